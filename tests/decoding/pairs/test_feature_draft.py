"""A draft that reads the target's states: the states at every node, exact output, and nothing kept unasked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import decoding.forest.cache
from decoding import DecodingConfig, DSBDDecoder, ModelPair, RandomWidth, UserError, dsbd_generate
from decoding.engine.fused import FusedForward
from decoding.engine.layer_states import LayerStates
from decoding.engine.runner import runner_of
from decoding.forest.node_scorer import ScorerOptions
from decoding.machine.seconds import measure_seconds
from decoding.measure.methods import METHODS
from tests.decoding.engine.test_fused import CLOSE, made
from tests.decoding.engine.test_graphs import graphed, seeded, static_runs
from tests.decoding.feature_draft import FeatureDraft, FeatureScorer, own_states
from tests.decoding.loop.test_exactness import settings
from tests.decoding.stubs import random_pair, small_llama

PROMPT = [1, 2]
PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 6], [1, 2, 3, 0]]  # they begin alike: a shared prefix is copied from row to row
ENGINES = pytest.mark.parametrize("engine", ["eager", "transformers"])


def feature_pair(vocabulary: int = 9, engine: str = "auto", target: Any = None) -> ModelPair:
    """A target of three blocks and a draft that reads the first and what the head reads."""
    target = target if target is not None else small_llama(vocabulary, layers=3)
    return ModelPair(target, FeatureDraft(target), engine=engine)


def logged(monkeypatch: pytest.MonkeyPatch) -> list[FeatureScorer]:
    """The scorers that drafts make from now on."""
    made, make = [], FeatureDraft.scorer

    def scorer(self: FeatureDraft, *args: Any) -> Any:
        made.append(make(self, *args))
        return made[-1]

    monkeypatch.setattr(FeatureDraft, "scorer", scorer)
    return made


def check_states(pair: ModelPair, scorers: list[FeatureScorer]) -> int:
    """Every state that was read is the target's own on that path; how many paths there were.

    CLOSE is what the fused pass's last states are held to: float32 sums in other orders through three blocks.
    """
    read = {tuple(path): (path, states) for scorer in scorers for path, states in scorer.read}
    for path, states in read.values():
        own = own_states(pair.target, path, pair.drafter.target_layers)
        torch.testing.assert_close(states, own, **CLOSE)
    assert len({states.numpy().tobytes() for _, states in read.values()}) > len(read) / 2, "nodes differ"
    return len(read)


# ------------------------------------------------------------------------------------------- states


@ENGINES
def test_states_are_the_targets_own_at_every_node(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At prompt tokens, a shared prefix among them, and at nodes, in rows and slots that are used again and grow."""
    monkeypatch.setattr(decoding.forest.cache, "SLOT_STEP", 4)
    pair, scorers = feature_pair(engine=engine), logged(monkeypatch)
    config = settings(3, 5, 2, 30)
    runner_of(pair.target, engine)._spare.clear()  # of a capacity that would do
    monkeypatch.setattr(
        decoding.forest.cache.ForestCache, "__init__", _without_spare(decoding.forest.cache.ForestCache.__init__)
    )
    DSBDDecoder(pair, config, RandomWidth(seed=3)).generate(PROMPTS, seeded(), batch_size=2)
    assert check_states(pair, scorers) > 60
    assert scorers[-1].target.cache.capacity > 12, "it grew"


def _without_spare(init: Any) -> Any:
    """A cache's constructor that leaves no slot for nodes."""
    return lambda self, rows, longest, spare, *args, **options: init(self, rows, longest, 0, *args, **options)


