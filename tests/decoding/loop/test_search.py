"""mode="beam_search": the hypotheses of transformers' beam search whatever the draft; and searches that are wrong on
purpose, which the same comparisons catch.

Two continuations whose weights differ by rounding alone may change places, so a difference from transformers counts
unless a decision on the way was closer than MARGIN (float32 sums differ by some 1e-6). Seeds are fixed: none was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import decoding.loop.search
from decoding import DecodingConfig, DSBDDecoder, FixedWidth, ModelPair, RandomWidth, UserError, WidthPolicy
from decoding.engine.sampled_head import SampledHead
from decoding.loop.processing import Rules
from decoding.loop.prompt_run import Beam
from decoding.loop.search import SearchRun
from decoding.pairs.drafts import named_draft
from decoding.pairs.drafts.fspad import FspadDraft
from decoding.policies.base import LayerRecord, TargetContext
from decoding.results import DecodeResult, LayerEvent, Recorder
from tests.decoding.loop.test_exactness import settings as sampling_settings
from tests.decoding.stubs import MAX_POSITIONS, Path, Reference, TableModel, random_pair, sharp_llama, small_llama

MARGIN = 1e-5
WIDTHS = (1, 2, 3, 5)


@cache
def sharp_pair(vocabulary: int = 7, draft: str = "noisy", engine: str = "auto") -> ModelPair:
    """A target with a draft that is a noisy copy of it, or one that knows nothing of it."""
    target = sharp_llama(vocabulary, seed=1)
    if draft == "unrelated":
        return ModelPair(target, sharp_llama(vocabulary, seed=2), engine=engine)
    noisy = small_llama(vocabulary)
    noisy.load_state_dict(target.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return ModelPair(target, noisy, engine=engine)


@cache
def pair_with(draft: str) -> ModelPair:
    """A target of 40 tokens with a noisy copy of itself, with one that knows nothing of it, or with a draft by name."""
    if draft in ("noisy", "unrelated"):
        return sharp_pair(40, draft)
    target = sharp_pair(40).target
    if draft == "head":
        return ModelPair(target, FspadDraft(random_head(target)))
    return ModelPair(target, named_draft(draft, target))


def random_head(target: Any) -> SampledHead:
    """A head that has learned nothing."""
    head = SampledHead.for_target(target, 40)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=random) + (weight.ndim == 1))
    return head


def ends_of(config: DecodingConfig) -> set[int]:
    ids = config.eos_token_id
    return (set(ids) if isinstance(ids, list) else {ids}) - {None, -1}  # type: ignore[return-value]


class SearchReference(Reference):
    """Beam search written from the description alone: dictionaries and loops, float64.

    Args:
        widths: beams kept after each step; None: target_width.
    """

    def __init__(
        self, model: nn.Module, prompt: list[int], config: DecodingConfig, widths: list[int] | None = None
    ) -> None:
        super().__init__(model, prompt, config)
        self.widths = widths
        self.margin = float("inf")  # the closest of all decisions
        self.rankings: list[list[Path]] = []  # of each step: all continuations that go on, best first
        self.starts: list[list[Path]] = []  # of each step: the beams it starts from
        self.found = self._search()

    def log_p(self, path: Path) -> Any:
        log_p = super().log_p(path)
        if len(path) < self.config.min_new_tokens:
            log_p = log_p.copy()
            log_p[list(ends_of(self.config))] = -float("inf")
        return log_p

    def _search(self) -> list[Path]:
        config, ends = self.config, ends_of(self.config)
        beams: list[Path] = [()]
        pool: list[Path] = []
        for layer in range(1, config.max_new_tokens + 1):
            width = self.widths[layer - 1] if self.widths is not None else config.target_width
            children = [(*beam, token) for beam in beams for token in range(len(self.log_p(beam)))]
            weights = {child: self.weight(child) for child in children}
            ranked = sorted(children, key=lambda child: -weights[child])  # stable: parents, then tokens, in order
            ranked = [child for child in ranked if weights[child] > -float("inf")]
            self.starts.append(beams)
            self.rankings.append([child for child in ranked if child[-1] not in ends])
            candidates = ranked[: max(2, 1 + len(ends)) * width]
            self._note([weights[child] for child in ranked[: len(candidates) + 1]])
            last = layer == config.max_new_tokens
            pool += [child for child in candidates[:width] if last or child[-1] in ends]
            pool.sort(key=lambda child: -self.score(child))
            self._note([self.score(child) for child in pool])
            pool = pool[: config.target_width]
            beams = [] if last else [child for child in candidates if child[-1] not in ends][:width]
            if not beams or (config.target_width == 1 and pool) or self._enough(beams, pool, layer):
                break
        return pool

    def _enough(self, beams: list[Path], pool: list[Path], layer: int) -> bool:
        config = self.config
        if len(pool) < config.target_width:
            return False
        if config.early_stopping is True:
            return True
        longest = config.early_stopping == "never" and config.length_penalty > 0
        hope = self.weight(beams[0]) / (config.max_new_tokens if longest else layer) ** config.length_penalty
        self._note([self.score(pool[-1]), hope])
        return self.score(pool[-1]) >= hope

    def _note(self, values: list[float]) -> None:
        ordered = sorted(values)
        gaps = [above - below for below, above in pairwise(ordered)]
        self.margin = min([self.margin, *gaps])


def transformers_search(
    pair: ModelPair, prompt: list[int], config: DecodingConfig, **options: Any
) -> tuple[list[Path], list[float]]:
    """What `generate` finds, without what it fills in where there are fewer hypotheses than were asked for."""
    if config.target_width > 1:
        options |= dict(
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            num_return_sequences=config.num_return_sequences,
        )
    if config.min_new_tokens:
        options["min_new_tokens"] = config.min_new_tokens
    ends = ends_of(config)
    given = torch.tensor([prompt])
    output = pair.target.generate(
        given,
        attention_mask=torch.ones_like(given),
        num_beams=config.target_width,
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    sequences = []
    for tokens in output.sequences[:, len(prompt) :].tolist():
        stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        sequences.append(tuple(tokens[:stop]))
    if config.target_width == 1:
        return sequences, []
    scores = output.sequences_scores.tolist()
    real = [i for i, score in enumerate(scores) if score > -1e6]
    return [sequences[i] for i in real], [scores[i] for i in real]


def difference(pair: ModelPair, prompt: list[int], config: DecodingConfig, result: DecodeResult) -> str:
    """What differs from transformers, and is no matter of rounding; empty where nothing does."""
    sequences, scores = transformers_search(pair, prompt, config)
    found = [tuple(tokens) for tokens in result.sequences]
    if found == sequences and result.scores[: len(scores)] == pytest.approx(scores, rel=1e-4, abs=1e-4):
        return ""
    margin = SearchReference(pair.target, prompt, config).margin
    if margin < MARGIN:
        return ""
    return f"{config}\nprompt {prompt}, margin {margin:.1e}\n{found} {result.scores}\n{sequences} {scores}"


def some_prompts(dice: random.Random, vocabulary: int, count: int = 2) -> list[list[int]]:
    return [[dice.randrange(vocabulary) for _ in range(dice.randint(1, 6))] for _ in range(count)]


def settings(width: int, drafts: int, depth: int, tokens: int, **changes: Any) -> DecodingConfig:
    """Returns all hypotheses and never ends early, unless `changes` say otherwise."""
    return sampling_settings(width, drafts, depth, tokens, **{"mode": "beam_search", **changes})


def chosen_settings(dice: random.Random, width: int, ends: list[int] | int, **changes: Any) -> DecodingConfig:
    """What the grid does not cross is drawn."""
    tokens = dice.choice([1, 2, 7, 14])
    return settings(
        width,
        dice.choice([width, width + 2, max(8, width)]),
        dice.choice([0, 1, 3]),
        tokens,
        min_new_tokens=min(dice.choice([0, 0, 3]), tokens),
        num_return_sequences=dice.randint(1, width),
        eos_token_id=ends,
        **changes,
    )


# Equality with transformers.


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("width", WIDTHS)
def test_hypotheses_are_those_of_transformers(width: int, early_stopping: bool | str, length_penalty: float) -> None:
    """Token for token and score for score, for drafts good and bad; prompts of several lengths are one batch."""
    dice = random.Random(f"{width} {early_stopping} {length_penalty}")
    for ends in (-1, [3], [1, 3, 5]):
        vocabulary, draft = dice.choice([7, 40]), dice.choice(["noisy", "unrelated"])
        pair = sharp_pair(vocabulary, draft, dice.choice(["auto", "transformers"]))
        config = chosen_settings(dice, width, ends, early_stopping=early_stopping, length_penalty=length_penalty)
        prompts = some_prompts(dice, vocabulary)
        for prompt, result in zip(prompts, DSBDDecoder(pair, config).generate(prompts), strict=True):
            assert not (found := difference(pair, prompt, config, result)), f"vocabulary {vocabulary}, {draft}: {found}"


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("draft", ["noisy", "unrelated", "layers:1", "ngram", "head"])
def test_every_draft_finds_at_every_width_what_transformers_finds(draft: str, width: int) -> None:
    """With what earlier passes scored at hand, alone and in batches; half of them under a repetition penalty."""
    dice = random.Random(f"{draft} {width}")
    config = settings(
        width,
        max(width, dice.choice([6, 8, 16])),
        dice.choice([1, 2, 4]),
        16,
        eos_token_id=dice.choice([-1, [3], [3, 5, 17]]),
        early_stopping=dice.choice([False, True, "never"]),
        length_penalty=dice.choice([0.0, 1.0, 2.0]),
    )
    pair, prompts = pair_with(draft), some_prompts(dice, 40, 4)
    for penalty in (1.0, 1.3):
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
        rules = [Rules(prompt, processors) for prompt in prompts] if penalty > 1 else None
        expected = [transformers_search(pair, prompt, config, repetition_penalty=penalty) for prompt in prompts]
        for batch in (1, 3):
            results = DSBDDecoder(pair, config).generate(prompts, batch_size=batch, rules=rules)
            for result, (sequences, scores) in zip(results, expected, strict=True):
                assert [tuple(tokens) for tokens in result.sequences] == sequences, f"{config}, penalty {penalty}"
                assert result.scores[: len(scores)] == pytest.approx(scores, rel=1e-4, abs=1e-4)


def test_the_reference_is_transformers_beam_search() -> None:
    """The margins above, and the tests of dynamic widths below, rest on a search written a second time."""
    dice = random.Random(5)
    pair = sharp_pair()
    for width in WIDTHS * 4:
        config = chosen_settings(dice, width, [3, 5], length_penalty=dice.choice([0.0, 1.0, -1.0]))
        prompt = some_prompts(dice, 7, 1)[0]
        sequences, scores = transformers_search(pair, prompt, config)
        reference = SearchReference(pair.target, prompt, config)
        assert reference.found[: config.num_return_sequences] == sequences or reference.margin < MARGIN
        if scores:
            expected = [reference.score(path) for path in reference.found[: len(scores)]]
            assert expected == pytest.approx(scores, rel=1e-4, abs=1e-5)


def test_fewer_hypotheses_than_were_asked_for_are_not_filled_up() -> None:
    """One token each of a vocabulary of 3 makes 3 hypotheses; transformers repeats them with scores of -1e9."""
    pair = sharp_pair(3)
    config = settings(5, 5, 0, 1)
    (result,) = DSBDDecoder(pair, config).generate([[1, 2]])
    assert sorted(result.sequences) == [[0], [1], [2]]
    assert transformers_search(pair, [1, 2], config)[0] == [tuple(tokens) for tokens in result.sequences]


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -2.0])
def test_one_beam_is_greedy_search(depth: int, length_penalty: float) -> None:
    """EOS second is not EOS, and a length penalty has nothing to choose from; penalties act on logits."""
    pair, dice = sharp_pair(), random.Random(7)
    prompts = some_prompts(dice, 7, 12)
    config = settings(1, 2, depth, 12, eos_token_id=[3], length_penalty=length_penalty)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    rules = [Rules(prompt, processors) for prompt in prompts]
    second = 0
    for prompt, result in zip(prompts, DSBDDecoder(pair, config).generate(prompts, rules=rules), strict=True):
        given = torch.tensor([prompt])
        output = pair.target.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=3,
            pad_token_id=0,
            repetition_penalty=1.7,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert [result.sequences[0]] == output.sequences[:, len(prompt) :].tolist()
        second += sum(int(logits.topk(2).indices[0, 1]) == 3 for logits in output.logits)
    assert second > 3, "EOS must come second now and then"


# Ties.


def tied_model(vocabulary: int, tied: list[int]) -> TableModel:
    """At every place some tokens have one and the same probability, and the others less."""
    table = torch.zeros(MAX_POSITIONS, vocabulary, vocabulary)
    table[:, :, tied] = 2.0
    return TableModel(table)


@pytest.mark.parametrize("tied", [[6, 2], [9, 4, 30], [8, 13, 21, 34, 39, 5]], ids=str)
def test_of_equal_tokens_greedy_search_takes_the_first(tied: list[int]) -> None:
    """As argmax does, also where more are equal than one beam would need to see; 16-bit logits tie all the time."""
    pair = ModelPair(tied_model(40, tied), tied_model(40, [1]))
    (result,) = DSBDDecoder(pair, settings(1, 1, 2, 6)).generate([[1, 2]])
    assert result.sequences == [[min(tied)] * 6]


@pytest.mark.parametrize("draft", [[4, 1, 3], [0, 2]], ids=["the same ties", "other tokens"])
def test_of_equal_weights_the_better_parents_child_then_the_lower_token_comes_first(draft: list[int]) -> None:
    pair = ModelPair(tied_model(5, [4, 1, 3]), tied_model(5, draft))
    (result,) = DSBDDecoder(pair, settings(4, 6, 2, 5)).generate([[1, 2]])
    assert result.sequences == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 3], [1, 1, 1, 1, 4], [1, 1, 1, 3, 1]]
    assert len(set(result.scores)) == 1


# Widths.


@dataclass
class Layers(Recorder):
    """Records one prompt's layers; `paths` of a layer are all that was drafted by then, none where nothing was."""

    records: list[LayerRecord] = field(default_factory=list)
    paths: list[set[Path]] = field(default_factory=list)
    _scored: set[Path] = field(default_factory=set)

    def drafted(self, forest: Any, beams: Any, layers: list[list[tuple[int, float]]], contexts: Any) -> None:
        self._scored = self._scored | {tuple(forest.path(node)) for layer in layers for node, _ in layer}

    def layer(self, event: LayerEvent) -> None:
        self.records.append(event.record)
        self.paths.append(self._scored if event.record.draft_width else set())


