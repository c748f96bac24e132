"""Joint distributions on the device against those on the host, and how often the host waits for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decoding import DecodingConfig, UserError
from decoding.dice.dense import DenseJoint, dense_joint
from decoding.dice.noise import PathNoise
from decoding.dice.sampling import log_probabilities
from decoding.dice.selection import run_race
from decoding.forest.tree import TokenForest
from tests.decoding.stubs import joint_distribution

CUTS = [(None, None), (5, None), (None, 0.6), (7, 0.9), (1, None), (100, None), (None, 1e-12), (None, 1.0)]


def config(**changes: object) -> DecodingConfig:
    return DecodingConfig(**{"target_width": 1, **changes})  # type: ignore[arg-type]


def roots() -> TokenForest:
    """A forest with nodes 1 to 3 below the prompt."""
    forest = TokenForest()
    for token in range(3):
        forest.child(0, token)
    return forest


def by_hand(grid: list[list[float]], nodes: list[int]) -> DenseJoint:
    """A joint with given probabilities; log p is what would give them with weights of 0."""
    probs = torch.tensor(grid, dtype=torch.float64)
    return DenseJoint(np.array(nodes), probs / probs.sum(), probs.log().float(), np.zeros(len(nodes)))


# The distribution.


@pytest.mark.parametrize("warp", ["joint", "beam"])
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_grid_is_the_joint_distribution(
    warp: str, top_k: int | None, top_p: float | None, temperature: float
) -> None:
    settings = config(warp=warp, top_k=top_k, top_p=top_p)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(3, 7, generator=generator)
        logits[1, 2] = -torch.inf
        log_probs = log_probabilities(logits, temperature)
        nodes, weights = [4, 9, 2], (3 * torch.randn(3, generator=generator)).tolist()
        expected = joint_distribution(log_probs, nodes, weights, settings)
        joint = dense_joint(log_probs, nodes, weights, settings)
        found = joint.compact()
        assert len(joint) == len(found) == len(expected)
        assert float(joint.grid.sum()) == pytest.approx(1, abs=1e-14)
        ours, theirs = (np.lexsort((j.tokens, j.parents)) for j in (found, expected))
        assert (found.parents[ours] == expected.parents[theirs]).all()
        assert (found.tokens[ours] == expected.tokens[theirs]).all()
        assert found.probs[ours] == pytest.approx(expected.probs[theirs], rel=1e-6)  # of float32 log-probabilities
        assert found.weights[ours] == pytest.approx(expected.weights[theirs], abs=1e-5)


def test_entries_are_named_by_node_and_token_with_true_weights() -> None:
    log_probs = log_probabilities(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), 1.0)
    joint = dense_joint(log_probs, [7, 3], [-1.0, -0.5], config(top_k=4))
    picks = [2, 9, 2]
    found = joint.entries(picks)
    assert [entry[:2] for entry in found] == [(7, 2), (3, 4), (7, 2)]
    expected = [-1.0 + float(log_probs[0, 2]), -0.5 + float(log_probs[1, 4]), -1.0 + float(log_probs[0, 2])]
    assert [entry[2] for entry in found] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warp", ["joint", "beam"])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.9), (3, 0.9)])
@pytest.mark.parametrize("rows", [[0], [2], [0, 1, 2]])
def test_nan_names_the_model_before_anything_is_used(
    warp: str, top_k: int | None, top_p: float | None, rows: list[int]
) -> None:
    settings = config(warp=warp, top_k=top_k, top_p=top_p)
    values = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    values[rows] = torch.nan
    bad = dense_joint(log_probabilities(values, 1.0), [0, 1, 2], [0.0] * 3, settings, "target")
    with pytest.raises(UserError, match="target model returned NaN"):
        run_race(bad, PathNoise(0, roots(), 6), 2)
    with pytest.raises(UserError, match="target model returned NaN"):
        bad.compact()


# Waiting for the device.


class Waits(TorchDispatchMode):
    """Operations whose result the host must wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        masked = name.startswith("index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for indices in args[1:]
            if isinstance(indices, (list, tuple))
            for index in indices
        )
        if masked or name in self.NAMES or name.startswith("_unique"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the block waited for: transfers to the host, and operations that read a value."""
    waits = Waits()

    def spy(name: str) -> Any:
        transfer = getattr(torch.Tensor, name)

        def spied(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            waits.seen.append(name)
            return transfer(self, *args, **kwargs)

        return spied

    with monkeypatch.context() as patch, waits:
        for name in ("cpu", "tolist"):
            patch.setattr(torch.Tensor, name, spy(name))
        yield waits.seen


def test_a_layer_waits_once_to_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = log_probabilities(torch.randn(3, 9, generator=torch.Generator().manual_seed(0)), 1.0)
    noise = PathNoise(0, roots(), 9)
    with counted(monkeypatch) as waits:
        joint = dense_joint(log_probs, [1, 2, 3], [0.0, 0.5, 1.0], config(top_p=0.95))
        assert waits == []
        race = run_race(joint, noise, 6)
        assert len(joint.entries(race.picks)) == 6
        assert waits == ["cpu"]


def test_the_count_of_waits_sees_a_value_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = by_hand([[0.5, 0.5]], [0])
    with counted(monkeypatch) as waits:
        assert bool(joint.grid[0, 0] > 0)
        assert joint.grid[joint.grid > 0].tolist() == [0.5, 0.5]
        assert joint.grid.flatten()[torch.tensor(1)] == 0.5
    assert waits == ["_local_scalar_dense", "index", "tolist", "_local_scalar_dense", "_local_scalar_dense"]
