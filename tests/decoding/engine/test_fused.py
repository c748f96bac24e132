"""FusedForward computes what the model's own forward computes, for every family and shape that it takes; it refuses
the rest, follows changes of the weights, and leaves the model as it was.

All parameters are random, norms and biases too, so that a norm or a bias that is left out or taken twice shows.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from decoding import DecodingConfig, DSBDDecoder, ModelPair, beam_sample
from decoding.engine import fused
from decoding.engine.forward import PassInputs
from decoding.engine.fused import FusedForward, can_fuse
from decoding.engine.runner import runner_of
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from tests.decoding.engine.test_families import largest_difference
from tests.decoding.stubs import in_16_bits

VOCABULARY = 23
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=False,
)
ROPE = {"rope_theta": 100.0}  # short waves, so that positions matter within a few tokens


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "rope_parameters": {"rope_type": "default", **ROPE}, **changes}))


def scaled(rope_type: str, **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "factor": 4.0, **ROPE, **changes}}


LLAMA3 = scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES: dict[str, Callable[[], Any]] = {
    "grouped heads": llama,
    "one key head": lambda: llama(num_key_value_heads=1),
    "all heads": lambda: llama(num_key_value_heads=4),
    "wide heads": lambda: llama(head_dim=16),
    "narrow heads": lambda: llama(head_dim=4),
    "tied": lambda: llama(tie_word_embeddings=True),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "large epsilon": lambda: llama(rms_norm_eps=0.5),
    "llama3": lambda: llama(**LLAMA3),
    "linear": lambda: llama(**scaled("linear")),
    "yarn": lambda: llama(**scaled("yarn", original_max_position_embeddings=32)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None, head_dim=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "tie_word_embeddings": True})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "qwen3, wide heads": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=12, rms_norm_eps=0.1)),
}


def randomised(model: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Every parameter random, norm weights around one; sharp enough that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.4 * noise if "norm" in name else 0.3 * noise)
    return model.to(dtype).eval()


def made(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return randomised(FAMILIES[family](), dtype, seed)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


@torch.inference_mode()
def own_logits(model: Any, tokens: list[int]) -> Tensor:
    """All positions' logits from a plain pass, [T, V]."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@torch.inference_mode()
