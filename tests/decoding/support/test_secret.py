"""Keys are hidden by name, by the environment and by form, wherever settings are written; other text stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from decoding.support.secret import hide, hide_argument, hide_in_file, is_secret, without_secrets

KEY = "hf_" + "aB3" * 11
FOREIGN = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("given", "hidden"),
    [
        ("pair.token=abc", "pair.token=***"),
        ("+logger.wandb.api_key=abc,def", "+logger.wandb.api_key=***"),
        ("+x={token: abc, name: n}", "+x={token: ***, name: n}"),
        ("+x={a: {hf_token: abc}}", "+x={a: {hf_token: ***}}"),
        ("+x=[{'password': abc}]", "+x=[{'password': ***}]"),
        (f"+note={KEY}", "+note=***"),
        ("decoding.max_new_tokens=8", "decoding.max_new_tokens=8"),
        ("+x={max_new_tokens: 8, tokenizer: t}", "+x={max_new_tokens: 8, tokenizer: t}"),
        ("data.key=text", "data.key=text"),
        ("a prompt on tokens: what is a token?", "a prompt on tokens: what is a token?"),
        ("hf_beam_sample", "hf_beam_sample"),
    ],
)
def test_arguments(given: str, hidden: str) -> None:
    assert hide_argument(given) == hidden


def test_keys_of_the_environment_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FOREIGN)
    monkeypatch.setenv("MY_SECRET", "short")
    assert hide(f"at {FOREIGN}!") == "at ***!" and hide("a short text") == "a short text"
    assert without_secrets({"note": [f"x{FOREIGN}", 1], "n": {"api_key": "abc", "token": None}}) == {
        "note": ["x***", 1],
        "n": {"api_key": "***", "token": None},
    }
    assert is_secret("AWS_SECRET_ACCESS_KEY") and not is_secret("max_new_tokens") and not is_secret("trace_key")


def test_files_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", FOREIGN)
    path, node = tmp_path / "config.yaml", {"a": {"token": "ab: c", "b": [f"x={FOREIGN}", "p.token=q"], "token2": 3}}
    path.write_text(yaml.safe_dump(node))
    hide_in_file(path)
    assert yaml.safe_load(path.read_text()) == {"a": {"token": "***", "b": ["x=***", "p.token=***"], "token2": 3}}
    path.write_text("- seed=1\n")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    hide_in_file(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
