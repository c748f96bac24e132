"""LearnedWidth: a WidthPolicy that asks a trained network what to draft, and plans with the device's latencies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from controller.checkpoint import load_controller
from controller.experience import Experience
from controller.features import ContextFeatures, check_features, features_of, root_features
from controller.host import HostNet, leftovers
from controller.hub import upload
from controller.network import SOFT, WidthNet
from controller.plan import LEAST_CHANCE, Plan
from decoding.config import DecodingConfig
from decoding.cost_table import Costs, LatencyTable, UnitCosts, costs_digest
from decoding.errors import UserError, reading
from decoding.policies.base import (
    DRAFT_DEPTH,
    DRAFT_WIDTH,
    TARGET_WIDTH,
    DraftContext,
    IterationRecord,
    Parents,
    RootContext,
    TargetContext,
    WidthPolicy,
)
from decoding.support.arrays import FloatVector, IntArray

CLOCKS = ("wall", "table")
# Settings that shape P and Q: a controller trained under others is used out of its element.
_TRAINED_UNDER = ("mode", "temperature", "top_k", "top_p", "warp", "oversample", "draft_top_k", "one_beam_cache")


class _Layer(NamedTuple):
    """What was drafted of a layer."""

    chances: FloatVector  # [w] π of the drafts, in order
    scored: NDArray[np.bool_]  # [w]
    reach: float  # the chance that all layers above pass
    left_out: float
    missing: float
    features: list[float]
    held: list[float]  # the chances that the drafts hold the first j = 1.. of the selection
    sent: NDArray[np.bool_] | None = None  # [w] drafts that go to the target; None: it is still to be decided


class LearnedWidth(WidthPolicy):
    """Drafts by a trained controller; the decoder forks it for each prompt.

    All target_width beams are asked for at every layer, so that the tokens are those of `beam_sample` with the same
    seed: only the speed depends on the controller. How long iterations take and what they give is learned on line and
    outlives a prompt; where drafting does not pay, nothing is drafted but now and then.

    Args:
        net: in eval mode, on the CPU.
        provenance: what `load_controller` returned with it.
        latency: seconds, or joules, of the passes on this device: a `LatencyTable`, its dict, or the path of its JSON.
            None: unit costs (a target pass 1, a draft pass a quarter), until `use_latency`.
        clock: what an iteration took: "wall", by which the table is corrected; or "table", as modelled. None: "wall"
            with a latency table in seconds, else "table".
        share: whether prompts learn together; False: each starts anew.
        features: those that the network was trained with; None: the built-in ones.

    Raises:
        UserError: an argument that is not allowed, or features other than those it was trained with.
    """

    name = "learned"
    knobs = (TARGET_WIDTH, DRAFT_WIDTH, DRAFT_DEPTH)
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
    ) -> None:
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
        self.clock, self.share = clock, share
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
            options: `latency`, `clock`, `share`, `features`.

        Raises:
            UserError: missing, not a controller, damaged, or trained for another pair or other features.
        """
        if options.pop("width_value", None) is not None:
            raise UserError(
                "width_value trades beams for speed, which LearnedWidth does not: it keeps target_width beams. Leave "
                "it out, or lower decoding.target_width."
            )
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
        self._layers: list[_Layer] = []
        self._log_chances = np.zeros(0, np.float32)  # log π of the last layer's drafts
        self._nodes = 0  # roots that the target has not scored
        self._drafting = True

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        if layer == 1:
            self._layers, self._root = [], root_features(context)
            self._drafting = self.experience.drafts()
            self._rate = self.experience.rate()
            if not self._drafting:
                return False
            nodes, above, covered = len(context.weights), (0.0, 0.0, context.unknown_share), 0.0
        else:
            last = self._layers[-1]
            fresh = last.chances[~last.scored]
            nodes, covered = len(fresh), 1.0 - last.missing / context.config.target_width
            above = np.log(last.left_out + SOFT), last.missing, float(fresh.sum() / max(last.chances.sum(), 1e-6))
        width = widths[-1] if widths else context.config.draft_width
        seen = (float(layer == 1), float(layer), *self._root, *above)
        chance = self._host.expects(seen, width)[context.config.target_width - 1]
        return self.plan.goes_deeper(self._reach * chance, covered, nodes, self._rate)

    def ask_draft(self, context: RootContext, layer: int, parents: Parents) -> bool:
        shares = np.exp(parents.weights - parents.weights.max())
        if layer > 1:
            shares *= np.exp(self._log_chances[list(parents.places)])
        share = float(shares[~parents.known].sum() / shares.sum())
        unknown = int((~parents.known).sum())
        return self.plan.asks_draft(self._reach, share, context.config.target_width, unknown, self._rate)

    def choose(self, context: DraftContext) -> IntArray:
        found, config = context.candidates, context.root.config
        assert found is not None and context.known is not None
        if context.layer == 1:
            self._nodes, log_parent = int((~context.known).sum()), np.zeros(len(found), np.float32)
        else:
            log_parent = self._log_chances[list(context.places)][found.rows]
        features = np.ascontiguousarray(self.features.of_layer(context), np.float32)
        candidates = np.ascontiguousarray(self.features.of_candidates(context), np.float32)
        log_chances = self._host.chances(candidates, features, log_parent)
        chances = np.exp(log_chances)
        order = np.argsort(-chances, kind="stable")
        order = order[chances[order] >= LEAST_CHANCE][: config.draft_width]
        order = order if len(order) else np.argsort(-chances)[:1]
        fresh = order[~found.scored[order]]
        count = self.plan.count(self.plan.worth(chances[fresh], self._reach), self._nodes, self._rate, both=True)
        picks = order[found.scored[order] | (chances[order] >= (chances[fresh[count - 1]] if count else 2.0))]
        picks = picks if len(picks) else order[:1]
        drafted = found.scored.copy()
        drafted[picks] = True
        left = leftovers(chances, drafted, config.target_width)
        reach = self._reach
        of_layer = features.tolist()
        held = self._host.passes(of_layer, *left)[: config.target_width]
        self._layers.append(_Layer(chances[picks], found.scored[picks], reach, *left, of_layer, held))
        self._log_chances = log_chances[picks]
        return picks

    def send(self, layers: Sequence[DraftContext]) -> list[NDArray[np.bool_]]:
        values = np.concatenate([self.plan.worth(layer.chances, layer.reach) for layer in self._layers])
        fresh = np.concatenate([~layer.scored for layer in self._layers])
        order = np.argsort(-values[fresh], kind="stable")
        count = self.plan.count(values[fresh][order], self._nodes, self._rate)
        sent = np.ones(len(values), dtype=np.bool_)
        sent[np.flatnonzero(fresh)[order[count:]]] = False
        masks = np.split(sent, np.cumsum([len(layer.chances) for layer in self._layers])[:-1])
        self._layers = [layer._replace(sent=mask) for layer, mask in zip(self._layers, masks, strict=True)]
        return masks

    def expected_count(self, context: TargetContext) -> float | None:
        layer = self._layers[context.draft.layer - 1]
        assert layer.sent is not None
        kept_back = layer.chances[~layer.sent]
        held = layer.held
        if len(kept_back):
            left_out = layer.left_out + leftovers(kept_back, np.zeros(len(kept_back), np.bool_), 0)[0]
            missing = layer.missing + float(kept_back.sum())
            held = self._host.passes(layer.features, left_out, missing)[: len(held)]
        return sum(held)

    def observe(self, record: IterationRecord) -> None:
        """Learn from an iteration."""
        told = self.plan.seconds(record.scored, record.draft_passes, len(record.drafts))
        self.experience.saw(record.tokens, told, record.seconds, self._drafting)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "clock": "wall" if self._wall else "table",
            "share": self.share,
            "latency": costs_digest(self.costs),
            "network": self.net.fingerprint,
            "trained_for": self.provenance.get("pair", {}).get("fingerprint"),
        }

    @property
    def _reach(self) -> float:
        """The chance that all layers drafted so far pass."""
        return self._layers[-1].reach * self._layers[-1].held[-1] if self._layers else 1.0

    def _compile(self) -> None:
        """Ask everything once, so that no prompt waits for numba: 20 seconds on a new machine, then a blink."""
        candidate, layer = self.net.sizes
        nothing = np.zeros((1, candidate), np.float32), np.zeros(layer, np.float32), np.zeros(1, np.float32)
        self.plan.count(self._host.chances(*nothing), 1, 1.0)

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
