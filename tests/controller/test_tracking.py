"""What reaches Weights & Biases, offline or on this machine: settings, refusals in a sentence, an evaluation's tables;
and what becomes of a run whose server cannot be reached, or is gone before its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

from controller.tracking import log_evaluation, tracked
from decoding import UserError
from decoding.support.entry import CONF_DIR


def config(directory: Path, *overrides: str, command: str = "train") -> DictConfig:
    settings = [f"paths.output_dir={directory}", "logger=wandb", *overrides]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(command, settings)


class Run:
    """A wandb run that keeps what it is given."""

    offline, id = False, "x1"

    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_offline(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings of WandbLogger and of wandb.init reach the run; the config is recorded, its secrets are not."""
    settings = ["+logger.wandb.id=x1", "+logger.wandb.group=g", "+logger.wandb.tags=[a]", "+api_key=hidden"]
    with tracked(config(tmp_path / "new", *settings, command=command)) as logger:
        assert logger is not None
        run = logger.experiment
        assert run.offline and (run.id, run.group, run.tags, run.project) == ("x1", "g", ("a",), "dsbd")
        assert run.config["seed"] == 0 and run.config["api_key"] == "***" and "git_sha" in run.config["provenance"]
    assert wandb.run is None
    assert f"wandb sync {tmp_path / 'new'}" in capsys.readouterr().err


def test_no_logger_of_wandb_is_none(tmp_path: Path) -> None:
    for group in ("csv", "none"):
        with tracked(config(tmp_path, f"logger={group}")) as logger:
            assert logger is None


def test_disabled(tmp_path: Path) -> None:
    with tracked(config(tmp_path, "+logger.wandb.mode=disabled")) as logger:
        assert logger is not None and not list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("+logger.wandb.prjoect=x", "of logger.wandb .*unexpected keyword argument 'prjoect'"),
        ("+logger.wandb.api_key=hidden", "unexpected keyword argument 'api_key'"),
        ("+logger.wandb.mode=later", "mode"),
        ("logger.wandb.log_model=all", "cannot be uploaded in offline mode"),
    ],
)
def test_what_wandb_refuses_is_a_sentence(tmp_path: Path, given: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error, tracked(config(tmp_path, given)):
        pytest.fail("it started")
    assert "hidden" not in str(error.value) and "\n" not in str(error.value)
    assert wandb.run is None


def logged(results: dict[str, Any]) -> Run:
    """What an evaluation's results are logged as."""
    run = Run()
    log_evaluation(WandbLogger(experiment=run), results, {})  # type: ignore[arg-type]
    return run


def test_comparisons_tuning_and_failures_are_logged() -> None:
    ratio = {"ratio": 1.2, "low": 1.1, "high": float("nan")}
    entry = {
        "reference": "beam_sample M=4",
        "quality": -0.5,
        "speed": 300.0,
        "over": {"hand-set": ratio, "bandit": ratio},
    }
    oracle = {"oracle": 400.0, "gap_closed": 0.5}
    point = {"name": "fixed M=8", "log_prob": -0.4, "kept": True, "speeds": {"modelled": 200.0, "also": 100.0}}
    results = {
        "rows": [],
        "failed": {"fixed M=8": "The device ran out of memory."},
        "tuned": {"split": "val", "prompts": 2, "grid": [point]},
        "comparisons": {"clock": [entry], "modelled": [entry | oracle], "also": []},
    }
    run = logged(results)
    table = run.logged["comparisons"]
    lines = [dict(zip(table.columns, line, strict=True)) for line in table.data]
    assert [(line["by"], line["family"]) for line in lines] == [
        (by, family) for by in ("clock", "modelled") for family in ("hand-set", "bandit")
    ]
    assert lines[0]["reference"] == "beam_sample M=4" and lines[0]["speed"] == 300.0
    assert (lines[0]["ratio"], lines[0]["low"], lines[0]["high"]) == (1.2, 1.1, None)
    assert (lines[0]["oracle"], lines[2]["oracle"], lines[2]["gap_closed"]) == (None, 400.0, 0.5)
    tuning = run.logged["tuning"]
    assert tuning.columns[-2:] == ["modelled_tokens_per_second", "also_tokens_per_second"]
    assert tuning.data == [["fixed M=8", -0.4, True, 200.0, 100.0]]
    assert run.summary == {"fixed M=8/failed": "The device ran out of memory."}


def test_an_evaluation_without_comparisons_logs_none() -> None:
    run = logged({"rows": [], "failed": {}, "tuned": None, "comparisons": {"clock": []}})
    assert run.logged == run.summary == {}


class Answers(BaseHTTPRequestHandler):
    """As much of a W&B server as a run needs to start."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        project = {"id": "p", "name": "dsbd", "entity": {"id": "e", "name": "us"}}
        bucket = {"id": "b", "name": "x1", "displayName": "x1", "project": project, "historyLineCount": 0}
        content = json.dumps({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server, for as long as the block takes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def on_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An account, and little patience; wandb reads the environment once."""
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    monkeypatch.setattr("controller.tracking.PATIENCE", 2.0)
    yield monkeypatch
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no.such.host.invalid"])
def test_a_server_out_of_reach_keeps_the_run_offline(
    tmp_path: Path, on_line: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    """The run goes on; nothing waits for the server."""
    on_line.setenv("WANDB_BASE_URL", address)
    settings = ["logger.wandb.offline=false", "logger.wandb.log_model=true", "+logger.wandb.mode=online"]
    with tracked(config(tmp_path / "run", *settings)) as logger:
        assert logger is not None and logger.experiment.offline
        logger.log_metrics({"loss": 1.0})
    said = capsys.readouterr().err
    assert "warning: wandb cannot be reached (" in said and f"wandb sync {tmp_path / 'run'}" in said
    assert wandb.run is None and list((tmp_path / "run").rglob("*.wandb"))


@pytest.mark.slow
@pytest.mark.skipif("finish_timeout" not in wandb.Settings.model_fields, reason="older wandb waits for its server")
def test_a_server_that_is_gone_before_the_end_is_not_waited_for(
    tmp_path: Path, on_line: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was logged is on the disk, and the command that uploads it is told."""
    with serving() as address:
        on_line.setenv("WANDB_BASE_URL", address)
        run = tracked(config(tmp_path / "run", "logger.wandb.offline=false"))
        logger = run.__enter__()
        assert logger is not None and not logger.experiment.offline
    logger.log_metrics({"loss": 1.0})
    run.__exit__(None, None, None)
    assert f"wandb sync {tmp_path / 'run'}" in capsys.readouterr().err
    assert wandb.run is None and list((tmp_path / "run").rglob("*.wandb"))
