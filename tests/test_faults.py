"""A full disk, a directory that cannot be written, a shard that is not what was written: a sentence, nothing
half-written, and the same command goes on afterwards.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from controller.checkpoint import load_controller, save_controller
from decoding import UserError
from decoding.engine.feature_head import FeatureHead
from decoding.measure.results_file import SCHEMA_VERSION, read_results, write_results
from decoding.pairs.drafts.eagle3 import save_head
from decoding.support.entry import _DISK, _number
from decoding.support.files import write_whole
from decoding.traces.store import load_traces
from decoding.train_draft.text import Document, _save
from tests import fuzzing
from tests.controller.synthetic import ABOUT, random_net, write_traces
from tests.decoding.stubs import small_llama
from tests.torture import ROOT, Hang, Kills, command, ended, forked, rows_lost, write_prompts

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


@contextmanager
def no_room(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system's own error, whichever library writes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_was_there_stays_where_the_disk_is_full(tmp_path: Path) -> None:
    about = {"features": ABOUT, "pair": {}, "decoding": {}}
    target, text = small_llama(8, layers=3), {"tokens": torch.arange(2000)}
    head = FeatureHead.for_target(target, 8, None)

    def write(what: int) -> list[Callable[[], object]]:
        return [
            lambda: save_controller(random_net(what), tmp_path / "controller", about),
            lambda: save_head(head, tmp_path / "head"),
            lambda: write_whole(tmp_path / "results.json", b"%d" % what * 2000),
            lambda: _save(tmp_path / "text-00000.safetensors", [Document((text["tokens"] * what).int(), 0)]),
        ]

    for one in write(1):
        one()
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for one in write(2):
        with no_room(1000), pytest.raises(OSError, match="File too large") as told:
            one()
        assert _number(told.value) in _DISK, "one sentence of the command"
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert load_controller(tmp_path / "controller")[0].fingerprint == random_net(1).fingerprint


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
    assert str(broken) == "broken killed=0 lost=0 hangs=0 failed=1"
    assert rows_lost({"rows": [1, 2, 3, 3], "n": 4}, {"rows": [1, 3, 3, 3], "n": 4}) == 2


@pytest.mark.slow
def test_killed_commands_lose_nothing() -> None:
    """`make torture` in short: each command is killed twice in one place, and then left to end."""
    code = (
        "import sys; from pathlib import Path; from tempfile import TemporaryDirectory; from tests.torture import kills"
    )
    code += "\nwith TemporaryDirectory() as folder:"
    code += "\n  for one in kills(Path(folder), seed=1, count=2): print(one)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    told = [line for line in ran.stdout.splitlines() if line.startswith(("collection", "training", "eval", "publish"))]
    names = ("collection", "training", "evaluation", "publishing")
    assert told == [f"{name} killed=2 lost=0 hangs=0 failed=0" for name in names], ran.stdout + ran.stderr


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


def test_a_flipped_bit_of_results_is_noticed(tmp_path: Path) -> None:
    """Most leave the JSON whole: another digit, another letter."""
    path = tmp_path / "results.json"
    row = {"method": "fixed", "settings": {}, "config": {}, "summary": {"tokens_per_second": 151.25, "log_prob": None}}
    content = write_results(path, {"schema_version": SCHEMA_VERSION, "rows": [row], "failed": []}).read_bytes()
    told = dict(read_results(path))
    assert told["rows"] == [row]
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = read_results(path)
        except UserError:
            refused += 1
            continue
        assert found["rows"] == told["rows"], "only the checksum's own name may change in silence"
    assert refused > 0.9 * len(content)
    del told["sha256"]
    path.write_text(json.dumps({**told, "rows": [{**row, "method": "mine"}]}))
    assert read_results(path)["rows"][0]["method"] == "mine", "who changes results takes their checksum out"
