"""Provenance is JSON, names the code version and holds no secret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from decoding.support import provenance as module
from decoding.support.provenance import git_sha, library_versions, provenance, to_plain


def test_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "pair.token=hf_x", "decoding.max_new_tokens=8"])
    about = json.loads(json.dumps(provenance()))
    assert about["argv"] == ["train.py", "pair.token=***", "decoding.max_new_tokens=8"]
    assert about["machine"]["cores"] >= 1 and about["python"].startswith("3.")
    assert {"torch", "transformers"} <= library_versions().keys()


def test_git_sha_is_of_this_code_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy installed inside somebody else's repository has no commit of its own."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert len(git_sha() or "") == 40
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path / "site")
    assert git_sha() is None


def test_git_sha_tells_changes_that_are_in_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    (tmp_path / "notes.txt").write_text("not of the code\n")
    clean = git_sha() or ""
    assert len(clean) == 40
    (tmp_path / "train.py").write_text("2\n")
    assert git_sha() == f"{clean}-dirty"
    git("add", ".")
    assert git_sha() == f"{clean}-dirty"


def test_to_plain_resolves_and_hides() -> None:
    cfg = OmegaConf.create({"a": 1, "b": "${a}", "pair": {"token": "hf_x"}, "keys": [{"api_key": "s"}]})
    assert to_plain(cfg) == {"a": 1, "b": 1, "pair": {"token": "***"}, "keys": [{"api_key": "***"}]}
