"""The dense path against the compact one: equal distributions, equal verdicts from equal coins, exact slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decoding import DecodingConfig, UserError
from decoding.dice import dense
from decoding.dice.acceptance import LayerVerdict, align, verify_layer
from decoding.dice.dense import DenseJoint, dense_joint, draw_dense, verify_dense
from decoding.dice.sampling import Dice, FloatArray, draw, log_probabilities
from tests.decoding.dice.test_acceptance import ScriptedDice, slots_distribution, successive_draws
from tests.decoding.stubs import chi_square_p, joint_distribution

CUTS = [(None, None), (5, None), (None, 0.6), (7, 0.9), (1, None), (100, None), (None, 1e-12), (None, 1.0)]


def config(**changes: object) -> DecodingConfig:
    return DecodingConfig(**{"target_width": 1, **changes})  # type: ignore[arg-type]


def dice_of(seed: int) -> Dice:
    return Dice(torch.Generator().manual_seed(seed))


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
    assert joint.find(np.array([3, 7, 4]), np.array([4, 2, 0])).tolist() == [9, 2, -1]


@pytest.mark.parametrize("warp", ["joint", "beam"])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.9), (3, 0.9)])
@pytest.mark.parametrize("rows", [[0], [2], [0, 1, 2]])
def test_nan_names_the_model_before_anything_is_used(
    warp: str, top_k: int | None, top_p: float | None, rows: list[int]
) -> None:
    settings = config(warp=warp, top_k=top_k, top_p=top_p)
    values = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    good = dense_joint(log_probabilities(values, 1.0), [0, 1, 2], [0.0] * 3, settings, "draft")
    drafts = draw_dense(good, 2, False, dice_of(0))
    values[rows] = torch.nan
    bad = dense_joint(log_probabilities(values, 1.0), [0, 1, 2], [0.0] * 3, settings, "target")
    with pytest.raises(UserError, match="target model returned NaN"):
        draw_dense(bad, 2, False, dice_of(0))
    with pytest.raises(UserError, match="target model returned NaN"):
        verify_dense(bad, good, drafts, 2, 2, 2, False, dice_of(0))
    with pytest.raises(UserError, match="target model returned NaN"):
        verify_dense(good, bad, drafts, 2, 2, 2, False, dice_of(0))
    with pytest.raises(UserError, match="target model returned NaN"):
        bad.compact()


# Draws.


@pytest.mark.parametrize("replacement", [False, True])
def test_draws_are_successive_draws(replacement: bool) -> None:
    joint = by_hand([[0.4, 0.0, 0.3], [0.0, 0.2, 0.1]], [0, 1])
    dice = dice_of(0)
    counts = Counter(tuple(draw_dense(joint, 2, replacement, dice).tolist()) for _ in range(3000))
    expected = successive_draws(joint.grid.flatten().numpy(), 2, replacement)
    assert chi_square_p(counts, expected) > 1e-3  # fixed seed
    other = successive_draws(joint.grid.flatten().numpy(), 2, not replacement)
    assert chi_square_p(counts, other) < 1e-6, "the test can tell draws with from draws without replacement"


def test_draws_with_replacement_are_those_of_the_compact_path() -> None:
    log_probs = log_probabilities(torch.randn(3, 50, generator=torch.Generator().manual_seed(1)), 1.0)
    joint = dense_joint(log_probs, [0, 1, 2], [0.0, -1.0, 1.0], config())
    for seed in range(20):
        picks = draw_dense(joint, 8, True, dice_of(seed))
        assert (picks == draw(joint.compact().probs, 8, True, dice_of(seed))).all()


@pytest.mark.parametrize("count", [3, 9])
def test_draws_end_with_the_support(count: int) -> None:
    joint = by_hand([[0.0, 0.5, 0.0], [0.3, 0.0, 0.2]], [0, 1])
    assert sorted(draw_dense(joint, count, False, dice_of(0)).tolist()) == [1, 3, 5]
    assert len(draw_dense(joint, count, True, dice_of(0))) == count


@pytest.mark.parametrize("number", [0.0, float(np.nextafter(1.0, 0.0)), 1.0])
@pytest.mark.parametrize("replacement", [False, True])
def test_extreme_numbers_never_draw_the_impossible(number: float, replacement: bool) -> None:
    """1 stands for a product that rounds up to the total."""
    joint = by_hand([[0.0, 0.1, 0.0], [0.7, 0.0, 0.0], [0.0, 1e-300, 0.0]], [0, 1, 2])
    picks = draw_dense(joint, 3, replacement, ScriptedDice([number] * 3)).tolist()
    assert set(picks) <= {1, 3, 7}
    assert replacement or sorted(picks) == [1, 3, 7]


# Verdicts.


def random_case(seed: int) -> dict[str, Any]:
    """Two layers' grids and a rule: nodes on either side that the other lacks, near and far drafts, cuts or none."""
    choose, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    target_nodes = sorted(choose.choice(6, choose.integers(1, 5), replace=False).tolist())
    draft_nodes = choose.choice(6, choose.integers(1, 5), replace=False).tolist()
    vocabulary, scale = int(choose.integers(2, 9)), float(choose.choice([0.3, 1.0, 3.0]))
    noise = float(choose.choice([0.0, 0.3, 1.0]))  # 0: equal rows
    rows = scale * torch.randn(6, vocabulary, generator=generator)
    other = rows + noise * scale * torch.randn(6, vocabulary, generator=generator)
    weights = choose.normal(size=6) * float(choose.choice([0.0, 1.0]))
    settings = config(warp=str(choose.choice(["joint", "beam"])), top_p=[None, None, 0.7][choose.integers(3)])
    m = int(choose.integers(1, 5))
    return dict(
        target=(log_probabilities(rows[target_nodes], 1.0), target_nodes, weights[target_nodes].tolist(), settings),
        draft=(log_probabilities(other[draft_nodes], 1.0), draft_nodes, weights[draft_nodes].tolist(), settings),
        width=int(choose.integers(1, 8)),
        rule=(m, m + int(choose.integers(0, 3)), m + int(choose.integers(0, 3)), bool(choose.integers(2))),
    )


