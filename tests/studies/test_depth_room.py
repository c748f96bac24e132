"""The room in deciding depths: arithmetic on iterations with known answers, what is recorded of real ones, mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from controller.losses import count_table, tails
from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError
from decoding.cost_table import UnitCosts
from decoding.entry import CONF_DIR
from decoding.oracles import modelled_seconds
from decoding.widths import IterationRecord, LayerRecord
from studies import depth_room
from studies.depth_room import DeepWidth, Iteration, candidates, compare, earnings, room_table, rules
from tests.controller.synthetic import draft_context, target_context
from tests.controller.test_learned_decoding import config_of
from tests.controller.test_policy import network, provenance
from tests.decoding.stubs import llama_pair, random_pair
from tests.test_evaluate import saved_controller

COSTS = UnitCosts(0.2, 1.0, 0.0)  # an iteration of d drafted layers takes 1 + 0.2 d
NOTHING, NETWORK, CLOSED, TOLD, EVERYTHING = (
    "nothing: the best fixed depth",
    "the network's chances to pass",
    "P(K_w ≥ M) of the layers drafted so far",
    "whether the layers drafted so far have passed",
    "everything: no layer that fails is drafted",
)
# The first layer passed, the second failed, the third was not reached; and one that could not be so deep.
FAILED = Iteration(2, (4, 4, 3), (0.5, 0.4, 0.8), (0.9, 0.2), passed=1, tokens=2)
SHORT = Iteration(1, (4,), (0.7,), (0.6,), passed=1, tokens=2)

# ------------------------------------------------------------------------------------------- arithmetic


def test_earnings_by_depth() -> None:
    """A token, and one for each layer that passed before the first that failed; no more than were committed."""
    ended = replace(FAILED, passed=2, tokens=2, closed=(0.9, 0.2))  # by an EOS in the second layer
    costs = UnitCosts(0.2, 1.0, 0.01)
    tokens, seconds = earnings([FAILED, SHORT, ended], costs)
    assert tokens.tolist() == [[1, 2, 2, 2], [1, 2, 0, 0], [1, 2, 2, 2]]
    target = np.array([1.02, 1.06, 1.10, 1.13])  # of 2 roots and the drafts
    draft = np.array([0.0, 0.22, 0.22 + 0.24, 0.22 + 0.24 + 0.24])
    assert seconds[0] == pytest.approx(target + draft)
    assert seconds[1, :2] == pytest.approx([1.01, 1.05 + 0.21])


def test_what_each_rule_goes_by() -> None:
    found = rules([FAILED, SHORT])
    assert list(found) == [NOTHING, NETWORK, CLOSED, TOLD, EVERYTHING]
    expected: dict[str, list[list[list[float]]]] = {
        NOTHING: [[[1, 1, 1], [1, 0, 0]]],
        NETWORK: [[[1, 0.5, 0.2], [1, 0, 0]], [[0.5, 0.2, 0.16], [0.7, 0, 0]]],
        CLOSED: [[[1, 0.9, 0.18], [1, 0, 0]], [[0.5, 0.36, 0.144], [0.7, 0, 0]]],  # of a layer itself: the promise
        TOLD: [[[0.5, 0.4, 0], [0.7, 0, 0]]],
        EVERYTHING: [[[1, 0, 0], [1, 0, 0]]],
    }
    for knows, scores in expected.items():
        assert [score.tolist() for score in found[knows]] == [[pytest.approx(row) for row in s] for s in scores]


def test_beyond_the_first_failure_the_promise_stands_for_p() -> None:
    deep = Iteration(1, (2,) * 4, (0.5, 0.5, 0.5, 0.5), (0.9, 0.8), passed=1, tokens=2)
    assert rules([deep])[CLOSED][0][0] == pytest.approx([1, 0.9, 0.72, 0.36])


def test_candidates_stop_at_the_first_layer_below_the_threshold() -> None:
    score = np.array([[1.0, 0.31, 0.9], [0.1, 0.9, 0.9]])
    depths = candidates(score).reshape(len(depth_room.THRESHOLDS), 4, 2)  # t from 0 by 0.05, at most 0 to 3 layers
    assert depths[0].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert depths[4].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert depths[7].tolist() == [[0, 0], [1, 0], [1, 0], [1, 0]]


def test_known_answers() -> None:
    """Half of the iterations pass both layers, half none; the network knows which, P of the first layer does not."""
    good = Iteration(1, (2, 2), (0.9, 0.9), (0.5, 0.5), passed=2, tokens=3)
    bad = Iteration(1, (2, 2), (0.2, 0.9), (0.5,), passed=0, tokens=1)
    found = {outcome.knows: outcome for outcome in compare([[good, bad]] * 4, COSTS)}
    speed = {knows: o.tokens.sum() / o.seconds.sum() for knows, o in found.items()}
    assert speed[NOTHING] == pytest.approx(4 / 2.8) and found[NOTHING].deepest == (2, 2)
    assert speed[NETWORK] == pytest.approx(4 / 2.4)  # with the layer's own chance: the bad ones are not drafted
    assert speed[CLOSED] == pytest.approx(4 / 2.4)  # by the promise of the first layer
    assert speed[TOLD] == pytest.approx(4 / 2.4)
    assert speed[EVERYTHING] == pytest.approx(4 / 2.4)
    assert found[NOTHING].layers.sum() == 16 and found[EVERYTHING].layers.sum() == 8 and found[TOLD].iterations == 8
    blind = [replace(i, promised=(0.6, 0.6)) for i in (good, bad)]  # only what comes after the first layer tells
    speed = {o.knows: o.tokens.sum() / o.seconds.sum() for o in compare([blind] * 4, COSTS)}
    assert speed[NETWORK] == speed[CLOSED] == pytest.approx(4 / 2.8)
    assert speed[TOLD] == pytest.approx(4 / 2.6) and speed[EVERYTHING] == pytest.approx(4 / 2.4)


def test_nothing_is_tuned_on_what_it_is_measured_on() -> None:
    """Even prompts pass everything, odd ones nothing: each half's depth is the wrong one for the other."""
    good = Iteration(1, (2, 2), (0.5, 0.5), (0.5, 0.5), passed=2, tokens=3)
    bad = Iteration(1, (2, 2), (0.5, 0.5), (0.5,), passed=0, tokens=1)
    fixed = compare([[good], [bad]] * 3, COSTS)[0]
    assert fixed.deepest == (0, 2)
    assert fixed.tokens.tolist() == [1] * 6 and fixed.seconds == pytest.approx([1, 1.4] * 3)


