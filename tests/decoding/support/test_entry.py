"""One sentence and an exit code for every mistake on a command line; values reach Hydra's sweepers."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from decoding import UserError
from decoding.support.entry import build_all, entry_point
from decoding.support.in_use import fresh_folder, in_use
from decoding.support.settings import check_settings

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs write into a temporary folder, and Hydra's logging set-up does not outlive the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Call a command line on conf/collect.yaml in this process; (exit code, what went to stderr)."""

    def call(*arguments: str, task: Callable[[DictConfig], Any] = lambda cfg: None) -> tuple[int, str]:
        def named(cfg: DictConfig) -> Any:
            return task(cfg)

        monkeypatch.setattr(sys, "argv", ["collect.py", *arguments])
        try:
            entry_point("collect", renames={"alias": "seed"})(named)()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("polic.seed=1", "Did you mean policy?"),
        ("policy.sed=1", "policy.sed is not a setting of policy; choose among seed."),
        ("+policy.sed=1", "policy.sed is not a setting of decoding.ExploringWidth; choose among seed"),
        ("decoding.top_kk=1", "Did you mean decoding.top_k?"),
        ("+colect.x=1", "colect is not a setting; choose among"),
        (
            "+collect.x=1",
            "collect.x is not a setting of collect; choose among batch_size, columns, strict, test_prompts",
        ),
        ("pair=foo", "pair=foo is not known; choose one of"),
        ("data=foo", "jsonl"),
        (
            "policy=foo",
            "policy=foo is not known; choose one of bandit, entropy, expected, exploring, fixed, gap, key_gap,",
        ),
        ("seed=abc", "seed is 'abc'; give a whole number (default 0)."),
        ("seed=1.5", "seed is 1.5"),
        ("seed.x=1", "seed.x is not a setting: seed is a single value."),
        ("collect.train_prompts=many", "collect.train_prompts is 'many'; give a whole number"),
        ("decoding.top_k=abc", "decoding.top_k is 'abc'; give a whole number or null."),
        ("policy.seed=[1]", "policy.seed is [1]; give a whole number."),
        ("pair=local", "pair.draft is not set: give it as pair.draft=..."),
        ("trainer=gpu", "trainer"),
        ("word", "The argument 'word' cannot be read"),
        ("seed=[", "The argument 'seed=[' cannot be read"),
        ("output_dir=/tmp/a=b", """those of the shell around them: 'output_dir="/tmp/a=b"'."""),
        ("seed=\n", r"The argument 'seed=\n' cannot be read"),
        ("decoding.top_k=a\nb", r"The argument 'decoding.top_k=a\nb' cannot be read"),
        ("pair='x\ny'", "choose one of"),
        ("policy._target_=decoding.Nope", "policy._target_ is 'decoding.Nope', which cannot be used"),
        ("seed=${nothing}", "nothing"),
        ("policy=null", "policy=null gives a group no choice"),
    ],
)
def test_mistakes_are_one_sentence(cli: Cli, tmp_path: Path, argument: str, expected: str) -> None:
    code, err = cli(argument)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert expected in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "nothing may be left behind"


def test_settings_that_fit_are_accepted(cli: Cli) -> None:
    seen: list[DictConfig] = []
    arguments = ("seed=3", "decoding.top_k=null", "collect.train_prompts=2", "policy=fixed", "policy.draft_width=5")
    assert cli(*arguments, task=seen.append) == (0, "")
    assert seen[0].seed == 3 and seen[0].policy._target_ == "decoding.FixedWidth"


def test_renamed_key(cli: Cli) -> None:
    seen: list[int] = []
    assert cli("alias=5", task=lambda cfg: seen.append(cfg.seed)) == (0, "")
    assert seen == [5]


def _raise(error: BaseException) -> Callable[[DictConfig], None]:
    def task(cfg: DictConfig) -> None:
        raise error

    return task


def test_user_error_in_the_task(cli: Cli) -> None:
    assert cli(task=_raise(UserError("draft_width (2) is too small."))) == (2, "error: draft_width (2) is too small.\n")


def test_user_error_inside_instantiate(cli: Cli) -> None:
    from hydra.utils import instantiate

    code, err = cli("decoding.draft_width=2", task=lambda cfg: instantiate(cfg.decoding))
    assert code == 2
    assert err.startswith("error: draft_width (2) is less than target_width (4)") and err.count("\n") == 1


def test_interrupt(cli: Cli) -> None:
    assert cli(task=_raise(KeyboardInterrupt())) == (130, "interrupted\n")


