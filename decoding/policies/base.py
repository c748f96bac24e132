"""Width policies: how many beams to draft, to ask for, and how deep. Design section 5.4.

A policy decides before the roll. What it may see is what is in the context it is given: nothing about the
drafts realised at the layer whose target width it sets, nor about deeper layers, nor the accept / reject
coins of that layer. Contexts are built by the decoder from arrays that hold nothing else.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from decoding.config import DecodingConfig
from decoding.dice.sampling import Distribution, FloatArray, IntArray
from decoding.errors import UserError

LEAST_SHARE = 0.01  # of the parents' weight: for less the draft is not run


@dataclass(frozen=True)
class Knob:
    """A setting that is worth sweeping, of a policy or of the decoding config it runs under.

    Args:
        name: of the setting, and of the policy's argument unless `argument` names another.
        symbol: what stands for it in the names of rows; None: its name; "": nothing does.
        kind: of its values: int, float, str or bool.
        grid: values that an evaluation tries where it is not told which; (): none but the policy's default.
        axis: key of evaluate.py's `grid` that its values are given under; None: its name.
        argument: of the policy; None: its name.
        of_config: it is a field of DecodingConfig and no argument of the policy.
        within_width: it is a width, and a row that asks for more than its target width cannot be.
        of_drafts: it changes nothing where nothing is drafted.
    """

    name: str
    symbol: str | None = None
    kind: type = float
    grid: tuple[Any, ...] = ()
    axis: str | None = None
    argument: str | None = None
    of_config: bool = False
    within_width: bool = False
    of_drafts: bool = False

    @property
    def on_axis(self) -> str:
        """Key of `grid`."""
        return self.axis or self.name


TARGET_WIDTH = Knob("target_width", "", int, axis="widths", of_config=True)  # every row's name has M
DRAFT_WIDTH = Knob("draft_width", "w", int, axis="draft_widths", of_config=True, of_drafts=True)
DRAFT_DEPTH = Knob("draft_depth", "γ", int, axis="depths", of_config=True)
SURPLUS = Knob("surplus", kind=str, axis="surpluses", of_config=True, of_drafts=True)
ASKED_WIDTH = Knob("asked_width", "", int, axis="asked_widths", argument="target_width", within_width=True)
FINAL_WIDTH = Knob("final_width", "last", int, axis="final_widths", within_width=True)
SKIP = Knob("least_share", "skip", axis="least_shares", of_drafts=True)


@dataclass(frozen=True)
class LayerRecord:
    """What is known of a committed layer: one entry of a policy's history."""

    layer: int  # 1..γ, or γ + 1 for the layer drawn from the target
    draft_width: int  # drafts drawn; 0 at the layer drawn from the target
    target_width: int  # M
    accepted: int  # drafts accepted, surplus included
    passed: bool
    expected: float | None = None  # mean of `accepted` as the policy had it


@dataclass(frozen=True)
class RootContext:
    """What is known when an iteration starts."""

    config: DecodingConfig
    iteration: int
    remaining: int  # tokens that the beams may still grow by
    weights: FloatArray  # [B] log-weights of the input beams, best first
    history: tuple[LayerRecord, ...] = ()  # layers of the previous iteration
    unknown_share: float = 1.0  # of the beams' weight, with those that the target has not scored
    target_hidden: FloatArray | None = None  # [H_p] the target's last hidden state at the root


@dataclass(frozen=True)
class Parents:
    """What a layer would continue, before it is known by which model."""

    nodes: tuple[int, ...]
    weights: FloatArray  # [B] best first
    known: NDArray[np.bool_]  # [B] whether the target has scored them
    places: tuple[int, ...] = ()  # [B] of each among the drafts of the layer above; empty for input beams

    @property
    def unknown_share(self) -> float:
        """Share of their weight that is with those that the target has not scored."""
        known = int(np.count_nonzero(self.known))
        if known in (0, len(self.known)):
            return float(not known)
        shares = np.exp(self.weights - self.weights.max())
        return float(shares[~self.known].sum() / shares.sum())


@dataclass(frozen=True)
class Candidates:
    """Entries of Q in the order in which they are drafted, as far as they were ranked and may go on."""

    entries: IntArray  # [N] of Q
    keys: FloatArray  # [N] E / Q; in a search, which has no noise, 1 / Q
    probs: FloatArray  # [N] Q
    parents: IntArray  # [N] nodes
    rows: IntArray  # [N] of the parents in the context
    tokens: IntArray  # [N]
    scored: NDArray[np.bool_]  # [N] children that the target has scored already: to draft them costs no target pass

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class DraftContext:
    """What is known of a layer before its drafts are drawn: earlier layers of the forest, and Q.

    `joint` is Q at a drafted layer. At the layer that ends an iteration (nothing drafted) it is the target's P,
    and `drafted` is False.
    """

    root: RootContext
    layer: int  # 1..γ
    weights: FloatArray  # [B] weights of the layer's parents, best first
    joint: Distribution
    drafted: bool = True
    widths: tuple[int, ...] = ()  # draft widths of the layers above
    draft_hidden: FloatArray | None = None  # [H_q] the draft's last hidden state, mean over the parents
    # Not under the paper's rule. For w and the layers below; where M may be chosen, a TargetContext has no noise or
    # candidates.
    known: NDArray[np.bool_] | None = None  # [B] parents whose entries of Q are the target's own
    parents: tuple[int, ...] = ()  # [B] nodes
    places: tuple[int, ...] = ()  # [B] as in `Parents`
    candidates: Candidates | None = None  # for policies that choose, and recorders
    noise: FloatArray | None = None  # [S] E of each entry of Q, whose key is E / Q; None on the device, or in a search


