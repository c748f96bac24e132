"""Contexts and traces made up for the controller's tests; their accept probabilities and survivor slots are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from controller.features import ContextFeatures
from decoding.config import DecodingConfig
from decoding.sampling import FloatArray, Joint
from decoding.traces import SCHEMA_VERSION, write_manifest, write_shard
from decoding.widths import DraftContext, LayerRecord, RootContext, TargetContext

CONFIG = DecodingConfig(target_width=4, draft_width=6, draft_depth=3, max_new_tokens=64, top_k=10)
PAIR = {"name": "synthetic", "fingerprint": "0123456789abcdef"}
H_Q, H_P = 6, 8  # sizes of the hidden vectors
U, BLURRED, V = 6, 8, 9  # columns of the features, twice, and of the target features; see `write_traces`


def joint(rng: np.random.Generator, support: int = 10, parents: int = 3) -> Joint:
    """A random distribution over (beam, token)."""
    probs = rng.dirichlet(np.full(support, 0.5)) + 1e-9
    weights = np.sort(rng.normal(size=support))[::-1]
    return Joint(rng.integers(0, parents, support), np.arange(support), probs / probs.sum(), weights)


def draft_context(
    seed: int = 0,
    layer: int = 1,
    drafted: bool = True,
    config: DecodingConfig = CONFIG,
    hidden: bool = True,
    history: tuple[LayerRecord, ...] = (LayerRecord(1, 6, 2, 3, True), LayerRecord(2, 0, 4, 0, True)),
) -> DraftContext:
    """A layer as a policy would see it."""
    rng = np.random.default_rng(seed)
    root = RootContext(
        config,
        1,
        40,
        np.array([-1.0, -1.5, -3.0]),
        history,
        rng.normal(size=H_P).astype(np.float32) if hidden else None,
    )
    return DraftContext(
        root,
        layer,
        np.array([-1.2, -2.0, -4.5]),
        joint(rng),
        drafted,
        widths=(5,) * (layer - 1),
        draft_hidden=rng.normal(size=H_Q).astype(np.float32) if hidden else None,
    )


def target_context(draft: DraftContext, draft_width: int, seed: int = 1) -> TargetContext:
    """The same layer when its target width is set."""
    return TargetContext(draft, joint(np.random.default_rng(seed)), draft_width, weights=np.array([-1.1, -2.2, -3.3]))


def write_traces(
    directory: Path, prompts: int = 60, seed: int = 0, target_width: int = CONFIG.target_width, **changes: Any
) -> Path:
    """Traces whose accept bits depend on one feature and whose survivors on another, of P; `changes` override manifest
    entries.

    A fifth of the prompts is validation. Feature U of a row is u ~ U(0, 1): a draft is accepted with probability
    0.1 + 0.8 u - 0.05 k. Target feature V is v ~ U(0, 1): slots survive with `survivor_shares(v)`, and each slot
    before the survivor is one nat worse than the next. Feature BLURRED is v and noise: what can be known of it
    before P is.
    """
    rng = np.random.default_rng(seed)
    names = changes.get("features", {}).get("names", ContextFeatures().names)
    rows = [
        _row(rng, prompt, iteration, len(names), target_width) for prompt in range(prompts) for iteration in range(20)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    about = {"trace_key": "key", "feature_names": names}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "trace_key": "key",
        "pair": PAIR,
        "decoding": {"target_width": target_width, "draft_width": CONFIG.draft_width, "top_k": CONFIG.top_k},
        "policy": {"name": "random"},
        "features": {"version": 2, "names": names, "target_names": ContextFeatures().target_names},
        "hidden": True,
        "complete": True,
        "shards": [write_shard(directory, "traces-00000.parquet", rows, about)],
        "rows": len(rows),
        "prompts": prompts,
    }
    write_manifest(directory, manifest | changes)
    return directory


def survivor_shares(v: float, kept: int) -> FloatArray:
    """Of slots 1..kept, where so many were kept; [kept]."""
    shares = np.exp(-3.0 * v * np.arange(1, kept + 1))
    return shares / shares.sum()


def _row(rng: np.random.Generator, prompt: int, iteration: int, features: int, target_width: int) -> dict[str, Any]:
    drafted = iteration % 4 != 3
    width = int(rng.integers(1, CONFIG.draft_width + 1)) if drafted else 0
    values = rng.normal(size=features).astype(np.float32)
    of_target = rng.normal(size=len(ContextFeatures().target_names)).astype(np.float32)
    u, v = rng.random(2)
    values[U], of_target[V] = u, v
    values[BLURRED] = v + rng.normal(scale=0.2)
    bits, probs = accept_bits(rng, width, u)
    kept = int(rng.integers(1, target_width + 1))
    slot = int(rng.choice(kept, p=survivor_shares(v, kept))) + 1
    deficits = np.arange(slot - 1, slot - 1 - kept, -1.0)  # [kept] slots before the survivor
    deficits[slot:] = rng.exponential(size=kept - slot)  # and after it, which must not matter
    return {
        "prompt_id": f"prompt-{prompt}",
        "split": "val" if prompt % 5 == 0 else "train",
        "layer": 1,
        "target_width": min(kept, max(width, 1)),
        "draft_width": width,
        "kept_width": kept,
        "features": values,
        "target_features": of_target,
        "draft_hidden": rng.normal(size=H_Q).astype(np.float32),
        "target_hidden": rng.normal(size=H_P).astype(np.float32),
        "accept_bits": bits,
        "accept_probs": probs,
        "survivor_slot": slot,
        "slot_deficits": deficits,
    }


def accept_bits(rng: np.random.Generator, width: int, u: float) -> tuple[list[bool], list[float]]:
    """Bits drawn in turn, and the probabilities they were drawn with."""
    bits: list[bool] = []
    probs = []
    for _ in range(width):
        probs.append(0.1 + 0.8 * u - 0.05 * sum(bits))
        bits.append(bool(rng.random() < max(probs[-1], 0.0)))
    return bits, probs
