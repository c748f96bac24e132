"""DecodingConfig refuses what cannot work, in one sentence that names the value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from decoding import DecodingConfig, UserError

REFUSED = [
    ({"draft_width": 2, "target_width": 4}, r"draft_width \(2\) is less than target_width \(4\)"),
    ({"target_width": 0}, "target_width is 0; give a whole number of at least 1"),
    ({"draft_width": -1}, "draft_width is -1"),
    ({"draft_depth": -1}, "draft_depth is -1; give a whole number of at least 0"),
    ({"min_width": 0}, "min_width is 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"num_return_sequences": 0}, "num_return_sequences is 0"),
    ({"target_width": 2.0}, "target_width is 2.0; give a whole number"),
    ({"target_width": True}, "target_width is True; give a whole number"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_p": 0.0}, r"top_p is 0.0; give a number in \(0, 1\]"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": "0.9"}, "top_p is '0.9'"),
    ({"top_p": float("nan")}, "top_p is nan"),
    ({"temperature": 0.0}, "temperature is 0.0; give a number above 0"),
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"min_width": 5}, r"min_width \(5\) is more than target_width \(4\)"),
    ({"num_return_sequences": 5}, r"num_return_sequences \(5\) is more than target_width \(4\)"),
    ({"top_k": 3}, r"top_k \(3\) is less than target_width \(4\) and warp is 'joint'"),
    ({"mode": "greedy"}, "mode is 'greedy'; choose one of 'beam_sample', 'beam_search'"),
    ({"warp": "row"}, "warp is 'row'; choose one of 'joint', 'beam'"),
    ({"surplus": True}, "surplus is True; choose one of 'keep', 'drop'"),
    ({"refill": "all"}, "refill is 'all'; choose one of 'full', 'width'"),
    ({"early_stopping": 1}, "early_stopping is 1; choose one of True, False, 'never'"),
    ({"length_penalty": "long"}, "length_penalty is 'long'"),
    ({"length_penalty": float("nan")}, "length_penalty is nan"),
    ({"length_penalty": 30.5}, "length_penalty is 30.5; give a number from -30 to 30"),
    ({"length_penalty": -31}, "length_penalty is -31; give a number from -30 to 30"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; give a token id, a list of them"),
    ({"eos_token_id": [2, None]}, "eos_token_id is"),
    ({"verification": "coins"}, "verification is 'coins'; choose one of 'rejection', 'shared_noise'"),
    ({"oversample": 0}, "oversample is 0; give a whole number of at least 1"),
    ({"oversample": 2, "verification": "rejection"}, "oversample is 2 and verification is 'rejection'"),
    ({"replacement": True, "verification": "shared_noise"}, "replacement is True and verification is 'shared_noise'"),
    ({"top_k": 10, "draft_top_k": 9}, r"draft_top_k \(9\) is less than top_k \(10\)"),
    ({"draft_top_k": 0}, "draft_top_k is 0; give a whole number of at least 1"),
    (
        {"top_k": 7, "oversample": 2, "verification": "shared_noise"},
        r"top_k \(7\) is less than oversample \* target_width \(8\)",
    ),
    ({"mode": "beam_search", "oversample": 2}, "oversample is 2 and mode is 'beam_search'"),
    ({"mode": "beam_search", "draft_top_k": 40}, "draft_top_k is 40 and mode is 'beam_search'"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_what_cannot_work_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        DecodingConfig(**fields)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError):
        DecodingConfig().with_changes(**fields)


def test_edges_are_allowed() -> None:
    DecodingConfig(top_p=1.0, top_k=4, temperature=1e-3, min_width=4, num_return_sequences=4, draft_width=4)
    DecodingConfig(length_penalty=30), DecodingConfig(length_penalty=-30.0)
    DecodingConfig(draft_width=1, draft_depth=0)  # nothing is drafted, so nothing can fail
    DecodingConfig(top_k=1, warp="beam", early_stopping="never", length_penalty=-1, eos_token_id=[1, 2])


def test_the_drafts_cut_grows_with_its_width() -> None:
    noise = {"verification": "shared_noise", "target_width": 1}
    cuts = {width: DecodingConfig(top_k=10, **noise).draft_cut(width) for width in (1, 8, 9, 24, 25, 40, 41, 128)}
    assert cuts == {1: 20, 8: 20, 9: 40, 24: 40, 25: 60, 40: 60, 41: 80, 128: 80}
    assert DecodingConfig(top_k=50, **noise).draft_cut(4) == 50
    assert DecodingConfig(top_k=10, draft_top_k=11, **noise).draft_cut(64) == 11
    assert DecodingConfig(**noise).draft_cut(64) is None
    assert DecodingConfig(top_k=10, verification="rejection").draft_cut(64) == 10


def test_exact_is_shorthand() -> None:
    config = DecodingConfig(exact=True)
    assert (config.surplus, config.refill) == ("drop", "width")
    assert (DecodingConfig().surplus, DecodingConfig().refill) == ("keep", "full")


def test_a_list_from_hydra_is_a_list() -> None:
    assert DecodingConfig(eos_token_id=OmegaConf.create([1, 2])).eos_token_id == [1, 2]
