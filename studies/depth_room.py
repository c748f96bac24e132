"""How much is to be had from deciding the depth well: python -m studies.depth_room controller=outputs/wide/controller

Prompts are decoded as deep as the config allows, at full draft width. What an iteration would have earned and cost, had
it stopped drafting after d layers, is arithmetic then, and so is what rules give that know more and more of it.

Not measured: the states that a rule would get into, since these are those of deep drafting with that M; quality; and
the time that a policy takes itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from controller.host import foresee
from controller.network import WidthNet
from controller.plan import least_bearable, passing_chances, settles_alone
from controller.policy import LearnedWidth
from decoding.arrays import FloatArray, IntArray
from decoding.checks import number, whole
from decoding.choose import cost_table
from decoding.config import DecodingConfig
from decoding.cost_table import Costs, iteration_seconds
from decoding.decoder import DSBDDecoder
from decoding.entry import entry_point
from decoding.errors import UserError
from decoding.files import write_whole
from decoding.pair import ModelPair
from decoding.progress import RunProgress
from decoding.tasks.base import Prompt, Task
from decoding.turns import prompt_stream
from decoding.widths import DraftContext, IterationRecord, RootContext, TargetContext
from studies.ablations import RESAMPLES, interval, markdown

THRESHOLDS = np.arange(20) / 20  # on a chance, above which a rule drafts a layer


@dataclass(frozen=True)
class Iteration:
    """What happened in an iteration that drafted as deep as it could."""

    roots: int  # input beams
    widths: tuple[int, ...]  # drafts of each layer
    promised: tuple[float, ...]  # P(K_w >= M) by the network before the draw, for each of them
    closed: tuple[float, ...]  # P(K_w >= M) given P and Q, for each layer that was reached
    passed: int  # layers that passed
    tokens: int  # layers committed


@dataclass(frozen=True)
class Outcome:
    """What a rule gives on every prompt."""

    knows: str
    tokens: FloatArray  # [P]
    seconds: FloatArray  # [P] of the table
    layers: FloatArray  # [P] drafted
    iterations: int
    deepest: tuple[int, ...]  # layers drafted at most, as chosen on each half of the prompts for the other


class DeepWidth(LearnedWidth):
    """Drafts all layers at full width, sets M by the loss that a pass can bear, and keeps what was known of each layer.

    Args:
        net, provenance: as for `LearnedWidth`.
        bearable: what a pass may lose, L(k). A layer that nothing was drafted for is as wide as one that failed:
            target_width.

    Raises:
        UserError: as for `LearnedWidth`, or bearable is no positive number.
    """

    name = "deep"

    def __init__(self, net: WidthNet, provenance: dict[str, Any], bearable: float = 1.2) -> None:
        number("bearable", bearable, above=0, hint="0.5 to 3 are worth trying")
        # A token a nat: what a pass brings is what it can bear.
        super().__init__(net, provenance, width_value=1.0)
        self.bearable = bearable
        self.prompts: list[list[Iteration]] = []  # of all forks
        self._iterations: list[Iteration] = []  # of this one

    def check(self, config: DecodingConfig) -> None:
        if config.mode != "beam_sample" or not settles_alone(config) or config.draft_depth < 1:
            raise UserError(
                f"The decoding config has mode={config.mode}, surplus={config.surplus}, refill={config.refill}, "
                f"draft_depth={config.draft_depth}; the room is known for mode=beam_sample, surplus=keep, refill=full "
                "and draft_depth of at least 1. Set these, and leave exact=false."
            )
        super().check(config)

    def fork(self, seed: int) -> DeepWidth:
        forked = copy.copy(self)
        forked._iterations = []
        forked._start()
        self.prompts.append(forked._iterations)
        return forked

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        return True

    def draft_width(self, context: DraftContext) -> int:
        config = context.root.config
        width = config.draft_width if config.replacement else min(config.draft_width, len(context.joint))
        features, hidden = self.features(context), self._hidden(context)
        at_least, loss = foresee(features, *hidden, self._host.early, config.target_width)
        asked = least_bearable(loss, self.width_value, self.bearable, config.min_width, config.target_width)
        self._widths = (*self._widths, width)
        self._promised.append(float(at_least[width, asked]) if asked <= width else 0.0)
        return width

    def target_width(self, context: TargetContext) -> int:
        config = context.draft.root.config
        self._roots = len(context.draft.root.weights)
        if context.draft_width == 0:
            return config.target_width
        asked, _ = self.planner.bearable_width(self._host, self.features.of_target(context), config, self.bearable)
        at_least = closed_form(context)  # [w + 1]
        self._closed.append(float(at_least[asked]) if asked < len(at_least) else 0.0)
        return asked

    def observe(self, record: IterationRecord) -> None:
        passed = sum(layer.passed for layer in record.layers if layer.draft_width)
        promised, closed = tuple(self._promised), tuple(self._closed)
        self._iterations.append(Iteration(self._roots, self._widths, promised, closed, passed, record.tokens))
        self._start()

    def _start(self) -> None:
        """An iteration starts."""
        self._widths = ()
        self._promised: list[float] = []
        self._closed: list[float] = []


@entry_point("depth_room", renames={"controller": "controller_path"})
def main(cfg: DictConfig) -> list[Outcome]:
    """Decode, compare, print the table, write it where `output` says, and return what it is of."""
    if cfg.controller_path is None:
        raise UserError(
            "No controller is given, which sets M and says chances; give controller=<directory of train.py>."
        )
    config = instantiate(cfg.decoding)
    policy = DeepWidth.load(cfg.controller_path, bearable=cfg.bearable)
    policy.check(config)  # before a pair is loaded
    pair = instantiate(cfg.pair)
    decoder = DSBDDecoder(pair, config, policy)
    prompts = read_prompts(cfg, pair)
    costs = cost_table(pair, instantiate(cfg.latency))
    with RunProgress() as progress:
        bar = progress.add_task("decoding", total=len(prompts))
        for first in range(0, len(prompts), cfg.batch_size):
            group = prompts[first : first + cfg.batch_size]
            decoder.generate([prompt.tokens for prompt in group], [prompt_stream(cfg.seed, p) for p in group])
            progress.advance(bar, len(group))
    outcomes = compare(policy.prompts, costs)
    about = f"{len(prompts)} prompts of split {cfg.prompts.split}, {outcomes[0].iterations} iterations"
    lines = [f"{about}, c = {cfg.bearable:g}; {costs.device}", "", *room_table(outcomes, costs.unit, cfg.seed)]
    print("\n".join(lines))
    if cfg.output is not None:
        try:
            write_whole(Path(cfg.output), "\n".join([*lines, ""]).encode())
        except OSError as error:
            raise UserError(
                f"output is {cfg.output!r}, which cannot be written ({error}); give another file."
            ) from error
    return outcomes


def read_prompts(cfg: DictConfig, pair: ModelPair) -> list[Prompt]:
    """Those that `prompts` asks for."""
    split, skip, limit = cfg.prompts.split, cfg.prompts.skip, cfg.prompts.limit
    least = {"batch_size": 1, "prompts.skip": 0, "prompts.limit": 2}  # chosen on one half, measured on the other
    for name, value in zip(least, (cfg.batch_size, skip, limit), strict=True):
        if value is not None:
            whole(name, value, least[name])
    task: Task = instantiate(cfg.data)
    prompts = task.prompts(split, None if limit is None else skip + limit, pair.tokenizer)[skip:]
    if len(prompts) < 2:
        raise UserError(f"prompts.skip={skip} leaves {len(prompts)} prompts of split {split}; lower it to leave 2.")
    return prompts


def compare(prompts: Sequence[Sequence[Iteration]], costs: Costs) -> list[Outcome]:
    """What each rule gives where it was not tuned: threshold and depth are chosen on every other prompt.

    Args:
        prompts: two or more, with the iterations of each.
        costs: of the passes.
    """
    iterations = [iteration for prompt in prompts for iteration in prompt]
    starts = np.cumsum([0, *map(len, prompts)])[:-1]  # [P]
    tokens, seconds = earnings(iterations, costs)
    row, half = np.arange(len(iterations)), np.arange(len(prompts)) % 2
    outcomes = []
    for knows, scores in rules(iterations).items():
        depths = np.concatenate([candidates(score) for score in scores])  # [C, N]
        found = np.stack([tokens[row, depths], seconds[row, depths], depths])  # [3, C, N]
        found = np.add.reduceat(found, starts, axis=2)  # [3, C, P]
        best = [int((t / s).argmax()) for t, s, _ in (found[:, :, half != h].sum(2) for h in (0, 1))]
        deepest = tuple(int(depths[choice].max()) for choice in best)
        given = np.where(half == 0, found[:, best[0]], found[:, best[1]])  # [3, P]
        outcomes.append(Outcome(knows, given[0], given[1], given[2], len(iterations), deepest))
    return outcomes


def closed_form(context: TargetContext) -> FloatArray:
    """P(K_w >= M) of the layer's P and Q with replacement (design 5.3); [w + 1]."""
    p, q = ((joint.parents, joint.tokens, joint.probs) for joint in (context.target, context.draft.joint))
    return passing_chances(p, q, context.draft_width)