def test_sigterm_is_an_interrupt_and_its_handler_goes_with_the_command(cli: Cli) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert cli(task=lambda cfg: signal.raise_signal(signal.SIGTERM)) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_bugs_keep_their_traceback(cli: Cli) -> None:
    with pytest.raises(ZeroDivisionError):
        cli(task=_raise(ZeroDivisionError()))


def _broken() -> None:
    [].pop()


def test_bugs_inside_instantiate_keep_their_traceback(cli: Cli) -> None:
    from hydra.utils import instantiate

    with pytest.raises(InstantiationException):
        cli(task=lambda cfg: instantiate({"_target_": f"{__name__}._broken"}))


def test_traceback_on_request(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError):
        cli(task=_raise(UserError("no")))


def test_sweep_runs_every_job_and_gets_values(cli: Cli, tmp_path: Path) -> None:
    seeds: list[int] = []
    code, err = cli("-m", "seed=1,2", task=lambda cfg: seeds.append(cfg.seed))
    assert (code, seeds) == (0, [1, 2]), err


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("place", ["/proc/x", "{}/file", "{}/file/below", "{}/" + "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_sentence(cli: Cli, tmp_path: Path, place: str, sweep: bool) -> None:
    """Whoever runs this, root included; in a task, a file that is missing may be a bug."""
    (tmp_path / "file").write_text("")
    place = place.format(tmp_path)
    code, err = cli(*(["-m", f"hydra.sweep.dir={place}"] if sweep else [f"hydra.run.dir={place}"]))
    assert code == 2 and err.startswith(f"error: {place}") and err.count("\n") == 1, err
    with pytest.raises(FileNotFoundError):
        cli(task=lambda cfg: (tmp_path / "absent").read_text())


def test_a_second_command_in_a_folder_is_refused(cli: Cli, tmp_path: Path) -> None:
    """And leaves nothing there, not even its settings beside those of the first."""
    ran: list[str] = []
    given, notes = f"hydra.run.dir={tmp_path}/same", tmp_path / "same" / ".hydra"
    with in_use(tmp_path / "same"):
        code, err = cli(given, task=lambda cfg: ran.append("beside"))
        assert not notes.exists()
    assert code == 2 and err.startswith(f"error: {tmp_path}/same is in use by process "), err
    assert cli(given, "seed=5", task=lambda cfg: ran.append("after")) == (0, "")
    assert ran == ["after"] and "seed: 5" in (notes / "config.yaml").read_text()
    assert (notes / "overrides.yaml").read_text() == "- seed=5\n"


@pytest.mark.parametrize("given", [(), ("-m", "seed=1,2")])
def test_commands_of_one_second_have_folders_of_their_own(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Stopped:
            return cls(2026, 11, 27)

    monkeypatch.setattr("hydra.core.utils.datetime", Stopped)
    seen: list[str] = []
    for _ in range(3):
        fresh_folder.cache_clear()  # as other processes have none of it
        assert cli(*given, task=lambda cfg: seen.append(HydraConfig.get().runtime.output_dir)) == (0, "")
    assert len(set(seen)) == len(seen) == 3 * max(1, len(given))
    assert sum("2026-11-27_00-00-00-3" in folder for folder in seen) == max(1, len(given))


def test_called_with_a_config_it_returns_the_value() -> None:
    main = entry_point("collect")(lambda cfg: cfg.x + 1)
    assert main(OmegaConf.create({"x": 1})) == 2


def test_value_reaches_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweepers such as Optuna optimise what the job returned."""
    from hydra._internal import hydra as internal

    returned: list[Any] = []
    run_job = internal.run_job

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = run_job(*args, **kwargs)
        returned.append(result.return_value)
        return result

    def task(cfg: DictConfig) -> float:
        return 0.25

    monkeypatch.setattr(internal, "run_job", spy)
    monkeypatch.setattr(sys, "argv", ["collect.py"])
    entry_point("collect")(task)()
    assert returned == [0.25]


def test_build_all() -> None:
    nodes = OmegaConf.create({"a": {"_target_": "decoding.FixedWidth", "target_width": 2}, "b": None})
    assert [policy.fixed_target_width for policy in build_all(nodes)] == [2]
    assert build_all(None) == [] and build_all(OmegaConf.create({})) == []


@pytest.mark.parametrize("value", [[1, 2], 1, "auto"])
def test_unions_are_understood(value: Any) -> None:
    check_settings(OmegaConf.create({"trainer": {"_target_": "lightning.Trainer", "devices": value}}))


def test_nested_nodes_are_checked() -> None:
    with pytest.raises(
        UserError, match=r"callbacks.stop.patiens is not a setting .* Did you mean callbacks.stop.patience"
    ):
        node = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "a", "patiens": 3}
        check_settings(OmegaConf.create({"callbacks": {"stop": node}}))
