"""An inflated model says what the small one says, token for token; what would break that is caught."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from decoding import DecodingConfig, DSBDDecoder, FixedWidth, ModelPair, UserError, beam_sample
from decoding.pairs import inflate
from decoding.pairs.inflate import SHAPES, Shape, shape_of
from decoding.support.entry import CONF_DIR
from decoding.support.settings import check_settings
from tests.decoding.stubs import settings

GROUPED = Shape(
    384, 9, 16, 4, 64, 704, 3000
)  # larger groups, further layers; the target's head size, twice the draft's
SHAPE_CASES = {
    "grouped": GROUPED,
    "multi-head": Shape(320, 7, 5, 5, 64, 640, 2500),  # every query head needs a key-value head of its own
    "split groups": Shape(288, 7, 9, 9, 128, 640, 2049),  # wider heads, one padded token
    "tied": Shape(512, 8, 8, 4, 128, 1024, 4096, tie_word_embeddings=True),
    "own size": Shape(256, 7, 4, 2, 64, 640, 2048, tie_word_embeddings=True),  # nothing to pad in the target
    "uneven groups": Shape(260, 7, 20, 5, 192, 641, 2050),
}


@pytest.fixture(scope="module")
def tokens(tiny_pair: ModelPair) -> Tensor:
    """A prompt on which the models are neither sure nor lost; [1, T]."""
    code = "import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n        return list(file)\n" * 3
    return torch.tensor(tiny_pair.tokenizer(code)["input_ids"])[None, :96]


@torch.no_grad()
def log_probs(model: Any, tokens: Tensor) -> Tensor:
    """[1, T] -> [T, V] float32."""
    return model(input_ids=tokens).logits[0].float().log_softmax(-1)


def distance(model: Any, wide: Any, tokens: Tensor) -> float:
    """Largest difference of log-probabilities over the small model's vocabulary; padded tokens must be impossible."""
    expected, found = log_probs(model, tokens), log_probs(wide, tokens)
    vocabulary = expected.shape[-1]
    assert (found[:, vocabulary:].exp() == 0).all()
    return (found[:, :vocabulary] - expected).abs().max().item()


# Log-probabilities go down to about -40; float32 holds such numbers to 4e-6, and sums over 256 products and 7 layers in
# another order lose a few times that. Measured 2.5e-5 at worst; the mistakes below give more than 5, a wrong eps less.
SAME = 1e-4


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("shape", SHAPE_CASES.values(), ids=SHAPE_CASES)
def test_distributions_are_the_small_models(tiny_pair: ModelPair, tokens: Tensor, shape: Shape, role: str) -> None:
    model = getattr(tiny_pair, role)
    wide = inflate.inflate(model, shape)
    assert distance(model, wide, tokens) < SAME
    assert all(weight.isfinite().all() for weight in wide.parameters())
    assert sum(weight.numel() for weight in wide.parameters()) == shape.parameters
    assert (wide.lm_head.weight is wide.model.embed_tokens.weight) == shape.tie_word_embeddings


