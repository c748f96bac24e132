"""Runner: a model with what it keeps between decodings: CUDA graphs, and KV buffers to use again."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from decoding.engine.families import family_of, has_alibi
from decoding.engine.feature_head import DraftHead, FeatureHead
from decoding.engine.forward import Forward, TransformersForward
from decoding.engine.fused import FusedForward, can_fuse, hooked
from decoding.engine.graphs import GraphedForward
from decoding.engine.head_forward import HeadForward
from decoding.engine.positions import window_of
from decoding.engine.sampled_head import SampledForward, SampledHead
from decoding.engine.trigram_head import TrigramForward, TrigramHead
from decoding.engine.watch import signature

ENGINES = ("auto", "eager", "transformers")
HEADS: dict[type[DraftHead], Any] = {
    FeatureHead: HeadForward,
    SampledHead: SampledForward,
    TrigramHead: TrigramForward,
}  # what runs each kind
SPARE_STORES = 3  # KV buffers kept for the next decoding


class Runner:
    """One model under one engine.

    Args:
        engine: as for `ModelPair`.
        fused: the model's fused forward, where another engine made one already.

    Attributes:
        prompts: runs passes over prompts, whose shapes do not repeat.
        forward: runs passes over nodes.
        window: tokens that its sliding layers see; None where there are none.
        alibi: its passes need the positions of keys.
        checked: `check_forest_pass` has compared it with the model's own passes.
    """

    def __init__(self, model: Any, engine: str, fused: FusedForward | None = None) -> None:
        if isinstance(model, DraftHead):
            self.prompts: Forward = fused or HEADS[type(model)](model)
        elif engine != "transformers" and can_fuse(model):
            self.prompts = fused or FusedForward(model)
        else:
            self.prompts = TransformersForward(model)
        self._graphs = engine == "auto" and _capturable(model)
        self.forward = self._with_graphs()
        self.window, self.alibi = window_of(model.config), has_alibi(model.config)
        self.checked = False
        self._spare: list[Any] = []  # KV buffers that no scorer uses

    def _with_graphs(self) -> Forward:
        return GraphedForward(self.prompts) if self._graphs else self.prompts

    def unfuse(self, model: Any) -> None:
        """Run the model's own forward from now on."""
        self.free()
        self.prompts = TransformersForward(model)
        self.forward = self._with_graphs()

    def borrow(self, rows: int, capacity: int) -> Any:
        """A KV buffer of so many rows, with at least that capacity; its content is stale."""
        fits = [store for store in self._spare if store.rows == rows and store.capacity >= capacity]
        # One that is too small goes: two of a kind would add up. Those of other batch sizes stay,
        # with their graphs.
        self._spare = [store for store in self._spare if store.rows != rows or store in fits[1:]]
        return fits[0] if fits else self.prompts.new_store(rows, capacity)

    def give_back(self, store: Any) -> None:
        """A scorer is done with its buffer."""
        self._spare = [*self._spare, store][-SPARE_STORES:]

    def free(self) -> None:
        """Keep no buffer."""
        self._spare.clear()

    @property
    def kv_bytes(self) -> int:
        """Memory of the KV buffers that no scorer uses now."""
        return sum(store.bytes for store in self._spare)


def _capturable(model: Any) -> bool:
    """True if all weights lie on one GPU, with no hooks that move them about."""
    return {w.device.type for w in model.parameters()} == {"cuda"} and not hasattr(model, "_hf_hook")


_runners: weakref.WeakKeyDictionary[Any, dict[str, tuple[tuple[Any, ...], Runner]]] = weakref.WeakKeyDictionary()


def runner_of(model: Any, engine: str) -> Runner:
    """The model's runner, made at first, and again when its weights, its hooks or its attention
    have changed.
    """
    kept = _runners.setdefault(model, {})
    now = _state(model)
    current = {name: runner for name, (then, runner) in kept.items() if then == now}
    fused = next((r.prompts for r in current.values() if isinstance(r.prompts, FusedForward)), None)
    if fused is not None and not fused.copies(model):
        current, fused = {name: r for name, r in current.items() if r.prompts is not fused}, None
    if engine in current:
        return current[engine]
    with torch.inference_mode(False), torch.no_grad():  # weights that are moved stay trainable
        runner = Runner(model, engine, fused)
    kept[engine] = (_state(model), runner)  # again: fusing may have moved weights
    return runner


def _state(model: Any) -> tuple[Any, ...]:
    """Changes when a runner of the model, or what the probe said about it, may no longer hold."""
    attention = [getattr(c, "_attn_implementation", None) for c in (model.config, model.config.get_text_config())]
    unwatched = type(model).__name__ == family_of(model.config).fused and not hooked(model)  # may be fused
    return signature(model.parameters()), unwatched, attention
