"""decoding.generate: what counts as the text, what is printed of it and of a forest, and that nothing else happens."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

from decoding import DecodingConfig, DSBDDecoder, FixedWidth, ModelPair, ThresholdWidth, UserError
from decoding.dice import sampling
from decoding.forest.tree import TokenForest
from decoding.forest_view import (
    ACCEPTED,
    DRAWN,
    REJECTED,
    SURPLUS,
    UNJUDGED,
    ForestRecorder,
    ForestView,
    LayerView,
    NodeView,
    render,
)
from decoding.generate import continuation, fit, read_arguments, read_text, run, tokenised
from decoding.results import LayerEvent
from decoding.support.entry import CONF_DIR
from tests.decoding.stubs import random_pair, settings
from tests.small_pair import small_pair, small_tokenizer

TEXT = "def area(width):\n"
SMALL = ("decoding.max_new_tokens=8", "decoding.target_width=3", "decoding.draft_width=5", "decoding.draft_depth=2")


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """pair=tiny is the random pair."""
    monkeypatch.setattr(ModelPair, "tiny", classmethod(lambda cls, **settings: small_pair()))


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("generate", [*SMALL, *overrides])


# ------------------------------------------------------------------------------------------------ input


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        "x = 1",
        "a==b",
        "print('=')",
        "def f(a=1):",
        'say "x=1"',
        "two\nlines=3",
        "",
        "https://host/?q=1",
        "${HOME}",
        "x <- y",
    ],
)
def test_a_text_stands_first(text: str) -> None:
    assert read_arguments([text, "pair=tiny", "--show-forest", "seed=1"]) == (
        text,
        ["pair=tiny", "show_forest=true", "seed=1"],
    )


def test_words_of_a_text_need_no_quotes() -> None:
    assert read_arguments(["import", "os", "seed=1"]) == ("import os", ["seed=1"])
    assert read_arguments(["seed=1", "--", "x=1", "y"]) == ("x=1 y", ["seed=1"])


@pytest.mark.parametrize("text", ["x=1", "-1", "- item", "--show-forest", "~policy"])
def test_a_text_that_looks_like_a_setting_goes_behind_dashes(text: str) -> None:
    assert read_arguments([text, "seed=1"])[0] is None
    assert read_arguments(["seed=1", "--", text]) == (text, ["seed=1"])


@pytest.mark.parametrize(
    "setting",
    ["x=1", "pair=tiny", "+a.b=2", "++a=2", "~policy", "decoding.eos_token_id=[1,2]", "hydra/job_logging=none"],
)
def test_settings_without_a_text(setting: str) -> None:
    """Which is piped in, or in a file."""
    assert read_arguments([setting, "--help"]) == (None, [setting, "--help"])


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_text_from_files_and_pipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One newline at the end is the editor's; an argument is taken as it is."""
    path = tmp_path / "prompt.txt"
    path.write_bytes("é\r\n\r\n".encode())
    assert read_text({"text": None, "file": str(path)}) == "é\n"
    assert read_text({"text": "c\n"}) == "c\n"
    piped(monkeypatch, b"a\n")
    assert read_text({"text": None}) == "a"


@pytest.mark.parametrize(
    ("given", "content", "expected"),
    [
        ({}, b"", "No text: give it as"),
        ({}, b"\n", "What was piped in is empty"),
        ({}, b"\xe9", "What was piped in is not UTF-8"),
        ({"text": "\udce9"}, b"", "The text is not UTF-8"),
        ({"text": ""}, b"", "The text is empty"),
        ({"the argument": "a", "file": "b.txt"}, b"", "There are 2 texts, by the argument and by file; give one."),
        ({"file": "/no/such/file"}, b"", "Cannot read /no/such/file"),
    ],
)
def test_no_text(monkeypatch: pytest.MonkeyPatch, given: dict[str, str | None], content: bytes, expected: str) -> None:
    piped(monkeypatch, content)
    with pytest.raises(UserError, match=re.escape(expected)):
        read_text(given)


