"""Latency tables: what a pass costs by the number of nodes scored, and what the host adds; measured, kept on disk.

    python -m decoding.latency pair=... [output=table.json]

conf/latency.yaml has every setting.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoding.config import DecodingConfig
from decoding.decoder import DSBDDecoder
from decoding.errors import UserError
from decoding.forest import TokenForest
from decoding.node_scorer import NodeScorer, ScorerOptions
from decoding.pair import ModelPair
from decoding.sampling import FloatArray
from decoding.table_cache import cache_key, device_name, entry_file, read_entry, write_entry
from decoding.widths import FixedWidth

NODE_COUNTS = (1, 2, 4, 8, 16, 32)
UNITS = ("seconds", "joules")
BUSY = 0.25  # spread above which a table serves this process only: something else was running
_TOP = 10  # tokens that a pass brings to the host, and that joint distributions are cut to
_HOST_DEPTH, _HOST_TOKENS, _HOST_RUNS = 2, 24, 3
_SMALLEST = 1e-9  # what a clock that did not move counts as
_measured: dict[Path, LatencyTable] = {}


@dataclass(frozen=True)
class LatencyTable:
    """What one pass of each model costs at `nodes` scored nodes (linear in between, extrapolated beyond), and the host.

    A pass costs what its number of nodes costs, whatever tree they form: the mask decides who sees whom, not what is
    computed (8 nodes below one beam, or 4 with a child each: the same within 1% on a CPU). The methods say seconds
    because that is what a planner usually prices; they return the table's unit.

    Args:
        nodes: increasing, two or more.
        target, draft: cost of a pass at each of `nodes`.
        device: in words.
        iteration: the host's cost of an iteration that drafts nothing: slots and masks, joints, draws, bookkeeping.
        layer: the host's cost that each drafted layer adds: joints of both models, draws, verification.
        unit: "seconds" or "joules".
        spread: interquartile range of repeated passes over their median, at a typical size; None: not known.
        measured: date (UTC, ISO 8601); None: not measured here.
        file: where the table is kept; not part of what it says.

    Raises:
        UserError: numbers that no passes can have.
    """

    nodes: tuple[int, ...]
    target: tuple[float, ...]
    draft: tuple[float, ...]
    device: str = "cpu"
    iteration: float = 0.0
    layer: float = 0.0
    unit: str = "seconds"
    spread: float | None = None
    measured: str | None = None
    file: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        nodes = self.nodes
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in nodes)
        if not whole or len(nodes) < 2 or any(a >= b for a, b in itertools.pairwise(nodes)):
            raise UserError(
                f"nodes of a latency table is {list(nodes)}; give two or more whole numbers from 1 on, increasing."
            )
        for name in ("target", "draft"):
            costs = getattr(self, name)
            if len(costs) != len(nodes) or not all(_is_number(cost) and cost > 0 for cost in costs):
                raise UserError(
                    f"{name} of a latency table is {list(costs)}; give {len(nodes)} numbers above 0, one for each of "
                    "nodes."
                )
        for name in ("iteration", "layer"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise UserError(f"{name} of a latency table is {getattr(self, name)!r}; give a number of 0 or more.")
        if self.unit not in UNITS:
            raise UserError(f"unit of a latency table is {self.unit!r}; choose one of {', '.join(UNITS)}.")

    def target_seconds(self, nodes: float) -> float:
        """Cost of a target pass over that many nodes."""
        return self._at(self.target, nodes)

    def draft_seconds(self, nodes: float) -> float:
        """Cost of a draft pass over that many nodes."""
        return self._at(self.draft, nodes)

    def host_seconds(self, layers: int) -> float:
        """The host's cost of an iteration that drafts so many layers; a policy's own decisions are not in it."""
        return self.iteration + self.layer * layers

    def _at(self, costs: tuple[float, ...], nodes: float) -> float:
        if nodes <= 0:
            return 0.0
        if nodes > self.nodes[-1]:
            slope = (costs[-1] - costs[-2]) / (self.nodes[-1] - self.nodes[-2])
            return costs[-1] + max(0.0, slope) * (nodes - self.nodes[-1])
        return float(np.interp(nodes, self.nodes, costs))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        table = asdict(replace(self, file=None))
        del table["file"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in table.items()}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `to_dict`; nodes, target and draft suffice.

        Raises:
            UserError: names that are missing or unknown, or numbers that no passes can have.
        """
        names = [part.name for part in fields(cls) if part.name != "file"]
        if not isinstance(table, Mapping):
            raise UserError(f"A latency table is {table!r}; give a mapping of {', '.join(names)}.")
        wrong = [f"{name} is unknown" for name in table if name not in names]
        wrong += [f"{name} is missing" for name in ("nodes", "target", "draft") if name not in table]
        for name in ("nodes", "target", "draft"):
            if name in table and (isinstance(table[name], str) or not isinstance(table[name], Sequence)):
                wrong.append(f"{name} is no list")
        if wrong:
            raise UserError(f"A latency table takes {', '.join(names)}; {', '.join(wrong)}.")
        lists = {name: tuple(table[name]) for name in ("nodes", "target", "draft")}
        return cls(**{**table, **lists})

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """A table from the JSON file of its `to_dict`, as `python -m decoding.latency output=...` writes it.

        Raises:
            UserError: no such file, or not such a table.
        """
        try:
            table = json.loads(Path(path).expanduser().read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"The latency table {str(path)!r} cannot be read ({error}); give a JSON file that "
                "python -m decoding.latency output=<file> wrote."
            ) from error
        return replace(cls.from_dict(table), file=Path(path))

    @classmethod
    def measure(
        cls,
        pair: ModelPair,
        prompt_tokens: int = 128,
        repeats: int = 7,
        cache_dir: str | Path | None = None,
        fresh: bool = False,
    ) -> LatencyTable:
        """Seconds of passes over forests of several sizes, and of the host in a short decoding; medians.

        Measured once: later calls, of other processes too, read what is kept for this device, pair, engine and
        versions. A table is measured again after 30 days, or where what is kept cannot be read; one that was measured
        while the machine was busy (`spread` above BUSY) is not kept on disk.

        Args:
            pair: both models; what an n-gram draft takes to look up its nodes is timed in the same way.
            prompt_tokens: prompt length behind the forest (at most half of the context is used).
            repeats: timed passes per size, after two to warm up.
            cache_dir: where tables are kept; None: latency/ in DSBD_CACHE, or else in ~/.cache/dsbd.
            fresh: measure again, whatever is kept.

        Raises:
            UserError: a pair without a draft, or one that cannot be decoded.
        """
        check_measurable(pair, prompt_tokens=prompt_tokens, repeats=repeats)
        key = cache_key(pair, unit="seconds", prompt_tokens=prompt_tokens, repeats=repeats)
        return kept_or(lambda: _measure(pair, prompt_tokens, repeats), key, cache_dir, fresh)