def fused_pass(model: Any, tokens: list[int], row: int = 1) -> tuple[Tensor, Tensor]:
    """Logits and hidden states of a prompt in a row of a larger buffer, the second half in a pass of its own."""
    forward = FusedForward(model)
    store = forward.new_store(3, 64)
    found = []
    for first, last in ((0, len(tokens) // 2), (len(tokens) // 2, len(tokens))):
        positions = torch.arange(first, last)
        hidden = torch.finfo(model.dtype).min
        mask = torch.zeros(last - first, 64, dtype=model.dtype)
        mask.masked_fill_(torch.arange(64) > positions[:, None], hidden)
        inputs = PassInputs(
            torch.tensor(tokens[first:last]), positions, positions + row * 64, mask[None, None], row, hidden=True
        )
        found.append(forward(inputs, store))
    hidden_states = [output.hidden for output in found if output.hidden is not None]
    return torch.cat([output.logits for output in found]), torch.cat(hidden_states)


# float32: sums of up to 40 terms in other orders, through three layers, on logits of some units: at worst 3e-5 is seen.
CLOSE = dict(atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_pass_is_the_models_own(family: str) -> None:
    model, tokens = made(family), tokens_of(30)
    assert can_fuse(model)
    logits, hidden = fused_pass(model, tokens)
    torch.testing.assert_close(logits, own_logits(model, tokens), **CLOSE)
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(hidden, states, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_forests_of_several_rows_are_scored_as_sequences(family: str) -> None:
    model = made(family)
    assert largest_difference(model) < CLOSE["atol"]
    assert runner_of(model, "auto").forward.name.startswith("fused")


def error_of(logits: Tensor, exact: Tensor) -> float:
    return float((logits.float() - exact).pow(2).mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_the_models_own(family: str) -> None:
    """Both round every product and sum to 8 bits, in places of their own choosing: neither is the other's reference.

    So the reference is float32 with the same (rounded) weights. Root mean square errors of 30 x 23 logits scatter by a
    few per cent where errors are independent; as they grow through three layers together, 1.5 times is the margin. A
    wrong norm, bias or rotation is an error as large as the logits themselves, some 30 times more.
    """
    model, tokens = made(family, torch.bfloat16), tokens_of(30)
    assert can_fuse(model)
    exact = own_logits(copy.deepcopy(model).float(), tokens)
    own = error_of(own_logits(model, tokens), exact)
    fused = error_of(fused_pass(model, tokens)[0], exact)
    assert fused < 1.5 * own
    assert own < 0.2 * float(exact.std()), "rounding must stay far below the logits for this to say anything"


def held(weight: Tensor) -> bool:
    return fused._halves(weight) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_16_bits_are_held_in_16_bits_and_say_the_same(family: str) -> None:
    """Float32 is what they are computed with: as close as the test above, where nothing is rounded."""
    model, tokens = in_16_bits(made(family)), tokens_of(30)
    layer = FusedForward(model)._layers[1]
    if fused._multiplies_halves():
        parts = inspect.getclosurevars(layer.qkv), inspect.getclosurevars(layer.gate_up)
        assert all("packed" in part.nonlocals and "bias" not in part.nonlocals for part in parts)
    logits, _ = fused_pass(model, tokens)
    torch.testing.assert_close(logits, own_logits(model, tokens), **CLOSE)
    assert largest_difference(model) < CLOSE["atol"]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert not held(model.model.layers[1].mlp.up_proj.weight), "16 bits no longer hold it"
    torch.testing.assert_close(fused_pass(model, tokens)[0], own_logits(model, tokens), **CLOSE)


@pytest.mark.parametrize("error", [RuntimeError("not supported by QNNPACK"), AttributeError("no such operator")])
def test_without_the_kernel_weights_are_laid_out_as_before(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise error

    fused._multiplies_halves.cache_clear()
    monkeypatch.setattr(torch.ops.quantized, "linear_prepack_fp16", missing)
    try:
        model, tokens = in_16_bits(made("grouped heads")), tokens_of(30)
        assert not fused._multiplies_halves() and not held(model.lm_head.weight)
        torch.testing.assert_close(fused_pass(model, tokens)[0], own_logits(model, tokens), **CLOSE)
    finally:
        fused._multiplies_halves.cache_clear()


@pytest.mark.skipif(not fused._multiplies_halves(), reason="this torch has no FBGEMM")
def test_what_16_bits_hold() -> None:
    """Whatever float16 or bfloat16 can say, however small or large it is as a whole; nothing else."""
    noise = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 1e-9, 1.0, 1e4, 1e30):
        assert held((noise * scale).bfloat16().float()) and not held(noise * scale)
    tiny = noise.half().float()
    tiny[0, :3] = torch.tensor([6e-8, 1e-7, -3e-6])  # float16's smallest
    tiny[0, :3] = tiny[0, :3].half().float()
    assert held(tiny) and held(tiny * 2**20)
    wide = noise.bfloat16().float()
    wide[0, 0] = 1e-12  # of the largest 2^-42: nothing that a sum in float32 could show
    assert held(wide)
    one = tiny.clone()
    one[7, 5] += 2**-12
    assert not held(one), "a single weight that would be another"
    one = noise.bfloat16().float()
    one[0, 0], one[7] = 2.0**16, 2.0**-20 * noise[7]
    assert not held(one), "a row that is small beside another one counts for itself"
    for odd in (math.inf, math.nan):
        one[7, 5] = odd
        assert not held(one)
    assert not held(torch.zeros(3, 4)) and not held(noise.bfloat16()) and not held(noise.double())


@pytest.mark.skipif(not fused._multiplies_halves(), reason="this torch has no FBGEMM")
@pytest.mark.parametrize("rows", [1, 3, 4, 17, 200])
def test_products_of_held_weights_are_as_exact_as_float32s(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = (0.02 * torch.randn(96, 640, generator=generator)).bfloat16().float()
    x, bias, base = (torch.randn(*size, generator=generator) for size in ((rows, 640), (96,), (rows, 96)))
    exact = x.double() @ weight.double().T
    plain = (torch.nn.functional.linear(x, weight).double() - exact).abs().max()
    for given in (None, bias):
        added = exact if given is None else exact + bias.double()
        assert (fused.linear(weight, given)(x).double() - added).abs().max() < 6 * plain + 1e-6
        more = fused.residual(weight, given)(x, base.clone()).double()
        assert (more - added - base.double()).abs().max() < 6 * plain + 1e-6


@pytest.mark.parametrize("family", ["grouped heads", "qwen3"])
def test_a_fault_is_far_beyond_the_tolerances(family: str) -> None:
    """What the tests above would see of a norm that is left out, or of a rotation that is off by one position."""
    model, tokens = made(family), tokens_of(30)
    exact = own_logits(model, tokens)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].post_attention_layernorm.weight.fill_(1)
    assert float((fused_pass(broken, tokens)[0] - exact).abs().max()) > 0.5
    shifted = fused_pass(model, [0, *tokens])[0][1:]
    assert float((shifted - exact).abs().max()) > 0.5


# What is not fused.


class Adapter(nn.Linear):
    """As adapters replace a projection: a Linear by inheritance, with a further term."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.low = nn.Parameter(0.1 * torch.ones(base.out_features, 1))

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) + states[..., :1] @ self.low.T


def with_hook(kind: str) -> Any:
    model = made("grouped heads")
    module = model.model.layers[1].mlp.up_proj
    if kind == "after":
        module.register_forward_hook(lambda module, args, output: 1.5 * output)
    else:
        module.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    return model


def with_adapter(place: str) -> Any:
    model = made("grouped heads")
    if place == "lm_head":
        model.lm_head = Adapter(model.lm_head)
    else:
        parent = model.model.layers[1].get_submodule(place.rpartition(".")[0])
        name = place.rpartition(".")[2]
        setattr(parent, name, Adapter(getattr(parent, name)))
    return model


class OwnRows(nn.Embedding):
    """As adapters train a few tokens: rows of their own beside the model's."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim)
        self.weight, self.rows = base.weight, nn.Parameter(torch.ones(3, base.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).index_put((ids < 3,), self.rows[ids[ids < 3]])


class Around(nn.Module):
    """The same by a module around the embedding."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + (ids < 3)[..., None].float()


def with_rows(around: Callable[[Any], nn.Module]) -> Any:
    model = made("grouped heads")
    model.set_input_embeddings(around(model.get_input_embeddings()))
    return model


class Doubled(LlamaForCausalLM):
    """A model of a family's shape whose forward is its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def mixed() -> Any:
    model = made("grouped heads")
    model.lm_head.double()
    return model


UNFUSED: dict[str, Callable[[], Any]] = {
    "hook": lambda: with_hook("after"),
    "pre-hook": lambda: with_hook("before"),
    "adapter on q": lambda: with_adapter("self_attn.q_proj"),
    "adapter on down": lambda: with_adapter("mlp.down_proj"),
    "adapter on the head": lambda: with_adapter("lm_head"),
    "trained tokens": lambda: with_rows(OwnRows),
    "trained tokens around": lambda: with_rows(Around),
    "subclass": lambda: randomised(Doubled(llama().config)),
    "gpt2": lambda: randomised(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2))),
    "other activation": lambda: randomised(llama(hidden_act="gelu")),
    "double": lambda: made("grouped heads").double(),
}


@pytest.mark.parametrize("case", UNFUSED)
def test_what_is_not_fused_runs_as_the_model_wrote_it(case: str) -> None:
    model = UNFUSED[case]()
    assert not can_fuse(model)
    assert largest_difference(model) < CLOSE["atol"]
    assert runner_of(model, "auto").forward.name.startswith("transformers")


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(**scaled("dynamic")),
        lambda: llama(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5, **ROPE}),
        mixed,
    ],
    ids=["dynamic rope", "partial rotary", "mixed dtype"],
)
def test_other_shapes_are_not_fused(make: Callable[[], Any]) -> None:
    assert can_fuse(made("grouped heads"))
    assert not can_fuse(make())


# The weights may change, and stay the model's.


def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    config = DecodingConfig(target_width=1, temperature=1e-4, max_new_tokens=8, eos_token_id=-1)
    results = beam_sample(model, prompts, config, torch.Generator().manual_seed(0))
    return [result.sequences[0] for result in results]


def greedy_by_generate(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = dict(do_sample=False, max_new_tokens=8, pad_token_id=0)
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return found


def optimizer_step(model: Any) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = torch.tensor([tokens_of(20)])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def load_another(model: Any) -> None:
    other = made("grouped heads", model.dtype, seed=5)
    model.load_state_dict(other.state_dict())


def add_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
        model.model.layers[1].mlp.gate_proj.weight.mul_(-1)


def replace_a_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(1, 0))


def replace_a_module(model: Any) -> None:
    other = made("grouped heads", model.dtype, seed=5)
    model.model.layers[1] = other.model.layers[1]


CHANGES = [optimizer_step, load_another, add_in_place, replace_a_weight, replace_a_module]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_follows_a_change_of_the_weights(change: Callable[[Any], None], dtype: torch.dtype) -> None:
    """Twice each, since the first change finds weights as fusing has left them."""
    model, prompts = made("grouped heads", dtype), [tokens_of(6), tokens_of(4, 1)]
    for _ in range(2):
        before = greedy(model, prompts)
        change(model)
        runner = runner_of(model, "auto")
        scores = ForestScorer(model, 1, 6, 8)
        with torch.inference_mode():
            scores.open(0, prompts[0], TokenForest())
        assert scores.runner is runner
        assert runner.forward.name.startswith("fused")
        after = greedy(model, prompts)
        if dtype == torch.float32:
            assert after == greedy_by_generate(model, prompts)
        logits = own_logits(model, prompts[0])[-1].float()
        # bfloat16: rounding leaves some 0.05 on logits of some 5; a stale weight leaves some units.
        margin = CLOSE if dtype == torch.float32 else dict(atol=0.5, rtol=0.0)
        torch.testing.assert_close(scores.log_probs(0, [0])[0], logits.log_softmax(-1), **margin)
        if change is not load_another and change is not replace_a_module:
            assert after != before, "the change must show"


@pytest.mark.parametrize("family", ["grouped heads", "tied", "biases", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_leaves_the_model_as_it_was(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, prompts = made(family, dtype), [tokens_of(6), tokens_of(4, 1)]
    twin, tokens = copy.deepcopy(model), tokens_of(12)
    pair = ModelPair(model, copy.deepcopy(model))
    DSBDDecoder(pair, DecodingConfig(max_new_tokens=6, eos_token_id=-1)).generate(prompts)
    assert_equal_states(model, twin)
    assert torch.equal(own_logits(model, tokens), own_logits(twin, tokens))
    assert all(weight.requires_grad and not weight.is_inference() for weight in model.parameters())
    assert all(weight.is_contiguous() for weight in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert_equal_states(loaded, twin)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_equal_states(copy.deepcopy(model), twin)
    loss = model(input_ids=torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def assert_equal_states(model: Any, other: Any) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        assert torch.equal(value, two[name]), name


def test_a_model_in_training_mode_is_decoded_without_dropout() -> None:
    """ModelPair puts models into evaluation mode; one that went back to training afterwards is fused all the same."""
    model = randomised(llama(attention_dropout=0.5))
    pair = ModelPair(model, copy.deepcopy(model))
    decoder = DSBDDecoder(pair, DecodingConfig(max_new_tokens=6, eos_token_id=-1))
    expected = decoder.generate([tokens_of(6)], torch.Generator().manual_seed(0))
    model.train()
    again = decoder.generate([tokens_of(6)], torch.Generator().manual_seed(0))
    assert again[0].sequences == expected[0].sequences


def test_engines_of_one_model_do_not_disturb_each_other() -> None:
    """Each has its own fused weights; in bfloat16 each moves the model's."""
    model, prompts = made("grouped heads", torch.bfloat16), [tokens_of(6)]
    config = DecodingConfig(target_width=2, draft_width=3, max_new_tokens=6, eos_token_id=-1)
    results = [
        beam_sample(model, prompts, config, torch.Generator().manual_seed(0), engine=engine)[0].sequences
        for engine in ("auto", "eager", "auto", "eager")
    ]
    assert results[0] == results[1] == results[2] == results[3]


def test_a_hook_set_after_the_first_decode_is_heeded() -> None:
    model, prompts = made("grouped heads"), [tokens_of(6)]
    before = greedy(model, prompts)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: -3 * output)
    assert runner_of(model, "auto").prompts.name == "transformers"
    assert greedy(model, prompts) == greedy_by_generate(model, prompts) != before
    hook.remove()
    assert greedy(model, prompts) == before


def turned_wrongly(self: FusedForward, qkv: Tensor, turns: Tensor, layer: Any) -> Tensor:
    return qkv[:, : self._heads * self._dim]


def crash(self: FusedForward, qkv: Tensor, turns: Tensor, layer: Any) -> Tensor:
    raise RuntimeError("a kernel that this machine lacks")


@pytest.mark.parametrize("fault", [turned_wrongly, crash])
def test_a_fused_pass_that_is_wrong_is_not_used(fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = made("grouped heads"), [tokens_of(6), tokens_of(4, 1)]
    monkeypatch.setattr(FusedForward, "_turned", fault)
    with pytest.warns(UserWarning, match="slower, but right"):
        assert greedy(model, prompts) == greedy_by_generate(model, prompts)
    assert runner_of(model, "auto").forward.name == "transformers"
    assert greedy(model, prompts) == greedy_by_generate(model, prompts)  # without a further warning
