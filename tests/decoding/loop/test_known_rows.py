"""Known rows, drawn or searched: what the target has scored is neither scored nor guessed again, and no token changes.

Seeds are fixed; runs that forget what they know are caught by the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from decoding import DecodingConfig, DSBDDecoder, FixedWidth, ModelPair, WidthPolicy
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.loop.known_rows import KnownRowsRun
from decoding.loop.noise_run import NoiseRun
from decoding.policies.base import DraftContext, Parents, RootContext
from decoding.results import DecodeResult
from decoding.tasks.stdlib import StdlibTask
from tests.decoding.loop.test_noise_run import Restless, some_prompts
from tests.decoding.loop.test_search import pair_with, transformers_search
from tests.decoding.stubs import Path, open_scorers, seeded
from tests.decoding.stubs import settings as any_settings

MODES: dict[str, dict[str, Any]] = {
    "drawn": {"verification": "shared_noise", "top_k": 12},
    "searched": {"mode": "beam_search"},
}


def settings(mode: str, width: int, drafts: int, depth: int, tokens: int, **changes: Any) -> DecodingConfig:
    return any_settings(width, drafts, depth, tokens, **MODES[mode], **changes)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays but the beams."""
    monkeypatch.setattr(KnownRowsRun, "_living", lambda self: [beam.node for beam in self.beams])


def calls(results: list[DecodeResult]) -> tuple[int, int]:
    """Passes of the target and of the draft."""
    return sum(r.stats.target_calls for r in results), sum(r.stats.draft_calls for r in results)


