"""A full disk, a directory that cannot be written, a shard that is not what was written: a sentence, nothing
half-written, and the same command goes on afterwards.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controller.checkpoint import load_controller, save_controller
from decoding import UserError
from decoding.measure.results_file import read_results
from decoding.support.files import write_whole
from decoding.traces.store import load_traces
from tests import fuzzing
from tests.controller.synthetic import ABOUT, random_net, write_traces
from tests.torture import Hang, Kills, command, ended, forked, rows_lost, write_prompts

SMALL = ["pair=tests.small_pair.small_pair", "data=jsonl", "decoding.max_new_tokens=4", "decoding.target_width=2"]
SMALL += ["decoding.draft_width=3", "decoding.draft_depth=1", "policy=exploring"]
SMALL += ["collect.train_prompts=30", "collect.val_prompts=5"]


def limited(work: Callable[[], object], most: int) -> Callable[[], object]:
    """Run something on a disk that takes no file of more than so many bytes."""

    def run() -> object:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        return work()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("most", [300, 4000])
def test_a_full_disk(tmp_path: Path, most: int) -> None:
    """First the manifest does not fit, then a shard; with room, the same command does the rest."""
    given = [f"data.path={write_prompts(tmp_path / 'p.jsonl', 200)}", f"collect.traces_dir={tmp_path}/traces"]
    collect = command("decoding.collect", *SMALL, *given, f"hydra.run.dir={tmp_path}/run")
    log = tmp_path / "log"
    status = forked(limited(collect, most), log)
    said = log.read_text()
    assert status == 2 and said.splitlines()[-1].startswith("error: ") and "Traceback" not in said, said
    assert not list(tmp_path.glob("traces/*/*.parquet")) and not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.partial"))
    assert forked(collect, log) == 0, log.read_text()
    (folder,) = (path.parent for path in tmp_path.glob("traces/*/manifest.json"))
    rows, manifest = load_traces(folder)
    assert manifest["prompts"] == 35 and len(rows) == manifest["rows"] > 0


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte can be written any more."""

    def no_room(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    monkeypatch.setattr("controller.checkpoint.save_file", no_room)


def test_what_was_there_stays_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"features": ABOUT, "pair": {}, "decoding": {}}
    saved = save_controller(random_net(1), tmp_path / "controller", about)
    kept = write_whole(tmp_path / "results.json", b"old")
    full(monkeypatch)
    for write in (lambda: save_controller(random_net(2), saved, about), lambda: write_whole(kept, b"new")):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert kept.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["controller", "results.json"]
    assert load_controller(saved)[0].fingerprint == random_net(1).fingerprint


@pytest.mark.slow
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """Whoever runs this, root included: nothing can be made below a file, nor in /proc."""
    (tmp_path / "file").write_text("")
    given = [f"data.path={write_prompts(tmp_path / 'p.jsonl', 200)}", f"hydra.run.dir={tmp_path}/run"]
    for place in (f"{tmp_path}/file/traces", "/proc/traces"):
        log = tmp_path / "log"
        status = forked(command("decoding.collect", *SMALL, *given, f"collect.traces_dir={place}"), log)
        said = log.read_text()
        assert status == 2 and said.splitlines()[-1].startswith("error: "), said
        assert place in said and "Traceback" not in said


def test_what_does_not_end_is_killed_and_counted(tmp_path: Path) -> None:
    """In `make torture`: a command that hangs, one that fails, one that forgets a row and doubles another one."""
    with pytest.raises(Hang, match="not done after"):
        forked(lambda: time.sleep(600), tmp_path / "log", limit=0.2)
    broken = Kills("broken", lambda place: lambda: [].pop(), lambda place: None)
    broken.torture(tmp_path / "broken", 3, random.Random(0))
    assert (broken.failed, broken.hangs, broken.lost, broken.killed) == (1, 0, 0, 0)
    assert rows_lost({"rows": [1, 2, 3, 3], "n": 4}, {"rows": [1, 3, 3, 3], "n": 4}) == 2


def test_inputs_that_hang_or_meet_a_foreign_error_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "TRIED", Counter())
    monkeypatch.setattr(fuzzing, "SECONDS", 0.1)
    with pytest.raises(fuzzing.Late), fuzzing.counted("a", UserError):
        time.sleep(60)
    with pytest.raises(KeyError), fuzzing.counted("a", UserError):
        raise KeyError
    with pytest.raises(AssertionError), fuzzing.counted("a", UserError):
        raise AssertionError
    with fuzzing.counted("a", UserError):
        pass
    assert fuzzing.TRIED == {"a: HANG": 1, "a: FOREIGN ERROR": 1, "a: done": 1}
    assert ended(fuzzing.TRIED, fuzzing.HANG) == ended(fuzzing.TRIED, fuzzing.FOREIGN) == 1


@pytest.mark.parametrize("change", ["cut", "flip", "foreign", "gone"])
def test_a_shard_that_is_not_what_was_written(tmp_path: Path, change: str) -> None:
    folder = write_traces(tmp_path / "traces")
    shard = folder / "traces-00000.parquet"
    content = shard.read_bytes()
    if change == "gone":
        shard.unlink()
    elif change == "foreign":
        other = write_traces(tmp_path / "other", count=4)
        shard.write_bytes((other / shard.name).read_bytes())
    else:
        middle = len(content) // 2
        shard.write_bytes(
            content[:middle]
            if change == "cut"
            else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        )
    with pytest.raises(UserError, match="trace shard"):
        load_traces(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"schema_version": 2}', b"[]", b"\xff\x00", json.dumps({"rows": []}).encode()]
)
def test_results_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match="The results"):
        read_results(tmp_path / "results.json")
