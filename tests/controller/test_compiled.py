"""Compiled functions: one source gives the same numbers compiled and plain; and widths against a search of all.

What else they compute is tested where it is used.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from controller import features, host, plan, policy
from controller.features import NAMES, TARGET_NAMES
from controller.losses import count_table, tails
from controller.plan import CostTable, Prospect, Rules
from decoding.dice.acceptance import align
from decoding.dice.closed_form import accept_probabilities, accepted_count_table
from decoding.dice.sampling import Joint
from decoding.support.arrays import FloatArray
from decoding.support.compiled import COMPILED

needs_numba = pytest.mark.skipif(not COMPILED, reason="numba is not installed, or disabled")


EARLY, LATE = len(NAMES), len(TARGET_NAMES)


def functions_of(*modules: ModuleType) -> SimpleNamespace:
    """All that modules with compiled functions define."""
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


OURS = functions_of(features, host, plan)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What they define without numba."""
    names = ("decoding.support.compiled", "controller.features", "controller.host", "controller.plan")
    kept = {name: sys.modules.pop(name) for name in names}
    try:
        with monkeypatch.context() as patch:  # no longer: numba reads it again wherever it compiles
            patch.setenv("NUMBA_DISABLE_JIT", "1")
            found = functions_of(*(importlib.import_module(name) for name in names[1:]))
    finally:
        for name, module in kept.items():
            package, _, leaf = name.rpartition(".")
            sys.modules[name] = module
            setattr(sys.modules[package], leaf, module)
    assert not found.COMPILED and found.times is np.dot
    return found