def untied_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)
    rest: dict[str, Any] = dict(intermediate_size=24, vocab_size=30, tie_word_embeddings=False, initializer_range=0.3)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **rest, **changes})).eval()
    with torch.no_grad():  # norms that do something
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def test_any_plain_llama_will_do() -> None:
    """Untied, one key-value head for all queries, an eps large enough to be seen, another base of the rotary angles."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    model = untied_llama(rms_norm_eps=0.3, rope_parameters=rope)
    tokens = torch.randint(0, 30, (1, 40), generator=torch.Generator().manual_seed(0))
    for shape in (Shape(24, 3, 8, 4, 12, 24, 64), Shape(48, 2, 4, 4, 4, 40, 31), Shape(16, 2, 4, 1, 4, 24, 30)):
        assert distance(model, inflate.inflate(model, shape), tokens) < SAME


BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "query scale forgotten": ("query_scale", lambda d, wide_d: 1.0),
    "rotary pairs not spread": (
        "rotary_indices",
        lambda d, wide_d: torch.cat([torch.arange(d // 2), torch.arange(d // 2) + wide_d // 2]),
    ),
    "head not taken apart": ("rotary_indices", lambda d, wide_d: torch.arange(d)),
    "queries in a wrong group": ("query_indices", lambda heads, kv_heads, group: (torch.arange(heads), 1)),
}


@pytest.mark.parametrize(("name", "broken"), BROKEN.values(), ids=BROKEN)
def test_mistakes_are_caught(
    tiny_pair: ModelPair, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., Any]
) -> None:
    """The comparison above fails for each step that could be forgotten."""
    monkeypatch.setattr(inflate, name, broken)
    assert distance(tiny_pair.draft, inflate.inflate(tiny_pair.draft, GROUPED), tokens) > 0.1


def test_padding_that_is_not_held_down_is_caught(
    tiny_pair: ModelPair, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflate, "_PAD_LOGIT", 0.0)
    with pytest.raises(AssertionError, match="== 0"):
        distance(tiny_pair.draft, inflate.inflate(tiny_pair.draft, GROUPED), tokens)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["eps not scaled", "constant not taken out"])
def test_a_wrong_eps_is_caught(share: float) -> None:
    """With an eps of visible size; the built-in pair's is too small to show it."""
    model, shape = untied_llama(rms_norm_eps=0.3), Shape(64, 2, 4, 1, 4, 24, 31)
    tokens = torch.randint(0, 30, (1, 40), generator=torch.Generator().manual_seed(0))
    wide = inflate.inflate(model, shape)
    assert distance(model, wide, tokens) < SAME
    for module in wide.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.3 * (1 if share == 0 else 16 / 64)
    assert distance(model, wide, tokens) > 0.01


