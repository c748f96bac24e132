"""LearnedWidth: what it asks for, what it may look at, what it refuses, and decoding with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from controller import LearnedWidth, WidthNet
from controller.features import ContextFeatures
from controller.network import save_controller
from decoding import DecodingConfig, UserError
from decoding.latency import LatencyTable
from decoding.widths import DraftContext, IterationRecord, LayerRecord
from tests.controller.synthetic import CONFIG, H_P, H_Q, PAIR, draft_context, target_context

TABLE = LatencyTable((1, 8, 32), (0.010, 0.012, 0.020), (0.002, 0.003, 0.006))


def provenance(**changes: Any) -> dict[str, Any]:
    features = ContextFeatures()
    decoding = dataclasses.asdict(CONFIG)
    return {
        "features": {"version": features.version, "names": features.names},
        "pair": PAIR,
        "decoding": decoding,
    } | changes


def network(hidden: bool = True, accept: float = 0.7) -> WidthNet:
    torch.manual_seed(0)
    sizes = (H_Q, H_P) if hidden else (0, 0)
    net = WidthNet(len(ContextFeatures().names), CONFIG.draft_width, CONFIG.target_width, *sizes)
    ranks = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = len(ContextFeatures().names)
    net.start_from(torch.zeros(count), torch.ones(count), torch.full((6, 6), accept), ranks)
    torch.nn.init.normal_(net.accept_head.weight, std=0.05)
    return net.eval()


def policy(**options: Any) -> LearnedWidth:
    made = LearnedWidth(network(options.pop("hidden", True), options.pop("accept", 0.7)), provenance(), **options)
    made.reset(CONFIG)
    return made


def test_widths_are_in_range_and_one_prediction_serves_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, context = policy(), draft_context()
    calls: list[DraftContext] = []
    predict = learned.predict
    monkeypatch.setattr(learned, "predict", lambda c: calls.append(c) or predict(c))
    w = learned.draft_width(context)
    m = learned.target_width(target_context(context, w))
    assert 1 <= m <= w <= CONFIG.draft_width and m <= CONFIG.target_width and len(calls) == 1
    learned.draft_width(draft_context(1))
    assert len(calls) == 2  # another layer is another question
    assert learned.needs_hidden and not policy(hidden=False).needs_hidden


def test_the_prediction_is_a_distribution_that_agrees_with_the_network() -> None:
    learned, context = policy(), draft_context()
    prediction = learned.predict(context)
    assert prediction.at_least.shape == (7, 7) and prediction.survivors.shape == (5,)
    assert prediction.survivors[0] == 0 and prediction.survivors[-1] == pytest.approx(1.0)
    vectors = (learned.features(context), context.draft_hidden, context.root.target_hidden)
    logits = learned.net(*(torch.from_numpy(v)[None] for v in vectors))
    assert prediction.at_least[1, 1] == pytest.approx(logits.accept[0, 0, 0].sigmoid().item())


def test_mode_before_ignores_the_layers_own_target() -> None:
    """Only the context before the draw decides M; another P changes nothing, though design 5.4 would allow it."""
    learned, context = policy(mode="before"), draft_context()
    w = learned.draft_width(context)
    assert len({learned.target_width(target_context(context, w, seed)) for seed in range(20)}) == 1


def test_mode_after_follows_p_and_q() -> None:
    context = draft_context()
    agree = dataclasses.replace(target_context(context, 6), target=context.joint)  # P = Q: every draft is accepted
    moved = np.where(
        np.arange(10) % 2 == 0, context.joint.tokens, context.joint.tokens + 100
    )  # half of Q is impossible
    apart = dataclasses.replace(agree, target=dataclasses.replace(context.joint, tokens=moved))
    for mode in ("after", "both"):
        learned = policy(mode=mode, width_value=0.3, accept=0.6, survivors="asked")  # kept beams cost no asking
        learned.draft_width(context)
        assert learned.target_width(agree) > learned.target_width(apart)
        assert mode == "both" or learned.target_width(agree) == CONFIG.target_width


def test_width_value_widens_every_layer() -> None:
    for seed in range(5):
        context, final = draft_context(seed), draft_context(seed, layer=2, drafted=False)
        asked, last = [], []
        for value in (0.0, 0.5, 2.0, 20.0):
            learned = policy(width_value=value)
            asked.append(learned.target_width(target_context(context, learned.draft_width(context))))
            last.append(learned.target_width(target_context(final, 0)))
        assert asked == sorted(asked) and last == sorted(last)
        assert asked[0] == 1 and last[0] == 1 and asked[-1] == CONFIG.target_width and last[-1] == CONFIG.target_width


@pytest.mark.parametrize("mode", ["before", "after", "both"])
def test_what_is_shown_of_deeper_layers_does_not_move_m(mode: str) -> None:
    """They are drafted before this layer is verified, from its own drafts (design 5.4)."""
    first = draft_context(0)
    asked = set()
    for seed in range(12):
        learned = policy(mode=mode, width_value=3.0)
        w = learned.draft_width(first)
        for layer in range(2, 2 + seed % 3):
            below = dataclasses.replace(draft_context(seed, layer=layer), widths=(w,) * (layer - 1))
            if learned.draft_further(below.root, layer, below.widths):
                learned.draft_width(below)
        asked.add(learned.target_width(target_context(first, w)))
    assert len(asked) == 1


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
    learned = policy(latency=dataclasses.replace(TABLE, draft=(0.012, 0.013, 0.02)))
    assert learned.throughput is not None
    tried = []
    for _ in range(60):
        learned.throughput.reward, learned.throughput.seconds = 1.0, 0.0145
        tried.append(learned.draft_further(draft_context().root, 1, ()))
        if not tried[-1]:  # an iteration that drafted nothing
            learned.observe(IterationRecord((LayerRecord(1, 0, 2, 0, True),), 1, 0.0145))
    assert not tried[0] and any(tried)


def test_support_that_gave_fewer_drafts_than_planned() -> None:
    learned, context = policy(width_value=50.0), draft_context()
    learned.draft_width(context)
    assert learned.target_width(target_context(context, 2)) == 2


def test_equal_seeds_give_equal_widths_without_a_wall_clock() -> None:
    def run(seconds: float, **options: Any) -> tuple[float, str]:
        learned = policy(**options)
        for _ in range(5):
            depth(learned)
            learned.observe(IterationRecord((LayerRecord(1, 6, 2, 3, True),), 3, seconds))
        assert learned.throughput is not None
        return learned.throughput.rate, learned.describe()["clock"]

    assert run(0.1) == run(0.2) and run(0.1)[1] == "table"
    assert run(0.1, latency=TABLE, clock="table") == run(0.2, latency=TABLE, clock="table")
    assert run(0.1, latency=TABLE)[0] > run(0.2, latency=TABLE)[0] and run(0.1, latency=TABLE)[1] == "wall"


def test_forks_share_the_network_and_nothing_of_a_prompt() -> None:
    """By the table a fork starts from what is expected, whatever its neighbours saw; by the wall clock all tell one."""
    record = IterationRecord((LayerRecord(1, 6, 2, 3, True),), 3, 0.1)
    for options, shared in (({}, False), ({"latency": TABLE}, True)):
        learned = LearnedWidth(network(), provenance(), **options)
        learned.check(CONFIG)
        first, second = learned.fork(1), learned.fork(2)
        assert first.net is second.net is learned.net
        for fork in (first, second):
            fork.reset(CONFIG)
        assert first.throughput is not None and second.throughput is not None
        before = second.throughput.rate
        depth(first)
        first.observe(record)
        assert (first.throughput is second.throughput) == shared
        assert (second.throughput.rate != before) == shared
        third = learned.fork(3)
        third.reset(CONFIG)
        assert third.throughput is not None
        assert (third.throughput.rate != before) == shared
        context = draft_context()
        alone = LearnedWidth(network(), provenance(), **options).fork(9)
        alone.reset(CONFIG)
        first.predict(draft_context(1))
        if not shared:
            assert second.draft_width(context) == alone.draft_width(context)


def test_latency_from_a_dict_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(json.dumps(TABLE.to_dict()))
    for latency in (TABLE, TABLE.to_dict(), tmp_path / "latency.json"):
        assert policy(latency=latency).planner.costs == TABLE
    for bad in (tmp_path / "absent.json", {"nodes": [1]}):
        with pytest.raises(UserError, match="latency table cannot be read"):
            policy(latency=bad)


def test_load_save_and_check_pair(tmp_path: Path) -> None:
    save_controller(network(), tmp_path / "controller", provenance())
    learned = LearnedWidth.load(tmp_path / "controller", pair=PAIR, width_value=0.5)
    assert learned.describe()["width_value"] == 0.5
    json.dumps(learned.describe())
    np.testing.assert_array_equal(learned.predict(draft_context()).at_least, policy().predict(draft_context()).at_least)
    with pytest.raises(UserError, match=r"trained for the pair 'synthetic' .* not for 'other'"):
        LearnedWidth.load(tmp_path / "controller", pair={"name": "other", "fingerprint": "ff"})
    with pytest.raises(UserError, match="No controller at"):
        LearnedWidth.load(tmp_path / "absent")


def test_refusals() -> None:
    for options, message in (
        ({"width_value": -1}, "width_value is -1"),
        ({"width_value": float("nan")}, "width_value is nan"),
        ({"mode": "never"}, "choose one of 'before', 'after', 'both'"),
        ({"clock": "sun"}, "clock is 'sun'"),
        ({"clock": "wall"}, "needs a latency table"),
        ({"survivors": "some"}, "survivors is 'some'"),
    ):
        with pytest.raises(UserError, match=message):
            policy(**options)
    names = ContextFeatures().names
    other = ["depth" if name == "layer" else name for name in names]
    with pytest.raises(UserError, match=r"trained with other features .* without layer and with the unknown depth"):
        LearnedWidth(network(), provenance(features={"version": 1, "names": other}))
    with pytest.raises(UserError, match="version 0 of the features"):
        LearnedWidth(network(), provenance(features={"version": 0, "names": names}))
    with pytest.raises(UserError, match=r"draft_width is 8; the controller was trained for at most 6"):
        policy().check(CONFIG.with_changes(draft_width=8))
    with pytest.warns(UserWarning, match="top_k=10"):
        policy().check(CONFIG.with_changes(top_k=20))
    wrong = dataclasses.replace(draft_context(), draft_hidden=np.zeros(3, np.float32))
    with pytest.raises(UserError, match="expects draft_hidden of size 6, the pair gives 3"):
        policy().predict(wrong)
