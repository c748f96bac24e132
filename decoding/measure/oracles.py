"""Yardsticks that cheat and that nobody can ship: what widths and depths could give if the future
were known for free.

`SurvivorOracle` asks the target model how the layer's candidates go on; `hindsight_seconds` charges
a decoding as if no layer that failed had been drafted. Both give text of the same distribution as
honest decoding: what they cheat with is time, so compare them by modelled seconds.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.config import DecodingConfig
from decoding.cost_table import Costs, iteration_seconds
from decoding.decoder import DSBDDecoder, Prompts, as_token_lists
from decoding.errors import UserError
from decoding.forest.tree import TokenForest
from decoding.pairs.pair import ModelPair, end_tokens
from decoding.policies.base import DraftContext, TargetContext, WidthPolicy
from decoding.results import DecodeResult, DecodeStats, Recorder
from decoding.support.arrays import IntArray
from decoding.support.checks import whole

# ---------------------------------------------------------------------- survivors, by looking ahead


class SurvivorOracle(WidthPolicy, Recorder):
    """NOT ACHIEVABLE: M is the rank of the candidate that turns out best when the target looks
    ahead, free of charge.

    The layer's heaviest candidates, entries of P, are continued greedily by the target. Each is
    scored as a hypothesis of its weight and its continuation; M is the rank by weight, 1 for the
    heaviest, of the one that wins, in the range that the config allows. M depends on P and the
    target alone, so every guarantee of the output stands (design 5.4).

    It is its own recorder, since only recorders see the forest: one oracle decodes one prompt at a
    time. `make` builds the function that does so.

    Args:
        pair: whose target looks ahead.
        prompt: token ids.
        lookahead: tokens that each candidate is continued by, at most; fewer where max_new_tokens
            or an EOS ends it.
        candidates: that are looked at, heaviest first.

    Raises:
        UserError: lookahead or candidates is no count.
    """

    name = "oracle_survivor"
    family = "control"

    def __init__(self, pair: ModelPair, prompt: Sequence[int], lookahead: int = 8, candidates: int = 10) -> None:
        for name, value in (("lookahead", lookahead), ("candidates", candidates)):
            whole(name, value, least=1)
        self.pair, self.prompt, self.lookahead, self.candidates = pair, list(prompt), lookahead, candidates
        self.seconds = 0.0  # spent looking ahead at this prompt
        self._forest = TokenForest()
        self._ahead: dict[tuple[int, ...], tuple[float, int]] = {}  # continuation -> of what follows: log p, tokens

    @classmethod
    def make(
        cls, pair: ModelPair, config: DecodingConfig, lookahead: int = 8, candidates: int = 10
    ) -> Callable[[Prompts, torch.Generator | Sequence[torch.Generator]], list[DecodeResult]]:
        """A function that decodes prompts one by one under an oracle each; lookahead is not in the
        stats' seconds.
        """

        def generate(prompts: Prompts, generator: torch.Generator | Sequence[torch.Generator]) -> list[DecodeResult]:
            results = []
            for i, prompt in enumerate(as_token_lists(prompts)):
                oracle = cls(pair, prompt, lookahead, candidates)
                stream = generator if isinstance(generator, torch.Generator) else [generator[i]]
                (result,) = DSBDDecoder(pair, config, oracle).generate([prompt], stream, recorder=oracle)
                result.stats.seconds["policy"] -= oracle.seconds
                results.append(result)
            return results

        return generate

    def fork(self, seed: int) -> SurvivorOracle:
        """Itself: the recorder is this object."""
        return self

    def reset(self, config: DecodingConfig) -> None:
        self._ahead, self.seconds = {}, 0.0
        self._ends = torch.tensor(sorted(end_tokens(self.pair, config)), device=self.pair.device, dtype=torch.int64)

    def target_width(self, context: TargetContext) -> int:
        began = time.perf_counter()
        config, target = context.draft.root.config, context.target
        heaviest = _heaviest(target.weights, self.candidates)
        entries = zip(target.parents[heaviest].tolist(), target.tokens[heaviest].tolist(), strict=True)
        paths = [(*self._forest.path(parent), token) for parent, token in entries]
        self._look_ahead([path for path in paths if path not in self._ahead], config)
        scores = []
        for path, weight in zip(paths, target.weights[heaviest].tolist(), strict=True):
            gained, tokens = self._ahead[path]
            scores.append((weight + gained) / (len(path) + tokens) ** config.length_penalty)
        self.seconds += time.perf_counter() - began
        return int(np.argmax(scores)) + 1

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "lookahead": self.lookahead, "candidates": self.candidates}

    @torch.inference_mode()
    def _look_ahead(self, paths: list[tuple[int, ...]], config: DecodingConfig) -> None:
        """Continue candidates of one layer greedily, all in one batch, and keep what the target
        says of that.
        """
        if not paths:
            return
        target, ends, depth = self.pair.target, self._ends, len(paths[0])
        options: dict[str, Any] = {"past_key_values": None, "use_cache": True}
        if "logits_to_keep" in inspect.signature(target.forward).parameters:
            options["logits_to_keep"] = 1
        tokens = torch.tensor([[*self.prompt, *path] for path in paths], device=self.pair.device)  # [C, T]
        going = ~torch.isin(tokens[:, -1], ends)  # [C]
        gained = torch.zeros(len(paths), dtype=torch.float64, device=self.pair.device)  # [C]
        added = torch.zeros(len(paths), dtype=torch.int64, device=self.pair.device)  # [C]
        for length in range(depth, min(depth + self.lookahead, config.max_new_tokens)):
            output = target(input_ids=tokens, **options)
            log_p, best = self._likeliest(output.logits[:, -1], length < config.min_new_tokens, config.temperature)
            gained += torch.where(going, log_p, 0.0)
            added += going
            going &= ~torch.isin(best, ends)
            if not going.any():
                break
            options["past_key_values"], tokens = output.past_key_values, best[:, None]  # [C, 1]
        for path, both in zip(paths, zip(gained.tolist(), added.tolist(), strict=True), strict=True):
            self._ahead[path] = both

    def _likeliest(self, logits: Tensor, unending: bool, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and id of the likeliest tokens; [C, V] -> [C] float64, [C] int64."""
        log_p = (logits.double() / temperature).log_softmax(-1)
        if unending and len(self._ends):
            log_p[:, self._ends] = -torch.inf
            log_p = log_p.log_softmax(-1)
        best = log_p.max(-1)
        return best.values, best.indices

    def drafted(
        self,
        forest: TokenForest,
        beams: list[tuple[int, float]],
        layers: list[list[tuple[int, float]]],
        contexts: list[DraftContext],
    ) -> None:
        """Keep the forest, where the paths of P's parents are found."""
        self._forest = forest


