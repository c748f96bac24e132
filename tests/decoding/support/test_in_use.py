"""Tests that two runs never share a folder, and that a dead one's is free."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from decoding import UserError
from decoding.support.in_use import OWNER, fresh_folder, in_use

HOLDS = (
    "import sys, time; from pathlib import Path; from decoding.support.in_use import in_use\n"
    "with in_use(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def test_a_directory_in_use_is_refused_until_its_process_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        words = f"is in use by process {other.pid} of {getpass.getuser()} on {socket.gethostname()} since 20"
        with pytest.raises(UserError, match=words), in_use(tmp_path):
            raise AssertionError
        assert (tmp_path / OWNER).exists()  # the refused one took nothing away
        other.send_signal(signal.SIGKILL)
        other.wait()
    with in_use(tmp_path):
        assert f"process {other.pid} of" in capsys.readouterr().err
    with in_use(tmp_path):
        assert not capsys.readouterr().err


def test_what_a_killed_run_had_not_written_to_the_end_is_removed(tmp_path: Path) -> None:
    """By the names that writers of this project give it; nothing else is."""
    stay = ["results.json", "traces-00001.parquet", "notes.tmp", ".a.tmp", "b.partial", "c.12.csv"]
    for name in [*stay, ".results.json.4711.tmp", "traces-00001.28695.partial"]:
        (tmp_path / name).write_text("x")
    with in_use(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stay, ".in_use", ".lock"])


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_an_unwritable_directory_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"), in_use(tmp_path / "a"):
        raise AssertionError


def test_folders_are_fresh(tmp_path: Path) -> None:
    wanted = str(tmp_path / "day" / "second")
    made = []
    for _ in range(3):
        fresh_folder.cache_clear()  # as other processes have none of it
        made += [fresh_folder(wanted), fresh_folder(wanted)]
    assert made == [wanted] * 2 + [f"{wanted}-2"] * 2 + [f"{wanted}-3"] * 2
