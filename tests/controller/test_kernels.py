"""The kernels compiled and plain: one source, the same numbers. Their mathematics is tested where they are used."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from controller import kernels

needs_numba = pytest.mark.skipif(not kernels.COMPILED, reason="numba is not installed, or disabled")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is without numba."""
    spec = importlib.util.spec_from_file_location("plain_kernels", kernels.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain_kernels", module)
    with monkeypatch.context() as patch:  # no longer: numba reads it again wherever it compiles
        patch.setenv("NUMBA_DISABLE_JIT", "1")
        spec.loader.exec_module(module)
    assert not module.COMPILED and module.times is np.dot
    return module


def f32(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def joint(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Weights, and probabilities and parents of a distribution, some of it cut off."""
    beams, entries = int(rng.integers(1, 6)), int(rng.integers(1, 30))
    probs = rng.dirichlet(np.full(entries, 0.3))
    probs = np.maximum(probs, 1e-12) / np.maximum(probs, 1e-12).sum()
    cut = entries > 12
    weights = np.sort(rng.normal(size=beams) * 3)[::-1].copy()
    kept = probs[:12] if cut else probs
    return weights, kept, rng.integers(0, beams, len(kept)), entries


def arguments(rng: np.random.Generator, module: Any) -> dict[str, tuple[Any, ...]]:
    """Arguments of every kernel; records are the module's own."""
    hidden, pass_hidden, ranks, draft = 9, 7, int(rng.integers(2, 6)), int(rng.choice([0, 4]))

    def linear(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
        return f32(rng, inputs, outputs), f32(rng, outputs)

    projections = f32(rng, draft, 3 if draft else 0), np.zeros((0, 0), np.float32)
    inputs = 21 + projections[0].shape[1]
    trunk = linear(inputs, hidden), linear(hidden, hidden)
    early = module.EarlyWeights(f32(rng, 21), f32(rng, 21), *projections, trunk)
    shapes = (hidden, pass_hidden), (pass_hidden,), (6, pass_hidden), (pass_hidden, 2), (2,)
    head = module.PassWeights(*(f32(rng, *shape) for shape in shapes))
    layers = linear(36, 8), linear(8, 8), linear(8, 2 * ranks - 1)
    late = module.LateWeights(f32(rng, 36), f32(rng, 36), layers)
    nodes = np.arange(64.0)
    costs = module.CostTable(0.2 + rng.random() * 0.02 * nodes, 1.0 + rng.random() * 0.02 * nodes, rng.random() * 0.1)
    known = rng.random(int(rng.integers(0, 4)))
    prospect = module.Prospect(known, 0.6, rng.random(), rng.random(), rng.uniform(0.8, 1.2))
    loss = np.append(np.sort(rng.exponential(size=ranks))[::-1], 0.0)
    weights, probs, parents, support = joint(rng)
    rate, reach, layer = rng.uniform(0.1, 2.0), rng.random(), int(rng.integers(1, 5))
    top, target_width = f32(rng, hidden), int(rng.integers(1, ranks + 1))
    target = True, layer, 30, weights, probs, parents, support
    context = *target, 4, 9, 3, 0.4, False
    vectors = f32(rng, draft), np.zeros(0, np.float32)
    value, brought = float(rng.exponential()), float(rng.exponential())
    packed = tuple(early), tuple(head), tuple(prospect), tuple(costs)
    return {
        "describe_context": (context,),
        "describe_target": (target,),
        "look": (f32(rng, 21), *vectors, early),
        "passing": (top, float(rng.exponential()), head),
        "late": (f32(rng, 36), late),
        "late_loss": (f32(rng, 36), late, target_width, bool(rng.integers(2))),
        "expected_loss": (f32(rng, 2 * ranks - 1), target_width, bool(rng.integers(2))),
        "ahead": (prospect, costs, layer, 4, 7, 5, 3),
        "worth_drafting": (*packed[2:], rate, reach, layer, 4, 3, 7, 5),
        "plan_width": (top, head, prospect, costs, value, rate, reach, layer, 4, 7, 1, 6),
        "plan_context": (context, *vectors, *packed, value, rate, reach, 4, 7, 1, 6),
        "judge_target": (target, tuple(late), value, brought, 1, target_width),
        "least_bearable": (loss, value, brought, 1, target_width),
        "cheapest_width": (loss, value, rate, packed[3], bool(rng.integers(2)), 1, target_width),
    }


def parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@needs_numba
def test_compiled_kernels_are_the_plain_ones(plain: ModuleType) -> None:
    tried = set()
    for seed in range(40):
        ours = arguments(np.random.default_rng(seed), kernels)
        theirs = arguments(np.random.default_rng(seed), plain)
        for name in ours:
            function: Callable[..., Any] = getattr(kernels, name)
            assert getattr(function, "py_func", function) is not function, f"{name} is not compiled"
            compiled, expected = function(*ours[name]), getattr(plain, name)(*theirs[name])
            for a, b in zip(parts(compiled), parts(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{name}, seed {seed}")
            tried.add(name)
    compiled_names = {name for name, value in vars(kernels).items() if hasattr(value, "py_func")}
    assert tried == {name for name in compiled_names if not name.startswith("_") and name != "times"}


def test_a_learned_policy_works_without_numba(plain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain kernels decide as the compiled ones do."""
    import torch

    from controller import features, network, planner, policy
    from decoding import DSBDDecoder
    from tests.controller.test_learned_decoding import PROMPTS, config_of, learned
    from tests.decoding.stubs import random_pair

    pair, config = random_pair(6, seed=1, closeness=0.7), config_of()

    def widths() -> list[list[int]]:
        results = DSBDDecoder(pair, config, learned(pair)).generate(PROMPTS, torch.Generator().manual_seed(0))
        return [result.stats.target_widths + result.stats.draft_widths for result in results]

    compiled = widths()
    monkeypatch.setattr(network, "kernels", plain)
    monkeypatch.setattr(planner, "kernels", plain)
    for name in ("EarlyWeights", "PassWeights", "LateWeights"):
        monkeypatch.setattr(network, name, getattr(plain, name))
    for name in ("CostTable", "Decision", "Prospect"):
        monkeypatch.setattr(planner, name, getattr(plain, name))
    monkeypatch.setattr(policy, "expected_loss", plain.expected_loss)
    for name in ("describe_context", "describe_target"):
        monkeypatch.setattr(features, name, getattr(plain, name))
    assert widths() == compiled