def _heaviest(weights: np.ndarray, count: int) -> IntArray:
    """Indices of the `count` largest weights, largest first; [S] -> [C]."""
    found = np.argpartition(-weights, count - 1)[:count] if count < len(weights) else np.arange(len(weights))
    return found[np.argsort(-weights[found], kind="stable")]


# -------------------------------------------------------------------------- seconds, with hindsight


def modelled_seconds(stats: DecodeStats, costs: Costs) -> float:
    """Seconds that a table gives a decoding: what each iteration drafted, scored and did beside;
    the prompt is free.

    Raises:
        UserError: stats without records, such as those of transformers' own methods.
    """
    _check_records(stats)
    return sum(iteration_seconds(costs, record.drafts, record.roots) for record in stats.records)


def hindsight_seconds(stats: DecodeStats, costs: Costs) -> float:
    """NOT ACHIEVABLE: `modelled_seconds` of a decoding if no layer that failed had been drafted,
    nor any below it.

    The text would be as good: what a failed layer is refilled with is distributed as a layer that
    the target draws.

    Raises:
        UserError: as for `modelled_seconds`.
    """
    _check_records(stats)
    return sum(iteration_seconds(costs, record.passed_drafts, record.roots) for record in stats.records)


def _check_records(stats: DecodeStats) -> None:
    if not stats.records:
        raise UserError("The stats hold no record of an iteration; give those of DSBDDecoder or beam_sample.")