class Nosy(WidthPolicy):
    """Widths that vary from layer to layer."""

    def draft_width(self, context: Any) -> int:
        return 2 + (context.layer + context.root.iteration) % 4

    def target_width(self, context: TargetContext) -> int:
        return 1 + (context.draft.layer + 2 * context.draft.root.iteration) % 3


def kept_widths(records: list[LayerRecord], config: DecodingConfig) -> list[int]:
    """What design 5.5 keeps of each layer."""
    kept = []
    for record in records:
        if record.passed and record.draft_width and config.surplus == "keep":
            kept.append(max(record.target_width, min(record.accepted, config.target_width)))
        elif not record.passed and config.refill == "full":
            kept.append(config.target_width)
        else:
            kept.append(record.target_width)
    return kept


RULES_OF_WIDTH: dict[str, dict[str, Any]] = {
    "defaults": {},
    "surplus dropped": {"surplus": "drop"},
    "refill to the width": {"refill": "width"},
    "exact": {"exact": True},
}


@pytest.mark.parametrize("ends", [-1, [3, 5]], ids=["no end", "ends"])
@pytest.mark.parametrize("policy", [Nosy(), RandomWidth(seed=1, full_share=0.0)], ids=["nosy", "random"])
@pytest.mark.parametrize("rule", RULES_OF_WIDTH)
def test_every_layer_is_a_step_of_the_width_that_the_rules_keep(
    rule: str, policy: WidthPolicy, ends: list[int] | int
) -> None:
    """The search with these widths, written a second time, finds the same; and so do `accepted` and `passed`."""
    config = settings(4, 6, 3, 11, eos_token_id=ends, **RULES_OF_WIDTH[rule])
    pair = sharp_pair()
    prompts = some_prompts(random.Random(11), 7, 9)
    recorders = [Layers() for _ in prompts]
    results = DSBDDecoder(pair, config, policy).generate(prompts, torch.Generator().manual_seed(0), recorders)
    surplus = failed = 0
    for prompt, result, layers in zip(prompts, results, recorders, strict=True):
        widths = kept_widths(layers.records, config)
        reference = SearchReference(pair.target, prompt, config, widths)
        assert reference.margin > MARGIN, "choose another seed: this one is decided by rounding"
        assert [tuple(tokens) for tokens in result.sequences] == reference.found
        assert result.scores == pytest.approx([reference.score(path) for path in reference.found], rel=1e-4, abs=1e-5)
        assert result.stats.accepted == [record.accepted for record in layers.records]
        for record, scored, ranking in zip(layers.records, layers.paths, reference.rankings, strict=True):
            prefix = next((i for i, path in enumerate(ranking) if path not in scored), len(ranking))
            assert record.accepted == prefix
            assert record.passed == (prefix >= record.target_width or not record.draft_width)
            surplus += bool(record.draft_width) and record.accepted > record.target_width
            failed += not record.passed
    assert surplus > 3 and failed > 3, "both rules must have had something to decide"


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_policy_that_asks_for_less_searches_as_narrowly(width: int) -> None:
    """With exact=True and without EOS a fixed width of m out of 4 is beam search with m beams."""
    pair, prompts = sharp_pair(), some_prompts(random.Random(12), 7, 3)
    wide = settings(4, 6, 2, 9, exact=True, num_return_sequences=width)
    narrow = settings(width, 6, 2, 9)
    for prompt, result in zip(prompts, DSBDDecoder(pair, wide, FixedWidth(width)).generate(prompts), strict=True):
        sequences, _ = transformers_search(pair, prompt, narrow)
        assert [tuple(tokens) for tokens in result.sequences] == sequences
        assert set(result.stats.target_widths) == {width}


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_perfect_draft_is_accepted_whole(width: int, depth: int) -> None:
    """The target drafts for itself: each iteration commits depth + 1 steps, and one at the end what is left."""
    target = sharp_llama(40, seed=1)
    tokens = 2 * (depth + 1)
    prompts = some_prompts(random.Random(13), 40, 3)
    for result in DSBDDecoder(ModelPair(target, target), settings(width, width, depth, tokens)).generate(prompts):
        assert result.stats.accepted == ([width] * depth + [0]) * 2
        assert result.stats.block_efficiency == depth + 1