def decide_by(functions: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies made from now on use these functions."""
    for name in ("ContextFeatures", "HostNet", "Planner", "COMPILED"):
        monkeypatch.setattr(policy, name, getattr(functions, name))


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


def parents_tokens_probs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A distribution over (beam, token); two of these share some of their entries."""
    entries = int(rng.integers(1, 13))
    place = rng.choice(16, entries, replace=False)
    probs = np.maximum(rng.dirichlet(np.full(entries, 0.3)), 1e-12)
    return place // 4 + 5, place % 4, probs / probs.sum()


def foreseen(rng: np.random.Generator, widest: int) -> np.ndarray:
    """P(K_w >= M) at [w, M] for random accept probabilities, some of them 0 or 1; [W + 1, W + 1]."""
    accept = np.clip(rng.normal(0.5, 0.5, (widest, widest)), 0.0, 1.0)
    return tails(count_table(torch.from_numpy(accept))).numpy()


def arguments(rng: np.random.Generator, module: Any) -> dict[str, tuple[Any, ...]]:
    """Arguments of every compiled function; records are the module's own."""
    hidden, ranks, draft = 9, int(rng.integers(2, 6)), int(rng.choice([0, 4]))

    def linear(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
        return f32(rng, inputs, outputs), f32(rng, outputs)

    projections = f32(rng, draft, 3 if draft else 0), np.zeros((0, 0), np.float32)
    inputs = EARLY + projections[0].shape[1]
    trunk = linear(inputs, hidden), linear(hidden, hidden)
    shapes = (hidden, LATE), (6, 6), (hidden, 2 * ranks - 1), (2 * ranks - 1,)
    heads = (f32(rng, *shape) for shape in shapes)
    early = module.EarlyWeights(f32(rng, EARLY), f32(rng, EARLY), *projections, trunk, *heads)
    layers = linear(LATE, 8), linear(8, 8), linear(8, 2 * ranks - 1)
    late = module.LateWeights(f32(rng, LATE), f32(rng, LATE), layers)
    nodes = np.arange(64.0)
    costs = module.CostTable(0.2 + rng.random() * 0.02 * nodes, 1.0 + rng.random() * 0.02 * nodes, rng.random() * 0.1)
    known = rng.random(int(rng.integers(0, 4)))
    prospect = module.Prospect(known, 0.6, rng.random(), rng.random(), rng.uniform(0.8, 1.2))
    loss = np.append(np.sort(rng.exponential(size=ranks))[::-1], 0.0)
    weights, probs, parents, support = joint(rng)
    rate, reach, layer = rng.uniform(0.1, 2.0), rng.random(), int(rng.integers(1, 5))
    target_width = int(rng.integers(1, ranks + 1))
    target = True, layer, 30, weights, probs, parents, support
    context = *target, 4, 9, 3, 0.4, False
    vectors = f32(rng, draft), np.zeros(0, np.float32)
    value, brought = float(rng.exponential()), float(rng.exponential())
    packed = tuple(early), tuple(prospect), tuple(costs)
    rules = module.Rules(1, target_width, bool(rng.integers(2)), bool(rng.integers(2)))
    at_least, draft_width = foreseen(rng, 6), int(rng.integers(1, 7))
    p, q = parents_tokens_probs(rng), parents_tokens_probs(rng)
    gained, spent = rng.random(4).cumsum(), rng.random(4).cumsum()
    place = value, rate, reach
    return {
        "describe_context": (context,),
        "describe_target": (target,),
        "early": (f32(rng, EARLY), *vectors, early),
        "late": (f32(rng, LATE), late),
        "late_loss": (f32(rng, LATE), late, target_width),
        "expected_loss": (f32(rng, 2 * ranks - 1), target_width),
        "foreseen_counts": (f32(rng, 6, 6) * 9,),
        "foresee": (f32(rng, EARLY), *vectors, packed[0], target_width),
        "passing_chances": (p, q, draft_width),
        "ahead": (prospect, costs, layer, 4, 7, 5, 3),
        "worth_drafting": (*packed[1:], rate, reach, layer, 4, 3, 7, 5),
        "best_depth": (reach, gained, rate, spent),
        "kept_loss": (at_least[draft_width, : draft_width + 1], loss, rules),
        "plan_widths": (at_least, loss, prospect, costs, rules, *place, layer, 4, 7, 6),
        "plan_features": (f32(rng, EARLY), *vectors, *packed, tuple(rules), *place, layer, 4, 7, 6),
        "best_width": (loss, at_least[draft_width, : draft_width + 1], value, brought, tuple(rules)),
        "judge_bearable": (f32(rng, LATE), tuple(late), value, brought, 1, target_width),
        "judge_counted": (f32(rng, LATE), p, q, draft_width, tuple(late), value, brought, tuple(rules)),
        "judge_final": (f32(rng, LATE), tuple(late), value, rate, packed[2], True, 1, target_width),
        "least_bearable": (loss, value, brought, 1, target_width),
        "cheapest_width": (loss, value, rate, packed[2], bool(rng.integers(2)), 1, target_width),
    }


def parts(value: Any) -> tuple[Any, ...]:
    """A result without its tuples."""
    return tuple(part for entry in value for part in parts(entry)) if isinstance(value, tuple) else (value,)


@needs_numba
def test_compiled_functions_are_the_plain_ones(plain: SimpleNamespace) -> None:
    tried = set()
    for seed in range(60):
        ours = arguments(np.random.default_rng(seed), OURS)
        theirs = arguments(np.random.default_rng(seed), plain)
        for name in ours:
            function: Callable[..., Any] = getattr(OURS, name)
            assert getattr(function, "py_func", function) is not function, f"{name} is not compiled"
            compiled, expected = function(*ours[name]), getattr(plain, name)(*theirs[name])
            for a, b in zip(parts(compiled), parts(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{name}, seed {seed}")
            tried.add(name)
    compiled_names = {name for name, value in vars(OURS).items() if hasattr(value, "py_func")}
    assert tried == {name for name in compiled_names if not name.startswith("_") and name != "times"}


@pytest.mark.parametrize("exact", [False, True])
def test_a_learned_policy_works_without_numba(
    plain: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    """The plain functions decide as the compiled ones do."""
    from decoding import DSBDDecoder
    from tests.controller.test_learned_decoding import PROMPTS, config_of, learned
    from tests.decoding.stubs import random_pair

    pair, config = random_pair(6, seed=1, closeness=0.7), config_of(exact=exact)

    def widths() -> list[list[int]]:
        decoder = DSBDDecoder(pair, config, learned(pair))
        results = decoder.generate(PROMPTS, torch.Generator().manual_seed(0))
        return [result.stats.target_widths + result.stats.draft_widths for result in results]

    compiled = widths()
    decide_by(plain, monkeypatch)
    assert widths() == compiled


DECODE_IN_ALL_WAYS = """
import torch
from controller import features, host, plan
from decoding import DSBDDecoder
from tests.controller.test_learned_decoding import PROMPTS, config_of, learned, net_of_llamas
from tests.decoding.stubs import llama_pair, random_pair

def compiled():
    found = {name: f for module in (features, host, plan) for name, f in vars(module).items()}
    return {name: len(f.signatures) for name, f in found.items() if hasattr(f, "signatures")}

random, llamas = random_pair(6, seed=1, closeness=0.7), llama_pair()
assert compiled()["plan_features"] == 0
learned(random)
before = compiled()
assert before["plan_features"] == 1
for policy, pair in ((learned(random), random), (learned(llamas, net=net_of_llamas()), llamas)):
    for exact in (False, True):
        for batch in (PROMPTS, PROMPTS[:1]):
            DSBDDecoder(pair, config_of(exact=exact), policy).generate(batch, torch.Generator().manual_seed(0))
    assert compiled() == before, {n: c for n, c in compiled().items() if c != before[n]}
"""


@needs_numba
def test_no_prompt_waits_for_a_compiler() -> None:
    """All that decoding calls is compiled when a policy is made; in a process in which nothing is yet."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", DECODE_IN_ALL_WAYS], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RULES = [(keep, full) for keep in (True, False) for full in (True, False)]
rules = pytest.mark.parametrize(("keep", "full"), RULES)


def kept(accepted: int, asked: int, rules: Rules) -> int:
    """Design 5.2, surplus and refill: how many beams go on."""
    if accepted >= asked:
        return min(accepted, rules.most) if rules.keep else asked
    return rules.most if rules.full else asked


def mean_loss(counts: FloatArray, loss: FloatArray, asked: int, rules: Rules) -> float:
    """Of the beams that go on; [counts] P(K = k)."""
    return sum(float(chance) * float(loss[kept(k, asked, rules)]) for k, chance in enumerate(counts))


def random_loss(rng: np.random.Generator, ranks: int, target_width: int) -> FloatArray:
    """L(k), 0 from target_width on; [R + 1]."""
    loss = np.zeros(ranks + 1)
    for k in range(target_width - 1, 0, -1):
        loss[k] = loss[k + 1] + rng.exponential()
    loss[0] = loss[1]
    return loss


def gains_below(
    prospect: Prospect, costs: CostTable, layers: range, nodes: int, width: int, parents: int
) -> list[tuple[float, float]]:
    """What drafting the first d of these layers promises, and its seconds; d from 0. The first continues `parents`."""
    found, passed = [(0.0, 0.0)], prospect.left * prospect.earned
    for layer in layers:
        gained, spent = found[-1]
        passed *= prospect.passing[layer - 1] if layer <= len(prospect.passing) else prospect.start
        seconds = costs.layer + costs.draft[parents] + costs.target[nodes + width] - costs.target[nodes]
        nodes, parents = nodes + width, width
        found.append((gained + passed, spent + seconds))
    return found


@rules
def test_planned_widths_are_the_best_of_every_width_and_depth(keep: bool, full: bool) -> None:
    rng, chosen, deeper = np.random.default_rng(0), set(), set()
    for _ in range(1500):
        drafts, ranks = int(rng.integers(1, 9)), int(rng.integers(2, 9))
        most = int(rng.integers(1, ranks + 1))  # fewer or more than are drafted
        least = min(int(rng.integers(1, 3)), most, drafts)
        rules, widest = Rules(least, most, keep, full), int(rng.integers(least, drafts + 1))
        at_least, loss = foreseen(rng, drafts), random_loss(rng, ranks, most)
        known = rng.random(int(rng.integers(0, 6)))  # of no layer, of some or of all
        prospect = Prospect(known, rng.random(), rng.uniform(0.05, 1), rng.random(), rng.uniform(0.5, 2))
        nodes = np.arange(80.0)
        draft, target = 0.2 + 0.1 * rng.random() * nodes, 1.0 + 0.1 * rng.random() * nodes
        costs = CostTable(draft, target, 0.1 * rng.random())
        value, rate, reach = rng.exponential(0.5) * (rng.random() < 0.9), rng.uniform(0.1, 1.5), rng.random()
        layer, deepest, scored = int(rng.integers(1, 5)), int(rng.integers(1, 6)), int(rng.integers(1, 9))

        nets: dict[tuple[int, int, int], float] = {}
        for w in range(least, widest + 1):
            counts = at_least[w] - np.append(at_least[w, 1:], 0.0)
            seconds = target[scored + w] - target[scored]
            rest = gains_below(prospect, costs, range(layer + 1, deepest + 1), scored + widest, widest, w)
            for m in range(least, min(w, most) + 1):
                passing = min(1.0, at_least[w, m] * prospect.correction)
                now = passing * prospect.earned - value * mean_loss(counts, loss, m, rules)
                for d, (gained, spent) in enumerate(rest):
                    nets[w, m, d] = reach * (now + passing * gained) - rate * (seconds + spent)
        place = value, rate, reach, layer, deepest, scored, widest
        plan = OURS.plan_widths(at_least, loss, prospect, costs, rules, *place)

        best = max(nets.values())
        equals = {pair for pair, net in nets.items() if net > best - 1e-9}  # more than one where passing is certain
        w, m = plan.draft_width, plan.target_width
        furthers = [prospect.earned + rest[d][0] for *pair, d in equals if pair == [w, m]]
        assert plan.passing == at_least[w, m] and any(plan.further == pytest.approx(one) for one in furthers)
        assert plan.onward == pytest.approx(reach * min(1.0, at_least[w, m] * prospect.correction))
        below = gains_below(prospect, costs, range(layer + 1, deepest + 1), scored + w, w, w)
        assert plan.deeper == any(plan.onward * gained > rate * spent for gained, spent in below[1:])
        chosen.add((w, m))
        deeper.add(plan.deeper)
    assert len(chosen) > 15 and {w for w, _ in chosen} >= set(range(1, 8)) and deeper == {False, True}


def as_joint(entries: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Joint:
    return Joint(*entries, np.log(entries[2]))


def pairs_of_joints(rng: np.random.Generator, count: int) -> list[tuple[Any, Any]]:
    """P and Q: some equal, some with nothing in common, one as large as without a cut."""
    found = [(parents_tokens_probs(rng), parents_tokens_probs(rng)) for _ in range(count)]
    (parents, tokens, probs), other = found[0]
    large = [np.divmod(rng.permutation(600), 200) for _ in range(2)]
    wide = [(*place, rng.dirichlet(np.full(600, 0.05)) + 1e-300) for place in large]
    shuffled = rng.permutation(len(probs))
    turned = parents[shuffled], tokens[shuffled], probs[shuffled]
    return [*found, (found[0][0], turned), ((parents, tokens + 10, probs), other), (wide[0], wide[1])]


def closed_form(p: Any, q: Any, draft_width: int) -> FloatArray:
    """P(K_w >= M) on the union of the supports; [w + 1]."""
    both = align(as_joint(p), as_joint(q))
    counts = accepted_count_table(accept_probabilities(both.p, both.q, draft_width))[-1]
    return counts[::-1].cumsum()[::-1]


def test_the_closed_form_is_that_of_the_verification() -> None:
    rng, seen = np.random.default_rng(1), set()
    for p, q in pairs_of_joints(rng, 300):
        for draft_width in (1, 2, 8, int(rng.integers(3, 33))):
            found = plan.passing_chances(p, q, draft_width)
            np.testing.assert_allclose(found, closed_form(p, q, draft_width), atol=1e-12)
            assert found[0] == 1 and found.max() <= 1
            seen.add(round(float(found[1]), 1))
    assert {0.0, 0.5, 1.0} <= seen


def test_loss_is_the_mean_of_nats_and_of_the_chance_that_the_best_line_is_lost() -> None:
    rng = np.random.default_rng(3)
    for ranks in (1, 2, 5):
        quality, widest = 3 * f32(rng, 2 * ranks - 1), int(rng.integers(1, ranks + 1))
        shares = np.exp(quality[:ranks].astype(np.float64)) / np.exp(quality[:ranks].astype(np.float64)).sum()
        steps = np.exp(quality[ranks:].astype(np.float64))
        nats = np.array([steps[k - 1 :].sum() for k in range(1, ranks + 1)])
        beyond = np.array([shares[k:].sum() for k in range(1, ranks + 1)])
        mean = (nats + beyond) / 2
        expected = np.maximum(mean - mean[widest - 1], 0)
        found = OURS.expected_loss(quality, widest)
        np.testing.assert_allclose(found[1:], expected, atol=1e-9)
        assert found[0] == found[1]


@rules
def test_a_judged_width_is_the_best_of_all_by_p_and_q(keep: bool, full: bool) -> None:
    rng, chosen = np.random.default_rng(2), set()
    for p, q in pairs_of_joints(rng, 400):
        ranks = int(rng.integers(2, 9))
        most, draft_width = int(rng.integers(1, ranks + 1)), int(rng.integers(1, 9))
        rules = Rules(min(int(rng.integers(1, 3)), most), most, keep, full)
        layers = (f32(rng, LATE, 8), f32(rng, 8)), (f32(rng, 8, 8), f32(rng, 8))
        head = 0.2 * f32(rng, 8, 2 * ranks - 1), f32(rng, 2 * ranks - 1)
        late = OURS.LateWeights(np.zeros(LATE, np.float32), np.ones(LATE, np.float32), (*layers, head))
        target = True, 2, 30, *joint(rng)
        features = OURS.describe_target(target)
        expected_loss = OURS.late_loss(features, late, most)
        value, brought = rng.exponential(), rng.uniform(0.2, 3.0)
        at_least = closed_form(p, q, draft_width)

        counts = at_least - np.append(at_least[1:], 0.0)
        nets = {}
        for m in range(rules.least, most + 1):  # more than are drafted, too
            passing = at_least[m] if m <= draft_width else 0.0
            nets[m] = passing * brought - value * mean_loss(counts, expected_loss, m, rules)
        place = tuple(late), value, brought, tuple(rules)
        asked, loss = OURS.judge_counted(features, p, q, draft_width, *place)
        np.testing.assert_array_equal(loss, expected_loss)
        assert asked in [m for m, net in nets.items() if net > max(nets.values()) - 1e-9]
        chosen.add((asked, asked > draft_width))
    assert {asked for asked, _ in chosen} >= set(range(1, 6)) and len({beyond for _, beyond in chosen}) == 2
