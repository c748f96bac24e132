"""Results in words: who won with the same texts, and whether drafting paid.

Read from what results.json holds. A row is compared with those that search or sample alike, at its
own target width, and the texts are compared token for token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from decoding.measure.methods import PEERS

Node = Mapping[str, Any]
_BASES = {"beam_sample": "beam sampling", "beam_search": "beam search"}  # rows of this engine that draft nothing
_RESAMPLES = 1000


class Against(NamedTuple):
    """A row against another one over the same prompts."""

    ratio: float  # of tokens/s
    low: float  # the central 95% of the bootstrap over prompts
    high: float
    same: int  # texts that are the same
    of: int

    @property
    def told(self) -> str:
        """The ratio and how many texts are the same, in words."""
        return f"{self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}], {self.same} of {self.of} texts the same"


def verdict_lines(results: Node) -> list[str]:
    """Sentences on each of this engine's rows that draft nothing: against peers, and against rows
    that draft.
    """
    rows = [row for row in results["rows"] if row["prompts"]]
    lines = []
    for base in rows:
        if base["method"] in _BASES and base["batch_size"] == 1:
            alike = [row for row in rows if row is not base and _alike(row, base)]
            lines += _peer_lines(base, [row for row in alike if row["family"] in PEERS])
            lines += _draft_lines(base, [row for row in alike if row["family"] not in PEERS and _drafts(row)])
    return lines


def _alike(row: Node, base: Node) -> bool:
    ours, theirs = row["config"], base["config"]
    return row["batch_size"] == 1 and all(ours[name] == theirs[name] for name in ("mode", "target_width"))


def _drafts(row: Node) -> bool:
    return any(layers for prompt in row["prompts"] for layers in prompt["stats"]["forests"])


def _peer_lines(base: Node, peers: Sequence[Node]) -> list[str]:
    """This engine without a draft over each peer; sampled texts have other dice, and are not
    compared.
    """
    lines = []
    for peer in peers:
        found = against(base, peer)
        told = found.told if base["method"] == "beam_search" else found.told.rpartition(",")[0]
        lines.append(f"{base['name']} over {peer['name']}: {told}.")
    return lines


def _draft_lines(base: Node, drafting: Sequence[Node]) -> list[str]:
    """A sentence on whether a row that drafts is faster than the same decoding without a draft."""
    compared = [(row, against(row, base)) for row in drafting]
    equal = [(row, found) for row, found in compared if found.same >= 0.9 * found.of]  # the others keep fewer beams
    if not equal:
        return []
    best, found = max(equal, key=lambda pair: pair[1].ratio)
    if found.low > 1:
        verdict = "Drafting pays"
    elif found.high < 1:
        verdict = "Drafting does not pay"
    else:
        verdict = "Whether drafting pays is not decided"
    depth = best["summary"].get("depth", {}).get("value", 0.0)
    what = f"{_BASES[base['method']]} of width {base['config']['target_width']}"
    return [
        f"{verdict} in {what}: the best that drafts, {best['name']} ({depth:.1f} layers an iteration), is {found.told}."
    ]


def against(row: Node, base: Node) -> Against:
    """A row's tokens/s over another's, paired by prompt and repeat, and how many texts are the
    same.
    """
    pairs = list(zip(row["prompts"], base["prompts"], strict=False))  # of several repeats, those that both have
    ours, theirs = (np.array([_share(pair[i]) for pair in pairs]) for i in (0, 1))  # [N, 2]
    draws = np.random.default_rng(0).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    drawn = [_speed(some[draws].sum(axis=1)) for some in (ours, theirs)]
    low, high = np.percentile(drawn[0] / drawn[1], [2.5, 97.5])
    ratio = float(_speed(ours.sum(axis=0)) / _speed(theirs.sum(axis=0)))
    same = sum(a["tokens"] == b["tokens"] for a, b in pairs)
    return Against(ratio, float(low), float(high), same, len(pairs))


def _share(prompt: Node) -> tuple[float, float]:
    return prompt["stats"]["new_tokens"], prompt["wall_seconds"]


def _speed(share: Any) -> Any:
    return share[..., 0] / share[..., 1]
