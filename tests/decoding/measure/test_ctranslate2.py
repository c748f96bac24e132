"""CTranslate2 in its own process: requests and answers, with a stand-in for the library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from decoding import DecodingConfig, UserError
from decoding.measure import ctranslate2_generate as peer
from tests.small_pair import small_pair

STAND_IN = """
import sys, types
assert "torch" not in sys.modules
__version__ = "0"
print("a library prints what is no answer")

class Generator:
    def __init__(self, directory, device, compute_type, intra_threads):
        print("and so does its constructor")
        self.said = (directory, compute_type, intra_threads)

    def generate_batch(self, rows, beam_size, num_hypotheses, max_length, min_length, **options):
        (row,) = rows
        if beam_size == 7:
            raise ValueError("seven beams")
        if beam_size == 8:
            sys.exit(3)
        ids = [[len(row)] * max_length] * num_hypotheses
        return [types.SimpleNamespace(sequences_ids=ids, scores=[-1.5] * num_hypotheses)]
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ctranslate2.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peer, "converted", lambda pair: tmp_path / "model")
    monkeypatch.setattr(peer, "worker", peer.worker.__wrapped__)  # a process for each test


def test_answers_become_results(stand_in: None) -> None:
    made = peer.Peer(small_pair())
    config = DecodingConfig(
        mode="beam_search", target_width=2, max_new_tokens=3, eos_token_id=-1, num_return_sequences=2
    )
    first, second = made.generate([[5, 6, 7], [8, 9]], config)
    assert (first.sequences, second.sequences) == ([[3, 3, 3]] * 2, [[2, 2, 2]] * 2)
    assert first.scores == [-1.5, -1.5] and first.finished == [False, False]
    assert first.stats.new_tokens == 3 and first.stats.seconds["other"] > 0


def test_what_goes_wrong_is_a_sentence_and_the_process_goes_on(stand_in: None) -> None:
    made = peer.Peer(small_pair())
    config = DecodingConfig(mode="beam_search", target_width=7, draft_width=8, max_new_tokens=3, eos_token_id=-1)
    with pytest.raises(UserError, match="CTranslate2 refused: seven beams"):
        made.generate([[5, 6]], config)
    assert made.generate([[5, 6]], config.with_changes(target_width=2))[0].sequences == [[2, 2, 2]]
    with pytest.raises(UserError, match="ended with 3"):
        made.generate([[5, 6]], config.with_changes(target_width=8))


def test_it_gets_the_tokens_of_the_prompt_and_no_others(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer that begins every text with a token of its own, too."""
    pair = small_pair()
    made, config = peer.Peer(pair), DecodingConfig(mode="beam_search", target_width=2, max_new_tokens=3)
    pair.tokenizer = copy.deepcopy(pair.tokenizer)
    pair.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{pair.tokenizer.eos_token} $A", special_tokens=[(pair.tokenizer.eos_token, 0)]
    )
    assert pair.tokenizer("def area")["input_ids"] == [
        0,
        *pair.tokenizer("def area", add_special_tokens=False)["input_ids"],
    ]
    asked: list[list[str]] = []
    answer = peer.ask

    def ask(process: Any, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["tokens"])
        return answer(process, request)

    monkeypatch.setattr(peer, "ask", ask)
    prompts = [pair.tokenizer("def area(width", add_special_tokens=False)["input_ids"], [0, 5, 0, 7]]
    made.generate(prompts, config)
    assert [pair.tokenizer.convert_tokens_to_ids(tokens) for tokens in asked] == prompts
    monkeypatch.setattr(
        type(pair.tokenizer), "convert_ids_to_tokens", lambda self, ids: [*["a"] * (len(ids) - 1), None]
    )
    with pytest.raises(UserError, match="Prompt 0 holds the id 7, which the tokenizer has no token for"):
        made.generate([[5, 7]], config)


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dsbd\[peers\]'"):
        peer.Peer(small_pair())
