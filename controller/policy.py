"""LearnedWidth: a WidthPolicy that asks a trained network what to draft, and plans with the device's latencies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from controller.checkpoint import load_controller
from controller.experience import Experience
from controller.features import ContextFeatures, check_features, features_of, root_features
from controller.host import HostNet, Layer, leftovers
from controller.hub import upload
from controller.network import SOFT, WidthNet
from controller.plan import Plan, sent, share_of
from decoding.config import DecodingConfig
from decoding.cost_table import Costs, LatencyTable, UnitCosts, costs_digest
from decoding.dice.sampling import Joint
from decoding.errors import UserError, reading
from decoding.policies.base import (
    DRAFT_DEPTH,
    DRAFT_WIDTH,
    TARGET_WIDTH,
    Candidates,
    DraftContext,
    IterationRecord,
    Knob,
    Parents,
    RootContext,
    TargetContext,
    WidthPolicy,
)
from decoding.support.arrays import FloatVector, IntArray
from decoding.support.checks import number

CLOCKS = ("wall", "table")
_NONE = np.zeros(0, np.float32)
# Settings that shape P and Q: a controller trained under others is used out of its element.
_TRAINED_UNDER = (
    "mode",
    "target_width",
    "temperature",
    "top_k",
    "top_p",
    "warp",
    "oversample",
    "draft_top_k",
    "one_beam_cache",
)


class LearnedWidth(WidthPolicy):
    """Drafts by a trained controller; the decoder forks it for each prompt.

    All target_width beams are asked for at every layer, so that the tokens are those of `beam_sample` with the same
    seed: only the speed depends on the controller. With `width_value` fewer may be asked for, where that makes a layer
    likelier to pass. How long iterations take and what they give is learned on line and outlives a prompt; where
    drafting does not pay, nothing is drafted but now and then.

    Args:
        net: in eval mode, on the CPU.
        provenance: what `load_controller` returned with it.
        latency: seconds, or joules, of the passes on this device: a `LatencyTable`, its dict, or the path of its JSON.
            None: unit costs (a target pass 1, a draft pass a quarter), until `use_latency`.
        clock: what an iteration took: "wall", by which the table is corrected; or "table", as modelled. None: "wall"
            with a latency table in seconds, else "table".
        share: whether prompts learn together; False: each starts anew.
        features: those that the network was trained with; None: the built-in ones.
        width_value: what a layer of very many beams in place of one is worth, in tokens, 0 or more: the lower, the
            fewer beams and the faster. None: all beams at every layer, whatever they cost.

    Raises:
        UserError: an argument that is not allowed, or features other than those it was trained with.
    """

    name = "learned"
    knobs = (TARGET_WIDTH, DRAFT_WIDTH, DRAFT_DEPTH, Knob("width_value", "value", axis="width_values", of_drafts=True))
    family = "learned"
    chooses = True

    def __init__(
        self,
        net: WidthNet,
        provenance: dict[str, Any],
        latency: Costs | dict[str, Any] | str | Path | None = None,
        clock: str | None = None,
        share: bool = True,
        features: ContextFeatures | None = None,
        width_value: float | None = None,
    ) -> None:
        if width_value is not None:
            number("width_value", width_value, least=0, hint="1 to 20 are worth trying; None keeps all beams")
        if clock not in (None, *CLOCKS):
            raise UserError(f"clock is {clock!r}; choose one of {', '.join(map(repr, (None, *CLOCKS)))}.")
        trained, features = provenance.get("features", {}), features or ContextFeatures()
        found = [*trained.get("names", []), *trained.get("candidate_names", [])]
        check_features(found, [*features.names, *features.candidate_names], "The controller was trained with")
        if trained.get("version") != features.version:
            raise UserError(
                f"The controller was trained with version {trained.get('version')} of the features; this code computes "
                f"version {features.version}. Collect traces and train again."
            )
        self.net, self.provenance, self.features = net.eval(), provenance, features
        self._host = HostNet(net)
        self.clock, self.share, self.width_value = clock, share, width_value
        self.use_latency(latency)
        self._checked: DecodingConfig | None = None
        self._compile()

    @classmethod
    def load(cls, path: str | Path, pair: Any = None, revision: str | None = None, **options: Any) -> Self:
        """A policy from a controller that train.py saved.

        Args:
            path: its directory, or a Hugging Face hub id.
            pair: the `ModelPair` (or its `describe()`) it will decode with; a controller of another pair is refused.
            revision: of the hub repository.
            options: `latency`, `clock`, `share`, `features`, `width_value`.

        Raises:
            UserError: missing, not a controller, damaged, or trained for another pair or other features.
        """
        net, provenance = load_controller(path, revision)
        with reading(f"The provenance of the controller {path}", "Train it again."):
            if options.get("features") is None:
                here = Path(path).expanduser().is_dir()
                options["features"] = features_of(provenance.get("features", {}), may_import=here)
            policy = cls(net, provenance, **options)
            if pair is not None:
                policy.check_pair(pair)
        return policy

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the controller to the Hugging Face hub, from where `load` takes it; returns the commit's URL.

        Args:
            repo_id: "owner/name".
            options: `results`, `private`, `token`, `revision`, see `controller.hub.upload`.

        Raises:
            UserError: the hub cannot be reached, or refuses.
        """
        return upload(self.net, self.provenance, repo_id, **options)

    def use_latency(self, latency: Costs | dict[str, Any] | str | Path | None) -> LearnedWidth:
        """Plan with these seconds from now on; what was learned of others is forgotten. Returns the policy."""
        costs = _costs(latency)
        unit = None if latency is None else getattr(costs, "unit", "seconds")
        self._wall = (self.clock or ("wall" if unit == "seconds" else "table")) == "wall"
        if self._wall and unit != "seconds":
            raise UserError(
                f"clock='wall' needs a latency table in seconds, not {unit or 'unit costs'}; give another latency, or "
                "clock='table'."
            )
        self.costs, self.plan = costs, Plan(costs)
        self._forget()
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
        if config.mode != "beam_sample" or config.verification != "shared_noise":
            raise UserError(
                f"LearnedWidth decides under shared noise; mode is {config.mode!r} and verification "
                f"{config.verification!r}. Set mode='beam_sample' and verification='shared_noise', or take another "
                "policy."
            )
        if config.target_width > self.net.target_width:
            raise UserError(
                f"target_width is {config.target_width}; the controller was trained for at most "
                f"{self.net.target_width}. Lower it, or collect traces and train with "
                f"decoding.target_width={config.target_width}."
            )
        if self.width_value is not None and config.min_width == config.target_width:
            raise UserError(
                f"width_value is {self.width_value} and min_width is target_width, {config.min_width}: there are no "
                "beams to trade for speed. Lower min_width, or leave width_value out."
            )
        trained = self.provenance.get("decoding", {})
        changed = [name for name in _TRAINED_UNDER if name in trained and trained[name] != getattr(config, name)]
        if changed:
            settings = ", ".join(f"{name}={trained[name]!r}" for name in changed)
            warnings.warn(f"The controller was trained with {settings}; it may fit badly here.", stacklevel=2)
        self._checked = config

    def fork(self, seed: int) -> LearnedWidth:
        """A policy for one prompt, which learns with the others or, without `share`, alone."""
        forked = copy.copy(self)
        if not self.share:
            forked._forget()
        return forked

    def reset(self, config: DecodingConfig) -> None:
        """A prompt starts."""
        self._layers: list[Layer] = []
        self._features: list[FloatVector] = []  # of each
        self._nodes = 0  # roots that the target has not scored
        self._ask_experience()

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        if layer == 1:
            self._layers, self._features = [], []
            if self.width_value is None and context.iteration:
                self._ask_experience()
            if not self._drafting:  # where nothing is drafted, deciding costs next to nothing
                return False
            self._root, self._unknown = root_features(context), context.unknown_share
            width = context.config.target_width
            chance = self._host.expects(self._before(1), context.config.draft_width, width)
            return self.plan.goes_deeper(chance, 0.0, len(context.weights), self._rate)
        last = self._layers[-1]
        covered = 1.0 - last.left[1] / context.config.target_width
        return self.plan.goes_deeper(last.passing * last.below, covered, last.fresh, self._rate)

    def ask_draft(self, context: RootContext, layer: int, parents: Parents) -> bool:
        above = _NONE if layer == 1 else self._layers[-1].log_chances[np.array(parents.places)]
        share, unknown = share_of(parents.weights, above, parents.known)
        return self.plan.asks_draft(self._reach, share, context.config.target_width, unknown, self._rate)

    def choose(self, context: DraftContext) -> IntArray:
        found, config = context.candidates, context.root.config
        assert found is not None and context.known is not None
        if context.layer == 1:
            self._nodes, log_parent = int(np.count_nonzero(~context.known)), np.zeros(len(found), np.float32)
        else:
            log_parent = self._layers[-1].log_chances[np.array(context.places)[found.rows]]
        features = np.ascontiguousarray(self.features.of_layer(context), np.float32)
        candidates = np.ascontiguousarray(self.features.of_candidates(context), np.float32)
        widths = context.layer, config.target_width, config.draft_width
        given = self._root, widths, self._reach, self._nodes, self._rate, self.plan.both
        self._layers.append(self._host.layer(candidates, features, log_parent, *given))
        self._features.append(features)
        return self._layers[-1].picks

    def target_width(self, context: TargetContext) -> int:
        """M; design 5.5: by what was known before the layer was drafted, and the widest w, not by the drafts.

        What an iteration earned and took tells of the noise below the layer that it ended with. So with `width_value`
        a prompt keeps the rate that it starts with, and nothing that was drafted is held back from the target.
        """
        config = context.draft.root.config
        if self.width_value is None or context.draft_width == 0:
            return config.target_width
        seen, widest = self._before(context.draft.layer), config.draft_width
        chances = [self._host.expects(seen, widest, width) for width in range(1, config.target_width + 1)]
        return self.plan.beams(chances, self.width_value, config.min_width)

    def send(self, layers: Sequence[DraftContext]) -> list[NDArray[np.bool_]]:
        values = np.concatenate([layer.values for layer in self._layers])
        stays = np.ones(len(values), np.bool_)
        if self.width_value is None:
            stays = sent(values, self._nodes, self.plan.target, self._rate)
        ends = list(accumulate(len(layer.values) for layer in self._layers))
        self._sent = [stays[first:end] for first, end in zip([0, *ends], ends, strict=False)]
        return self._sent

    def expected_count(self, context: TargetContext) -> float | None:
        place = context.draft.layer - 1
        layer, features = self._layers[place], self._features[place]
        kept_back = np.exp(layer.log_chances[~self._sent[place]])
        left_out, _ = leftovers(kept_back, np.zeros(len(kept_back), np.bool_), 0)
        left = np.exp(layer.left[0]) - SOFT + left_out, layer.left[1] + kept_back.sum()
        return sum(self._host.passes(features, *left, j) for j in range(1, context.draft.root.config.target_width + 1))

    def observe(self, record: IterationRecord) -> None:
        """Learn from an iteration."""
        told = self.plan.seconds(record.scored, record.draft_passes, len(record.drafts))
        self.experience.saw(record.tokens, told, record.seconds, self._drafting)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "clock": "wall" if self._wall else "table",
            "share": self.share,
            "width_value": self.width_value,
            "latency": costs_digest(self.costs),
            "network": self.net.fingerprint,
            "trained_for": self.provenance.get("pair", {}).get("fingerprint"),
        }

    def _ask_experience(self) -> None:
        self._drafting = self.experience.drafts()
        if self._drafting:
            self._rate = self.experience.rate()

    @property
    def _reach(self) -> float:
        """The chance that all layers drafted so far pass."""
        return self._layers[-1].passing if self._layers else 1.0

    def _before(self, layer: int) -> tuple[float, ...]:
        """BEFORE of a layer of this iteration."""
        left = (0.0, 0.0, self._unknown) if layer == 1 else self._layers[layer - 2].left
        return float(layer == 1), float(layer), *self._root, *left

    def _compile(self) -> None:
        """Ask everything once, so that no prompt waits for numba: 20 seconds on a new machine, then a blink."""
        one, no, first = np.ones(1), np.zeros(1, np.bool_), np.zeros(1, np.int64)
        root = RootContext(DecodingConfig(), iteration=0, remaining=1, weights=one)
        found = Candidates(first, one, one, first, first, first, no)
        joint = Joint(first, first, one, one)
        self._layers, self._features, self._nodes, self._rate = [], [], 1, 1.0
        self._root, self._unknown = root_features(root), 1.0
        context = DraftContext(root, 1, one, joint, known=no, candidates=found)
        self.choose(context)
        self.send([context])
        self._host.expects(self._before(1), 1, 1)
        share_of(one, _NONE, no)

    def _forget(self) -> None:
        self.experience = Experience(self.plan.plain_seconds(1), wall=self._wall)


def _in_words(pair: dict[str, Any]) -> str:
    """A pair's `describe()` in a few words."""
    draft = pair.get("draft")
    by = f" with draft={draft}" if draft not in (None, "model") else ""
    return f"{pair.get('name')!r}{by} ({pair.get('fingerprint')})"


def _costs(latency: Costs | dict[str, Any] | str | Path | None) -> Costs:
    if latency is None:
        return UnitCosts()
    if isinstance(latency, str | Path):
        return LatencyTable.load(latency)
    costs = LatencyTable.from_dict(latency) if isinstance(latency, dict) else latency
    if not all(hasattr(costs, name) for name in ("draft_cost", "target_cost", "host_cost")):
        raise UserError(f"latency is {latency!r}; give a LatencyTable, its dict, the path of its JSON, or None.")
    return costs
