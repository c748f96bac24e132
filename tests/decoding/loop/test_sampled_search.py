"""`dsbd_generate(do_sample=True, num_beams=R)` has the distribution of transformers' own sampled beams: both are
compared with one enumeration of what transformers does, on models small enough for it, and so are wrong samplers.

All seeds are fixed. There are about 20 p-values: the smallest is expected near 0.05; a wrong sampler gives less than
1e-6.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, set_seed

import decoding.loop.noise_run
from decoding import DecodingConfig, DSBDDecoder, ModelPair, dsbd_generate
from decoding.dice.selection import Choice, choose
from tests.decoding.stubs import Path, chi_square_p, sharp_llama

PASS, CAUGHT = 1e-3, 1e-6
PROMPT = [1, 2]
DRAWS = 800

State = tuple[tuple[Path, ...], tuple[Path, ...]]  # beams and pool, best first


@cache
def model_of(vocabulary: int, seed: int = 4) -> LlamaForCausalLM:
    """Soft enough that everything happens."""
    model = sharp_llama(vocabulary, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.div_(3)
    return model


class SampledBeams:
    """transformers' `_beam_search` with do_sample, by enumeration: dictionaries and loops, float64.

    Args:
        ends: EOS ids; max(2, 1 + their number) candidates are drawn for each beam.
    """

    def __init__(
        self, model: Any, width: int, ends: list[int], tokens: int, early_stopping: bool | str, length_penalty: float
    ) -> None:
        self.model, self.width, self.ends, self.tokens = model, width, ends, tokens
        self.early_stopping, self.length_penalty = early_stopping, length_penalty
        self._log_p: dict[Path, list[float]] = {}

    def log_p(self, path: Path) -> list[float]:
        if path not in self._log_p:
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([[*PROMPT, *path]])).logits[0, -1]
            self._log_p[path] = logits.double().log_softmax(-1).tolist()
        return self._log_p[path]

    def weight(self, path: Path) -> float:
        return sum(self.log_p(path[:i])[token] for i, token in enumerate(path))

    def score(self, path: Path) -> float:
        return self.weight(path) / len(path) ** self.length_penalty

    def draws(self, beams: tuple[Path, ...]) -> Iterator[tuple[tuple[Path, ...], float]]:
        """Ordered candidates, drawn one after the other without replacement from softmax(accumulated scores)."""
        shares = {(*beam, v): self.weight((*beam, v)) for beam in beams for v in range(len(self.log_p(beam)))}
        table = torch.tensor(list(shares.values()), dtype=torch.float64).softmax(0).tolist()
        joint = dict(zip(shares, table, strict=True))
        for drawn in itertools.permutations(joint, min(len(joint), max(2, 1 + len(self.ends)) * self.width)):
            chance, left = 1.0, 1.0
            for child in drawn:
                chance *= joint[child] / left
                left -= joint[child]
            yield drawn, chance

    def chances(self) -> dict[tuple[Path, ...], float]:
        """Of the returned sequences, best first."""
        out: dict[tuple[Path, ...], float] = defaultdict(float)
        now: dict[State, float] = {(((),), ()): 1.0}
        for length in range(1, self.tokens + 1):
            after: dict[State, float] = defaultdict(float)
            for (beams, pool), chance in now.items():
                for drawn, share in self.draws(beams):
                    last = length == self.tokens
                    ended = [c for c in drawn[: self.width] if last or c[-1] in self.ends]  # the first drawn
                    growing = [] if last else [c for c in drawn if c[-1] not in self.ends]
                    kept = tuple(sorted([*pool, *ended], key=lambda c: -self.score(c))[: self.width])
                    heaviest = tuple(sorted(growing, key=lambda c: -self.weight(c))[: self.width])
                    if not heaviest or self.stops(heaviest, kept, length):
                        out[kept] += chance * share
                    else:
                        after[heaviest, kept] += chance * share
            now = after
        return dict(out)

    def stops(self, beams: tuple[Path, ...], pool: tuple[Path, ...], length: int) -> bool:
        if len(pool) < self.width:
            return False
        longest = self.early_stopping == "never" and self.length_penalty > 0
        hope = self.weight(beams[0]) / (self.tokens if longest else length) ** self.length_penalty
        return self.early_stopping is True or self.score(pool[-1]) >= hope


# (vocabulary, num_beams, EOS ids, new tokens, early_stopping, length_penalty)
CASES: dict[str, tuple[int, int, list[int], int, bool | str, float]] = {
    "no end": (6, 2, [], 2, False, 1.0),
    "one end": (4, 2, [3], 3, False, 1.0),
    "one end, early": (4, 2, [3], 3, True, 1.0),
    "one end, never": (4, 2, [3], 3, "never", 0.5),
    "two ends": (4, 2, [0, 3], 2, False, 1.0),
}


@cache
def expected_of(case: str) -> dict[tuple[Path, ...], float]:
    vocabulary, *rest = CASES[case]
    return SampledBeams(model_of(vocabulary), *rest).chances()  # type: ignore[arg-type]


def counts_of(case: str, ours: dict[str, Any]) -> Counter[tuple[Path, ...]]:
    """All sequences of DRAWS copies of the prompt, best first."""
    vocabulary, width, ends, tokens, early_stopping, length_penalty = CASES[case]
    set_seed(7)
    inputs = torch.tensor([PROMPT] * DRAWS)
    found = (
        model_of(vocabulary)
        .generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=tokens,
            eos_token_id=ends or None,
            pad_token_id=vocabulary,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
            top_k=0,
            **ours,
        )[:, len(PROMPT) :]
        .tolist()
    )
    texts = [tuple(token for token in row if token != vocabulary) for row in found]
    return Counter(tuple(texts[i : i + width]) for i in range(0, len(texts), width))


def speculative(case: str) -> dict[str, Any]:
    return {"custom_generate": dsbd_generate, "assistant_model": model_of(CASES[case][0], seed=5)}


@pytest.mark.parametrize("case", CASES)
def test_the_enumeration_is_what_transformers_does(case: str) -> None:
    assert sum(expected_of(case).values()) == pytest.approx(1)
    assert chi_square_p(counts_of(case, {}), expected_of(case)) > PASS


@pytest.mark.parametrize("case", CASES)
def test_sampled_beams_have_transformers_distribution(case: str) -> None:
    assert chi_square_p(counts_of(case, speculative(case)), expected_of(case)) > PASS


def ends_by_weight(weights: list[float], hits: list[bool], width: int, oversample: int) -> Choice:
    """A candidate that ends counts if it is among the heaviest, as it would if candidates were sorted first."""
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    sorted_choice = choose([weights[i] for i in order], [hits[i] for i in order], width, oversample)
    growing, ended = ([order[i] for i in part] for part in (sorted_choice.growing, sorted_choice.ended))
    return Choice(growing, sorted_choice.growing_places, ended, sorted_choice.ended_places, sorted_choice.size)


def paper(weights: list[float], hits: list[bool], width: int, oversample: int) -> Choice:
    """Keeps the first that were drawn."""
    return choose(weights, hits, width, 1)


@pytest.mark.parametrize("fault", [ends_by_weight, paper])
def test_wrong_selections_are_caught(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.loop.noise_run, "choose", fault)
    assert chi_square_p(counts_of("one end", speculative("one end")), expected_of("one end")) < CAUGHT


@pytest.mark.parametrize("mode", ["rejection", "shared_noise"])
def test_beams_that_still_grow_do_not_compete_with_a_pool_that_decides(mode: str) -> None:
    """With early_stopping=True every text that is returned has ended, or is max_new_tokens long."""
    pair = ModelPair(model_of(6), model_of(6, seed=5))
    config = DecodingConfig(
        target_width=3,
        draft_width=4,
        draft_depth=2,
        max_new_tokens=12,
        early_stopping=True,
        eos_token_id=[0, 3],
        num_return_sequences=3,
        verification=mode,
    )
    results = DSBDDecoder(pair, config).generate([PROMPT] * 100, torch.Generator().manual_seed(0))
    texts = [(tokens, result) for result in results for tokens in result.sequences]
    assert all(tokens[-1] in (0, 3) or len(tokens) == 12 for tokens, _ in texts)
    assert sum(result.stats.new_tokens < 12 for result in results) > 50, "the pool must have decided"