def check_measurable(pair: ModelPair, **counts: int) -> None:
    """Refuse a pair without a draft, and counts below 1 (UserError)."""
    if pair.draft is None:
        raise UserError("A latency table needs a draft: give the pair one, such as draft=ngram.")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{name} of a latency table is {count!r}; give a whole number of at least 1.")


def kept_or(
    measure: Callable[[], LatencyTable], key: dict[str, Any], cache_dir: str | Path | None, fresh: bool
) -> LatencyTable:
    """The table that is kept under a key, in this process or on disk; else what `measure` gives, which is then kept."""
    file = entry_file(key, cache_dir)
    if not fresh and file in _measured:
        return _measured[file]
    table = None if fresh else _read(file, key)
    if table is None:
        table = measure()
        quiet = table.spread is None or table.spread <= BUSY
        if quiet and write_entry(file, key, table.to_dict()):
            table = replace(table, file=file)
    _measured[file] = table
    return table


def _read(file: Path, key: dict[str, Any]) -> LatencyTable | None:
    """What is kept on disk, if it is a table."""
    kept = read_entry(file, key)
    try:
        return None if kept is None else replace(LatencyTable.from_dict(kept), file=file)
    except UserError:
        return None


# ---------------------------------------------------------------------------------------------- passes


class ForestPasses:
    """Single passes over forests of a chosen size behind a prompt; `with` gives their buffers back.

    Args:
        scorers: by role, in the order to open them: a draft may read what the target's scorer knows of the prompt.
        role: whose passes they are.
        prompt: token ids.
    """

    def __init__(self, scorers: Mapping[str, NodeScorer], role: str, prompt: Sequence[int]) -> None:
        self._scorers, self._scorer, self._forest = scorers, scorers[role], TokenForest()
        for scorer in scorers.values():
            scorer.open(0, prompt, self._forest)

    def __enter__(self) -> ForestPasses:
        return self

    def __exit__(self, *error: object) -> None:
        for scorer in self._scorers.values():
            scorer.close()

    def run(self, nodes: int) -> float:
        """Score so many new nodes and forget them; seconds inside the model, with its results on the host."""
        before = self._scorer.model_seconds
        drafted = [self._forest.child(0, token) for token in range(nodes)]
        self._scorer.score({0: drafted})
        self._scorer.forget(0, self._forest.release(drafted, set()), [])
        return self._scorer.model_seconds - before