def test_no_text_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left waiting."""
    piped(monkeypatch, b"never read")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(UserError, match="No text"):
        read_text({})


def test_a_pair_without_a_tokenizer() -> None:
    pair = small_pair()
    pair.tokenizer = None
    with pytest.raises(UserError, match="'small' has no tokenizer"):
        tokenised(pair, TEXT)


# ----------------------------------------------------------------------------------------------- output


@pytest.mark.usefixtures("_small")
def test_prints_every_hypothesis(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(config("decoding.length_penalty=0.5"), TEXT)
    out = capsys.readouterr().out
    pair = small_pair()
    expected = DSBDDecoder(
        pair,
        DecodingConfig(
            target_width=3, draft_width=5, draft_depth=2, max_new_tokens=8, top_k=10, num_return_sequences=3,
            length_penalty=0.5,
        ),
    ).generate([tokenised(pair, TEXT)], torch.Generator().manual_seed(0))[0]  # fmt: skip
    assert (result.sequences, result.scores) == (expected.sequences, expected.scores)
    assert out.startswith(TEXT) and "\x1b" not in out
    numbers = re.findall(r"^\[(\d)\] score (\S+), log-probability (\S+) a token, ", out, re.MULTILINE)
    assert [int(place) for place, _, _ in numbers] == [1, 2, 3]
    for (_, score, per_token), exact, tokens in zip(numbers, result.scores, result.sequences, strict=True):
        assert float(score) == pytest.approx(exact, abs=6e-4)
        assert float(per_token) == pytest.approx(exact / len(tokens) ** 0.5, abs=6e-4)
    assert f"{result.stats.target_calls} target and {result.stats.draft_calls} draft calls" in out


@pytest.mark.usefixtures("_small")
def test_ended_hypotheses_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    ends = ",".join(str(token) for token in range(0, 200))
    result = run(config(f"decoding.eos_token_id=[{ends}]"), TEXT)
    out = capsys.readouterr().out
    assert any(result.finished)
    assert out.count("finished after") == sum(result.finished)


@pytest.mark.usefixtures("_small")
def test_from_python(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT + "\n")
    one = run(config("text=width"))
    two = run(config(f"file={tmp_path / 'a.txt'}", "seed=3", "policy=threshold"))
    assert one.stats.prompt_tokens != two.stats.prompt_tokens
    assert capsys.readouterr().out.count("[1] score") == 2


@pytest.mark.usefixtures("_small")
def test_colours_only_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run(config("show_forest=true"), TEXT)
    coloured = r"\x1b\[[0-9;]*3[0-9]m"
    assert re.search(coloured, capsys.readouterr().out)
    monkeypatch.setenv("NO_COLOR", "1")
    run(config("show_forest=true"), TEXT)
    assert not re.search(coloured, capsys.readouterr().out)


def test_terminals_are_not_obeyed() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    hostile = "a\tb\n\x1b[2J\x1b]0;title\x07\r\x9b31m\u202edrow\ud800 é"
    assert fit(hostile, console) == "a\tb\n\\x1b[2J\\x1b]0;title\\x07\\r\\x9b31m\\u202edrow\\ud800 é"
    assert fit("é", Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"))) == "\\xe9"


def test_text_of_tokens_follows_what_is_before_them() -> None:
    tokenizer = small_tokenizer()
    before, after = tokenizer("def é", verbose=False)["input_ids"], tokenizer("ü(", verbose=False)["input_ids"]
    assert continuation(tokenizer, before, after) == "ü("
    eos = tokenizer.eos_token_id
    assert continuation(tokenizer, before, [eos]) == tokenizer.eos_token
    assert continuation(tokenizer, before, [eos], special=False) == ""
    assert "\ufffd" in continuation(tokenizer, before, after[:1])

    class DropsSpace:
        def decode(self, tokens: list[int], **options: Any) -> str:
            return " ".join(map(str, tokens))

    assert continuation(DropsSpace(), [1], [2, 3]) == " 2 3"


# ----------------------------------------------------------------------------------------------- forest


class Checked(ForestRecorder):
    """Compares the view with the events, layer by layer."""

    def __init__(self, iteration: int | None = None) -> None:
        super().__init__(iteration)
        self.checked = 0

    def layer(self, event: LayerEvent) -> None:
        super().layer(event)
        if not self._listening:
            return
        view, place = self.view, event.record.layer - 1
        assert view is not None
        drafted = [node for node, _ in view.drafts[place]] if place < len(view.drafts) else []
        kept = [node for node, _ in event.kept]
        states = Counter(view.nodes[node].state for node in {*drafted, *kept})
        assert states[DRAWN] == view.layers[place].taken
        assert {n for n in kept if view.nodes[n].state != DRAWN} == {
            n for n in drafted if view.nodes[n].state in (ACCEPTED, SURPLUS)
        }
        if event.verdict is not None and not event.context.draft.root.config.replacement:
            assert states[ACCEPTED] + states[SURPLUS] == event.record.accepted
            assert states[ACCEPTED] == min(event.record.accepted, event.record.target_width)
        self.checked += 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exact": True},
        {"verification": "rejection"},
        {"verification": "rejection", "replacement": True},
        {"verification": "rejection", "exact": True},
        {"top_k": None},
        {"top_k": None, "dense": True},
        {"verification": "rejection", "top_k": None, "dense": True},
        {"mode": "beam_search", "top_k": None},
    ],
    ids=str,
)
def test_forest_shows_what_happened(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks agree with the events, log-probabilities with the models', and looking changes nothing."""
    changes = dict(changes)
    if changes.pop("dense", False):
        monkeypatch.setattr(sampling, "HOST_VOCABULARY", 8)
    usual: dict[str, Any] = {
        "target_width": 3,
        "draft_width": 6,
        "draft_depth": 3,
        "max_new_tokens": 10,
        "top_k": 20,
    }
    decoding, pair = DecodingConfig(**(usual | changes)), small_pair()
    prompt = tokenised(pair, TEXT)
    decoder = DSBDDecoder(pair, decoding, FixedWidth(target_width=2))
    plain = decoder.generate([prompt], torch.Generator().manual_seed(1))[0]
    checked, states = 0, Counter[str]()
    for iteration in range(1, plain.stats.iterations + 1):
        recorder = Checked(iteration)
        seen = decoder.generate([prompt], torch.Generator().manual_seed(1), recorder)[0]
        assert seen.sequences == plain.sequences
        view = recorder.view
        assert view is not None and view.iteration == iteration and recorder.iterations == plain.stats.iterations
        checked += recorder.checked
        states.update(node.state for node in view.nodes.values())
        compare_log_probabilities(view, pair, prompt)
        reached = [layer.target_width is not None for layer in view.layers]
        assert reached == sorted(reached, reverse=True), "a layer is reached after all above it"
    assert checked == plain.stats.new_tokens, "every layer was looked at once"
    assert states[ACCEPTED] and states[DRAWN] and states[REJECTED] and states[UNJUDGED]


