"""Kills, faults and fuzz: python -m tests.torture [seconds]; `make torture` runs it and prints the counts.

A command is forked from a process that has imported everything, so that SIGKILL meets its work and not its imports.
It is killed at a random moment, up to three times in one place, and then left to end: the same command must end with
the rows, steps and results of one that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update({"HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"})
os.environ.setdefault("MPLBACKEND", "Agg")

import pyarrow.parquet as pq
import torch

from tests.fuzzing import FOREIGN, HANG

KILLS, IN_A_ROW = 30, 3
SECONDS = 300.0  # of a command that takes ten: more is a hang
ROOT = Path(__file__).resolve().parent.parent
SMALL = ["pair=tests.small_pair.small_pair", "data=jsonl", "decoding.max_new_tokens=6", "decoding.target_width=2"]
SMALL += ["decoding.draft_width=3", "decoding.draft_depth=2"]


class Failed(AssertionError):
    """A command ended in an error."""


class Hang(AssertionError):
    """A command did not end."""


def forked(
    work: Callable[[], object], log: Path, kill_after: float | None = None, limit: float = SECONDS
) -> int | None:
    """Run something in a process of its own; its exit status, None where it was killed in time.

    Raises:
        Hang: it had not ended after `limit` seconds, and was killed.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            torch.set_num_threads(1)  # threads that the parent may have do not come along
            work()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    late = time.monotonic() + limit
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > late:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Hang(f"not done after {limit:.0f} seconds: {log.read_text()[-2000:]}")
        time.sleep(0.005)
    return None if os.WIFSIGNALED(ended[1]) else os.WEXITSTATUS(ended[1])


def command(module: str, *arguments: str) -> Callable[[], object]:
    """A command line of this project, as a function."""

    def run() -> object:
        sys.argv = [f"{module.rpartition('.')[2]}.py", *arguments]
        return importlib.import_module(module).main()

    return run


class Kills:
    """Kill a command again and again; counts what was killed, and what was lost or doubled afterwards.

    Args:
        name: of the command.
        make: the command for a folder.
        outcome: what it leaves there, comparable and without the time it took.
    """

    def __init__(self, name: str, make: Callable[[Path], Callable[[], object]], outcome: Callable[[Path], Any]) -> None:
        self.name, self.make, self.outcome = name, make, outcome
        self.killed = self.chains = self.lost = self.hangs = self.failed = 0

    def __str__(self) -> str:
        return f"{self.name} killed={self.killed} lost={self.lost} hangs={self.hangs} failed={self.failed}"

    def torture(self, folder: Path, kills: int, draw: random.Random) -> None:
        """Kill it so many times; a hang or a failure ends that, and is counted."""
        try:
            self._torture(folder, kills, draw)
        except Hang as error:
            self.hangs += 1
            print(f"{self.name}: {error}", file=sys.stderr)
        except Failed as error:
            self.failed += 1
            print(f"{self.name}: {error}", file=sys.stderr)

    def _torture(self, folder: Path, kills: int, draw: random.Random) -> None:
        whole = folder / "whole"
        whole.mkdir(parents=True)
        began = time.perf_counter()
        self._to_the_end(whole)
        seconds, expected = time.perf_counter() - began, self.outcome(whole)
        while self.killed < kills:
            place = folder / f"chain{self.chains}"
            place.mkdir()
            for _ in range(min(IN_A_ROW, kills - self.killed)):
                status = forked(self.make(place), place / "log", draw.uniform(0.0, seconds))
                if status is None:
                    self.killed += 1
                elif status:
                    raise Failed(f"exit {status}: {(place / 'log').read_text()[-2000:]}")
                else:
                    seconds *= 0.8  # it was done before: the first run was slow, on a machine that was busy
                    break
            self._to_the_end(place)
            found = self.outcome(place)
            if found != expected:
                self.lost += max(1, rows_lost(expected, found))
                print(f"{self.name}, {place}: {differences(expected, found)}", file=sys.stderr)
            self.chains += 1

    def _to_the_end(self, place: Path) -> None:
        if status := forked(self.make(place), place / "log"):
            raise Failed(f"exit {status}: {(place / 'log').read_text()[-2000:]}")