@pytest.mark.parametrize(("dtype", "loss"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_half_precision_is_close(
    tiny_pair: ModelPair, tokens: Tensor, role: str, dtype: torch.dtype, loss: float
) -> None:
    """Mean total variation from float32; the small models' own rounding costs 0.004 and 0.006 in bf16, 1/8 in fp16."""
    for shape in (GROUPED, SHAPE_CASES["tied"]):
        wide = inflate.inflate(getattr(tiny_pair, role), shape, dtype=dtype)
        expected, found = log_probs(getattr(tiny_pair, role), tokens).exp(), log_probs(wide, tokens).exp()
        assert (found[:, 2048:] == 0).all()
        assert 0.5 * (found[:, :2048] - expected).abs().sum(-1).mean() < loss
        assert wide.dtype == dtype and wide.model.rotary_emb.inv_freq.dtype == torch.float32


def inflated_pair(**changes: Any) -> ModelPair:
    sizes = {"target_size": asdict(GROUPED), "draft_size": asdict(SHAPE_CASES["tied"]) | {"vocab_size": 3000}}
    return ModelPair.inflated(**{**sizes, "device": "cpu", "dtype": "float32", **changes})


def test_beams_are_the_built_in_pairs(tiny_pair: ModelPair) -> None:
    """Same seed, same beams: the forest sees no difference either."""
    pair = inflated_pair()
    config = settings(3, 5, 3, 24, eos_token_id=None, top_k=10)
    prompts = [tiny_pair.tokenizer("import os\n\n\ndef read_lines(path):\n")["input_ids"]]
    decoded = [
        DSBDDecoder(p, config, FixedWidth()).generate(prompts, torch.Generator().manual_seed(1))[0]
        for p in (tiny_pair, pair)
    ]
    assert decoded[0].sequences == decoded[1].sequences
    assert decoded[0].stats.accepted == decoded[1].stats.accepted
    assert decoded[0].scores == pytest.approx(decoded[1].scores, abs=1e-3)
    alone = [beam_sample(p.target, prompts, config, torch.Generator().manual_seed(1))[0] for p in (tiny_pair, pair)]
    assert alone[0].sequences == alone[1].sequences


def test_the_pair_says_what_it_is(tiny_pair: ModelPair) -> None:
    pair = inflated_pair()
    about = json.loads(json.dumps(pair.describe()))
    assert pair.name == about["name"] == "inflated-custom-custom"
    assert "not trained models of these sizes" in about["note"]
    assert "note" not in tiny_pair.describe()
    assert (pair.vocab_size, pair.context) == (3000, inflate.CONTEXT)
    assert len(pair.tokenizer) == len(tiny_pair.tokenizer)
    for role in ("target", "draft"):
        model, small = getattr(pair, role), getattr(tiny_pair, role)
        assert model.generation_config.eos_token_id == small.generation_config.eos_token_id
        assert model.config.eos_token_id == small.config.eos_token_id
        assert not model.training
    assert inflated_pair(dtype="bfloat16").fingerprint == pair.fingerprint != tiny_pair.fingerprint


PUBLISHED = {  # parameters, from the safetensors headers on the hub
    "13b": 13_015_864_320,
    "8b": 8_030_261_248,
    "1b": 1_235_814_400,
    "160m": 162_417_408,
    "68m": 68_030_208,
}


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_their_sizes(tiny_pair: ModelPair, name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        wide = LlamaForCausalLM(LlamaConfig(**asdict(shape)))
    counted = sum(weight.numel() for weight in wide.parameters())
    assert counted == shape.parameters
    assert counted == pytest.approx(PUBLISHED.get(name, 400e6), rel=0.01 if name in PUBLISHED else 0.05)
    inflate._check_shape(tiny_pair.draft.config, shape)
    if name != "68m":
        inflate._check_shape(tiny_pair.target.config, shape)


def llama_like(**changes: Any) -> dict[str, Any]:
    return asdict(GROUPED) | changes


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ("9b", "The size '9b' is not known; choose one of 13b, 8b, 1b"),
        ("68m", "num_hidden_layers is 2, but the model to be inflated has 7: give at least 7"),
        ({"hidden_size": 8}, "A shape takes hidden_size, .*; num_hidden_layers is missing, .*vocab_size is missing"),
        (llama_like(heads=3), "heads is unknown"),
        (llama_like(head_dim=0), "head_dim of a shape is 0; give a whole number"),
        (llama_like(head_dim=64.0), r"head_dim of a shape is 64\.0; give a whole number"),
        (llama_like(tie_word_embeddings=1), "tie_word_embeddings of a shape is 1; choose one of True, False"),
        (llama_like(num_key_value_heads=3), r"num_attention_heads \(16\) is no multiple of num_key_value_heads \(3\)"),
        (llama_like(hidden_size=390), r"hidden_size \(390\) is no multiple of num_attention_heads \(16\)"),
        (llama_like(head_dim=65), "head_dim is 65; rotary positions turn pairs"),
        (llama_like(head_dim=96), "head_dim is 96, no multiple of the model's 64.* Give 64, 128"),
        (llama_like(hidden_size=128), "hidden_size is 128, but the model to be inflated has 256"),
        (llama_like(hidden_size=256), "vocab_size 3000 pads the model's 2048.* give at least 257"),
        (llama_like(vocab_size=2000), "vocab_size is 2000, but the model to be inflated has 2048"),
        (llama_like(num_attention_heads=3, num_key_value_heads=3), "num_attention_heads is 3, but the model"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(tiny_pair: ModelPair, shape: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        inflate.inflate(tiny_pair.target, shape_of(shape))
    assert "\n" not in str(refusal.value)


def test_key_value_heads_are_copied_if_there_is_room() -> None:
    """Three queries a group, where the shape has two: every key-value head is needed twice."""
    model = untied_llama(num_attention_heads=6, num_key_value_heads=2, head_dim=4, hidden_size=24)
    tokens = torch.randint(0, 30, (1, 40), generator=torch.Generator().manual_seed(0))
    assert distance(model, inflate.inflate(model, Shape(32, 2, 8, 4, 4, 24, 40)), tokens) < SAME
    with pytest.raises(UserError, match=r"num_key_value_heads is 3 with 2 query heads each; .* need 4 such groups"):
        inflate.inflate(model, Shape(30, 2, 6, 3, 4, 24, 40))


def test_other_models_are_refused() -> None:
    for changes in (
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ):
        with pytest.raises(UserError, match="it takes a Llama with silu, without biases"):
            inflate.inflate(untied_llama(**changes), Shape(24, 3, 8, 4, 4, 24, 64))
    with pytest.raises(UserError, match="embeddings are not tied"):
        inflate.inflate(untied_llama(), Shape(24, 3, 8, 4, 4, 24, 64, tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_size": "8b", "draft_size": "68m"}, "target_size 8b has 128256 tokens, draft_size 68m has 32000"),
        ({"target_size": "huge"}, "The size 'huge' is not known"),
        ({"dtype": "auto"}, "dtype is 'auto'; choose one of float32, bfloat16, float16"),
        ({"device": "cuda:99"}, "device is 'cuda:99' but this machine has"),
    ],
    ids=str,
)
def test_impossible_pairs_are_refused_before_anything_is_built(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        inflated_pair(**changes)


def test_shapes_can_be_given_on_the_command_line() -> None:
    dimensions = json.dumps(asdict(GROUPED)).replace('"', "")
    sizes = [f"pair.target_size={dimensions}", f"pair.draft_size={dimensions}"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("evaluate", ["pair=inflated", *sizes, "pair.device=cpu", "pair.dtype=float32"])
    check_settings(cfg.pair)
    pair = instantiate(cfg.pair)
    assert pair.describe()["models"]["draft"]["parameters"] == GROUPED.parameters


def test_the_spare_constant_is_exact_in_every_dtype(tiny_pair: ModelPair) -> None:
    wide = inflate.inflate(tiny_pair.target, GROUPED)
    constant = wide.model.embed_tokens.weight[0, 256].item()
    assert constant > 0 and math.log2(constant).is_integer()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.tensor(constant, dtype=dtype).item() == constant
    assert constant**2 < tiny_pair.target.config.rms_norm_eps * 256


def test_padded_tokens_are_never_drawn() -> None:
    """With nothing cut off, all 952 padded tokens stand in the joint distribution, with nothing to be drawn for."""
    pair = inflated_pair()
    config = DecodingConfig(target_width=4, draft_width=8, draft_depth=2, max_new_tokens=16, num_return_sequences=4)
    results = DSBDDecoder(pair, config).generate([[1, 2, 3]] * 4, torch.Generator().manual_seed(0))
    assert max(token for result in results for sequence in result.sequences for token in sequence) < 2048


@pytest.mark.gpu
@pytest.mark.slow
def test_real_sizes_on_a_gpu(tiny_pair: ModelPair, tokens: Tensor) -> None:
    """8B and 1B parameters: nothing beyond the weights is allocated to make them, and both still say the same."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pair = ModelPair.inflated("8b", "1b", device="cuda", dtype="bfloat16")
    weights = 2 * (SHAPES["8b"].parameters + SHAPES["1b"].parameters)
    # to_empty makes the 1B model's tied rows twice (0.5 GB) before they are tied again
    assert torch.cuda.max_memory_allocated() - before < 1.05 * weights
    for role in ("target", "draft"):
        expected = log_probs(getattr(tiny_pair, role), tokens).exp()
        found = log_probs(getattr(pair, role), tokens.cuda()).exp().cpu()
        assert (found[:, 2048:] == 0).all()
        assert 0.5 * (found[:, :2048] - expected).abs().sum(-1).mean() < 0.02  # as in the smaller shapes
