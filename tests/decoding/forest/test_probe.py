"""The probe: right models pass in every dtype, and broken twins of them do not, fused or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import decoding.forest.probe as probe
from decoding import ModelPair, UserError
from decoding.engine.forward import PassInputs, TransformersForward
from decoding.engine.fused import FusedForward
from decoding.engine.runner import runner_of
from decoding.forest.probe import check_forest_pass
from decoding.pairs.builtin import load_tiny
from tests.decoding.families import FAMILIES
from tests.decoding.stubs import random_pair, small_llama

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COARSE = DTYPES[1:]
Break = Callable[[PassInputs, Any], PassInputs]


@pytest.fixture(scope="module")
def trained() -> Any:
    """The built-in target: real weights, whose predictions are sharp."""
    return load_tiny()[0]


# Broken twins, as a foreign attention may be: made of what a pass is told.


def mask_dropped(inputs: PassInputs, store: Any) -> PassInputs:
    """Causal by place, as an attention that only knows `is_causal` has it."""
    places, slots = torch.arange(inputs.mask.shape[2])[:, None], torch.arange(inputs.read)
    mask = torch.zeros_like(inputs.mask).masked_fill(slots > places, torch.finfo(inputs.mask.dtype).min)
    return replace(inputs, mask=mask)


def siblings_seen(count: int) -> Break:
    """Of the slots that were written and must not be seen, the last few are."""

    def broken(inputs: PassInputs, store: Any) -> PassInputs:
        mask = inputs.mask.clone()
        for row in mask[:, 0]:
            written = int((row == 0).any(0).nonzero().max())
            for query in row:
                if (query == 0).any():
                    hidden = (query[:written] < 0).nonzero().flatten()
                    query[hidden[-count:]] = 0
        return replace(inputs, mask=mask)

    return broken


def slots_for_positions(inputs: PassInputs, store: Any) -> PassInputs:
    return replace(inputs, positions=inputs.slots % store.capacity)


def positions_from_0(inputs: PassInputs, store: Any) -> PassInputs:
    return replace(inputs, positions=torch.arange(len(inputs.positions)) % 8)


def positions_moved(inputs: PassInputs, store: Any) -> PassInputs:
    """One too far, of the leaves alone: a pass of few tokens."""
    return replace(inputs, positions=inputs.positions + (len(inputs.positions) <= 6))


TWINS: dict[str, Break] = {
    "mask dropped": mask_dropped,
    "a foreign sibling seen": siblings_seen(1),
    "three foreign siblings seen": siblings_seen(3),
    "slots for positions": slots_for_positions,
    "positions from 0": positions_from_0,
    "leaves one too far": positions_moved,
}


def break_(forward: Any, twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes over nodes are broken; over prompts, and the model's own, they are not."""
    honest = forward.__call__

    def broken(self: Any, inputs: PassInputs, store: Any) -> Any:
        return honest(self, inputs if inputs.last_only else TWINS[twin](inputs, store), store)

    monkeypatch.setattr(forward, "__call__", broken)