@pytest.mark.parametrize("verification", ["shared_noise", "rejection"])
def test_nodes_that_were_scored_before_are_marked(verification: str) -> None:
    """Shared noise keeps them, rejection lets go of them."""
    decoding = settings(3, 6, 3, 14, verification=verification)
    decoder, known = DSBDDecoder(random_pair(6, closeness=0.7), decoding), 0
    for iteration in (2, 3, 4):
        for seed in range(6):
            recorder = ForestRecorder(iteration)
            decoder.generate([[1]], torch.Generator().manual_seed(seed), recorder)
            known += sum(node.known for node in recorder.view.nodes.values()) if recorder.view else 0
    assert (known > 0) == (verification == "shared_noise")


def compare_log_probabilities(view: ForestView, pair: ModelPair, prompt: list[int]) -> None:
    for node, seen in view.nodes.items():
        *before, token = [*prompt, *view.forest.path(node)]
        for model, value in ((pair.target, seen.target), (pair.draft, seen.draft)):
            with torch.inference_mode():
                expected = model(torch.tensor([before])).logits[0, -1].float().log_softmax(-1)[token]
            # float32 sums over a path, subtracted again
            assert value is None or value == pytest.approx(float(expected), abs=1e-4)
        assert seen.target is not None or seen.draft is not None


@pytest.mark.usefixtures("_small")
def test_which_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    run(config("forest_iteration=2"), TEXT)
    assert "forest of iteration 2" in capsys.readouterr().out
    run(config("show_forest=true", "decoding.draft_depth=0"), TEXT)
    assert "layer 1: none drafted, 3 taken from the target" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"forest_iteration is 99, but there were \d iterations"):
        run(config("forest_iteration=99"), TEXT)
    assert "[1] score" in capsys.readouterr().out, "what was decoded is shown all the same"
    for wrong in ("0", "first", "true"):
        with pytest.raises(UserError, match=r"forest_iteration is .* give a whole number of at least 1"):
            run(config(f"forest_iteration={wrong}"), TEXT)


