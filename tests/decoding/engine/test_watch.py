"""Watch: a fused copy goes when the model's weights or settings change, in whatever way they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from decoding import DecodingConfig, DSBDDecoder, ModelPair
from decoding.engine import fused
from decoding.engine.runner import runner_of
from decoding.engine.watch import Watch, signature
from tests.decoding.stubs import small_llama

PROMPT = [[3, 1, 4]]


def small(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return small_llama(24, 2, initializer_range=0.3).to(dtype)


def step(model: Any) -> None:
    """What transformers' Trainer does; a fused step counts as no write."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(torch.tensor(PROMPT), labels=torch.tensor(PROMPT)).loss.backward()
    optimiser.step()
    model.zero_grad()


def data(model: Any) -> None:
    """What merging an adapter does."""
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data += torch.randn_like(weight)


def one_row(model: Any) -> None:
    """What giving a new token its row does."""
    model.lm_head.weight.data[7] = 3.0


def one_column(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.weight.data[:, 5] = 3.0


def numpy(model: Any) -> None:
    model.model.norm.weight.detach().numpy()[:] *= 3


def epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 5.0


def frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(0.3)


def forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda states: 0 * states


def replaced(model: Any) -> None:
    model.load_state_dict(small_llama(24, 2, seed=5, initializer_range=0.3).state_dict())


CHANGES = [step, data, one_row, one_column, numpy, epsilon, frequencies, forward, replaced]
UNCOUNTED = [step, data, one_row, one_column, numpy, frequencies]  # behind torch's counter of writes


def log_probs(model: Any) -> list[float]:
    config = DecodingConfig(mode="beam_search", target_width=2, max_new_tokens=6, eos_token_id=-1)
    (result,) = DSBDDecoder(ModelPair(model, None), config).generate(PROMPT)
    return result.scores


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_decoded_as_it_is_now(change: Callable[[Any], None]) -> None:
    model = small()
    before, fused = log_probs(model), runner_of(model, "auto").prompts
    assert fused.name == "fused" and runner_of(model, "auto").prompts is fused
    torch.manual_seed(1)
    change(model)
    after = log_probs(model)
    options = dict(num_beams=2, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    plain = model.generate(torch.tensor(PROMPT), **options, return_dict_in_generate=True, output_scores=True)
    assert after[0] == pytest.approx(plain.sequences_scores.item(), abs=1e-4)
    assert abs(after[0] - before[0]) > 1e-3, "the change shows"


@pytest.mark.parametrize("change", UNCOUNTED, ids=lambda change: change.__name__)
def test_torchs_own_count_of_writes_would_miss_it(change: Callable[[Any], None]) -> None:
    model = small()
    weights, watch = signature([*model.parameters(), *model.buffers()]), Watch([model])
    change(model)
    assert signature([*model.parameters(), *model.buffers()]) == weights
    assert not watch.holds([model])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_has_not_changed_is_kept(dtype: torch.dtype) -> None:
    model = small(dtype)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan  # equal to itself here
    watch, runner = Watch([model]), runner_of(model, "auto")
    model(torch.tensor(PROMPT))
    model.train()
    model.eval()
    assert runner_of(model, "auto") is runner
    assert watch.holds([model]) is fused._packs(model.lm_head.weight), "else weights moved"