def earnings(iterations: Sequence[Iteration], costs: Costs) -> tuple[FloatArray, FloatArray]:
    """Tokens and seconds of each iteration had it stopped drafting after d layers; both [N, γ + 1]."""
    seconds_of = functools.cache(lambda widths, roots: iteration_seconds(costs, widths, roots))
    deepest = max(len(iteration.widths) for iteration in iterations)
    tokens, seconds = np.zeros((2, len(iterations), deepest + 1))
    for n, it in enumerate(iterations):
        for depth in range(len(it.widths) + 1):
            tokens[n, depth] = min(1 + min(it.passed, depth), it.tokens)  # an EOS may end it before
            seconds[n, depth] = seconds_of(it.widths[:depth], it.roots)
    return tokens, seconds


def rules(iterations: Sequence[Iteration]) -> dict[str, list[FloatArray]]:
    """By what each rule goes on to a layer, one or two ways to be tried; [N, γ], 0 where no layer can be drafted."""
    layers = np.array([len(iteration.widths) for iteration in iterations])[:, None]
    layer = np.arange(1, layers.max() + 1)  # [γ]
    promised, closed = np.ones((2, len(iterations), len(layer)))
    for n, it in enumerate(iterations):
        promised[n, : layers[n, 0]] = it.promised
        closed[n, : layers[n, 0]] = it.closed + it.promised[len(it.closed) :]  # beyond the first that failed: no P
    passed = np.array([iteration.passed for iteration in iterations])[:, None]

    def reach(chance: FloatArray) -> FloatArray:
        return np.cumprod(np.concatenate([np.ones_like(chance[:, :1]), chance[:, :-1]], axis=1), axis=1)

    found: dict[str, list[FloatArray]] = {
        "nothing: the best fixed depth": [np.ones_like(promised)],
        "the network's chances to pass": [reach(promised), reach(promised) * promised],
        "P(K_w ≥ M) of the layers drafted so far": [reach(closed), reach(closed) * promised],
        "whether the layers drafted so far have passed": [np.where(layer - 1 <= passed, promised, 0.0)],
        "everything: no layer that fails is drafted": [np.where(layer <= passed, 1.0, 0.0)],
    }
    return {knows: [np.where(layer <= layers, score, 0.0) for score in scores] for knows, scores in found.items()}


