"""BanditWidth: draft width and depth found by trial while decoding; no network, no traces.

UCB1 (Auer, Cesa-Bianchi and Fischer 2002, figure 1) on a ratio. Arm a has committed R_a tokens in
T_a seconds over n_a iterations; n = Σ n_a and ρ = Σ R_a / Σ T_a. Each arm is tried once, then the
one of the highest

    R_a / T_a + exploration · ρ · sqrt(2 ln n / n_a)

goes on: tokens per second in the long run are a ratio of sums, and ρ gives the width of the
confidence the same unit, where UCB1 has rewards in [0, 1]. All sums shrink by exp(-1 / memory) an
iteration (discounted UCB, Garivier and Moulines 2011), so that an arm that the text has come to
suit is tried again. Clocks have spikes, where something is compiled or captured: by the clock, an
arm's first iteration does not count, and no other for more than a few times the arm's fastest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from decoding.config import DecodingConfig
from decoding.cost_table import Costs, costs_digest, iteration_seconds
from decoding.errors import UserError
from decoding.policies.base import (
    ASKED_WIDTH,
    DRAFT_DEPTH,
    DRAFT_WIDTH,
    DraftContext,
    IterationRecord,
    RootContext,
    TargetContext,
    WidthPolicy,
)
from decoding.support.checks import is_whole, number, whole

_DEPTHS = 4  # that the default arms have at most, besides 0
_SPIKE = 4.0  # times an arm's fastest iteration


class Arm(NamedTuple):
    """A width and a depth that an iteration may draft."""

    draft_width: int  # w of each layer; 0 where nothing is drafted
    draft_depth: int  # γ


class BanditWidth(WidthPolicy):
    """Learns, by trial, which draft width and depth commit most tokens per second; M is fixed.

    What is learned outlives a prompt: a bandit needs hundreds of iterations. All prompts that a
    policy object decodes add to the same sums, so a prompt's widths depend on those before it and
    on those decoded together with it. That moves no output distribution: an arm is chosen before
    anything is drafted, and M never follows from it.

    Args:
        target_width: M of every layer, the one that the target draws among them; None: the
            config's.
        arms: (draft_width, draft_depth) pairs to choose among, depth 0 for the target alone; None:
            nothing drafted, and up to four depths from 1 to the config's, each with M drafts a
            layer and with the config's draft_width.
        exploration: how far an arm's confidence reaches, 0 or more; 1 is UCB1's own, which assumes
            the worst noise.
        memory: iterations after which a weight has fallen to 1/e; None: nothing is forgotten, as in
            UCB1.
        latency: seconds of the passes. None: an iteration's wall seconds. With a table, equal seeds
            and an equal order of prompts give equal widths.
        share: whether all prompts learn together; False: each starts anew.

    Raises:
        UserError: an argument that is not allowed; arms that a config has no room for are refused
            with it.

    Source: the formula is in the module's first lines.
    """

    name = "bandit"
    knobs = (DRAFT_WIDTH, DRAFT_DEPTH, ASKED_WIDTH)  # its arms lie within draft_width and draft_depth
    family = "control"

    def __init__(
        self,
        target_width: int | None = None,
        arms: Sequence[Sequence[int]] | None = None,
        exploration: float = 0.2,
        memory: float | None = 1000.0,
        latency: Costs | None = None,
        share: bool = True,
    ) -> None:
        _check_arguments(target_width, exploration, memory, latency)
        self.asked_width, self.given_arms = target_width, _as_arms(arms)
        self.exploration, self.memory, self.latency, self.share = float(exploration), memory, latency, share
        self._sums_by_arms: dict[tuple[Arm, ...], _Sums] = {}  # by arms: a policy may serve several configs
        self._sums: _Sums | None = None
        self._arm, self._counts = Arm(0, 0), False
        self._roots = 1  # of this iteration, as are the drafts of its layers
        self._widths: tuple[int, ...] = ()

    def check(self, config: DecodingConfig) -> None:
        asked = self.asked_width
        if asked is not None and not config.min_width <= asked <= config.target_width:
            raise UserError(
                f"BanditWidth(target_width={asked}) is outside {config.min_width}..{config.target_width}, the range "
                "that the decoding config allows. Change it, or decoding.target_width or decoding.min_width."
            )
        least = asked or config.target_width
        for arm in self.arms(config):
            wide = not arm.draft_depth or least <= arm.draft_width <= config.draft_width
            if not wide or arm.draft_depth > config.draft_depth:
                raise UserError(
                    f"The arm {tuple(arm)} is not possible: draft widths are {least}..{config.draft_width} here "
                    f"(target_width..draft_width) and depths 0..{config.draft_depth}. Change it, or "
                    "decoding.draft_width and decoding.draft_depth."
                )

    def arms(self, config: DecodingConfig) -> tuple[Arm, ...]:
        """The arms under a config, in the order in which they are tried."""
        if self.given_arms is not None:
            return self.given_arms
        depths = np.geomspace(1, max(config.draft_depth, 1), _DEPTHS).round().astype(int).tolist()
        widths = (self.asked_width or config.target_width, config.draft_width)
        drafting = [Arm(width, depth) for depth in depths for width in widths if depth <= config.draft_depth]
        return tuple(dict.fromkeys([Arm(0, 0), *drafting]))

    def fork(self, seed: int) -> BanditWidth:
        """A policy for one prompt, adding to the same sums unless `share` is off."""
        forked = copy.copy(self)
        if not self.share:
            forked._sums_by_arms = {}
        return forked

    def reset(self, config: DecodingConfig) -> None:
        arms = self.arms(config)
        keep = 1.0 if self.memory is None else math.exp(-1.0 / self.memory)
        self._sums = self._sums_by_arms.setdefault(
            arms, _Sums(arms, self.exploration, keep, spikes=self.latency is None)
        )
        self._counts = False

    def rates(self, config: DecodingConfig) -> dict[Arm, float]:
        """Tokens per second that each arm was seen to give; arms not tried yet are absent."""
        sums = self._sums_by_arms.get(self.arms(config))
        return {} if sums is None else sums.rates()

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        if layer == 1:
            assert self._sums is not None  # the decoder resets
            self._arm, self._counts = self._sums.choose(context.remaining - 1)
            self._roots, self._widths = len(context.weights), ()
        return layer <= self._arm.draft_depth

    def draft_width(self, context: DraftContext) -> int:
        if self.latency is not None:
            drawn = self._arm.draft_width
            if not context.root.config.replacement:
                drawn = min(drawn, len(context.joint))
            self._widths = (*context.widths, drawn)
        return self._arm.draft_width

    def target_width(self, context: TargetContext) -> int:
        return self.asked_width or context.draft.root.config.target_width

    def observe(self, record: IterationRecord) -> None:
        """Count an iteration for its arm."""
        if self._counts and self._sums is not None:
            seconds = record.seconds
            if self.latency is not None:
                seconds = iteration_seconds(self.latency, self._widths, self._roots)
            self._sums.add(self._arm, record.tokens, seconds)
        self._counts = False  # the prompt's last iteration may draft nothing, and then asks for no arm

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "target_width": self.asked_width,
            "arms": None if self.given_arms is None else [list(arm) for arm in self.given_arms],
            "exploration": self.exploration,
            "memory": self.memory,
            "clock": "wall" if self.latency is None else "table",
            "latency": None if self.latency is None else costs_digest(self.latency),
            "share": self.share,
        }


class _Sums:
    """Tokens and seconds of the arms so far, and which arm is next.

    Args:
        keep: what an iteration leaves of all sums.
        spikes: whether seconds have them.
    """

    def __init__(self, arms: tuple[Arm, ...], exploration: float, keep: float, spikes: bool) -> None:
        self._arms, self._exploration, self._keep, self._spikes = arms, exploration, keep, spikes
        self._index = {arm: i for i, arm in enumerate(arms)}
        self._depths = np.array([arm.draft_depth for arm in arms])
        self._pulls, self._tokens, self._seconds = np.zeros((3, len(arms)))  # [A] each
        self._fastest = np.full(len(arms), np.inf)  # [A] seconds of an iteration
        self._begun = np.zeros(len(arms), dtype=np.int64)  # [A] first tries, so that a batch spreads over the arms

    def choose(self, deepest: int) -> tuple[Arm, bool]:
        """The next arm, drafting at most `deepest` layers; False where it will be cut short."""
        fitting = np.flatnonzero(self._depths <= deepest)
        if not len(fitting):
            return self._arms[int(self._depths.argmin())], False
        pulls = self._pulls[fitting]
        if not pulls.all():
            untried = fitting[pulls == 0]
            first = int(untried[self._begun[untried].argmin()])
            self._begun[first] += 1
            return self._arms[first], True
        reach = self._exploration * self._tokens.sum() / self._seconds.sum()
        bonus = reach * np.sqrt(2.0 * math.log(max(self._pulls.sum(), 1.0)) / pulls)
        return self._arms[fitting[int((self._tokens[fitting] / self._seconds[fitting] + bonus).argmax())]], True

    def add(self, arm: Arm, tokens: int, seconds: float) -> None:
        """An iteration of an arm ended."""
        i, seconds = self._index[arm], max(seconds, 1e-9)
        if self._spikes:
            first = self._fastest[i] == np.inf
            self._fastest[i] = min(self._fastest[i], seconds)
            if first:
                return
            seconds = min(seconds, _SPIKE * float(self._fastest[i]))
        for sums, seen in ((self._pulls, 1.0), (self._tokens, tokens), (self._seconds, seconds)):
            sums *= self._keep
            sums[i] += seen

    def rates(self) -> dict[Arm, float]:
        """Tokens per second of the arms tried."""
        tried = np.flatnonzero(self._pulls)
        return {self._arms[i]: float(self._tokens[i] / self._seconds[i]) for i in tried}


def _as_arms(arms: Sequence[Sequence[int]] | None) -> tuple[Arm, ...] | None:
    if arms is None:
        return None
    given = []
    for arm in arms if not isinstance(arms, str) else [arms]:
        pair = list(arm) if isinstance(arm, Sequence) and not isinstance(arm, str) else []
        if len(pair) != 2 or not all(is_whole(n) and n >= 0 for n in pair):
            raise UserError(f"arms holds {arm!r}; give pairs of whole numbers, (draft_width, draft_depth).")
        given.append(Arm(*pair) if pair[1] else Arm(0, 0))
    if not given:
        raise UserError("arms is empty; give at least one (draft_width, draft_depth), or None for the default ones.")
    return tuple(dict.fromkeys(given))


def _check_arguments(target_width: Any, exploration: Any, memory: Any, latency: Any) -> None:
    if target_width is not None:
        whole("target_width", target_width, least=1, hint="None for the config's")
    number("exploration", exploration, least=0, hint="0.1 to 1 are worth trying")
    if memory is not None:
        number("memory", memory, least=1, hint="iterations; None to forget nothing")
    missing = [name for name in ("draft_cost", "target_cost", "host_cost") if not hasattr(latency, name)]
    if latency is not None and missing:
        raise UserError(
            f"latency is {type(latency).__name__!r} without {', '.join(missing)}; give an object with draft_cost, "
            "target_cost and host_cost, or None for wall seconds."
        )