@pytest.mark.parametrize("wrong", ["layers", "shared prefix"])
def test_wrong_states_are_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of another block, and a prefix that is not copied from the row that scored it."""
    pair, scorers = feature_pair(), logged(monkeypatch)
    if wrong == "shared prefix":
        monkeypatch.setattr(LayerStates, "copy_slots", lambda *args: None)
    DSBDDecoder(pair, settings(2, 3, 1, 4)).generate(PROMPTS, seeded())
    if wrong == "layers":
        pair.drafter.target_layers = (2, 3)
    with pytest.raises(AssertionError, match="not close"):
        check_states(pair, scorers)


@pytest.mark.parametrize("family", ["grouped heads", "large epsilon", "mistral", "qwen2", "qwen3"])
def test_fused_families_give_the_states_of_all_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = made(family)
    pair, scorers = feature_pair(target=target, engine="eager"), logged(monkeypatch)
    pair.drafter.target_layers = (0, 2)  # as wide as the pair of layers that it replaces
    assert isinstance(runner_of(target, "eager").prompts, FusedForward)
    DSBDDecoder(pair, settings(2, 3, 2, 6)).generate([[5, 6, 7, 8], [5, 6]], seeded())
    assert check_states(pair, scorers) > 10


@pytest.mark.parametrize("how", ["static", "graphs"])
def test_static_shapes_and_graphs_give_the_same_states(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fillers write where nobody reads, and a replay overwrites what the last one gave."""
    pair = feature_pair()
    decoder = DSBDDecoder(pair, settings(3, 5, 2, 12), RandomWidth(seed=1))
    expected = decoder.generate(PROMPTS, seeded())
    scorers = logged(monkeypatch)
    (graphed if how == "graphs" else static_runs)(pair, monkeypatch)
    found = decoder.generate(PROMPTS, seeded())
    assert [result.sequences for result in found] == [result.sequences for result in expected]
    check_states(pair, scorers)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["auto", "eager", "transformers"])
def test_a_gpu_gives_the_states(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under CUDA graphs, and where a block adds to its states in place."""
    pair, scorers = feature_pair(target=small_llama(9, layers=3).cuda(), engine=engine), logged(monkeypatch)
    results = DSBDDecoder(pair, settings(3, 5, 2, 12)).generate(PROMPTS, seeded(), batch_size=2)
    for path, states in scorers[-1].read:
        own = own_states(pair.target, path, pair.drafter.target_layers)
        torch.testing.assert_close(states, own, **CLOSE)
    assert sum(sum(result.stats.accepted) for result in results) > 0


def test_nothing_is_kept_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ScorerOptions(rows=1, longest_prompt=4, spare_slots=4)
    for pair in (ModelPair(small_llama(9), "ngram"), ModelPair(small_llama(9), small_llama(9, seed=1))):
        assert all(getattr(scorer, "_states", None) is None for scorer in pair.scorers(options).values())
    pair = feature_pair()
    assert pair.scorers(options)["target"]._states is not None
    assert pair.scorers(options, drafting=False)["target"]._states is None


# ----------------------------------------------------------------------------------- what surrounds it


def test_pairs_take_it_as_any_other_draft() -> None:
    pair = feature_pair(40)
    assert pair.draft is pair.drafter and pair.draft_name == "features" and list(pair.models) == ["target"]
    about = pair.describe()
    assert about["draft"] == "features" and about["fingerprint"] != ModelPair(pair.target, None).fingerprint
    assert len(measure_seconds(pair, 8, repeats=1).draft) > 0
    with pytest.raises(UserError, match="hf_assisted cannot draft with 'features'"):
        METHODS["hf_assisted"](pair, DecodingConfig(max_new_tokens=4, eos_token_id=-1))([[1, 2]], seeded())


def test_generate_takes_it_as_an_assistant() -> None:
    target = small_llama(9, layers=3)
    options = {"num_beams": 3, "max_new_tokens": 8, "pad_token_id": 0}
    ids = torch.tensor([[1, 2, 3]])
    ours = {"assistant_model": FeatureDraft(target), "custom_generate": dsbd_generate}
    assert target.generate(ids, **options, **ours).tolist() == target.generate(ids, **options).tolist()


def test_what_cannot_be_read_is_refused() -> None:
    target = small_llama(9, layers=3)
    draft = FeatureDraft(target)
    draft.target_layers = (1, 4)
    with pytest.raises(UserError, match=r"'features' reads layer 4 of the target, which has 3; .* be 0 .* to 3"):
        ModelPair(target, draft)
    silent = random_pair(4).target  # logits and nothing else
    draft.target_layers = (1,)
    with pytest.raises(UserError, match="does not give them when output_hidden_states=True"):
        DSBDDecoder(ModelPair(silent, draft), settings(1, 1, 1, 2)).generate([[1, 2]], seeded())
