"""Rules: what a caller puts between a model and its text, as transformers' `generate` takes it, for one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList


class Rules:
    """Logits processors, stopping criteria and a listener.

    Processors and criteria are called with rows of this prompt alone, in any order, at nodes that may never be kept:
    each must be a function of the row it is given.

    Args:
        prompt: token ids as processors and criteria see them, padding included.
        processors: change a model's scores: raw logits where one beam is kept, log-probabilities otherwise.
        criteria: end a hypothesis beside EOS and max_new_tokens.
        listener: is told of tokens as soon as all hypotheses agree on them, and at the end of the rest of the best.
        scores, logits: keep what each step was taken from, for `DecodeResult`; criteria are told the scores so far.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        processors: LogitsProcessorList | None = None,
        criteria: StoppingCriteriaList | None = None,
        listener: Callable[[list[int]], None] | None = None,
        scores: bool = False,
        logits: bool = False,
    ) -> None:
        self._prompt = list(prompt)
        self.processors, self.criteria, self.listener = processors or None, criteria or None, listener
        self.scores, self.logits = scores, logits

    @property
    def keeps(self) -> bool:
        """True if rows of the target are to be kept."""
        return self.scores or self.logits

    def process(self, paths: Sequence[list[int]], scores: Tensor) -> Tensor:
        """Scores of the next token after each path from the prompt's end; [N, V] float32 both ways."""
        if self.processors is None:
            return scores
        processed = torch.empty_like(scores)
        for length in sorted({len(path) for path in paths}):  # processors take rows of one length
            rows = [i for i, path in enumerate(paths) if len(path) == length]
            index = torch.tensor(rows, device=scores.device)
            given = self._ids([paths[i] for i in rows], scores.device)
            processed[index] = self.processors(given, scores[index]).to(scores.dtype)  # type: ignore[arg-type]
        dead = processed.isnan().all(-1) & ~scores.isnan().any(-1)  # normalised where everything was forbidden
        return processed.masked_fill(dead[:, None], -torch.inf)

    def stops(
        self, paths: Sequence[list[int]], device: torch.device, scores: tuple[Tensor, ...] | None = None
    ) -> list[bool]:
        """Whether each path, all of one length, ends here; `scores`: [M, V] of every step so far, if they are kept."""
        if self.criteria is None or not paths:
            return [False] * len(paths)
        return [bool(stop) for stop in self.criteria(self._ids(paths, device), scores).tolist()]

    def _ids(self, paths: Sequence[list[int]], device: torch.device) -> Tensor:
        return torch.tensor([self._prompt + path for path in paths], dtype=torch.long, device=device)  # [N, L]