def check_equal_verdicts(seed: int, device: str = "cpu") -> Counter[str]:
    """Both paths on one case; returns what happened in it."""
    case = random_case(seed)
    target, draft = (dense_joint(case[name][0].to(device), *case[name][1:]) for name in ("target", "draft"))
    rule, replacement = case["rule"], case["rule"][-1]
    drafts = draw_dense(draft, case["width"], replacement, dice_of(seed))
    pairs = [entry[:2] for entry in draft.entries(drafts)]
    parents, tokens = np.array(pairs).T
    both = align(target.compact(), draft.compact())
    assert (draft.find(parents, tokens) == drafts).all()
    places = np.searchsorted(draft.grid.flatten().nonzero().squeeze(1).cpu().numpy(), drafts)  # in the compact Q
    seen: Counter[str] = Counter()
    for shadow in (False, True):
        streams = [(dice_of(seed + 1), dice_of(seed + 2) if shadow else None) for _ in range(2)]
        expected = verify_layer(both.p, both.q, both.of_draft[places], *rule, *streams[0])
        found = verify_dense(target, draft, drafts, *rule, *streams[1])
        assert found.bits == expected.bits
        assert (found.accepted, found.passed) == (expected.accepted, expected.passed)
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-12)
        # The fills as well, since the target's nodes are sorted here.
        entries = target.entries(found.slots)
        same = target.compact().entries(both.in_target(expected.slots))
        assert [entry[:2] for entry in entries] == [entry[:2] for entry in same]
        for node, token, weight in entries:
            row = case["target"][1].index(node)
            assert weight == pytest.approx(case["target"][2][row] + float(case["target"][0][row, token]), abs=1e-12)
        seen["passed" if found.passed else "failed"] += 1
        seen["accepted"] += found.accepted
        seen["rejected"] += len(found.bits) - sum(found.bits)
        seen["fills"] += len(found.slots) - found.accepted
        seen["dead drafts"] += len(set(parents.tolist()) - set(case["target"][1]))
        seen["own nodes"] += len(set(case["target"][1]) - set(case["draft"][1]))
    return seen


