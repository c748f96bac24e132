"""LearnedWidth: what it asks for, what it may look at, what it refuses, and decoding with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from controller import LearnedWidth, WidthNet
from controller.checkpoint import save_controller
from controller.features import ContextFeatures
from controller.host import foresee
from decoding import DecodingConfig, UserError
from decoding.cost_table import LatencyTable, iteration_seconds
from decoding.widths import DraftContext, IterationRecord, LayerRecord
from tests.controller.synthetic import CONFIG, H_P, H_Q, PAIR, draft_context, target_context

RULES = [{"surplus": surplus, "refill": refill} for surplus in ("keep", "drop") for refill in ("full", "width")]
TABLE = LatencyTable((1, 8, 32), (0.010, 0.012, 0.020), (0.002, 0.003, 0.006))


def provenance(**changes: Any) -> dict[str, Any]:
    features = ContextFeatures()
    decoding = dataclasses.asdict(CONFIG)
    return {
        "features": {
            "version": features.version,
            "names": features.names,
            "target_names": features.target_names,
        },
        "pair": PAIR,
        "decoding": decoding,
    } | changes


def network(hidden: bool = True, accept: float = 0.7) -> WidthNet:
    torch.manual_seed(0)
    sizes = (H_Q, H_P) if hidden else (0, 0)
    features = ContextFeatures()
    early, late = len(features.names), len(features.target_names)
    net = WidthNet(early, CONFIG.draft_width, CONFIG.target_width, *sizes, late)
    net.start_from(
        (torch.zeros(early), torch.ones(early)),
        (torch.zeros(late), torch.ones(late)),
        torch.full((6, 6), accept),
        torch.tensor([0.5, 0.25, 0.15, 0.1]),
        torch.tensor([0.4, 0.15, 0.05]),
    )
    torch.nn.init.normal_(net.accept_head.weight, std=0.05)
    for head in (net.survivor_head, net.regret_head):
        torch.nn.init.normal_(head.weight, std=0.1)
    for head in (net.late_survivor_head, net.late_regret_head):
        torch.nn.init.normal_(head.weight, std=0.3)
    return net.eval()


def policy(**options: Any) -> LearnedWidth:
    made = LearnedWidth(network(options.pop("hidden", True), options.pop("accept", 0.7)), provenance(), **options)
    made.reset(CONFIG)
    return made


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_widths_are_in_range_whatever_the_settings(rule: dict[str, str]) -> None:
    config = CONFIG.with_changes(**rule)
    for least, value in ((1, 0.0), (1, 3.0), (3, 0.0), (2, 1e6)):
        learned = policy(width_value=value)
        narrow = config.with_changes(min_width=least)
        learned.reset(narrow)
        for seed in range(5):
            context = draft_context(seed, config=narrow)
            learned.draft_further(context.root, 1, ())
            w = learned.draft_width(context)
            m = learned.target_width(target_context(context, w))
            last = learned.target_width(target_context(draft_context(seed, 2, drafted=False, config=narrow), 0))
            assert least <= m <= w <= CONFIG.draft_width and m <= CONFIG.target_width
            assert least <= last <= CONFIG.target_width


def test_one_look_serves_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, context = policy(), draft_context()
    calls: list[DraftContext] = []
    of_context = learned.features.of_context
    monkeypatch.setattr(learned.features, "of_context", lambda c: calls.append(c) or of_context(c))
    learned.target_width(target_context(context, learned.draft_width(context)))
    assert len(calls) == 1
    learned.draft_width(draft_context(1))
    assert len(calls) == 2  # another layer is another question
    assert learned.needs_hidden and not policy(hidden=False).needs_hidden


def test_plans_go_by_what_the_network_says() -> None:
    """P(K_w >= M) of its accept head; L(k) the mean of the regret steps from k on and of the chance that the survivor
    lies beyond slot k."""
    learned, context = policy(), target_context(draft_context(), 5)
    draft = context.draft
    vectors = (learned.features(draft), draft.draft_hidden, draft.root.target_hidden)
    rows = [torch.from_numpy(v)[None] for v in (*vectors, learned.features.of_target(context))]
    logits = learned.net(*rows)
    at_least, early_loss = foresee(*vectors, learned._host.early, CONFIG.target_width)
    assert at_least.shape == (7, 7)
    assert at_least[1, 1] == pytest.approx(logits.accept[0, 0, 0].sigmoid().item())
    early = (logits.survivor, logits.regret, early_loss)
    asked = learned._host, learned.features.of_target(context), CONFIG, 1.0
    late = (logits.late_survivor, logits.late_regret, learned.planner.final_width(*asked)[1])
    for survivor, regret, loss in (early, late):
        shares, steps = survivor[0].softmax(-1).tolist(), regret[0].exp().tolist()
        beyond = [(sum(steps[k - 1 :]) + sum(shares[k:])) / 2 for k in range(1, 5)]
        assert loss.tolist() == pytest.approx([beyond[0], *beyond], abs=1e-5)
        assert loss[-1] == 0 and (np.diff(loss) <= 0).all()


def test_m_follows_p_at_every_layer() -> None:
    learned, context = policy(width_value=4.0), draft_context()
    w = learned.draft_width(context)
    assert len({learned.target_width(target_context(context, w, seed)) for seed in range(20)}) > 1
    learned = policy(width_value=0.1)
    last = draft_context(layer=2, drafted=False)
    assert len({learned.target_width(target_context(last, 0, seed)) for seed in range(20)}) > 1


def test_what_is_not_kept_makes_m_follow_how_much_p_and_q_agree() -> None:
    """With surplus="keep" and refill="full" each count speaks for itself; elsewhere P(K_w >= M) counts too."""
    context = draft_context(config=CONFIG.with_changes(exact=True))
    agree = dataclasses.replace(target_context(context, 6), target=context.joint)  # P = Q: every draft is accepted
    moved = np.where(
        np.arange(10) % 2 == 0, context.joint.tokens, context.joint.tokens + 100
    )  # half of Q is impossible
    apart = dataclasses.replace(agree, target=dataclasses.replace(context.joint, tokens=moved))
    learned = policy(width_value=1.0, accept=0.6)
    learned.draft_width(context)
    assert learned.target_width(agree) > learned.target_width(apart)
    alone = policy(width_value=1.0, accept=0.6)
    same = draft_context()
    alone.draft_width(same)
    asked = {alone.target_width(dataclasses.replace(c, draft=same)) for c in (agree, apart)}  # P's shape is one
    assert len(asked) == 1


def test_width_value_widens_every_layer() -> None:
    for seed in range(5):
        context, final = draft_context(seed), draft_context(seed, layer=2, drafted=False)
        asked, last = [], []
        for value in (0.0, 0.5, 2.0, 20.0, 1e6):
            learned = policy(width_value=value)
            learned.draft_width(context)
            asked.append(learned.target_width(target_context(context, 6)))
            last.append(learned.target_width(target_context(final, 0)))
        assert asked == sorted(asked) and last == sorted(last)
        assert asked[0] == 1 and last[0] == 1 and asked[-1] == CONFIG.target_width and last[-1] == CONFIG.target_width


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_is_shown_of_deeper_layers_does_not_move_m(rule: dict[str, str]) -> None:
    """They are drafted before this layer is verified, from its own drafts (design 5.4)."""
    config = CONFIG.with_changes(**rule)
    first, asked = draft_context(0, config=config), set()
    second = dataclasses.replace(draft_context(1, layer=2, config=config), widths=(3,))
    for seed in range(12):
        learned = policy(width_value=3.0)
        learned.draft_further(first.root, 1, ())
        w, shallow = learned.draft_width(first), None
        for layer in range(2, 2 + seed % 3):
            below = dataclasses.replace(draft_context(seed, layer=layer, config=config), widths=(w,) * (layer - 1))
            if layer == 2 and seed % 2:
                below = shallow = second  # one that all of these runs share
            learned.draft_further(below.root, layer, below.widths)
            learned.draft_width(below)
        ms = [learned.target_width(target_context(first, w))]
        if shallow is not None:
            ms.append(learned.target_width(target_context(shallow, 4)))
        asked.add((len(ms), tuple(ms), learned.target_width(target_context(draft_context(2, 4, drafted=False), 0))))
    assert len(asked) == len({count for count, *_ in asked}) == 2


def depth(learned: LearnedWidth, config: DecodingConfig = CONFIG) -> int:
    """Layers that a policy drafts in one iteration."""
    widths: tuple[int, ...] = ()
    for layer in range(1, config.draft_depth + 1):
        context = draft_context(layer, layer=layer, config=config)
        if not learned.draft_further(context.root, layer, widths):
            break
        widths = (*widths, learned.draft_width(dataclasses.replace(context, widths=widths)))
    return len(widths)


def test_cheaper_drafts_never_give_fewer_layers() -> None:
    config = CONFIG.with_changes(draft_depth=6)
    depths = []
    for share in (4.0, 1.0, 0.5, 0.2, 0.05):
        table = dataclasses.replace(TABLE, draft=tuple(share * s for s in TABLE.target))
        learned = policy(latency=table, width_value=0.3)
        learned.throughput = None
        learned.reset(config)
        assert learned.throughput is not None
        learned.throughput.reward, learned.throughput.seconds = 1.0, 0.012  # the same price of time for all
        depths.append(depth(learned, config))
    assert depths == sorted(depths) and depths[0] == 0 and depths[-1] > 2


def test_a_first_layer_that_did_not_pay_is_tried_again() -> None:
    learned = policy(latency=dataclasses.replace(TABLE, draft=(0.010, 0.011, 0.02)))
    assert learned.throughput is not None
    tried = []
    for _ in range(150):
        learned.throughput.reward, learned.throughput.seconds = 1.0, 0.0145
        tried.append(learned.draft_further(draft_context().root, 1, ()))
        if not tried[-1]:  # an iteration that drafted nothing
            m = learned.target_width(target_context(draft_context(drafted=False), 0))
            learned.observe(IterationRecord((LayerRecord(1, 0, m, 0, True),), 1, 0.0145))
    assert not tried[0] and any(tried)


def test_a_draft_with_nothing_to_propose_is_no_refusal() -> None:
    """Nothing was drafted, though it was asked for: that raises no hopes of the first layer."""
    learned = policy(latency=dataclasses.replace(TABLE, draft=(1e-4, 1e-4, 1e-4)))
    before = learned.outlook.passing(1)
    for _ in range(20):
        assert learned.draft_further(draft_context().root, 1, ())
        m = learned.target_width(target_context(draft_context(drafted=False), 0))
        learned.observe(IterationRecord((LayerRecord(1, 0, m, 0, True),), 1, 0.0145))
    assert learned.outlook.passing(1) == before


def test_support_that_gave_fewer_drafts_than_planned() -> None:
    learned, context = policy(width_value=500.0), draft_context()
    learned.draft_width(context)
    assert learned.target_width(target_context(context, 2)) == CONFIG.target_width  # it had better fail


def an_iteration(
    learned: LearnedWidth,
    seed: int = 0,
    accepted: int = 3,
    seconds: float | Callable[[tuple[int, ...]], float] = 0.1,
    deepest: int = CONFIG.draft_depth,
) -> list[int]:
    """Draft as deep as the policy likes, ask for M of the first layer, and tell it what became of it; its widths."""
    widths: tuple[int, ...] = ()
    contexts = []
    for layer in range(1, deepest + 1):
        context = dataclasses.replace(draft_context(seed + layer, layer=layer), widths=widths)
        if not learned.draft_further(context.root, layer, widths):
            break
        widths = (*widths, learned.draft_width(context))
        contexts.append(context)
    if widths:
        m = learned.target_width(target_context(contexts[0], widths[0], seed))
        accepted = min(accepted, widths[0])
        record = LayerRecord(1, widths[0], m, accepted, accepted >= m)
    else:
        m = learned.target_width(target_context(draft_context(seed, drafted=False), 0, seed))
        record = LayerRecord(1, 0, m, 0, True)
    learned.observe(IterationRecord((record,), 1, seconds(widths) if callable(seconds) else seconds))
    return [*widths, m]


def test_equal_seeds_give_equal_widths_without_a_wall_clock() -> None:
    def run(seconds: float, **options: Any) -> tuple[list[list[int]], float, str]:
        learned = policy(**options)
        widths = [an_iteration(learned, seed, seed % 5, seconds) for seed in range(20)]
        assert learned.throughput is not None
        return widths, learned.throughput.rate, learned.describe()["clock"]

    assert run(0.1) == run(0.2) and run(0.1)[-1] == "table"
    assert run(0.1, latency=TABLE, clock="table") == run(0.2, latency=TABLE, clock="table")
    assert run(0.1, latency=TABLE)[-1] == "wall"


def test_drafts_that_the_clock_finds_dear_are_drafted_less() -> None:
    def layers(dear: float) -> tuple[int, float]:
        learned, total = policy(latency=TABLE, width_value=0.3), 0
        for seed in range(300):
            deepest = CONFIG.draft_depth if seed % 8 else 0  # where a prompt ends, nothing may be drafted
            drafted = an_iteration(learned, seed, 3, lambda widths: dear_seconds(dear, widths), deepest)[:-1]
            total += len(drafted) if seed >= 150 else 0
        return total, learned.pace.of_added

    def dear_seconds(dear: float, widths: tuple[int, ...]) -> float:
        plain = iteration_seconds(TABLE, (), 1)
        return plain + dear * (iteration_seconds(TABLE, widths, 1) - plain)

    cheap, plain, dear = (layers(factor) for factor in (0.5, 1.0, 16.0))
    assert cheap[0] >= plain[0] > dear[0] and cheap[1] < 0.8 < plain[1] < 1.2 < dear[1]


def state(learned: LearnedWidth) -> tuple[float, ...]:
    """What was learned on line."""
    assert learned.throughput is not None
    outlook = learned.outlook
    known = (outlook.earned, outlook.left, outlook.correction, outlook.passing(1))
    return (learned.throughput.rate, learned.pace.of_added, *known)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("options", [{}, {"latency": TABLE}], ids=["table", "wall"])
def test_prompts_learn_together_or_alone(share: bool, options: dict[str, Any]) -> None:
    learned = LearnedWidth(network(), provenance(), share=share, **options)
    learned.check(CONFIG)

    def fork(seed: int) -> LearnedWidth:
        forked = learned.fork(seed)
        forked.reset(CONFIG)
        return forked

    first, second = fork(1), fork(2)
    assert first.net is second.net is learned.net
    start = state(second)
    for seed in range(5):
        an_iteration(first, seed)
    assert state(first) != start
    for other in (second, fork(3)):
        assert (state(other) == state(first)) == share and (state(other) == start) != share
    assert learned.fork(4).describe()["share"] == share
    learned.use_latency(TABLE)  # afresh
    assert state(fork(5))[1:] == start[1:]


def test_prompts_that_learn_alone_do_not_depend_on_the_order_of_their_turns() -> None:
    """Forks share a host network; whose turn it is must not matter."""

    def forks() -> list[LearnedWidth]:
        learned = LearnedWidth(network(), provenance(), share=False)
        learned.check(CONFIG)
        found = [learned.fork(seed) for seed in range(3)]
        for fork in found:
            fork.reset(CONFIG)
        return found

    alone = [[an_iteration(fork, 10 * i + turn) for turn in range(8)] for i, fork in enumerate(forks())]
    together = forks()
    rounds = [[an_iteration(fork, 10 * i + turn) for i, fork in enumerate(together)] for turn in range(8)]
    assert alone == [list(turns) for turns in zip(*rounds, strict=True)]


def test_latency_from_a_dict_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(json.dumps(TABLE.to_dict()))
    for latency in (TABLE, TABLE.to_dict(), tmp_path / "latency.json"):
        assert policy(latency=latency).planner.costs == TABLE
    for bad, message in ((tmp_path / "absent.json", "cannot be read"), ({"nodes": [1]}, "target is missing")):
        with pytest.raises(UserError, match=f"latency table .*{message}"):
            policy(latency=bad)


def test_load_save_and_check_pair(tmp_path: Path) -> None:
    save_controller(network(), tmp_path / "controller", provenance())
    learned = LearnedWidth.load(tmp_path / "controller", pair=PAIR, width_value=0.5)
    assert learned.describe()["width_value"] == 0.5
    json.dumps(learned.describe())
    learned.reset(CONFIG)
    assert learned._plan(draft_context()) == policy(width_value=0.5)._plan(draft_context())
    with pytest.raises(UserError, match=r"trained for the pair 'synthetic' .* not for 'other'"):
        LearnedWidth.load(tmp_path / "controller", pair={"name": "other", "fingerprint": "ff"})
    with pytest.raises(UserError, match="No controller at"):
        LearnedWidth.load(tmp_path / "absent")


def test_refusals() -> None:
    for options, message in (
        ({"width_value": -1}, "width_value is -1"),
        ({"width_value": float("nan")}, "width_value is nan"),
        ({"clock": "sun"}, "clock is 'sun'; choose one of None, wall, table"),
        ({"clock": ["wall"]}, r"clock is \['wall'\]; choose one of"),
        ({"clock": "wall"}, "needs a latency table"),
        ({"latency": 0.01}, r"latency is 0\.01; give a LatencyTable"),
    ):
        with pytest.raises(UserError, match=message):
            policy(**options)
    for name, message in (
        ("joint_max", "without joint_max and with the unknown depth"),
        ("target_prob_1", "without target_prob_1 and with the unknown depth"),
    ):
        about = provenance()["features"]
        for key in ("names", "target_names"):
            about[key] = ["depth" if known == name else known for known in about[key]]
        with pytest.raises(UserError, match=f"trained with other features .* ({message})"):
            LearnedWidth(network(), provenance(features=about))
    without = {"version": 2, "names": ContextFeatures().names}
    with pytest.raises(UserError, match=r"trained with other features .* without log_target_support"):
        LearnedWidth(network(), provenance(features=without))
    with pytest.raises(UserError, match="version 0 of the features"):
        LearnedWidth(network(), provenance(features=provenance()["features"] | {"version": 0}))
    with pytest.raises(UserError, match=r"draft_width is 8; the controller was trained for at most 6"):
        policy().check(CONFIG.with_changes(draft_width=8))
    with pytest.warns(UserWarning, match="top_k=10"):
        policy().check(CONFIG.with_changes(top_k=20))
    wrong = dataclasses.replace(draft_context(), draft_hidden=np.zeros(3, np.float32))
    with pytest.raises(UserError, match="expects draft_hidden of size 6, the pair gives 3"):
        policy().draft_width(wrong)