def rows_lost(expected: Any, found: Any) -> int:
    """Count what one outcome has and the other has not: rows, steps, results, one too many of them included."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return sum(rows_lost(expected.get(key), found.get(key)) for key in expected.keys() | found.keys())
    if isinstance(expected, list) and isinstance(found, list):
        ours, theirs = Counter(map(repr, expected)), Counter(map(repr, found))
        return ((ours - theirs) + (theirs - ours)).total()
    return int(expected != found)


def differences(expected: Any, found: Any, path: str = "") -> str:
    """Where two outcomes differ first."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected.keys() | found.keys():
            if expected.get(key) != found.get(key):
                return differences(expected.get(key), found.get(key), f"{path}/{key}")
    return f"{path}: {str(expected)[:200]} became {str(found)[:200]}"


# ------------------------------------------------------------------------------------------- commands


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"def f{i}(x):\n"}) + "\n" for i in range(count)))
    return path


def collecting(prompts: Path) -> Kills:
    def make(place: Path) -> Callable[[], object]:
        counts = ["collect.train_prompts=150", "collect.val_prompts=20", f"collect.traces_dir={place}/traces"]
        return command(
            "decoding.collect",
            *SMALL,
            f"data.path={prompts}",
            *counts,
            f"hydra.run.dir={place}/run",
            "policy=exploring",
        )

    def outcome(place: Path) -> Any:
        (folder,) = (path.parent for path in place.glob("traces/*/manifest.json"))
        manifest = json.loads((folder / "manifest.json").read_text())
        tables = [pq.read_table(folder / entry["file"]) for entry in manifest["shards"]]
        rows = [row for table in tables for row in table.select(["prompt_id", "layer", "need", "places"]).to_pylist()]
        shards = {entry["file"]: entry["rows"] for entry in manifest["shards"]}
        there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        return {"complete": manifest["complete"], "rows": rows, "shards": shards, "files": there} | {
            name: manifest[name] for name in ("prompts", "done")
        }

    return Kills("collection", make, outcome)


def training(prompts: Path, traces: Path) -> Kills:
    def make(place: Path) -> Callable[[], object]:
        given = ["policy=exploring", "collect.train_prompts=150", "collect.val_prompts=20", "trainer.max_epochs=3"]
        given += [f"collect.traces_dir={traces}", f"hydra.run.dir={place}/run", "callbacks.progress_bar=null"]
        return command("train", *SMALL, f"data.path={prompts}", *given, "+trainer.enable_progress_bar=false")

    def outcome(place: Path) -> Any:
        from controller.checkpoint import load_controller

        net, about = load_controller(place / "run" / "controller")
        csv = next(iter((place / "run").rglob("metrics.csv"))).read_text().splitlines()
        return {"network": net.fingerprint, "metrics": about["metrics"], "steps": csv}

    return Kills("training", make, outcome)


def evaluating(prompts: Path) -> Kills:
    def make(place: Path) -> Callable[[], object]:
        given = ["policies=[fixed]", "prompts.limit=20", "prompts.warmup=0"]
        return command("evaluate", *SMALL, f"data.path={prompts}", *given, f"hydra.run.dir={place}/run")

    def outcome(place: Path) -> Any:
        results = json.loads((place / "run" / "results.json").read_text())
        return {
            row["name"]: [(p["repeat"], p["prompt_id"], p["text"], p["tokens"], p["log_prob"]) for p in row["prompts"]]
            for row in results["rows"]
        } | {"failed": results["failed"], "stopped": results.get("stopped")}

    return Kills("evaluation", make, outcome)


def publishing(controller: Path, address: str) -> Kills:
    def make(place: Path) -> Callable[[], object]:
        return command("controller.publish", str(controller), f"torture/{place.name}")

    def outcome(place: Path) -> Any:
        def ask(path: str) -> bytes:
            with urllib.request.urlopen(f"{address}/{path}") as answer:
                return bytes(answer.read())

        name = f"torture/{place.name}"
        about = json.loads(ask(f"api/models/{name}"))
        files = sorted(entry["rfilename"] for entry in about["siblings"])
        kept = {
            file: hashlib.sha256(ask(f"{name}/resolve/main/{file}")).hexdigest()
            for file in files
            if file != "README.md"
        }
        return {"files": files, "content": kept, "commits": about["commits"]}

    return Kills("publishing", make, outcome)