def test_a_useless_draft_costs_passes_and_changes_nothing() -> None:
    prompts = some_prompts(random.Random(14), 40, 4)
    results = {}
    for draft in ("noisy", "unrelated"):
        config = settings(3, 5, 3, 12, eos_token_id=[3])
        results[draft] = DSBDDecoder(sharp_pair(40, draft), config).generate(prompts)
    alone = DSBDDecoder(ModelPair(sharp_llama(40, seed=1), None), settings(3, 5, 0, 12, eos_token_id=[3]))
    for noisy, unrelated, plain in zip(*results.values(), alone.generate(prompts), strict=True):
        assert noisy.sequences == unrelated.sequences == plain.sequences
        assert noisy.stats.iterations <= unrelated.stats.iterations <= plain.stats.iterations
    passes = {draft: sum(r.stats.target_calls for r in found) for draft, found in results.items()}
    assert passes["noisy"] < 0.8 * passes["unrelated"]


# Wrong on purpose: the comparison with transformers must be able to fail.


def differences() -> Iterator[str]:
    """From transformers, over settings where EOS comes often and drafts are often wrong."""
    for seed in range(12):
        dice = random.Random(seed)
        pair = sharp_pair(draft=dice.choice(["noisy", "unrelated"]))
        config = settings(
            dice.choice([2, 3]),
            4,
            2,
            9,
            eos_token_id=[1, 3, 6],
            early_stopping=dice.choice([False, True, "never"]),
            length_penalty=dice.choice([1.0, 0.0, -1.0]),
        )
        for prompt in some_prompts(dice, 7, 2):
            (result,) = DSBDDecoder(pair, config).generate([prompt])
            yield difference(pair, prompt, config, result)