@pytest.mark.parametrize("mode", MODES)
def test_known_rows_save_passes_of_both_models(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, prompts = DSBDDecoder(pair_with("noisy"), settings(mode, 4, 8, 3, 24)), some_prompts()
    reused = decoder.generate(prompts, seeded())
    forgetful(monkeypatch)
    fresh = decoder.generate(prompts, seeded())
    assert [r.sequences for r in reused] == [r.sequences for r in fresh]
    for used, used_afresh in zip(calls(reused), calls(fresh), strict=True):
        assert used < 0.95 * used_afresh


class Scored:
    """Paths that the target scores, by prompt, in their order."""

    def __init__(self, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: dict[TokenForest, list[Path]] = {}
        run = ForestScorer._run

        def noted(scorer: ForestScorer, inputs: Any, order: list[tuple[int, int]], *rest: Any) -> None:
            for row, node in order if scorer.model is target else ():
                forest = scorer._held(row).forest
                self.paths.setdefault(forest, []).append(tuple(forest.path(node)))
            run(scorer, inputs, order, *rest)

        monkeypatch.setattr(ForestScorer, "_run", noted)

    def twice(self) -> int:
        """How many were scored before."""
        return sum(len(paths) - len(set(paths)) for paths in self.paths.values())


@pytest.mark.parametrize("draft", ["noisy", "ngram", "layers:1", "head"])
@pytest.mark.parametrize("mode", MODES)
def test_the_target_scores_no_path_twice(mode: str, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its tokens: a node that was let go and made again would be another node, but the same path."""
    pair, config = pair_with(draft), settings(mode, 4, 8, 3, 24, eos_token_id=[3])
    decoder = DSBDDecoder(pair, config, Restless())  # which has tried the target's passes by now
    scored = Scored(pair.target, monkeypatch)
    decoder.generate(some_prompts(), seeded())
    assert len(scored.paths) == len(some_prompts()) and scored.twice() == 0
    forgetful(monkeypatch)
    decoder.generate(some_prompts(), seeded())
    assert scored.twice() > 5


@pytest.mark.parametrize("mode", MODES)
def test_only_descendants_of_beams_stay(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tell, checks = KnownRowsRun._tell, []

    def checked(self: KnownRowsRun) -> None:  # called where all has been let go of
        living = set(self._living())
        above = set()
        for node in living:
            while node > 0 and node not in above:
                above.add(node)
                node = self.forest.parents[node]
        for scorer in open_scorers(self):
            table = scorer.cache._tables[self.row]
            assert set(table.slot_of) <= above | {0}
            assert len(set(table.slot_of.values())) == len(table.slot_of)
        assert set(self.target.known(self.row)) <= living
        if isinstance(self, NoiseRun):
            assert set(self.noise._hashes) <= above | {0}
        starts = {beam.node for beam in self.beams} | {ended.node for ended in self.pool}
        for node in living - starts:
            while node not in starts:
                node = self.forest.parents[node]  # ends at a beam, or at -1 with an error
                assert node > 0
        checks.append(len(living - starts))
        tell(self)

    monkeypatch.setattr(KnownRowsRun, "_tell", checked)
    config = settings(mode, 4, 8, 3, 40, eos_token_id=[3])
    results = DSBDDecoder(pair_with("noisy"), config, Restless()).generate(some_prompts(), seeded())
    assert len(checks) == sum(result.stats.iterations for result in results)
    assert max(checks) > 3 and max(checks) <= 8 * 3
    for result in results:
        assert result.stats.target_calls <= result.stats.iterations
        assert result.stats.kv_slots_peak <= 6 + result.stats.new_tokens * 4 + 2 * (8 * 3 + 4)


class Chooser(WidthPolicy):
    """Drafts every other candidate after the first ones, and sends all but the last."""

    chooses = True

    def choose(self, context: DraftContext) -> np.ndarray:
        assert context.candidates is not None
        assert (np.diff(context.candidates.keys) >= 0).all()
        places = np.arange(len(context.candidates))
        return places[(places < 4) | (places % 2 == 0)]

    def send(self, layers: Sequence[DraftContext]) -> list[np.ndarray]:
        return [np.arange(layer.root.config.draft_width) < layer.root.config.draft_width - 1 for layer in layers]


class Idle(WidthPolicy):
    """Never runs the draft where anything is known."""

    def ask_draft(self, context: RootContext, layer: int, parents: Parents) -> bool:
        return False


@pytest.mark.parametrize("draft", ["noisy", "ngram"])
@pytest.mark.parametrize("policy", [Restless(), Chooser(), Idle()], ids=["restless", "chooser", "idle"])
def test_a_search_finds_the_same_whatever_a_policy_drafts_sends_or_skips(policy: WidthPolicy, draft: str) -> None:
    pair, prompts = pair_with(draft), some_prompts()
    for width in (1, 3, 4):
        config = settings("searched", width, 8, 4, 16, min_width=width, eos_token_id=[3, 5])
        results = DSBDDecoder(pair, config, policy).generate(prompts, batch_size=3)
        for prompt, result in zip(prompts, results, strict=True):
            assert [tuple(tokens) for tokens in result.sequences] == transformers_search(pair, prompt, config)[0]


def test_skipping_saves_draft_passes_of_a_search() -> None:
    config, prompts = settings("searched", 4, 8, 3, 24), some_prompts()
    asked, skipped = (
        DSBDDecoder(pair_with("noisy"), config, FixedWidth(least_share=share)).generate(prompts) for share in (0.0, 0.2)
    )
    assert [r.sequences for r in asked] == [r.sequences for r in skipped]
    assert calls(skipped)[1] < 0.95 * calls(asked)[1]


@pytest.mark.parametrize("draft", ["model", "ngram", "layers:2"])
def test_known_rows_raise_tokens_per_pass_of_the_built_in_pair(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searched with four beams, token for token as transformers does."""
    tiny = ModelPair.tiny()
    pair = ModelPair(tiny.target, tiny.draft if draft == "model" else draft, tiny.tokenizer)
    prompts = [prompt.tokens for prompt in StdlibTask(prompt_tokens=32).prompts("val", 4, tiny.tokenizer)]
    config = settings("searched", 4, 8, 3, 24)
    decoder = DSBDDecoder(pair, config)
    reused = decoder.generate(prompts)
    forgetful(monkeypatch)
    fresh = decoder.generate(prompts)
    for prompt, *both in zip(prompts, reused, fresh, strict=True):
        expected, _ = transformers_search(pair, prompt, config)
        assert all([tuple(tokens) for tokens in result.sequences] == expected for result in both)
    assert calls(reused)[0] < 0.95 * calls(fresh)[0]
