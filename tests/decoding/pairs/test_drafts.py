"""Drafts of every kind through all that surrounds decoding: traces, controllers, latencies, bench, command lines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from controller import LearnedWidth, WidthNet
from controller.data import TraceDataModule
from decoding import DSBDDecoder, ModelPair, RandomWidth, UserError, beam_sample, bench
from decoding.collect import ensure_traces
from decoding.forest.scorer import ForestScorer
from decoding.machine.seconds import measure_seconds
from decoding.pairs.drafts import NodeScorer
from decoding.pairs.drafts.mixed import MixedScorer
from decoding.pairs.drafts.ngram import NgramScorer
from decoding.support.entry import CONF_DIR
from decoding.support.settings import check_settings
from tests.decoding.engine.test_graphs import PROMPTS, assert_same, graphed, seeded, static_runs
from tests.decoding.engine.test_vocabulary import tokenizer
from tests.decoding.feature_draft import FeatureScorer
from tests.decoding.loop.test_exactness import settings
from tests.decoding.stubs import FixedTask, small_llama
from tests.decoding.test_bench import config as bench_config
from tests.decoding.test_bench import read

KINDS = ("model", "layers:1", "ngram", "ngram+layers:1", "fewer tokens")


def pair_with(draft: str) -> ModelPair:
    """A small pair; the draft "turned" has the target's tokens under other ids."""
    if draft == "turned":
        words = [f"w{i}" for i in range(40)]
        tokenizers = tokenizer(words), tokenizer(words[7:][::-1] + words[:7])
        return ModelPair(small_llama(40), small_llama(40, seed=1), tokenizers[0], draft_tokenizer=tokenizers[1])
    others = {"model": small_llama(40, seed=1), "fewer tokens": small_llama(34, layers=1, seed=1)}
    return ModelPair(small_llama(40), others.get(draft, draft), name="small")


@pytest.mark.parametrize("scorer", [ForestScorer, NgramScorer, FeatureScorer, MixedScorer])
def test_scorers_keep_to_the_protocol(scorer: type) -> None:
    """The type checker sees this where they are used; here, that names and parameters are the protocol's."""
    for name, asked in inspect.getmembers(NodeScorer, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(scorer, name)).parameters) == list(
                inspect.signature(asked).parameters
            )


# ------------------------------------------------------------------------------------------ engines


