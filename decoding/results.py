"""Results of a decoding: hypotheses, what they took, and what recorders are told on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from decoding.dice.rejection import LayerVerdict
from decoding.dice.sampling import Dice
from decoding.forest.tree import TokenForest
from decoding.policies.base import DraftContext, IterationRecord, LayerRecord, TargetContext

PHASES = ("prompt", "draft", "target", "verify", "policy", "other")  # prompt: both models' passes over it


@dataclass
class DecodeStats:
    """Statistics of decoding one prompt: counts, seconds, and a record of every iteration.

    `records` is empty where another library decoded: of its layers nothing is known but how many
    there were. All lists below are read from it.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0  # layers committed: the length of the longest hypothesis
    iterations: int = 0
    target_calls: int = 0  # the prompt's own pass not counted
    draft_calls: int = 0
    records: list[IterationRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    kv_slots_peak: int = 0  # of the target's cache
    kv_slots_end: int = 0

    @property
    def layers(self) -> list[LayerRecord]:
        """Every committed layer, in order."""
        return [layer for record in self.records for layer in record.layers]

    @property
    def target_widths(self) -> list[int]:
        """M of every committed layer."""
        return [layer.target_width for layer in self.layers]

    @property
    def draft_widths(self) -> list[int]:
        """Drafts of every committed layer; 0 at a layer drawn from the target."""
        return [layer.draft_width for layer in self.layers]

    @property
    def accepted(self) -> list[int]:
        """Accepted drafts of every committed layer."""
        return [layer.accepted for layer in self.layers]

    @property
    def expected(self) -> list[float | None]:
        """E[K] of every committed layer as the policy had it; None where it does not say."""
        return [layer.expected for layer in self.layers]

    @property
    def passed(self) -> list[bool]:
        """For every committed layer, true if it passed; a layer drawn from the target does."""
        return [layer.passed for layer in self.layers]

    @property
    def roots(self) -> list[int]:
        """Input beams of every iteration."""
        return [record.roots for record in self.records]

    @property
    def forests(self) -> list[list[int]]:
        """Drafts of every layer that an iteration drafted, by iteration."""
        return [list(record.drafts) for record in self.records]

    @property
    def total_seconds(self) -> float:
        """Wall seconds, all phases."""
        return sum(self.seconds.values())

    @property
    def block_efficiency(self) -> float:
        """Tokens committed per iteration, that is per target call."""
        return self.new_tokens / max(self.iterations, 1)

    def to_dict(self) -> dict[str, Any]:
        """The statistics as results.json holds them: records as lists, a tenth of their size as
        objects.
        """
        lists = ("target_widths", "draft_widths", "accepted", "expected", "passed", "roots", "forests")
        counts = {name: value for name, value in vars(self).items() if name != "records"}
        return counts | {name: getattr(self, name) for name in lists}


@dataclass
class DecodeResult:
    """The hypotheses of one prompt, best first."""

    sequences: list[list[int]]  # continuations without the prompt; EOS included where it ended one
    scores: list[float]  # accumulated log-weight / length ** length_penalty
    finished: list[bool]  # ended on EOS
    stats: DecodeStats
    # Where `Rules` are given, the place of each token's parent among the beams of its step; and,
    # where they ask for it, the target's rows at these beams, [M, V] float32 a step.
    beams: list[list[int]] = field(default_factory=list, compare=False)
    step_scores: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    step_logits: tuple[Any, ...] = field(default=(), compare=False, repr=False)


class Recorder:
    """Listens to a decoding run, for traces; a subclass overrides what it wants to hear."""

    shadow: Dice | None = None
    needs_hidden: bool = False  # ask the decoder for hidden states in the contexts

    def drafted(
        self,
        forest: TokenForest,
        beams: list[tuple[int, float]],
        layers: list[list[tuple[int, float]]],
        contexts: list[DraftContext],
    ) -> None:
        """An iteration's forest stands, before it is verified.

        Args:
            forest: tokens and parents of all nodes; it grows on.
            beams: the input beams as (node, weight), best first.
            layers: the drafts of each layer as (node, the draft's weight), in draw order.
            contexts: of every layer that was drafted, those of which nothing was sent included.
        """

    def layer(self, event: LayerEvent) -> None:
        """A layer was committed."""

    def restart(self) -> None:
        """The prompt is decoded anew, since memory did not suffice: forget what was heard of it.

        Prompts are begun anew only where all recorders override this.
        """

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
    # Under shared noise: how many drafts hold the first j = 1.. of the target's selection, as
    # `verdict.needs`.
    need: list[int] = field(default_factory=list)