def made_up(seed: int = 0, prompts: int = 200, per_prompt: int = 20, depth: int = 4) -> list[list[Iteration]]:
    """Iterations whose layers pass with their closed form's chance, of which the promise is the mean."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(prompts * per_prompt):
        promised = rng.uniform(0.2, 0.95, depth)
        closed = promised + rng.choice([-0.9, 0.9], depth) * np.minimum(promised, 1 - promised)
        coins = rng.random(depth) < closed
        passed = int(np.cumprod(coins).sum())
        reached = tuple(closed[: passed + 1].tolist())
        found.append(Iteration(1, (2,) * depth, tuple(promised.tolist()), reached, passed, 1 + passed))
    return [found[i * per_prompt : (i + 1) * per_prompt] for i in range(prompts)]


def speeds(prompts: list[list[Iteration]]) -> list[float]:
    return [float(o.tokens.sum() / o.seconds.sum()) for o in compare(prompts, COSTS)]


def test_who_knows_more_is_faster() -> None:
    """By 1% at least in each step; 4,000 iterations know a speed to about 1%, and all rules see the same ones."""
    fixed, network, closed, told, everything = speeds(made_up())
    assert fixed * 1.01 < network and network * 1.01 < closed and closed * 1.01 < told and told * 1.01 < everything


@pytest.mark.parametrize("broken", ["promised", "closed"])
def test_chances_of_other_iterations_are_worth_nothing(broken: str) -> None:
    """What shows that the order above is not there by construction."""
    prompts = made_up()
    order = iter(np.random.default_rng(1).permutation(200 * 20))
    every = [iteration for prompt in prompts for iteration in prompt]
    if broken == "promised":
        prompts = [[replace(it, promised=every[next(order)].promised) for it in prompt] for prompt in prompts]
    else:
        prompts = [[replace(it, closed=it.closed[::-1]) for it in prompt] for prompt in prompts]
    fixed, network, closed, *_ = speeds(prompts)
    assert (network if broken == "promised" else closed) < 1.01 * (fixed if broken == "promised" else network)


def test_the_table_compares_with_the_best_fixed_depth() -> None:
    outcomes = compare(made_up(prompts=40), COSTS)
    lines = room_table(outcomes, "joules")
    assert lines == room_table(outcomes, "joules") and len(lines) == 7
    assert lines[0].startswith("| known when a layer is drafted | tokens/joule | x |")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0][2] == "1.000" and float(cells[0][1]) == pytest.approx(speeds(made_up(prompts=40))[0], abs=0.05)
    for row in cells[1:]:
        value, low, high = (float(word.strip("[],")) for word in row[2].split())
        assert low < value < high and high - low < 0.3
    fixed = outcomes[0]
    assert float(cells[0][3]) == pytest.approx(fixed.tokens.sum() / 800, abs=0.005)
    assert float(cells[0][4]) == pytest.approx(fixed.layers.sum() / 800, abs=0.005)


# ------------------------------------------------------------------------------------ what is recorded


def deep(pair: ModelPair, bearable: float = 1.2) -> DeepWidth:
    """With an untrained controller that was made for this pair."""
    return DeepWidth(network(hidden=False), provenance(pair=pair.describe(), decoding={}), bearable)


@pytest.mark.parametrize(
    "changes", [{}, {"eos_token_id": [1, 2]}, {"replacement": True}, {"max_new_tokens": 1}], ids=str
)
@pytest.mark.parametrize("make", [random_pair, llama_pair])
def test_iterations_are_those_that_were_decoded(make: Any, changes: dict[str, Any]) -> None:
    pair, config = make(7), config_of(**changes)
    policy = deep(pair)
    results = DSBDDecoder(pair, config, policy).generate([[1, 2], [3], [2, 0, 1]], torch.Generator().manual_seed(0))
    assert len(policy.prompts) == 3
    for result, iterations in zip(results, policy.prompts, strict=True):
        stats = result.stats
        assert [i.roots for i in iterations] == stats.roots
        assert [list(i.widths) for i in iterations] == stats.forests
        assert [i.passed for i in iterations] == [
            sum(layer.passed for layer in record.layers if layer.draft_width) for record in stats.records
        ]
        tokens, seconds = earnings(iterations, COSTS)
        full = np.arange(len(iterations)), [len(i.widths) for i in iterations]
        assert tokens[full].sum() == stats.new_tokens
        assert seconds[full].sum() == pytest.approx(modelled_seconds(stats, COSTS))
        for it in iterations:
            assert len(it.promised) == len(it.widths) >= len(it.closed) >= it.passed
            assert all(0 <= chance <= 1 + 1e-9 for chance in it.promised + it.closed)
        assert {len(i.widths) for i in iterations[:1]} == {min(3, config.max_new_tokens - 1)}
    assert len(compare(policy.prompts, COSTS)) == 5


def test_the_closed_form_is_how_often_layers_pass() -> None:
    """With replacement it is exact: within four standard deviations; an untrained network's promise is not."""
    pair = random_pair(6, seed=1, closeness=0.7)
    policy = deep(pair, 0.3)
    prompts = [[a, b] for a in range(6) for b in range(6)] * 4
    config = config_of(replacement=True, max_new_tokens=12)
    DSBDDecoder(pair, config, policy).generate(prompts, torch.Generator().manual_seed(0))
    iterations = [it for prompt in policy.prompts for it in prompt]
    closed = np.array([c for it in iterations for c in it.closed])
    passed = np.array([layer < it.passed for it in iterations for layer in range(len(it.closed))])
    promised = np.array([p for it in iterations for p in it.promised[: len(it.closed)]])
    spread = 4 * np.sqrt((closed * (1 - closed)).sum())
    assert len(passed) > 1000 and 0.1 < passed.mean() < 0.9
    assert abs(passed.sum() - closed.sum()) < spread < abs(passed.sum() - promised.sum())