def only_drafted(honest: Callable[..., LayerRecord]) -> Callable[..., LayerRecord]:
    """A search that goes on with what was drafted, without asking whether all of its beams were."""

    def commit(self: SearchRun, context: TargetContext, target: Any, layer: Any) -> LayerRecord:
        ranked = self._ranked

        def among_drafts(joint: Any) -> tuple[list[Beam], list[bool]]:
            pairs = zip(*ranked(joint), strict=True)
            kept = [(beam, hit) for beam, hit in pairs if hit or beam.node in layer.nodes]
            return [beam for beam, _ in kept], [hit for _, hit in kept]

        self._ranked = among_drafts  # type: ignore[method-assign]
        try:
            return honest(self, context, target, layer)
        finally:
            self._ranked = ranked  # type: ignore[method-assign]

    return commit


def all_that_end(honest: Callable[..., Any]) -> Callable[..., Any]:
    """A search that ends hypotheses which are not among the best `width` continuations."""

    def step(self: SearchRun, ranking: list[Beam], hits: list[bool], width: int) -> Any:
        before = list(self.pool)
        children = honest(self, ranking, hits, width)
        most = self.candidates * width
        ended = [beam for beam, hit in zip(ranking[:most], hits[:most], strict=True) if hit]
        pool = before + [self._hypothesis(beam, self._ended(beam.node)) for beam in ended]
        self.pool = sorted(pool, key=lambda h: -h.score)[: self.config.target_width]
        self.done = self._is_done()
        return children

    return step


