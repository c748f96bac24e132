"""LearnedWidth: a WidthPolicy that asks a trained network and plans with the device's latencies."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from controller import kernels
from controller.features import ContextFeatures, FloatVector, check_features, hidden_vectors, known
from controller.kernels import Decision, Packed
from controller.knob import choose_width_value
from controller.network import HostNet, WidthNet, load_controller, weights_sha256
from controller.planner import (
    Outlook,
    Pace,
    Planner,
    Throughput,
    UnitCosts,
    kept_width,
    settles_alone,
)
from decoding.config import DecodingConfig
from decoding.errors import UserError
from decoding.latency import LatencyTable
from decoding.pricing import Costs, costs_digest
from decoding.sampling import Distribution, FloatArray
from decoding.widths import DraftContext, IterationRecord, RootContext, TargetContext, WidthPolicy

CLOCKS = ("wall", "table")
_NO_HIDDEN = np.zeros(0, np.float32), np.zeros(0, np.float32)
# Settings that shape P and Q: a controller trained under others is used out of its element.
_TRAINED_UNDER = (
    "mode", "temperature", "top_k", "top_p", "warp", "replacement", "surplus", "refill", "one_beam_cache",
)  # fmt: skip


class _Seen(NamedTuple):
    """The plan of a layer, kept between `draft_width` and `target_width`."""

    context: DraftContext
    plan: Decision


class LearnedWidth(WidthPolicy):
    """Widths and depth from a trained controller; the decoder forks it for each prompt.

    M is fixed once the layer's P is there, by what the network says of P and, where P(K_w >= M) matters, by its closed
    form (design 5.3); never from the drafts or the coins (design 5.4). What is learned on line, how long iterations
    take and what they earn, outlives a prompt, so that widths depend on the prompts before.

    Args:
        net: in eval mode, on the CPU.
        provenance: what `load_controller` returned with it.
        width_value: what a nat of the best hypothesis is worth, in tokens, and what the whole of it is: a loss is the
            mean of its nats and of the chance that it is lost. 0 or more; larger: wider, better, slower.
        latency: seconds, or joules, of the passes on this device: a `LatencyTable`, its dict, or the path of its JSON.
            None: unit costs (a target pass 1, a draft pass a quarter), until `use_latency`.
        clock: what an iteration took: "wall", by which the table is corrected for what nodes and layers add; or
            "table", as modelled, so that equal prompts, seeds and tables give equal widths. None: "wall" with a latency
            table in seconds, else "table".
        share: whether prompts learn together; False: each starts anew, and does not depend on others.

    Raises:
        UserError: an argument that is not allowed, or features other than this code's.
    """

    name = "learned"

    def __init__(
        self,
        net: WidthNet,
        provenance: dict[str, Any],
        width_value: float = 2.0,
        latency: Costs | dict[str, Any] | str | Path | None = None,
        clock: str | None = None,
        share: bool = True,
    ) -> None:
        _check_arguments(width_value, clock)
        self.features = ContextFeatures()
        trained = provenance.get("features", {})
        found = [*trained.get("names", []), *trained.get("target_names", [])]
        check_features(found, self.features.names + self.features.target_names, "The controller was trained with")
        if trained.get("version") != self.features.version:
            raise UserError(
                f"The controller was trained with version {trained.get('version')} of the features; this code computes "
                f"version {self.features.version}. Collect traces and train again."
            )
        self.net, self.provenance = net.eval(), provenance
        self._host = HostNet(net)
        self.width_value, self.clock, self.share = float(width_value), clock, share
        self.needs_hidden = bool(net.sizes["draft_hidden"] or net.sizes["target_hidden"])
        self.use_latency(latency)
        self._checked: DecodingConfig | None = None
        self._widths: tuple[int, ...]
        self._compile()
        self._new_prompt()

    @classmethod
    def load(
        cls,
        path: str | Path,
        pair: Any = None,
        revision: str | None = None,
        results: str | Path | Mapping[str, Any] | None = None,
        min_logprob_drop: float | None = None,
        target_tokens_per_second: float | None = None,
        **options: Any,
    ) -> Self:
        """A policy from a controller that train.py saved.

        Args:
            path: its directory, or a Hugging Face hub id.
            pair: the `ModelPair` (or its `describe()`) it will decode with; a controller of another pair is refused.
            revision: of the hub repository.
            results: a results.json of evaluate.py with this controller, or what it holds, to read `width_value` from.
            min_logprob_drop, target_tokens_per_second: what `width_value` should give; one of them where there are
                results. See `choose_width_value`.
            options: `width_value`, `latency`, `clock`, `share`.

        Raises:
            UserError: missing, not a controller, damaged, or trained for another pair or other features; a
                `width_value` given twice, or that the results do not tell.
        """
        targets: dict[str, Any] = {
            "min_logprob_drop": min_logprob_drop,
            "target_tokens_per_second": target_tokens_per_second,
        }
        asked = [name for name, value in {"results": results, **targets}.items() if value is not None]
        if asked and options.get("width_value") is not None:
            raise UserError(
                f"width_value is {options['width_value']!r} beside {', '.join(asked)}; give either the value or what "
                "to choose it by."
            )
        if asked and results is None:
            raise UserError(
                f"{' and '.join(asked)} without results; give results=<results.json> of an evaluation of this "
                "controller."
            )
        if results is not None:
            options["width_value"] = choose_width_value(results, **targets, weights=weights_sha256(path, revision))
        net, provenance = load_controller(path, revision)
        policy = cls(net, provenance, **options)
        if pair is not None:
            policy.check_pair(pair)
        return policy

    def use_latency(self, latency: Costs | dict[str, Any] | str | Path | None) -> LearnedWidth:
        """Plan with these seconds from now on; throughput is estimated afresh. Returns the policy."""
        costs = _costs(latency)
        unit = None if latency is None else getattr(costs, "unit", "seconds")
        self._wall = (self.clock or ("wall" if unit == "seconds" else "table")) == "wall"
        if self._wall and unit != "seconds":
            raise UserError(
                f"clock='wall' needs a latency table in seconds, not {unit or 'unit costs'}; give another latency, or "
                "clock='table'."
            )
        self.planner = Planner(costs, self.width_value)
        self.outlook, self.pace = Outlook(), Pace()
        self.throughput: Throughput | None = None
        return self

    # What the decoder asks.

    def check_pair(self, pair: Any) -> None:
        """Refuse a pair that the controller was not trained for (a `ModelPair` or its `describe()`)."""
        found = pair if isinstance(pair, dict) else pair.describe()
        trained = self.provenance.get("pair", {})
        if found.get("fingerprint") != trained.get("fingerprint"):
            raise UserError(
                f"The controller was trained for the pair {_in_words(trained)}, not for {_in_words(found)}: other "
                "weights, or an earlier version of this code. Train one with python train.py pair=..."
            )

    def check(self, config: DecodingConfig) -> None:
        if config == self._checked:
            return
        for name in ("draft_width", "target_width"):
            asked, limit = getattr(config, name), self.net.sizes[name]
            if asked > limit:
                raise UserError(
                    f"{name} is {asked}; the controller was trained for at most {limit}. Lower it, or collect traces "
                    f"and train with decoding.{name}={asked}."
                )
        trained = self.provenance.get("decoding", {})
        changed = [name for name in _TRAINED_UNDER if name in trained and trained[name] != getattr(config, name)]
        if changed:
            settings = ", ".join(f"{name}={trained[name]!r}" for name in changed)
            warnings.warn(f"The controller was trained with {settings}; its widths may fit badly here.", stacklevel=2)
        self._checked = config

    def fork(self, seed: int) -> LearnedWidth:
        """A policy for one prompt, which learns with the others or, without `share`, alone."""
        if self.share and self.throughput is None and self._checked is not None:
            self.throughput = Throughput.expected(self.planner.costs, self._checked)
        forked = copy.copy(self)
        if not self.share:
            forked.throughput = None
            forked.outlook, forked.pace = Outlook(), Pace()
        return forked

    def reset(self, config: DecodingConfig) -> None:
        """A prompt starts."""
        self._config = config
        self._rate(config)
        self._new_prompt()

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        if layer > 1:
            return self._seen[layer - 1].plan.deeper
        self._seen.clear()
        config, roots = context.config, len(context.weights)
        place = self._rate(config), 1.0, layer, _deepest(context)
        worth = self.planner.worth_drafting(self.outlook, *place, parents=roots, nodes=roots, width=config.draft_width)
        self._roots, self._declined = roots, not worth
        return worth

    def draft_width(self, context: DraftContext) -> int:
        width = self._see(context).plan.draft_width
        self._widths = (*context.widths, width)
        return width

    def target_width(self, context: TargetContext) -> int:
        config, layer, width = context.draft.root.config, context.draft.layer, context.draft_width
        if width == 0:
            self._roots = len(context.draft.root.weights)
            asked, loss = self.planner.final_width(self._host, known(context), config, self._rate(config))
        else:
            asked, loss = self._judged_width(context, config)
        self._seen_loss[layer] = loss
        return asked

    def observe(self, record: IterationRecord) -> None:
        """Learn from an iteration; only now, since what is shown of deeper layers may not move M (design 5.4)."""
        outlook, earned = self.outlook, 0.0
        for layer in record.layers:
            loss = self._seen_loss[layer.layer]
            lost = self.width_value * float(loss[min(kept_width(layer, self._config), len(loss) - 1)])
            earned += 1.0 - lost
            outlook.was_paid(1.0 - lost)
            if layer.draft_width:
                plan = self._seen[layer.layer].plan
                outlook.saw(layer.layer, float(layer.passed), plan.passing)
                if layer.passed:
                    outlook.lost(lost / max(plan.further, 1e-9))
        if self._declined:
            outlook.hope()
        if self.throughput is not None:
            plain = self.planner.seconds((), 1)
            added = self.planner.seconds(self._widths, self._roots) - plain
            if self._wall:
                self.pace.saw(plain, added, record.seconds)
            self.throughput.update(earned, plain + self.pace.of_added * added)
        self._seen.clear()
        self._seen_loss.clear()
        self._widths, self._declined = (), False

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "width_value": self.width_value,
            "clock": "wall" if self._wall else "table",
            "share": self.share,
            "latency": costs_digest(self.planner.costs),
            "network": self.net.fingerprint,
        }

    # What it knows.

    def _hidden(self, context: DraftContext) -> tuple[FloatVector, FloatVector]:
        """The draft's and the target's hidden vectors, empty where the network does without."""
        if not self.needs_hidden:
            return _NO_HIDDEN
        sizes = self.net.sizes
        hidden = hidden_vectors(context, sizes["draft_hidden"], sizes["target_hidden"])
        for name, vector in zip(("draft_hidden", "target_hidden"), hidden, strict=True):
            if len(vector) != sizes[name]:
                raise UserError(
                    f"The controller expects {name} of size {sizes[name]}, the pair gives {len(vector)}: it was "
                    "trained for another pair. Train one with python train.py pair=..."
                )
        return hidden

    # What it plans.

    def _judged_width(self, context: TargetContext, config: DecodingConfig) -> tuple[int, FloatArray]:
        """M by P and Q, and the L(k) that it was set by."""
        place = config, self._see(context.draft).plan.further
        if settles_alone(config):
            return self.planner.bearable_width(self._host, known(context), *place)
        joints = _entries(context.target), _entries(context.draft.joint)
        return self.planner.counted_width(self._host, known(context), joints, context.draft_width, *place)

    def _see(self, context: DraftContext) -> _Seen:
        """The plan of a layer, made once."""
        seen = self._seen.get(context.layer)
        if seen is None or seen.context is not context:
            seen = self._seen[context.layer] = _Seen(context, self._plan(context))
        return seen

    def _plan(self, context: DraftContext) -> Decision:
        config, root = context.root.config, context.root
        above = self._seen.get(context.layer - 1)
        reach = above.plan.onward if above is not None else 1.0  # probability that all layers above pass
        scene, hidden = self.features.of_context(context), self._hidden(context)
        nodes = len(root.weights) + sum(context.widths)
        place = self._rate(config), reach, _deepest(root), nodes
        return self.planner.widths(self._host, scene, hidden, config, self.outlook, *place)

    def _rate(self, config: DecodingConfig) -> float:
        """The price of a second of the table that nodes or layers add: all that is ever weighed against a reward."""
        if self.throughput is None:
            self.throughput = Throughput.expected(self.planner.costs, config)
        return self.throughput.rate * self.pace.of_added

    def _compile(self) -> None:
        """Ask everything once, so that no prompt waits for numba: 20 seconds on a new machine, then a blink."""
        if not kernels.COMPILED:
            return
        config, outlook, sizes = DecodingConfig(target_width=1, draft_width=1), Outlook(), self.net.sizes
        vectors = np.zeros(sizes["draft_hidden"], np.float32), np.zeros(sizes["target_hidden"], np.float32)
        probs, first = np.ones(1), np.zeros(1, np.int64)
        target = True, 1, 1, np.zeros(1), probs, first, 1
        shown = np.ones(1)
        shown.flags.writeable = False  # as policies are shown P and Q
        joints = (first, first, shown), (first, first, shown)
        planner, scene = self.planner, (*target, 0, 0, 0, 0.0, False)
        planner.worth_drafting(outlook, 1.0, 1.0, 1, 1, parents=1, nodes=1, width=1)
        planner.widths(self._host, scene, vectors, config, outlook, 1.0, 1.0, 1, 1)
        planner.counted_width(self._host, target, joints, 1, config, 1.0)
        planner.bearable_width(self._host, target, config, 1.0)
        planner.final_width(self._host, target, config, 1.0)

    def _new_prompt(self) -> None:
        self._seen: dict[int, _Seen] = {}  # of this iteration's drafted layers
        self._seen_loss: dict[int, FloatArray] = {}  # L that M of a layer was set by
        self._widths = ()  # drafted in this iteration
        self._roots, self._declined = 1, False  # input beams; whether nothing was to be drafted for them


def _deepest(root: RootContext) -> int:
    """The last layer that may be drafted."""
    return min(root.config.draft_depth, root.remaining - 1)


def _in_words(pair: dict[str, Any]) -> str:
    """A pair's `describe()` in a few words."""
    draft = pair.get("draft")
    by = f" with draft={draft}" if draft not in (None, "model") else ""
    return f"{pair.get('name')!r}{by} ({pair.get('fingerprint')})"


def _entries(joint: Distribution) -> Packed:
    """A joint distribution for the kernels: parents, tokens and probabilities."""
    return joint.parents, joint.tokens, joint.probs


def _costs(latency: Costs | dict[str, Any] | str | Path | None) -> Costs:
    if latency is None:
        return UnitCosts()
    if isinstance(latency, str | Path):
        return LatencyTable.load(latency)
    costs = LatencyTable.from_dict(latency) if isinstance(latency, dict) else latency
    if not all(hasattr(costs, name) for name in ("draft_seconds", "target_seconds", "host_seconds")):
        raise UserError(f"latency is {latency!r}; give a LatencyTable, its dict, the path of its JSON, or None.")
    return costs


def _check_arguments(width_value: Any, clock: str | None) -> None:
    number = isinstance(width_value, int | float) and not isinstance(width_value, bool)
    if not number or not 0 <= width_value < math.inf:
        raise UserError(f"width_value is {width_value!r}; give a number of 0 or more (0: speed alone).")
    if clock not in (None, *CLOCKS):
        raise UserError(f"clock is {clock!r}; choose one of {', '.join(map(repr, (None, *CLOCKS)))}.")