def test_verdicts_are_those_of_the_compact_path_coin_by_coin() -> None:
    seen = sum((check_equal_verdicts(seed) for seed in range(300)), Counter())
    assert min(seen.values()) > 100, "all kinds of layers occurred"


@pytest.mark.gpu
def test_verdicts_on_a_gpu_are_those_of_the_compact_path() -> None:
    for seed in range(100):
        check_equal_verdicts(seed, "cuda")


def test_verdict_counts_and_limits() -> None:
    """Equal P and Q accept everything: surplus up to the limit, no refill. Apart: the support ends the refill."""
    joint = by_hand([[0.4, 0.3, 0.2, 0.1]], [0])
    drafts = np.array([2, 0, 3, 1])
    kept = verify_dense(joint, joint, drafts, 1, 3, 3, False, dice_of(0))
    assert (kept.slots, kept.accepted, kept.passed) == ([2, 0, 3], 3, True)
    dropped = verify_dense(joint, joint, drafts, 1, 1, 3, False, dice_of(0))
    assert (dropped.slots, dropped.accepted, dropped.passed) == ([2], 1, True)
    every = verify_dense(joint, joint, drafts, 6, 6, 6, False, dice_of(0))
    assert (every.slots, every.accepted, every.passed) == ([2, 0, 3, 1], 4, True)
    apart = verify_dense(
        by_hand([[0.5, 0.5]], [0]), by_hand([[0.2, 0.8]], [5]), np.array([1]), 1, 3, 3, False, dice_of(0)
    )
    assert sorted(apart.slots) == [0, 1]
    assert (apart.accepted, apart.passed, apart.bits) == (0, False, [False])


# The distribution of the slots.


def on_one_row(p: FloatArray, q: FloatArray, drafts: np.ndarray, dice: Dice, **rule: Any) -> LayerVerdict:
    return verify_dense(by_hand([p.tolist()], [0]), by_hand([q.tolist()], [0]), drafts, dice=dice, **rule)


def worst(p: list[float], q: list[float], width: int, target_width: int, replacement: bool) -> float:
    """Largest error of a slots' probability, integrated over all drafts, coins and fills."""
    both = np.array(p), np.array(q)
    rule = dict(target_width=target_width, limit=target_width, refill=target_width, replacement=replacement)
    found = slots_distribution(*both, width, on_one_row, **rule)
    expected = successive_draws(both[0], target_width, replacement)
    return max(abs(found.get(slots, 0.0) - expected.get(slots, 0.0)) for slots in {*found, *expected})


@pytest.mark.parametrize(
    ("p", "q", "width", "target_width", "replacement"),
    [
        ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], 2, 1, False),
        ([0.6, 0.4, 0.0], [0.3, 0.2, 0.5], 2, 2, False),
        ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], 3, 2, False),
        ([0.7, 0.3], [0.4, 0.6], 2, 2, True),
    ],
)
def test_slots_are_successive_draws_exactly(
    p: list[float], q: list[float], width: int, target_width: int, replacement: bool
) -> None:
    """As in test_acceptance: thresholds by bisection, accurate to about 1e-16 each."""
    assert worst(p, q, width, target_width, replacement) < 1e-12


TARGET = ([[0.25, 0.1, 0.05], [0.3, 0.2, 0.1]], [3, 5])  # node 4 was not accepted, node 5 was not drafted from
DRAFT = ([[0.6, 0.05, 0.05], [0.04, 0.06, 0.2]], [4, 3])


