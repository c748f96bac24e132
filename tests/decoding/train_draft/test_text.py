"""Text that a target writes: what is in it, going on where it stopped, held-out documents, files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from transformers import PreTrainedTokenizerFast

from decoding import ModelPair, UserError
from decoding.train_draft import text as texts_of
from decoding.train_draft.text import TextConfig, _chats, documents, token_counts
from tests.decoding.stubs import small_llama

WORDS = ["<end>", "<user>", "<bot>", "a", "b", "c", "d", "e"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def tokenizer_of() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


def pair_of(chat: bool = True) -> ModelPair:
    target: Any = small_llama(len(WORDS), layers=3)
    target.generation_config.eos_token_id = 0
    tokenizer = tokenizer_of()
    if not chat:
        tokenizer.chat_template = None
    return ModelPair(target, None, tokenizer)


CONFIG = TextConfig(tokens=300, batch=8, longest=24, top_k=None)


def test_chats_have_the_template_around_what_the_target_wrote(tmp_path: Path) -> None:
    texts = documents(pair_of(), CONFIG, tmp_path)
    assert sum(len(text.tokens) for text in texts) >= 300
    for text in texts:
        tokens = text.tokens.tolist()
        assert tokens[0] == 1 and text.start == 1, "the user's turn opens the text and is the target's too"
        place = tokens.index(0)
        assert place > 1 and tokens[place + 1] == 2, "a turn, its end, and the answer's opening"
        assert len(tokens) <= 24 and 0 not in tokens[place + 2 : -1], "an answer ends once"


def test_goes_on_where_it_stopped_and_knows_other_settings(tmp_path: Path) -> None:
    pair = pair_of()
    whole = documents(pair, CONFIG, tmp_path / "a")
    documents(pair, TextConfig(**{**vars(CONFIG), "tokens": 1}), tmp_path / "b")
    torch.manual_seed(99)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 1
    resumed = documents(pair, CONFIG, tmp_path / "b")
    assert [t.tokens.tolist() for t in resumed] == [t.tokens.tolist() for t in whole]
    with pytest.raises(UserError, match="other settings"):
        documents(pair, TextConfig(**{**vars(CONFIG), "temperature": 0.5}), tmp_path / "a")


@pytest.mark.parametrize("what", ["flipped", "cut", "foreign", "emptied"])
def test_a_damaged_batch_alone_is_written_again(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, whole = pair_of(), documents(pair_of(), CONFIG, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    before = shards[1].read_bytes()
    place = len(before) - 12  # of the tokens, whose sign or size alone changes
    damaged = {
        "flipped": before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :],
        "cut": before[:-4],
        "foreign": save({"tokens": torch.zeros(3)}),
        "emptied": b"",
    }
    shards[1].write_bytes(damaged[what])
    written = []
    monkeypatch.setattr(texts_of, "_chats", lambda *given: written.append(1) or _chats(*given))
    again = documents(pair, CONFIG, tmp_path)
    assert len(written) == 1 and shards[1].read_bytes() == before
    assert [t.tokens.tolist() for t in again] == [t.tokens.tolist() for t in whole]
    assert f"warning: {shards[1]} is not what was written there" in capsys.readouterr().err


def test_equal_texts_are_on_one_side(tmp_path: Path) -> None:
    texts = documents(pair_of(), TextConfig(**{**vars(CONFIG), "tokens": 6000, "batch": 64}), tmp_path)
    held = {tuple(t.tokens.tolist()) for t in texts if t.held_out}
    assert held and not held & {tuple(t.tokens.tolist()) for t in texts if not t.held_out}
    assert 0.01 < len([t for t in texts if t.held_out]) / len(texts) < 0.12


def test_files(tmp_path: Path) -> None:
    pair = pair_of(chat=False)
    (tmp_path / "p.jsonl").write_text('\ufeff{"prompt": "a b c"}\n\n{"prompt": "d"}\n', encoding="utf-8")
    told = documents(pair, TextConfig(source=str(tmp_path / "p.jsonl"), tokens=40, batch=4, longest=12), tmp_path / "t")
    assert {tuple(t.tokens[: t.start].tolist()) for t in told} == {(3, 4, 5), (6,)}
    (tmp_path / "t.txt").write_text("a b c d e a b c d e")
    told = documents(pair, TextConfig(source=str(tmp_path / "t.txt"), longest=4), tmp_path / "u")
    assert [t.tokens.tolist() for t in told] == [[3, 4, 5, 6], [7, 3, 4, 5], [6, 7]]
    counts = token_counts(iter(told), 9)
    assert counts.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 0]


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("chat", None, "no chat template"),
        ("nowhere.jsonl", None, "chat, or the path"),
        ("nowhere.txt", None, "or the path"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ("long.jsonl", '{"prompt": "' + "a " * 40 + '"}\n', "less than 24 tokens"),
    ],
)
def test_what_cannot_be_written_is_told(source: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / source).write_text(content)
    source = source if source == "chat" else str(tmp_path / source)
    with pytest.raises(UserError, match=message):
        documents(pair_of(chat=False), TextConfig(source=source, longest=24), tmp_path / "t")


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        documents(ModelPair(small_llama(8), None), CONFIG, tmp_path)