def candidates(score: FloatArray) -> IntArray:
    """Layers drafted by "go on while the score is above t, at most to layer d", for all t and d; [N, γ] -> [C, N]."""
    going = np.cumprod(score > THRESHOLDS[:, None, None], axis=2).sum(2)  # [t, N]
    caps = np.arange(score.shape[1] + 1)
    return np.minimum(going[:, None], caps[:, None]).reshape(-1, len(score))


def room_table(outcomes: Sequence[Outcome], unit: str, seed: int = 0) -> list[str]:
    """Markdown: a line a rule, against the first; 95% intervals over prompts, with the same resamples for all."""
    count = len(outcomes[0].tokens)
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    draws = np.concatenate([np.arange(count)[None], draws])  # [B + 1, P]
    rates = [o.tokens[draws].sum(1) / o.seconds[draws].sum(1) for o in outcomes]  # [B + 1] each
    speed = f"tokens/{unit.removesuffix('s')}"
    head = ["known when a layer is drafted", speed, "x", "tokens an iteration", "layers drafted", "at most"]
    body = []
    for outcome, rate in zip(outcomes, rates, strict=True):
        ratio = rate / rates[0]
        x = f"{ratio[0]:.3f}" + (f" {interval(ratio, '.3f')}" if rate is not rates[0] else "")
        means = [f"{values.sum() / outcome.iterations:.2f}" for values in (outcome.tokens, outcome.layers)]
        body.append([outcome.knows, f"{rate[0]:.1f}", x, *means, " / ".join(map(str, outcome.deepest))])
    return markdown(head, body)


if __name__ == "__main__":
    main()