def test_the_first_iteration_that_drafted() -> None:
    """A policy that drafts later than in the first iteration."""

    class Late(ThresholdWidth):
        def draft_further(self, context: Any, layer: int, widths: tuple[int, ...]) -> bool:
            return context.iteration >= 2

    pair, recorder = small_pair(), ForestRecorder()
    decoding = DecodingConfig(target_width=2, draft_width=4, max_new_tokens=8)
    DSBDDecoder(pair, decoding, Late()).generate([tokenised(pair, TEXT)], torch.Generator().manual_seed(0), recorder)
    assert recorder.view is not None and recorder.view.iteration == 3


TOKENS = {1: "a", 2: "\x1b[2J\n", 3: "é", 4: "\ufffd", 5: "[red]"}


def drawn_forest(ascii_only: bool, encoding: str = "utf-8") -> str:
    """A forest with a node of every state, as it is printed."""
    forest = TokenForest()
    root = forest.child(0, 1)
    nodes = [forest.child(root, token) for token in (2, 3, 4)]
    below = forest.child(nodes[1], 5)
    view = ForestView(
        iteration=4,
        forest=forest,
        beams=[(root, -0.5)],
        drafts=[],
        layers=[LayerView(3, 1, 2, True), LayerView(2)],
        nodes={
            nodes[0]: NodeView(ACCEPTED, -0.1, -0.2, drawn=2),
            nodes[1]: NodeView(REJECTED, draft=-0.3),
            nodes[2]: NodeView(DRAWN, target=-1.0),
            below: NodeView(UNJUDGED, draft=0.0),
        },
    )
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=120)
    console.print(render(view, lambda before, tokens: "".join(TOKENS[t] for t in tokens), ascii_only))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_drawing() -> None:
    out = drawn_forest(ascii_only=False).splitlines()
    assert out[:5] == [
        "forest of iteration 4",
        "layer 1: 3 drafted (w), 1 asked for (M), 2 accepted (K): passed",
        "layer 2: 2 drafted (w), not reached",
        "beam 1: 'a'  weight -0.50",
        r"├── ✓ '\x1b[2J\n'  target -0.20  draft -0.10  drawn 2 times",
    ]
    assert out[5:8] == ["├── ✗ 'é'  draft -0.30", "│   └── · '[red]'  draft 0.00", "└── ○ '\ufffd' #4  target -1.00"]
    assert [line[0] for line in out[8:-2]] == ["✓", "○", "✗", "·"], "the legend has the marks in use"


def test_drawing_in_ascii() -> None:
    out = drawn_forest(ascii_only=True, encoding="ascii")
    assert out.isascii() and r"x '\xe9'" in out and r"v '\x1b[2J\n'" in out


# ---------------------------------------------------------------------------------------- command line


def command(*arguments: str, folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "decoding.generate", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CONF_DIR.parent), "PYTHONIOENCODING": "utf-8"},
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line(tmp_path: Path) -> None:
    result = command(
        "x = 1", "decoding.max_new_tokens=4", "decoding.target_width=2", "--show-forest", "seed=2", folder=tmp_path
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("x = 1\n\nforest of iteration 1\nlayer 1: 2 drafted (w), 2 asked for (M)")
    assert "[2] score" in result.stdout and "[3] score" not in result.stdout
    assert not list(tmp_path.iterdir()), "it writes nothing"


def test_what_is_piped_in_goes_on(tmp_path: Path) -> None:
    result = command("decoding.max_new_tokens=2", "decoding.target_width=2", folder=tmp_path, given="x = 1\n")
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("x = 1\n\n[1] score")


def test_command_line_mistakes(tmp_path: Path) -> None:
    result = command("x", "polcy=fixed", folder=tmp_path)
    assert result.returncode == 2 and "Did you mean policy?" in result.stderr and result.stdout == ""
    result = command("seed=1", "import os", folder=tmp_path)
    assert result.returncode == 2 and "'import os' cannot be read" in result.stderr
    assert not list(tmp_path.iterdir())


def test_nobody_reads_on(tmp_path: Path) -> None:
    """As with `| head`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "decoding.generate", "x", "decoding.max_new_tokens=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CONF_DIR.parent)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert process.returncode == 1 and process.stderr == ""
