"""What a decoding gives: hypotheses, what they took, and what recorders are told on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from decoding.acceptance import LayerVerdict
from decoding.forest import TokenForest
from decoding.sampling import Dice
from decoding.widths import LayerRecord, TargetContext

PHASES = ("prompt", "draft", "target", "verify", "policy", "other")  # prompt: both models' passes over it


@dataclass
class DecodeStats:
    """What decoding one prompt took. Lists have one entry per committed layer."""

    prompt_tokens: int = 0
    new_tokens: int = 0  # layers committed: the length of the longest hypothesis
    iterations: int = 0
    target_calls: int = 0  # the prompt's own pass not counted
    draft_calls: int = 0
    target_widths: list[int] = field(default_factory=list)
    draft_widths: list[int] = field(default_factory=list)  # 0 at a layer drawn from the target
    accepted: list[int] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)  # input beams of each iteration
    forests: list[list[int]] = field(default_factory=list)  # drafts of every layer that an iteration drafted
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    kv_slots_peak: int = 0  # of the target's cache
    kv_slots_end: int = 0

    @property
    def total_seconds(self) -> float:
        """Wall seconds, all phases."""
        return sum(self.seconds.values())

    @property
    def block_efficiency(self) -> float:
        """Tokens committed per iteration, that is per target call."""
        return self.new_tokens / max(self.iterations, 1)


@dataclass
class DecodeResult:
    """The hypotheses of one prompt, best first."""

    sequences: list[list[int]]  # continuations without the prompt; EOS included where it ended one
    scores: list[float]  # accumulated log-weight / length ** length_penalty
    finished: list[bool]  # ended on EOS
    stats: DecodeStats


class Recorder(Protocol):
    """Listens to a decoding run, for traces."""

    shadow: Dice | None

    def drafted(
        self, forest: TokenForest, beams: list[tuple[int, float]], layers: list[list[tuple[int, float]]]
    ) -> None:
        """An iteration's forest stands, before it is verified.

        Args:
            forest: tokens and parents of all nodes; it grows on.
            beams: the input beams as (node, weight), best first.
            layers: the drafts of each layer as (node, the draft's weight), in draw order.
        """

    def layer(self, event: LayerEvent) -> None:
        """A layer was committed."""

    def iteration(self, seconds: dict[str, float], forest_nodes: int) -> None:
        """An iteration ended."""

    def end(self, best_path: list[int]) -> None:
        """The prompt is done; `best_path` are the nodes of the best hypothesis, by depth from 1."""


@dataclass(frozen=True)
class LayerEvent:
    """One committed layer, as a recorder sees it."""

    context: TargetContext
    record: LayerRecord
    verdict: LayerVerdict | None  # None at a layer drawn from the target
    kept: list[tuple[int, float]]  # nodes with weights, best first, finished ones included
    slots: list[int] = field(default_factory=list)  # the same nodes in the order in which they were drawn
    # Under shared noise: how many drafts hold the first j = 1.. of the target's selection, as `verdict.needs`.
    need: list[int] = field(default_factory=list)