@pytest.mark.parametrize("engine", ["auto", "transformers"])
@pytest.mark.parametrize("draft", ["turned", "fewer tokens", "layers:1"])
@pytest.mark.parametrize("how", ["static", "graphs"])
def test_static_shapes_and_graphs_give_the_same_tokens(
    how: str, draft: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are mapped outside the captured pass: fillers, and outputs that the next replay overwrites, do no harm."""
    pair = pair_with(draft)
    pair = ModelPair(pair.target, pair.draft, pair.tokenizer, engine=engine, draft_tokenizer=pair.draft_tokenizer)
    decoder = DSBDDecoder(pair, settings(3, 5, 2, 12), RandomWidth())
    expected = decoder.generate(PROMPTS, seeded())
    (graphed if how == "graphs" else static_runs)(pair, monkeypatch)
    assert_same(decoder.generate(PROMPTS, seeded()), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("draft", KINDS)
def test_a_gpu_decodes_with_every_kind(draft: str) -> None:
    """Under CUDA graphs, on the host's and on the device's path; blocks of the target are not laid out twice."""
    here = pair_with(draft)
    target = here.target.cuda()
    other = (draft if draft in ("layers:1", "ngram", "ngram+layers:1") else None) or here.draft.cuda()
    pair = ModelPair(target, other, here.tokenizer, draft_tokenizer=here.draft_tokenizer)
    for config in (settings(2, 3, 2, 8), settings(2, 3, 2, 8, top_k=4)):
        decoder = DSBDDecoder(pair, config)
        first = decoder.generate(PROMPTS, seeded())
        weights = [p.data_ptr() for p in pair.target.parameters()]
        assert_same(decoder.generate(PROMPTS, seeded()), first)
        assert [p.data_ptr() for p in pair.target.parameters()] == weights
        assert {len(result.sequences[0]) for result in first} == {8}


# ----------------------------------------------------------------------------- traces and controllers


def traces_config(directory: Path, draft: str) -> DictConfig:
    return OmegaConf.create(
        {
            "pair": {"_target_": f"{__name__}.pair_with", "draft": draft},
            "data": {"_target_": f"{FixedTask.__module__}.FixedTask"},
            "features": {"_target_": "controller.features.ContextFeatures"},
            "policy": {"_target_": "decoding.ExploringWidth", "seed": 0},
            "decoding": {
                "_target_": "decoding.DecodingConfig",
                "target_width": 3,
                "draft_width": 5,
                "draft_depth": 2,
                "max_new_tokens": 12,
                "eos_token_id": -1,
                "verification": "shared_noise",
            },
            "collect": {
                "traces_dir": str(directory),
                "train_prompts": 3,
                "val_prompts": 2,
                "batch_size": 2,
            },
            "seed": 0,
        }
    )


@pytest.mark.parametrize("draft", KINDS)
def test_traces_and_a_controller_of_every_kind(draft: str, tmp_path: Path) -> None:
    """Collected, read, and decided by; a controller of one draft is refused with another."""
    cfg = traces_config(tmp_path, draft)
    data = TraceDataModule(ensure_traces(cfg), batch_size=8)
    assert data.target_width == 3 and len(data.rows["train"]) > len(data.rows["val"]) > 0
    pair, config = pair_with(draft), instantiate(cfg.decoding)
    about = {"pair": pair.describe(), "features": data.manifest["features"], "decoding": data.manifest["decoding"]}
    learned = LearnedWidth(WidthNet(data.target_width), about, latency=measure_seconds(pair, 8, repeats=1))
    (result,) = DSBDDecoder(pair, config, learned).generate([[1, 2, 1, 2]], seeded())
    (alone,) = beam_sample(pair.target, [[1, 2, 1, 2]], config, seeded())
    assert result.sequences == alone.sequences and len(result.sequences[0]) == 12
    other = next(kind for kind in KINDS if kind != draft)
    with pytest.raises(UserError, match="The controller was trained for the pair 'small'"):
        DSBDDecoder(pair_with(other), config, learned)


def test_the_refusal_says_which_draft() -> None:
    learned = LearnedWidth.__new__(LearnedWidth)
    learned.provenance = {"pair": pair_with("ngram").describe()}
    with pytest.raises(UserError, match=r"'small' with draft=ngram:3 \(\w+\), not for 'small' with draft=layers:1"):
        learned.check_pair(pair_with("layers:1"))


def test_latencies_of_every_kind_and_of_none() -> None:
    for draft in KINDS:
        table = measure_seconds(pair_with(draft), 8, repeats=1)
        assert len(table.draft) == len(table.target) and all(seconds > 0 for seconds in table.draft)
    with pytest.raises(UserError, match="A latency table needs a draft"):
        measure_seconds(ModelPair(small_llama(40), None))
    with pytest.raises(UserError, match="Traces are logged of a target with a draft"):
        ensure_traces(traces_config(Path("nowhere"), "model"), ModelPair(small_llama(40), None))


# ------------------------------------------------------------------------------------------- bench


def test_bench_rows_of_every_kind(tmp_path: Path) -> None:
    fixed = "method: fixed, target_width: 2, draft_width: 3, draft_depth: 2"
    rows = (f"{{{fixed}}}", f"{{{fixed}, draft: ngram}}", f"{{{fixed}, draft: layers:1}}")
    rows += ("{method: hf_assisted, draft: ngram:2}", f"{{{fixed}, draft: ngram, batch_size: 2}}")
    bench.main(bench_config(tmp_path, "roofline=false", "profile=true", "profile_row=1", "profile_tokens=2", rows=rows))
    found = read(tmp_path)
    assert [row["error"] for row in found["rows"]] == [None] * 5
    name = "fixed M=2 w=3 γ=2"
    assert [row["name"] for row in found["rows"]] == [
        name,
        f"{name} draft=ngram",
        f"{name} draft=layers:1",
        "hf_assisted M=1 draft=ngram:2",
        f"{name} draft=ngram, batch 2",
    ]
    assert [row["draft"] for row in found["rows"]] == [None, "ngram", "layers:1", "ngram:2", "ngram"]
    assert found["profile"]["row"] == f"{name} draft=ngram"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{method: beam_sample, draft: ngram}", r"rows\[0\].draft is not a setting of beam_sample"),
        ("{method: hf_sample, draft: ngram}", r"rows\[0\].draft is not a setting of hf_sample"),
        ("{method: fixed, draft: 3}", r"rows\[0\].draft is 3; give text"),
        ("{method: fixed, draft: trigram}", "draft is 'trigram'; give a model, or layers:N"),
        ("{method: fixed, draft: layers:2}", "draft is 'layers:2', but the target .* give layers:1 to layers:1"),
    ],
)
def test_bench_rows_that_cannot_be(row: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        bench.main(bench_config(tmp_path, rows=(row,)))


# ------------------------------------------------------------------------------------ command lines


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("collect", list(overrides))
    check_settings(OmegaConf.create({"pair": cfg.pair}))
    return cfg.pair


@pytest.mark.parametrize("draft", ["layers:2", "ngram", "ngram:4", "ngram:3+layers:2"])
def test_pairs_take_a_draft_on_the_command_line(draft: str) -> None:
    pair = instantiate(composed(f"pair.draft={draft}"))
    assert pair.draft_name == ("ngram:3" if draft == "ngram" else draft)
    for group in ("pair=local pair.target=x", "pair=qwen25_3b", "pair=llama3_8b"):
        assert composed(*group.split(), f"pair.draft={draft}").draft == draft
    assert instantiate(composed()).draft_name == "model"


def test_inflated_pairs_take_ngrams_only() -> None:
    shape = dict(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=768,
        vocab_size=2048,
    )
    pair = ModelPair.inflated(shape, shape, device="cpu", dtype="float32", draft="ngram")
    assert pair.draft_name == "ngram:3" and pair.name == "inflated-custom-ngram" and list(pair.models) == ["target"]
    with pytest.raises(UserError, match=r"draft is 'layers:2'; an inflated pair takes ngram, ngram:N, or null"):
        ModelPair.inflated(shape, shape, device="cpu", dtype="float32", draft="layers:2")


def test_traces_of_beam_search_are_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    cfg = traces_config(tmp_path, "model")
    cfg.decoding.mode = "beam_search"
    with pytest.raises(UserError, match="traces are logged of shared noise"):
        ensure_traces(cfg)
    assert not any(tmp_path.iterdir())