def test_the_honest_search_differs_nowhere() -> None:
    assert [found for found in differences() if found] == []


@pytest.mark.parametrize("fault", ["unchecked drafts", "half the candidates", "ends beyond the best", "no pool rule"])
def test_wrong_searches_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "unchecked drafts":
        monkeypatch.setattr(SearchRun, "_commit_drafted", only_drafted(SearchRun._commit_drafted))
    elif fault == "half the candidates":
        monkeypatch.setattr(decoding.loop.search, "candidates_per_beam", lambda ends: 1)
    elif fault == "ends beyond the best":
        monkeypatch.setattr(SearchRun, "_step", all_that_end(SearchRun._step))
    else:
        monkeypatch.setattr(SearchRun, "_is_done", lambda self: not self.beams or len(self.pool) > 0)
    assert any(differences())


# Who listens, and who is decoded next to whom.


@pytest.mark.parametrize("mode", ["beam_search", "beam_sample"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_listener_is_told_the_best_hypothesis_once_and_never_of_another(width: int, mode: str) -> None:
    """What it was told is at any time the beginning of what is returned, and at the end all of it."""
    pair, prompts = sharp_pair(40), some_prompts(random.Random(15), 40, 8)
    told: list[list[list[int]]] = [[] for _ in prompts]
    rules = [Rules(prompt, listener=heard.append) for prompt, heard in zip(prompts, told, strict=True)]
    config = settings(width, width + 2, 2, 12, mode=mode, eos_token_id=[3, 5], early_stopping=True)
    results = DSBDDecoder(pair, config).generate(prompts, torch.Generator().manual_seed(0), rules=rules)
    for heard, result in zip(told, results, strict=True):
        assert all(heard)
        assert [token for part in heard for token in part] == result.sequences[0]
    assert max(map(len, told)) > 1, "tokens must be told before the end"


def test_a_prompt_is_decoded_as_if_it_were_alone() -> None:
    pair, prompts = sharp_pair(40), some_prompts(random.Random(16), 40, 5)
    decoder = DSBDDecoder(pair, settings(3, 5, 3, 10, eos_token_id=[3, 5]), Nosy())
    alone = [decoder.generate([prompt])[0] for prompt in prompts]
    together = decoder.generate(prompts)
    backwards = decoder.generate(prompts[::-1])[::-1]
    by_twos = decoder.generate(prompts, batch_size=2)
    for single, *others in zip(alone, together, backwards, by_twos, strict=True):
        for other in others:
            assert other.sequences == single.sequences
            assert other.scores == pytest.approx(single.scores, abs=1e-5)
            assert other.stats.accepted == single.stats.accepted
            assert other.stats.iterations == single.stats.iterations


# Where nothing can follow.


def test_nan_and_forbidden_vocabularies_are_reported() -> None:
    pair = random_pair(5)
    config = settings(2, 3, 2, 4)
    forbid = LogitsProcessorList([lambda tokens, scores: scores - torch.inf])
    with pytest.raises(UserError, match="target model gives every continuation the probability 0"):
        DSBDDecoder(pair, config).generate([[1, 2]], rules=Rules([1, 2], forbid))
    broken = TableModel(torch.full((MAX_POSITIONS, 5, 5), torch.nan))
    with pytest.raises(UserError, match="NaN"):
        DSBDDecoder(ModelPair(random_pair(5).target, broken), config).generate([[1, 2]])


def test_what_has_ended_is_returned_where_nothing_can_follow_the_rest() -> None:
    """After two tokens a processor forbids everything; one hypothesis had ended before."""
    pair = random_pair(5, seed=4)

    def stops(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - torch.inf if tokens.shape[1] >= 4 else scores

    config = settings(3, 4, 2, 8, eos_token_id=[0, 1, 2])
    (result,) = DSBDDecoder(pair, config).generate([[1, 2]], rules=Rules([1, 2], LogitsProcessorList([stops])))
    assert result.sequences and all(result.finished)
    assert max(map(len, result.sequences)) <= 2
