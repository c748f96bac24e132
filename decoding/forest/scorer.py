"""ForestScorer: nodes in, log-probabilities out, for a batch of prompts. The only place that runs a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.dice.sampling import FloatArray, IntArray, log_probabilities, top_entries
from decoding.engine.forward import Forward, PassInputs, PassOutput
from decoding.engine.layer_states import LayerStates
from decoding.engine.placement import device_of, dtype_of
from decoding.engine.runner import runner_of
from decoding.engine.vocabulary import VocabularyMap
from decoding.errors import UserError, first_line, is_out_of_memory
from decoding.forest.cache import ForestCache, Placement
from decoding.forest.node_scorer import Process
from decoding.forest.tree import TokenForest

PREFILL_CHUNK = 512  # prompt tokens in a pass: bounds the memory of its mask and its activations


class PassFailed(UserError):
    """What a model's own code raised in a pass."""


@dataclass
class _Scored:
    """What a pass gave; a node's share of it is row `i`."""

    tops: tuple[FloatArray, IntArray] | None  # [T, K] log-probabilities of the likeliest tokens, and these
    log_probs: Tensor | None  # [T, V] on the device


class _Prompt:
    """The prompt in a row."""

    def __init__(self, tokens: Sequence[int], forest: TokenForest) -> None:
        self.tokens, self.forest = tokens, forest
        self.scored: dict[int, tuple[_Scored, int]] = {}
        self.hidden: dict[int, tuple[Tensor, int]] = {}
        self.calls = 0