def slots_p(replacement: bool, draws: int = 2000) -> float:
    """p-value of the slots of a layer, in order, under M = 2 draws from P."""
    target, draft = by_hand(*TARGET), by_hand(*DRAFT)
    counts: Counter[tuple[int, ...]] = Counter()
    dice = dice_of(6)
    for _ in range(draws):
        drafts = draw_dense(draft, 3, replacement, dice)
        counts[tuple(verify_dense(target, draft, drafts, 2, 3, 3, replacement, dice).slots[:2])] += 1
    return chi_square_p(counts, successive_draws(target.grid.flatten().numpy(), 2, replacement))


@pytest.mark.parametrize("replacement", [False, True])
def test_slots_are_successive_draws_where_parents_are_missing(replacement: bool) -> None:
    assert slots_p(replacement) > 1e-3  # fixed seed


def never_normalised(outside: torch.Tensor, own: torch.Tensor, width: int, replacement: bool) -> torch.Tensor:
    """Q's mass, but drawn entries are not taken off."""
    return (outside + own.sum()).expand(width)


def never_afresh(self: Any, afresh: torch.Tensor, c: torch.Tensor, mass: torch.Tensor) -> None:
    """R goes on from what was left, also after an acceptance."""
    self.own, self.c, self.mass = self.own, torch.where(mass > 0, c, self.c), torch.where(mass > 0, mass, self.mass)


@pytest.mark.parametrize(
    ("place", "broken"),
    [("_draft_masses", never_normalised), ("_Judge._move_on", never_afresh)],
)
def test_a_biased_judge_is_caught(monkeypatch: pytest.MonkeyPatch, place: str, broken: Any) -> None:
    monkeypatch.setattr(f"decoding.dice.dense.{place}", broken)
    assert slots_p(replacement=False) < 1e-6
    assert worst([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], 3, 2, False) > 0.01


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


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("shadow", [False, True])
def test_a_layer_waits_once_to_be_drawn_and_once_to_be_verified(
    monkeypatch: pytest.MonkeyPatch, replacement: bool, shadow: bool
) -> None:
    log_probs = log_probabilities(torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)), 1.0)
    numbers = np.random.default_rng(0).random((3, 40)).tolist()  # the dice of the test live on the host
    with counted(monkeypatch) as waits:
        target = dense_joint(log_probs[0], [1, 2, 3], [0.0, 0.5, 1.0], config(top_p=0.95))
        draft = dense_joint(log_probs[1], [3, 4, 1], [0.0, 0.5, 1.0], config(top_p=0.95))
        assert waits == []
        drafts = draw_dense(draft, 6, replacement, ScriptedDice(numbers[0]))
        draft.entries(drafts)
        assert waits == ["cpu"]
        second = ScriptedDice(numbers[2]) if shadow else None
        verdict = verify_dense(target, draft, drafts, 4, 4, 4, replacement, ScriptedDice(numbers[1]), second)
        assert len(target.entries(verdict.slots)) == 4
        assert waits == ["cpu", "cpu"]


def test_the_count_of_waits_sees_a_value_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = by_hand([[0.5, 0.5]], [0])
    with counted(monkeypatch) as waits:
        assert bool(joint.grid[0, 0] > 0)
        assert joint.grid[joint.grid > 0].tolist() == [0.5, 0.5]
        assert joint.grid.flatten()[torch.tensor(1)] == 0.5
    assert waits == ["_local_scalar_dense", "index", "tolist", "_local_scalar_dense", "_local_scalar_dense"]


def test_large_grids_are_drawn_in_blocks() -> None:
    """Two levels: blocks of a grid that no size divides; the last entry is reached."""
    probs = torch.zeros(3, 1001, dtype=torch.float64)
    probs[0, 0] = probs[1, 500] = probs[2, 1000] = 1 / 3
    joint = DenseJoint(np.arange(3), probs, probs.log().float(), np.zeros(3))
    assert dense._in_blocks(probs).shape[0] > 1
    assert draw_dense(joint, 5, True, ScriptedDice([0.0, 0.3, 0.4, 0.6, 0.99])).tolist() == [0, 0, 1501, 1501, 3002]
    assert sorted(draw_dense(joint, 5, False, dice_of(0)).tolist()) == [0, 1501, 3002]