@pytest.mark.parametrize("bearable", [0.05, 0.3, 2.0])
def test_the_promise_is_what_the_early_heads_say_of_that_loss(bearable: float) -> None:
    net = network()
    policy, context = DeepWidth(net, provenance(), bearable).fork(0), draft_context()
    width = policy.draft_width(context)
    policy.target_width(target_context(context, width))
    policy.observe(IterationRecord((LayerRecord(1, width, 2, 1, False),), 1, 0.1))
    vectors = (policy.features(context), context.draft_hidden, context.root.target_hidden)
    logits = net(*(torch.from_numpy(vector)[None] for vector in vectors))
    steps, shares = logits.regret[0].exp().tolist(), logits.survivor[0].softmax(-1).tolist()
    losses = [(sum(steps[k:]) + sum(shares[k + 1 :])) / 2 for k in range(len(shares))]
    asked = 1 + min(k for k, loss in enumerate(losses) if loss <= bearable)
    expected = tails(count_table(logits.accept.sigmoid()))[0, width, asked].item()
    ((iteration,),) = policy.prompts
    assert width == context.root.config.draft_width
    assert iteration.promised == (pytest.approx(expected, abs=1e-5),) and iteration.passed == 0


def test_more_that_can_be_borne_asks_for_less() -> None:
    pair, config = random_pair(6, seed=1, closeness=0.7), config_of()
    widths = []
    for bearable in (0.01, 0.3, 30.0):
        results = DSBDDecoder(pair, config, deep(pair, bearable)).generate(
            [[1, 2], [3]], torch.Generator().manual_seed(0)
        )
        drafted = [m for r in results for m, w in zip(r.stats.target_widths, r.stats.draft_widths, strict=True) if w]
        widths.append(np.mean(drafted))
    assert widths[0] > widths[1] > widths[2] == 1