class ForestScorer:
    """Runs one model over the forests of a batch; each node is scored at most once.

    Args:
        model: a transformers causal LM.
        rows: prompts at a time.
        longest_prompt: tokens.
        spare_slots: KV slots of a row for new tokens; more are made when they run out.
        temperature: divides the logits.
        top: log-probabilities of so many likeliest tokens per node are brought to the host; None: all stay on the
            device, for `log_probs`.
        keep_hidden: also keep the last hidden state of scored nodes.
        process: (row, nodes, logits [N, V] float32) -> their log-probabilities; None: log-softmax.
        vocabulary: makes the model's token ids the forest's; None where they are the same.
        layers: also keep these hidden states of all prompt tokens and living nodes, for `layer_states`; numbered as
            transformers numbers them.
        engine: "auto": fused where the model's family is known, as CUDA graphs on a GPU; "eager": without graphs;
            "transformers": the model's own forward.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        longest_prompt: int,
        spare_slots: int,
        temperature: float = 1.0,
        top: int | None = None,
        keep_hidden: bool = False,
        engine: str = "auto",
        process: Process | None = None,
        vocabulary: VocabularyMap | None = None,
        layers: tuple[int, ...] = (),
    ) -> None:
        self.model, self.temperature, self.device = model, temperature, device_of(model)
        self.top, self._keep_hidden, self._process = top, keep_hidden, process
        self._vocabulary = vocabulary.to(self.device) if vocabulary is not None else None
        self.runner = runner_of(model, engine)
        self.model_seconds = 0.0  # inside forward passes, the transfer of their results included
        self.cache = ForestCache(
            rows,
            longest_prompt,
            spare_slots,
            self.device,
            dtype_of(model),
            static=self.runner.forward.static,
            positions=self.runner.alibi or self.runner.window is not None,
        )
        self._store = self.runner.borrow(rows, self.cache.capacity)
        self.cache.reserve(self._store.capacity)
        self._layers = layers
        self._states = LayerStates(rows, self.cache.capacity) if layers else None
        self._prompts: list[_Prompt | None] = [None] * rows

    def close(self) -> None:
        """Give the KV buffer back for the next scorer of this model."""
        if self._store is not None:
            self.runner.give_back(self._store)
            self._store = None

    def free(self) -> None:
        """Let go of the KV buffer, and of those that the model's runner has kept."""
        self._store = None
        self.runner.free()

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """Score a prompt, in chunks; its last token is node 0 of `forest`.

        Args:
            row: that the prompt takes.
            shared: (row, count): the first `count` tokens are those of the prompt that was opened in that row.
        """
        held = _Prompt(prompt, forest)
        self._prompts[row] = held
        self.cache.open(row, len(prompt))
        first = 0
        if shared is not None and shared[1] > 0:
            source, first = shared
            if source != row:
                self._store.copy_slots(source, row, first)
                if self._states is not None:
                    self._states.copy_slots(source, row, first)
        known = prompt if self._vocabulary is None else self._vocabulary.to_draft(prompt)
        tokens = torch.tensor(known).to(self.device)
        while first < len(prompt):
            last = min(first + PREFILL_CHUNK, len(prompt))
            positions = torch.arange(first, last, device=self.device)
            inputs = PassInputs(
                tokens=tokens[first:last],
                positions=positions,
                slots=positions + row * self.cache.capacity,
                mask=self.cache.prompt_mask(first, last),
                first_row=row,
                last_only=True,
                hidden=self._keep_hidden,
                layers=self._layers,
                features=self._prompt_features(row, first, last),
            )
            scored = [(row, 0)] if last == len(prompt) else []
            self._run(inputs, scored, range(len(scored)), self.runner.prompts)
            first = last

    def close_row(self, row: int) -> None:
        """The prompt in a row is done."""
        self._prompts[row] = None
        self.cache.close(row)

    def score(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """Make sure that all nodes of `wanted` (row -> nodes) are scored, in at most one pass; unscored ancestors too.

        Returns:
            The number of nodes scored.
        """
        fresh: dict[int, tuple[list[int], list[int]]] = {}
        for row, nodes in wanted.items():
            forest, missing = self._held(row).forest, self._missing(row, nodes)
            if missing:
                order = sorted(missing)  # parents first: they are older
                fresh[row] = (order, [forest.parents[node] for node in order])
                self._held(row).calls += 1
        if not fresh:
            return 0
        placement = self.cache.place(fresh)
        if self.cache.capacity > self._store.capacity:
            self._store.grow(self.cache.capacity)
            if self._states is not None:
                self._states.grow(self.cache.capacity)
        inputs, at = self._inputs(placement)
        self._run(inputs, placement.order, at, self.runner.forward)
        return len(placement.order)

    def _missing(self, row: int, nodes: Sequence[int]) -> set[int]:
        """What a pass must score for some nodes: they and their ancestors, as far as they have no slot."""
        parents, missing = self._held(row).forest.parents, set()
        for node in nodes:
            while node not in missing and not self.cache.holds(row, node):
                missing.add(node)
                node = parents[node]
        return missing

    def _prompt_features(self, row: int, first: int, last: int) -> Tensor | None:
        """What a pass over a prompt's tokens first..last - 1 reads beside them; models read nothing."""
        return None

    def _inputs(self, placement: Placement) -> tuple[PassInputs, Sequence[int]]:
        """The tensors of a pass, in one transfer; and where each node of `placement.order` stands in its output."""
        rows, queries = placement.rows, placement.queries
        tokens, positions = [], []
        for row, node in placement.order:
            held = self._held(row)
            tokens.append(held.forest.tokens[node])
            positions.append(held.forest.depths[node] + len(held.tokens) - 1)
        if self._vocabulary is not None:
            tokens = self._vocabulary.to_draft(tokens)
        count, places = len(tokens), rows * queries
        slots: Sequence[int] = placement.slots
        at: Sequence[int] = placement.places
        base_rows, mask_rows = placement.base_rows, placement.mask_rows
        pads: list[Sequence[int]] = []
        if count < places:
            nothing = [self.cache.filler_mask_row] * places
            base_rows, mask_rows = _laid_out(at, base_rows, nothing), _laid_out(at, mask_rows, nothing)
            if self.runner.forward.ragged:
                pads = [_laid_out(at, range(count), [0] * places), at]
                at = range(count)
            else:
                tokens, positions = _laid_out(at, tokens, [0] * places), _laid_out(at, positions, [0] * places)
                fillers = [self.cache.filler_slot(placement.first_row + i // queries) for i in range(places)]
                slots = _laid_out(at, slots, fillers)
        flat = self._to_device([tokens, positions, slots, base_rows, mask_rows, placement.bits, *pads])
        mask = self.cache.masks(flat[3], flat[4], flat[5], rows, placement.read)
        inputs = PassInputs(flat[0], flat[1], flat[2], mask, placement.first_row)
        inputs.hidden, inputs.layers = self._keep_hidden, self._layers
        if pads:
            inputs.pad, inputs.unpad = flat[6], flat[7]
        return inputs, at

    def _to_device(self, lists: list[Sequence[int]]) -> Sequence[Tensor]:
        """Lists of integers as int64 tensors on the model's device, in one transfer."""
        flat = torch.from_numpy(np.array([value for values in lists for value in values], dtype=np.int64))
        return torch.split_with_sizes(flat.to(self.device, non_blocking=True), [len(values) for values in lists])

    def _run(self, inputs: PassInputs, order: list[tuple[int, int]], at: Sequence[int], forward: Forward) -> None:
        """One pass; keeps what it gave for the nodes of `order`, which stand at rows `at` of its output."""
        began = time.perf_counter()
        if self.cache.keeps_positions:
            self._look_back(inputs)
        logits, hidden, states = self._passed(inputs, forward)
        if self._states is not None and states is not None:
            self._states.write(inputs.slots, states)
        if not order:  # a part of a prompt
            self.model_seconds += time.perf_counter() - began
            return
        log_probs = self._log_probs(logits, order, at)
        tops = self._tops(log_probs) if self.top is not None else None
        if tops is None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the dice are next and would wait: let the pass have its seconds
        if hidden is not None and forward.static:
            hidden = hidden.clone()  # a graph writes to the same place every time
        result = _Scored(tops, log_probs if tops is None else None)
        for (row, node), i in zip(order, at, strict=True):
            held = self._held(row)
            held.scored[node] = (result, i)
            if hidden is not None:
                held.hidden[node] = (hidden, i)
        self.model_seconds += time.perf_counter() - began

    def _passed(self, inputs: PassInputs, forward: Forward) -> PassOutput:
        """A pass, whatever a foreign model raises in it as one sentence."""
        try:
            return forward(inputs, self._store)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            kind = getattr(self.model.config, "model_type", type(self.model).__name__)
            raise PassFailed(f"A pass of the model ({kind}) failed: {first_line(error)}") from error

    def _look_back(self, inputs: PassInputs) -> None:
        """Add what a pass reads of distances along paths: the mask of sliding layers, or positions for ALiBi."""
        cache, runner, first, rows = self.cache, self.runner, inputs.first_row, inputs.rows
        cache.note(inputs.slots, inputs.positions)
        if runner.alibi:
            inputs.key_positions = cache.positions(first, rows, inputs.read)
        if runner.window is not None and cache.longest_path > runner.window:
            positions = inputs.positions
            if inputs.unpad is not None:  # one for each place; fillers stand at 0, where all that they see is near
                places = positions.new_zeros(rows * inputs.mask.shape[2])
                positions = places.index_copy_(0, inputs.unpad, positions)
            inputs.window_mask = cache.window_mask(inputs.mask, positions, first, runner.window)

    def _log_probs(self, logits: Tensor, order: list[tuple[int, int]], at: Sequence[int]) -> Tensor:
        """Logits of a pass -> log-probabilities, [T, V] float32."""
        if self._vocabulary is not None:
            logits = self._vocabulary.to_target(logits)
        if self._process is None:
            return log_probabilities(logits, self.temperature)
        logits = logits.float() / self.temperature
        log_probs = torch.zeros_like(logits)  # places of fillers are not read, but may not hold what cannot be cast
        for row in dict.fromkeys(row for row, _ in order):
            mine = [(node, i) for (of, node), i in zip(order, at, strict=True) if of == row]
            index = torch.tensor([i for _, i in mine], device=logits.device)
            log_probs[index] = self._process(row, [node for node, _ in mine], logits[index])
        return log_probs

    def _tops(self, log_probs: Tensor) -> tuple[FloatArray, IntArray]:
        """What `tops` gives, of a pass's log-probabilities [T, V]."""
        assert self.top is not None
        return top_entries(log_probs, self.top)

    def calls(self, row: int) -> int:
        """Passes that scored nodes of the row's prompt; its own pass not counted."""
        return self._held(row).calls

    def proposes(self, row: int, nodes: Sequence[int]) -> bool:
        """Whether any token may follow any of some scored nodes; processors may forbid all that the model knows."""
        if self._process is None:
            return True
        if self.top is None:
            return bool((self.log_probs(row, nodes) != -torch.inf).any())  # NaN is for others to report
        return bool((self.tops(row, nodes)[0] != -np.inf).any())

    @property
    def vocabulary_size(self) -> int:
        """Rows of the model's output."""
        return int(self.model.config.get_text_config().vocab_size)

    def knows(self, row: int, node: int) -> bool:
        """Whether a node has been scored, and what that gave is still there."""
        return node in self._held(row).scored

    def known(self, row: int) -> list[int]:
        """All such nodes of a row."""
        return list(self._held(row).scored)

    def tops(self, row: int, nodes: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """Log-probabilities of the likeliest next tokens at scored nodes, best first, and the tokens; [N, K] each."""
        found = [self._held(row).scored[node] for node in nodes]
        first = found[0][0]
        if all(scored is first for scored, _ in found):
            assert first.tops is not None, "the scorer was made with `top`"
            index = [i for _, i in found]
            return first.tops[0][index], first.tops[1][index]
        rows = [(scored.tops[0][i], scored.tops[1][i]) for scored, i in found if scored.tops is not None]
        return np.stack([values for values, _ in rows]), np.stack([tokens for _, tokens in rows])

    def log_probs(self, row: int, nodes: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token at scored nodes, [N, V] float32; of a scorer without `top`."""
        found = [self._held(row).scored[node] for node in nodes]
        return _gather([(scored.log_probs, i) for scored, i in found if scored.log_probs is not None])

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor | None:
        """Last hidden states at those of `nodes` that have been scored, [N, H]; None if none was."""
        known = self._held(row).hidden
        found = [known[node] for node in nodes if node in known]
        return _gather(found) if found else None

    def layer_states(self, row: int, nodes: Sequence[int]) -> Tensor:
        """Hidden states of `layers` at scored nodes that live, their layers in that order; [N, K, H]."""
        assert self._states is not None, "the scorer was made with `layers`"
        return self._states.read(row, [self.cache.slot(row, node) for node in nodes])

    def prompt_states(self, row: int) -> Tensor:
        """Hidden states of `layers` at the tokens of the row's prompt; [P, K, H]."""
        assert self._states is not None, "the scorer was made with `layers`"
        return self._states.read(row, range(len(self._held(row).tokens)))

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Free the slots of dead nodes, and all log-probabilities except at `live` nodes."""
        held = self._held(row)
        self.cache.release(row, dead)
        held.scored = {node: held.scored[node] for node in live if node in held.scored}
        if self.top is None and held.scored:  # whole rows: do not keep a pass's [T, V] for a few of its nodes
            rows = [(scored.log_probs, i) for scored, i in held.scored.values() if scored.log_probs is not None]
            own = _Scored(None, _gather(rows))
            held.scored = {node: (own, i) for i, node in enumerate(held.scored)}
        if self._keep_hidden:
            near = {*live, *(held.forest.parents[node] for node in live)}
            held.hidden = {node: state for node, state in held.hidden.items() if node in near}

    def _held(self, row: int) -> _Prompt:
        held = self._prompts[row]
        assert held is not None, "the row was opened"
        return held


def _laid_out(at: Sequence[int], values: Sequence[int], among: Sequence[int]) -> list[int]:
    """`among` with each value at its place."""
    laid = list(among)
    for place, value in zip(at, values, strict=True):
        laid[place] = value
    return laid


def _gather(rows: list[tuple[Tensor, int]]) -> Tensor:
    """Rows of one or several passes -> [N, width]."""
    first = rows[0][0]
    if all(source is first for source, _ in rows):
        index = [i for _, i in rows]
        if index == list(range(len(first))):
            return first
        return first[torch.tensor(index).to(first.device, non_blocking=True)]
    return torch.stack([source[i] for source, i in rows])
