"""NodeScorer: what decoding asks of whatever scores nodes, the target's `ForestScorer` and the
scorer of any draft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from decoding.dice.sampling import FloatArray, IntArray
from decoding.forest.tree import TokenForest

Process = Callable[[int, Sequence[int], Tensor], Tensor]


@dataclass(frozen=True)
class ScorerOptions:
    """Settings that every scorer of a batch is made with.

    Args:
        rows: prompts at a time.
        longest_prompt: tokens of the longest of them.
        spare_slots: KV slots of a row for new tokens; more are made when they run out.
        temperature: divides the logits.
        top: log-probabilities of so many likeliest tokens per node are brought to the host, for
            `tops`; None: all stay on the device, for `log_probs`.
        keep_hidden: `hidden` will be asked for.
        process: (row, nodes, logits [N, V] float32) -> their log-probabilities; None: log-softmax.
        engine: how models are run, as for `ModelPair`.
    """

    rows: int
    longest_prompt: int
    spare_slots: int
    temperature: float = 1.0
    top: int | None = None
    keep_hidden: bool = False
    process: Process | None = None
    engine: str = "auto"


class NodeScorer(Protocol):
    """Nodes in, log-probabilities of the next token out, in the target's ids, for a batch."""

    top: int | None  # `tops` gives at most so many tokens of a node; None: `log_probs` gives all, on the device
    model_seconds: float  # spent in `score`, in passes or what stands for them

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """A prompt takes a row; its last token is node 0 of `forest`, scored at once. The target's
        scorer comes first; the draft's when its first guess is asked for, the forest grown or not.

        Args:
            row: that the prompt takes.
            shared: (row, count): the first `count` tokens are those of the prompt that was opened
                in that row.
        """

    def close_row(self, row: int) -> None:
        """The prompt in a row is done."""

    def score(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """Make sure that all nodes of `wanted` (row -> nodes) are scored; returns how many are new."""
        ...

    def proposes(self, row: int, nodes: Sequence[int]) -> bool:
        """True if any token may follow any of some scored nodes; else nothing further is drafted."""
        ...

    def tops(self, row: int, nodes: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """Log-probabilities of the likeliest next tokens at scored nodes, and their ids; [N, K]
        each.

        -inf stands for want of more; what is finite in a row are different tokens.
        """
        ...

    def log_probs(self, row: int, nodes: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token at scored nodes, [N, V] on the target's device."""
        ...

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor | None:
        """Last hidden states at the scored ones of `nodes`, [N, H]; None where none is kept."""

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Nodes died; of the others, log-probabilities are asked for at `live` nodes only."""

    def calls(self, row: int) -> int:
        """Times that nodes of the row's prompt were scored; the prompt itself not counted."""
        ...

    def close(self) -> None:
        """Give back what can be used again."""

    def free(self) -> None:
        """Keep nothing: memory is short, or what is kept may be spoilt."""


def mean_hidden(scorer: NodeScorer, row: int, nodes: Sequence[int]) -> FloatArray | None:
    """Mean of the last hidden states at the scored ones of `nodes`, [H]; None where none is kept."""
    states = scorer.hidden(row, nodes)
    return states.float().mean(0).cpu().numpy() if states is not None else None