def trained_as(trained: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(trained).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_a_right_model_is_accepted(engine: str, dtype: torch.dtype, trained: Any, recwarn: Any) -> None:
    model = trained_as(trained, dtype)
    check_forest_pass(model, "target", engine)
    assert runner_of(model, engine).checked
    assert runner_of(model, engine).prompts.name == ("fused" if engine == "auto" else "transformers")
    assert not recwarn.list


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_twin_is_refused(twin: str, dtype: torch.dtype, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    break_(TransformersForward, twin, monkeypatch)
    with pytest.raises(UserError, match=r"target model \(llama\) scores a forest of beams differently"):
        check_forest_pass(trained_as(trained, dtype), "target", "transformers")


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_fused_pass_is_replaced(twin: str, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    break_(FusedForward, twin, monkeypatch)
    model = trained_as(trained, torch.bfloat16)
    with pytest.warns(UserWarning, match=r"fused pass of the target model .* slower, but right"):
        check_forest_pass(model, "target")
    assert runner_of(model, "auto").prompts.name == "transformers"


@pytest.mark.parametrize("dtype", COARSE, ids=str)
@pytest.mark.parametrize("twin", [None, *TWINS])
def test_the_questions_alone_tell_on_real_weights(
    twin: str | None, dtype: torch.dtype, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no float32 copy can be made, as of a model too large for it."""
    monkeypatch.setattr(probe, "_float_copy", lambda model: None)
    if twin is not None:
        break_(TransformersForward, twin, monkeypatch)
    with torch.inference_mode():
        fault = probe._fault(trained_as(trained, dtype), "target", "transformers")
    assert (fault is None) is (twin is None)


@pytest.mark.parametrize("twin", [None, *TWINS])
def test_the_float32_copy_alone_tells(twin: str | None, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it must where weights are random, and no token makes much of a difference."""
    if twin is not None:
        break_(TransformersForward, twin, monkeypatch)
    model = small_llama(300, 3, initializer_range=0.1).to(torch.bfloat16)
    with torch.inference_mode():
        assert (probe._fault_of_copy(model, "target", "transformers") is None) is (twin is None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_packed_keep_their_fused_pass_in_16_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    """As on a GPU: fusing moves the weights of the float32 copy, too, which was made in inference mode once."""
    monkeypatch.setattr("decoding.engine.fused._packs", lambda weight: False)
    check_forest_pass(small_llama(300, 3, initializer_range=0.1).to(dtype), "target")
    assert not [warning for warning in recwarn.list if "fused pass" in str(warning.message)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_accepted_in_16_bits(name: str, recwarn: Any) -> None:
    check_forest_pass(FAMILIES[name].model().to(torch.bfloat16), "target")
    assert not [warning for warning in recwarn.list if "fused pass" in str(warning.message)]


@pytest.mark.parametrize("vocabulary", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_vocabulary_will_do(vocabulary: int, dtype: torch.dtype) -> None:
    check_forest_pass(small_llama(vocabulary).to(dtype), "target")


def test_ids_are_spread_over_the_vocabulary(trained: Any) -> None:
    """A model's lowest ids are its control tokens."""
    case = probe._Case.of(trained, "auto")
    ids = [token for part in (case.prompts, case.siblings, case.others) for row in part for token in row]
    size = trained.config.vocab_size
    assert len({4 * id_ // size for id_ in ids}) == 4
    assert sum(id_ < size // 20 for id_ in ids) < len(ids) // 5
    assert len({len(prompt) for prompt in case.prompts}) == len(case.prompts), "rows of different lengths"
    for old, new in zip(case.siblings, case.others, strict=True):
        assert not {*old} & {*new}


# What else is said of a model.


class Odd(torch.nn.Module):
    """A model whose own forward fails."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.inner, self.error = random_pair(8).target, error
        self.config = self.inner.config

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [AssertionError(), IndexError("odd\nand more"), KeyError("odd"), OSError("odd")])
def test_whatever_a_foreign_forward_raises_is_one_sentence(error: Exception) -> None:
    with pytest.raises(UserError, match=r"target model .* cannot run a forest pass.*(AssertionError|odd)") as refusal:
        check_forest_pass(Odd(error), "target")
    assert "\n" not in str(refusal.value)


def test_memory_that_runs_out_is_no_fault_of_the_model() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        check_forest_pass(Odd(torch.OutOfMemoryError("none left")), "target")


def test_flex_attention_on_a_cpu_is_refused_by_name() -> None:
    """It would end the process; a family that is fused never calls it on a forest."""
    model = FAMILIES["GPT-NeoX, Pythia"].model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match=r"attn_implementation='flex_attention'.* load it with attn_implementation='sd"):
        check_forest_pass(model, "target")


def test_an_attention_set_later_is_probed_again() -> None:
    model = FAMILIES["GPT-NeoX, Pythia"].model()
    ModelPair(model, None).check_forest_passes()
    before = runner_of(model, "auto")
    assert before.checked
    model.set_attn_implementation("eager")
    assert not runner_of(model, "auto").checked
    model.set_attn_implementation("sdpa")
    ModelPair(model, None).check_forest_passes()


def test_layers_quantised_as_they_go_are_told_from_a_broken_mask() -> None:
    """They scale a pass's numbers by the largest of all its tokens, as no mask forbids."""
    quantised = torch.ao.quantization.quantize_dynamic(small_llama(40), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        UserError, match=r"quantize_dynamic layers scale by all tokens of a pass.* Quantise the weights"
    ):
        check_forest_pass(quantised, "target")


def test_an_attention_of_someone_elses_is_named() -> None:
    """What is wrong may be the attention and not the family: the sentence says which to take."""
    model = FAMILIES["GPT-NeoX, Pythia"].model()
    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def blind(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        return whole(module, query, key, value, None, **given)

    ALL_ATTENTION_FUNCTIONS["blind"] = blind
    try:
        model.set_attn_implementation("blind")
        with pytest.raises(UserError, match=r"attn_implementation is 'blind'; load it with 'sdpa' or 'eager'\."):
            check_forest_pass(model, "target")
    finally:
        del ALL_ATTENTION_FUNCTIONS["blind"]
