"""Drafts made of the target's first layers: what they share, what they compute, exact output, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError
from decoding.engine.runner import runner_of
from decoding.measure.methods import METHODS
from decoding.pairs.drafts.early_layers import first_layers
from tests.decoding.loop.test_exactness import settings
from tests.decoding.stubs import small_llama

SMALL: dict[str, Any] = dict(vocab_size=11, bos_token_id=None, eos_token_id=None, pad_token_id=0)
LLAMA_LIKE: dict[str, Any] = SMALL | dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1
)
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**LLAMA_LIKE, head_dim=8),
    "mixtral": lambda: MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: GPT2Config(**SMALL, n_embd=16, n_layer=4, n_head=2, n_positions=64),
    "gpt_neox": lambda: GPTNeoXConfig(**LLAMA_LIKE),
    "opt": lambda: OPTConfig(
        **SMALL, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2, word_embed_proj_dim=16
    ),
    "falcon": lambda: FalconConfig(**SMALL, hidden_size=16, num_hidden_layers=4, num_attention_heads=2),
    "bloom": lambda: BloomConfig(**SMALL, hidden_size=16, n_layer=4, n_head=2),
    "mpt": lambda: MptConfig(**SMALL, d_model=16, n_layers=4, n_heads=2, max_seq_len=64),
}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


def blocks_of(model: Any) -> nn.ModuleList:
    layers = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)


@pytest.mark.parametrize("family", CONFIGS)
def test_an_exit_computes_what_the_target_would_with_the_other_blocks_gone(family: str) -> None:
    """Compared with a copy of the target whose further blocks are taken out; the target itself stays as it was."""
    target = model_of(family)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        before = target(input_ids=ids).logits
        draft = first_layers(target, 2)
        got = draft(input_ids=ids).logits
        assert torch.equal(target(input_ids=ids).logits, before)
        blocks = blocks_of(target)
        del blocks[2:]
        target.config.get_text_config().num_hidden_layers = 2
        torch.testing.assert_close(got, target(input_ids=ids).logits, atol=0, rtol=0)
    assert not torch.equal(got, before)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_the_targets_own_and_configs_are_not(family: str) -> None:
    target = model_of(family)
    draft = first_layers(target, 1)
    assert {p.data_ptr() for p in draft.parameters()} < {p.data_ptr() for p in target.parameters()}
    assert (target.config.num_hidden_layers, draft.config.num_hidden_layers) == (4, 1)
    assert (len(blocks_of(target)), len(blocks_of(draft))) == (4, 1)
    for config, count in ((target.config, 4), (draft.config, 1)):
        assert len(getattr(config, "layer_types", None) or [0] * count) == count
    draft.register_forward_pre_hook(lambda module, args: None)
    assert not target._forward_pre_hooks, "hooks on the draft are not the target's"
    with torch.no_grad():
        next(blocks_of(target)[0].parameters()).fill_(0.5)
    assert (next(blocks_of(draft)[0].parameters()) == 0.5).all(), "it follows the target"


@pytest.mark.parametrize("engine", ["auto", "eager", "transformers"])
@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - {"mpt"}))
def test_families_decode_under_every_engine(family: str, engine: str) -> None:
    pair = ModelPair(model_of(family), "layers:3", engine=engine)
    config = DecodingConfig(target_width=2, draft_width=4, draft_depth=2, max_new_tokens=12, eos_token_id=-1)
    results = DSBDDecoder(pair, config).generate([[1, 2], [3]], torch.Generator().manual_seed(0))
    assert [len(result.sequences[0]) for result in results] == [12, 12]
    assert sum(sum(result.stats.accepted) for result in results) > 0


def test_fused_passes_share_their_weights_and_are_made_once() -> None:
    """Blocks and head are laid out once for both models, and decoding again makes nothing anew."""
    pair = ModelPair(small_llama(9, layers=4), "layers:2")
    decoder = DSBDDecoder(pair, settings(2, 3, 2, 6))

    def runners() -> list[Any]:
        decoder.generate([[1, 2]], torch.Generator().manual_seed(0))
        return [runner_of(model, pair.engine) for model in pair.models.values()]

    target, draft = runners()
    assert target.prompts.name == draft.prompts.name == "fused"
    assert all(a is b for a, b in zip(target.prompts._layers, draft.prompts._layers, strict=False))
    assert target.prompts._head is draft.prompts._head
    assert len(draft.prompts._layers) == 2
    assert runners() == [target, draft]
    with torch.no_grad():
        pair.target.model.layers[0].mlp.down_proj.weight.mul_(2)
    again = runners()
    assert again[0] is not target and again[1] is not draft, "both must see the new weights"
    assert again[0].prompts._layers[0] is again[1].prompts._layers[0] is not target.prompts._layers[0]
    assert again[0].prompts._layers[3] is target.prompts._layers[3]


def test_bfloat16_weights_stay_put() -> None:
    """Where fusing moves weights (all but float32 on a CPU), a shared block is moved once, whoever comes first."""
    target = small_llama(9, layers=3).to(torch.bfloat16)
    pair = ModelPair(target, "layers:1")
    decoder = DSBDDecoder(pair, settings(2, 3, 1, 4))
    runners = []
    for _ in range(2):
        decoder.generate([[1, 2]], torch.Generator().manual_seed(0))
        runners.append([runner_of(model, pair.engine) for model in pair.models.values()])
    assert runners[0] == runners[1]
    assert {p.data_ptr() for p in pair.draft.parameters()} < {p.data_ptr() for p in target.parameters()}


@pytest.mark.parametrize("draft", ["layers:1", "ngram"])
def test_transformers_assisted_generation_takes_them_too(draft: str) -> None:
    pair = ModelPair(small_llama(9, layers=3), draft)
    generate = METHODS["hf_assisted"](pair, DecodingConfig(max_new_tokens=8, eos_token_id=-1))
    (result,) = generate([[1, 2, 1, 2]], torch.Generator().manual_seed(0))
    assert len(result.sequences[0]) == 8
    assert result.stats.draft_calls > 0 if draft == "layers:1" else result.stats.draft_calls == 0


def test_assisted_generation_refuses_other_vocabularies() -> None:
    pair = ModelPair(small_llama(9), small_llama(7))
    generate = METHODS["hf_assisted"](pair, DecodingConfig(max_new_tokens=4))
    with pytest.raises(UserError, match=r"hf_assisted needs a draft with .* has 9, the draft 7"):
        generate([[1, 2]], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [0, 3, 8])
def test_numbers_out_of_range_are_refused(count: int) -> None:
    with pytest.raises(
        UserError, match=rf"'layers:{count}', but the target \(llama\) has 3 layers; give layers:1 to l.*2"
    ):
        ModelPair(small_llama(5, layers=3), f"layers:{count}")


def test_models_that_cannot_be_taken_apart_are_refused() -> None:
    wrapped = small_llama(5, layers=3)
    wrapped.model.forward = wrapped.model.forward
    with pytest.raises(UserError, match=r"forward is wrapped, as device_map .* Load it on one device"):
        first_layers(wrapped, 1)

    class Twice(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.others = nn.ModuleList(nn.Identity() for _ in range(config.num_hidden_layers))

    with pytest.raises(UserError, match=r"exactly one must have 3 blocks, which model\.layers, others have"):
        first_layers(Twice(small_llama(5, layers=3).config), 1)
    bare = small_llama(5, layers=3)
    bare.model.layers = nn.Sequential(*bare.model.layers)
    with pytest.raises(UserError, match="exactly one must have 3 blocks, which none has"):
        first_layers(bare, 1)


def test_the_built_in_target_drafts_for_itself() -> None:
    pair = ModelPair.tiny(draft="layers:2")
    assert pair.name == "tiny-layers2" and pair.draft_name == "layers:2"
    about = pair.describe()["models"]
    assert about["draft"]["layers"] == 2 and about["draft"]["parameters"] < about["target"]["parameters"]
    assert ModelPair.tiny(draft="ngram:2").name == "tiny-ngram2"
    assert len({ModelPair.tiny(draft=draft).fingerprint for draft in (None, "layers:2", "layers:3", "ngram")}) == 4


def test_saved_models_take_drafts_without_a_checkpoint(tmp_path: Any) -> None:
    from tests.decoding.engine.test_vocabulary import saved, tokenizer

    directory = saved(small_llama(8, layers=3), tokenizer("abcdefgh"), tmp_path / "big")
    for draft, name in (("layers:2", "big-layers2"), ("ngram:2", "big-ngram2"), ("ngram", "big-ngram")):
        pair = ModelPair.load(directory, draft, device="cpu", dtype="float32")
        assert pair.name == name
        (result,) = DSBDDecoder(pair, settings(2, 3, 2, 5)).generate([[1, 2]], torch.Generator().manual_seed(0))
        assert len(result.sequences[0]) == 5
    assert pair.with_draft("layers:1").draft_name == "layers:1"
    with pytest.raises(UserError, match="draft is 'layers:9', but the target"):
        ModelPair.load(directory, "layers:9", device="cpu", dtype="float32")