@dataclass(frozen=True)
class TargetContext:
    """What is known of a layer when its target width is set: P and Q, not the drafts drawn from Q."""

    draft: DraftContext  # the layer as it was before the drafts
    target: Distribution  # P
    draft_width: int  # w, decided before the draw; 0 at the layer that ends an iteration
    committed: tuple[LayerRecord, ...] = ()  # layers of this iteration above this one
    weights: FloatArray | None = None  # [B] of the beams that P continues, best first; None: those of the draft context


@dataclass(frozen=True)
class IterationRecord:
    """What an iteration drafted and gave: for policies that learn on line, and for `DecodeStats`."""

    layers: tuple[LayerRecord, ...]  # that were committed
    tokens: int  # their number
    seconds: float
    roots: int = 1  # input beams
    drafts: tuple[int, ...] = ()  # of every layer that was drafted, those below a failed layer too
    scored: int = 0  # nodes of its target pass
    draft_passes: tuple[int, ...] = ()  # nodes of each of its draft passes

    @property
    def passed_drafts(self) -> tuple[int, ...]:
        """Drafts of the drafted layers that passed: all above the first one that failed."""
        return self.drafts[: sum(layer.passed for layer in self.layers[: len(self.drafts)])]


class WidthPolicy:
    """Decides w, M and whether to draft a further layer; the base class asks for the config's widest.

    The decoder decodes each prompt with a `fork` of its own, after a `reset`, so that a prompt's widths need not depend
    on its neighbours; forks of policies that learn on line may share what they learn. A policy that keeps state must
    not let `target_width` of a layer depend on what it was shown of deeper layers (they are drafted before this one is
    verified): contexts hold nothing of them, but memory could. That would bias the output. Under shared noise a layer's
    noise is the same in the next iteration; where M may be less than target_width, w and depth must not depend on what
    an earlier iteration showed of it. With M = target_width everything may be used.

    What tables, plots and command lines need to know of a policy stands on its class: `name`, `knobs`, `family`.
    """

    name: ClassVar[str] = "widest"
    knobs: ClassVar[tuple[Knob, ...]] = (DRAFT_WIDTH, DRAFT_DEPTH)  # in the order of a row's name
    # "hand-set": someone would tune its knobs, and learned widths are compared with the best of them; "learned";
    # "control": a yardstick that nobody tunes.
    family: ClassVar[str] = "hand-set"
    needs_hidden = False  # ask the decoder for hidden states in the contexts
    needs_candidates = False  # ask for them in the contexts; not under the paper's rule
    chooses = False  # asked for drafts by `choose` and `send`, not by `draft_width`; not under the paper's rule

    def check(self, config: DecodingConfig) -> None:
        """Refuse a config that this policy cannot work with (UserError)."""

    def check_pair(self, pair: Any) -> None:
        """Refuse a pair that this policy was not made for (UserError)."""

    def fork(self, seed: int) -> WidthPolicy:
        """A policy for one prompt, sharing what is costly and never written; `seed` is that of the prompt's stream."""
        return copy.copy(self)

    def reset(self, config: DecodingConfig) -> None:
        """A prompt starts."""

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        """Whether to draft layer `layer` (at most config.draft_depth); asked before the draft model runs."""
        return True

    def ask_draft(self, context: RootContext, layer: int, parents: Parents) -> bool:
        """Whether the draft is run for the parents of a layer that the target has not scored yet.

        Asked where there are others, which propose by themselves; not under the paper's rule.
        """
        return parents.unknown_share >= LEAST_SHARE

    def choose(self, context: DraftContext) -> IntArray:
        """Which of `context.candidates` to draft, by place, in order: 1..config.draft_width of them.

        Asked of policies with `chooses` alone, which must define it, as they must `send`.
        """
        raise NotImplementedError

    def send(self, layers: Sequence[DraftContext]) -> list[NDArray[np.bool_]]:
        """Which of the drafts that `choose` gave go to the target, for each layer; below one that does not none does.

        What is not sent was not drafted, except that the draft model knows it.
        """
        raise NotImplementedError

    def draft_width(self, context: DraftContext) -> int:
        """w: beams to draft at this layer; clipped to 1..config.draft_width."""
        return context.root.config.draft_width

    def target_width(self, context: TargetContext) -> int:
        """M: beams that must be accepted; clipped to config.min_width..config.target_width."""
        return context.draft.root.config.target_width

    def expected_count(self, context: TargetContext) -> float | None:
        """E[K]: the mean number of a drafted layer's drafts that it expects to be accepted; None: it does not say.

        Asked after `target_width` of the same layer, with the same context: for reports alone, nothing depends on it.
        """
        return None

    def observe(self, record: IterationRecord) -> None:
        """An iteration ended."""

    def describe(self) -> dict[str, Any]:
        """Name and all that the widths depend on, JSON-able: for results, and to find traces again.

        Files are described by what is in them, not by their paths.
        """
        return {"name": self.name}


def check_unloaded(policy: Any, config: DecodingConfig) -> None:
    """Refuse, before models are loaded, what a decoder would refuse; it says what it warns of."""
    if isinstance(policy, WidthPolicy):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy.check(config)


def check_final_width(width: int | None, config: DecodingConfig) -> None:
    """Refuse a final_width that the config has no room for."""
    least, most = config.min_width, config.target_width
    if width is not None and (isinstance(width, bool) or not isinstance(width, int) or not least <= width <= most):
        raise UserError(
            f"final_width is {width!r}; give a whole number of {least}..{most}, the range that the decoding config "
            "allows, or None."
        )