def forest_passes(pair: ModelPair, role: str, prompt: Sequence[int]) -> ForestPasses:
    """Passes of a pair's "target" or "draft"."""
    top = min(_TOP, pair.vocab_size)
    options = ScorerOptions(1, len(prompt), spare_slots=max(NODE_COUNTS), top=top, engine=pair.engine)
    return ForestPasses(pair.scorers(options, drafting=role == "draft"), role, prompt)


def synthetic_prompt(pair: ModelPair, tokens: int) -> list[int]:
    """Token ids without meaning; at most half of what the models take."""
    length = max(1, min(tokens, (pair.context or 2 * tokens) // 2))
    return [i % pair.vocab_size for i in range(1, length + 1)]


@torch.inference_mode()
def _measure(pair: ModelPair, prompt_tokens: int, repeats: int) -> LatencyTable:
    pair.check_forest_passes()  # a fused pass that turns out wrong is replaced: before it is timed
    prompt = synthetic_prompt(pair, prompt_tokens)
    with forest_passes(pair, "target", prompt) as target, forest_passes(pair, "draft", prompt) as draft:
        times = _alternating(target, draft, repeats)  # [2, N, R]
    low, medians, high = np.percentile(times, (25, 50, 75), axis=-1)
    medians = np.maximum(medians, _SMALLEST)
    iteration, layer = _host_seconds(pair, prompt)
    return LatencyTable(
        NODE_COUNTS,
        rising(medians[0]),
        rising(medians[1]),
        device_name(pair),
        iteration,
        layer,
        spread=float(np.median((high - low) / medians)),
        measured=now(),
    )


def _alternating(target: ForestPasses, draft: ForestPasses, repeats: int) -> FloatArray:
    """Seconds of passes in turns, [2, N, repeats] for N = len(NODE_COUNTS).

    In turns over models and sizes, as in decoding: each finds the processor's caches as another left them, and a
    moment in which the machine was busy does not fall on one size alone.
    """
    times = [[[model.run(count) for model in (target, draft)] for count in NODE_COUNTS] for _ in range(repeats + 2)]
    return np.array(times[2:]).transpose(2, 1, 0)  # the first two warm up


def rising(costs: Sequence[float] | FloatArray) -> tuple[float, ...]:
    """The nearest costs, in squares, that never decrease: more nodes take no less."""
    places = range(len(costs))
    return tuple(
        float(max(min(np.mean(costs[i : j + 1]) for j in places[k:]) for i in places[: k + 1])) for k in places
    )


def _host_seconds(pair: ModelPair, prompt: list[int]) -> tuple[float, float]:
    """The host's seconds of an iteration without drafts, and of each drafted layer, from short decodings.

    Phases "verify" and "other": what is inside neither model, slots and masks of passes included, so that nothing is
    counted twice. Where the draft proposes nothing, a layer counts as an iteration does: joints and draws are alike.
    """
    top_k = min(_TOP, pair.vocab_size)
    width = min(4, top_k)
    room = _HOST_TOKENS if pair.context is None else min(_HOST_TOKENS, pair.context - len(prompt))
    config = DecodingConfig(
        target_width=width,
        draft_width=max(width, min(8, pair.vocab_size)),
        draft_depth=_HOST_DEPTH,
        max_new_tokens=max(room, 1),
        top_k=top_k,
        eos_token_id=-1,
    )
    plain, drafting = (DSBDDecoder(pair, config, FixedWidth(draft_depth=depth)) for depth in (0, _HOST_DEPTH))
    iterations, layers = [], []
    for seed in range(_HOST_RUNS + 1):
        seconds, count, _ = _host_of(plain, prompt, seed)
        iterations.append(seconds / count)
        seconds, count, drafted = _host_of(drafting, prompt, seed)
        layers.append((seconds - count * iterations[-1]) / drafted if drafted else iterations[-1])
    return float(np.median(iterations[1:])), max(0.0, float(np.median(layers[1:])))  # the first runs warm up


def _host_of(decoder: DSBDDecoder, prompt: list[int], seed: int) -> tuple[float, int, int]:
    """The host's seconds of one decoding, its iterations, and the layers that it drafted."""
    (result,) = decoder.generate([prompt], torch.Generator().manual_seed(seed))
    stats = result.stats
    return stats.seconds["verify"] + stats.seconds["other"], stats.iterations, sum(map(len, stats.forests))


def now() -> str:
    """The date as tables have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


if __name__ == "__main__":
    from decoding.costs import main

    main()
