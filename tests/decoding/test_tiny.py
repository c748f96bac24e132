"""The built-in pair: what is committed keeps its promises, and the recipe runs from end to end in small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from decoding import ModelPair, tiny
from decoding.tasks.stdlib import split_of, stdlib_modules


def test_committed_pair_is_what_the_issue_allows(tiny_pair: ModelPair) -> None:
    recipe = json.loads((tiny.TINY_DIR / "recipe.json").read_text())
    sizes = {name: sum(p.numel() for p in getattr(tiny_pair, name).parameters()) for name in ("target", "draft")}
    assert sizes == recipe["parameters"]
    assert 4e6 <= sizes["target"] <= 6e6 and 0.4e6 <= sizes["draft"] <= 0.8e6
    assert sum(path.stat().st_size for path in tiny.TINY_DIR.rglob("*") if path.is_file()) <= 14e6
    assert recipe["target_bits_per_byte"] <= 1.5 and recipe["overlap_top_k_10"] >= 0.65


def test_committed_pair_measures_as_recorded(tiny_pair: ModelPair) -> None:
    """A slice of the held-out modules, with room for its being a slice and for another interpreter's library."""
    tokens, _ = tiny.read_tokens(tiny_pair.tokenizer, "test", tests=False)
    some = tokens[: 12 * tiny.CONTEXT]
    num_bytes = len(tiny_pair.tokenizer.decode(some.tolist()).encode())
    assert tiny.bits_per_byte(tiny_pair.target, some, num_bytes) < 1.5
    assert tiny.mean_overlap(tiny_pair.target, tiny_pair.draft, some) > 0.6


@pytest.fixture
def short_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few modules of each kind, and one optimiser step's worth of everything else."""
    everything = list(stdlib_modules())
    trained = [m for m in everything if split_of(m[0]) == "model"][:8]
    held_out = min((m for m in everything if split_of(m[0]) == "test" and len(m[1]) > 3000), key=lambda m: len(m[1]))

    def few(tests: bool = False) -> Iterator[tuple[str, str]]:
        return iter(trained[:2] if tests else [*trained, held_out])

    monkeypatch.setattr(tiny, "stdlib_modules", few)


def test_recipe_runs_and_leaves_a_pair(tmp_path: Path, short_library: None) -> None:
    out = tmp_path / "pair"
    tiny.main(["--out", str(out), "--steps", "2", "--draft-steps", "2"])
    target, draft, _ = tiny.load_tiny(out)
    ModelPair(target, draft).check_forest_passes()
    assert json.loads((out / "recipe.json").read_text())["steps"] == 2
    before = (out / "target" / "model.safetensors").read_bytes()
    tiny.main(["--out", str(out), "--draft-steps", "2", "--draft-only"])
    assert (out / "target" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_an_interrupted_recipe_keeps_the_old_pair(
    tmp_path: Path, short_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pair"
    out.mkdir()
    (out / "kept").touch()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "fit_model", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.main(["--out", str(out), "--steps", "2"])
    assert (out / "kept").exists()