# -------------------------------------------------------------------------------------------- all


def serve_hub(pipe: int) -> None:
    """A stand-in of the hub in a process of its own, which writes its address into a pipe."""
    from tests.controller.hub_server import serving

    with serving() as (address, _):
        os.write(pipe, address.encode())
        signal.pause()


def kills(folder: Path, seed: int, count: int = KILLS, names: tuple[str, ...] = ()) -> list[Kills]:
    """Kill all commands, or those named; publishing needs a hub, which is started here."""
    draw = random.Random(seed)
    reader, writer = os.pipe()
    hub = os.fork()
    if hub == 0:
        serve_hub(writer)
    try:
        address = os.read(reader, 100).decode()
        import huggingface_hub.constants as constants

        constants.ENDPOINT, constants.HF_HUB_OFFLINE = address, False
        constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
        os.environ["HF_TOKEN"] = "hf_" + "x" * 34
        for module in ("controller.publish", "decoding.collect", "evaluate", "tests.small_pair", "train"):
            importlib.import_module(module)  # before anything is forked

        prompts = write_prompts(folder / "prompts.jsonl", 600)
        collected = collecting(prompts)
        found = [collected]
        collected.torture(folder / "collection", count if not names or "collection" in names else 0, draw)
        fitted = training(prompts, folder / "collection" / "whole" / "traces")
        fitted.torture(folder / "training", count if not names or "training" in names else 0, draw)
        found += [fitted, evaluating(prompts)]
        if not names or "evaluation" in names:
            found[-1].torture(folder / "evaluation", count, draw)
        found.append(publishing(folder / "training" / "whole" / "run" / "controller", address))
        if not names or "publishing" in names:
            found[-1].torture(folder / "publishing", count, draw)
    finally:
        os.kill(hub, signal.SIGKILL)
        os.waitpid(hub, 0)
    return found


def fuzz(scale: int) -> tuple[int, dict[str, int]]:
    """Run the tests of faults and of odd inputs, the latter `scale` times as long; exit status, inputs by kind."""
    with TemporaryDirectory() as counts:
        files = ["tests/test_fuzz.py", "tests/test_fuzz_files.py", "tests/test_faults.py", "tests/test_security.py"]
        options = ["-q", "-p", "no:cacheprovider", "-n", "2"]
        environment = {**os.environ, "DSBD_FUZZ": str(scale), "DSBD_FUZZ_COUNTS": counts}
        ran = subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env=environment)
        total: dict[str, int] = {}
        for path in Path(counts).iterdir():
            for name, number in json.loads(path.read_text()).items():
                total[name] = total.get(name, 0) + number
    return ran.returncode, total


def main() -> None:
    """Everything, and the counts."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}; give it as an argument to draw the same moments again", flush=True)
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        found = kills(Path(folder), seed)
    for one in found:
        print(f"{one.name}: {one.killed} kills survived in {one.chains} places, {one.lost} rows lost or doubled")
    status, tried = fuzz(scale=30)
    for name, number in sorted(tried.items()):
        print(f"{name}: {number}")
    killed, lost = sum(one.killed for one in found), sum(one.lost for one in found)
    hangs = sum(one.hangs for one in found) + ended(tried, HANG)
    foreign = sum(one.failed for one in found) + ended(tried, FOREIGN)
    print(f"{killed} kills survived, {lost} rows lost or doubled, {sum(tried.values())} inputs tried, {hangs} hangs,")
    print(f"{foreign} foreign tracebacks; faults and fuzz {'held' if status == 0 else 'FAILED'};", end=" ")
    print(f"{time.perf_counter() - began:.0f} seconds")
    raise SystemExit(bool(status or lost or hangs or foreign))


def ended(tried: dict[str, int], how: str) -> int:
    """Inputs that ended so."""
    return sum(number for name, number in tried.items() if name.endswith(f": {how}"))


if __name__ == "__main__":
    main()