# ----------------------------------------------------------------------------------------- the command


def settings(folder: Path, *overrides: str) -> DictConfig:
    """depth_room.yaml on random models, a modelled device and prompts of the test's own."""
    rows = [{"prompt": f"def f{i}(x):\n", "reference": f"    return x + {i}\n"} for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [
        "data=jsonl",
        f"data.path={folder / 'prompts.jsonl'}",
        "data.reference_field=reference",
        "data.shares=null",
        "decoding.max_new_tokens=8",
        "latency=h200_8b_1b",
        f"controller_path={saved_controller(folder)}",
    ]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("depth_room", [*given, *overrides])
    with open_dict(cfg):
        cfg.pair = {"_target_": "tests.small_pair.small_pair"}
    return cfg


def test_from_a_config_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tables" / "room.md"
    outcomes = depth_room.main(settings(tmp_path, f"output={output}", "prompts.skip=1", "batch_size=2"))
    printed = capsys.readouterr().out
    assert printed == output.read_text()
    assert printed.startswith("5 prompts of split val, ") and "c = 1.2; H200" in printed
    assert len(outcomes) == 5 and all(len(outcome.tokens) == 5 for outcome in outcomes)
    assert printed.count("\n|") == 7 and "tokens/second" in printed
    again = depth_room.main(settings(tmp_path, "prompts.skip=1", "batch_size=5"))
    assert [o.tokens.tolist() for o in again] == [o.tokens.tolist() for o in outcomes]  # whatever the batch


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["decoding=exact"], "surplus=drop, refill=width"),
        (["decoding.refill=width"], "refill=full and draft_depth of at least 1"),
        (["decoding=beam_search"], "mode=beam_search"),
        (["decoding.draft_depth=0"], "draft_depth=0"),
        (["decoding.draft_width=9"], "draft_width is 9; the controller was trained for at most 8"),
        (["bearable=0"], "bearable is 0; give a number above 0"),
        (["bearable=null"], "bearable is None; give a number above 0"),
        (["controller_path=null"], "give controller="),
        (["prompts.limit=1"], "prompts.limit is 1; give a whole number of at least 2"),
        (["prompts.skip=-1"], "prompts.skip is -1"),
        (["prompts.skip=5"], "prompts.skip=5 leaves 1 prompts of split val"),
        (["batch_size=0"], "batch_size is 0"),
        (["output=/dev/null/room.md"], "cannot be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        depth_room.main(settings(tmp_path, *overrides))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_controller_of_another_pair_is_refused() -> None:
    pair, other = random_pair(6, seed=1), random_pair(6, seed=2)
    with pytest.raises(UserError, match="was trained for the pair"):
        DSBDDecoder(other, DecodingConfig(target_width=2, draft_width=4, draft_depth=1), deep(pair))
