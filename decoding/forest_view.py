"""One iteration's forest as a tree for the terminal: what was drafted, and what verification made
of every node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from decoding.dice.sampling import Distribution
from decoding.forest.tree import TokenForest
from decoding.policies.base import DraftContext
from decoding.results import LayerEvent, Recorder

ACCEPTED, SURPLUS, DRAWN, REJECTED, UNJUDGED = "accepted", "surplus", "drawn", "rejected", "unjudged"
TextOf = Callable[[Sequence[int], Sequence[int]], str]  # (tokens before, none at the prompt's end; tokens) -> text


@dataclass(frozen=True)
class _Style:
    mark: str
    ascii_mark: str
    colour: str
    meaning: str


_STYLES = {
    ACCEPTED: _Style("✓", "v", "green", "drafted and kept"),
    SURPLUS: _Style("✚", "+", "cyan", "drafted and kept beyond M, as a surplus"),
    DRAWN: _Style("○", "o", "yellow", "taken from the target"),
    REJECTED: _Style("✗", "x", "red", "drafted, not kept"),
    UNJUDGED: _Style("·", ".", "dim", "not judged: its parent was dropped, or its layer was not reached or was full"),
}
_TAIL = 40  # characters of an input beam that are shown


@dataclass
class NodeView:
    """A node of the iteration; log-probabilities of its token after its parent, None where unknown."""

    state: str = UNJUDGED
    draft: float | None = None
    target: float | None = None
    drawn: int = 0  # times that it was drafted, more than once only with replacement
    known: bool = False  # the target scored it in an earlier iteration


@dataclass
class LayerView:
    """A layer as numbers: drafted w, asked M, accepted K; M is None where it was not reached."""

    draft_width: int
    target_width: int | None = None
    accepted: int = 0
    passed: bool = False
    taken: int = 0  # from the target
    counted: str = "accepted"  # what K counts


@dataclass
class ForestView:
    """One iteration, as plain data."""

    iteration: int  # from 1
    forest: TokenForest
    beams: list[tuple[int, float]]  # the input beams as (node, weight), best first
    drafts: list[list[tuple[int, float]]]  # of each layer, as (node, the draft's weight), in draw order
    layers: list[LayerView] = field(default_factory=list)
    nodes: dict[int, NodeView] = field(default_factory=dict)  # in order of their layers, then as drawn


class ForestRecorder(Recorder):
    """A decoder's recorder that keeps one iteration's forest.

    Args:
        iteration: which one, counted from 1; None: the first that drafted something, or the first
            of all.
    """

    def __init__(self, iteration: int | None = None) -> None:
        self.wanted, self.iterations = iteration, 0
        self.view: ForestView | None = None
        self._listening = False
        self._weights: dict[int, float] = {}  # the target's, of the beams that the next layer grows from
        self._scored: set[int] = set()  # sent to the target, in this iteration or before
        self._before: set[int] = set()  # those of earlier iterations

    def drafted(
        self,
        forest: TokenForest,
        beams: list[tuple[int, float]],
        layers: list[list[tuple[int, float]]],
        contexts: list[DraftContext],
    ) -> None:
        """Begin the view, if this is the iteration."""
        self.iterations += 1
        self._before = set(self._scored)
        self._scored.update(node for layer in layers for node, _ in layer)
        if self.wanted is None:
            self._listening = self.view is None or bool(layers and not self.view.drafts)
        else:
            self._listening = self.iterations == self.wanted
        if not self._listening:
            return
        self.view = ForestView(self.iterations, forest, beams, layers, [LayerView(len(layer)) for layer in layers])
        self._weights = dict(beams)
        weights = dict(beams)
        for layer, context in zip(layers, contexts, strict=False):  # of a last layer nothing may have been sent
            of_target = _known_parents(context)
            for node, weight in layer:
                parent = forest.parents[node]
                seen = self.view.nodes.setdefault(node, NodeView(known=node in self._before))
                seen.drawn += 1
                if parent in of_target:
                    seen.target = weight - weights[parent]
                else:
                    seen.draft = weight - weights[parent]
            weights = dict(layer)

    def layer(self, event: LayerEvent) -> None:
        """Note what became of a layer's nodes."""
        if not self._listening or self.view is None:
            return
        view, record, place = self.view, event.record, event.record.layer - 1
        if place == len(view.layers):  # nothing was drafted for it
            view.layers.append(LayerView(0))
        drafts = [node for node, _ in view.drafts[place]] if place < len(view.drafts) else []
        kept = dict(event.kept)
        accepted = self._judge(event, drafts, kept)
        for node in kept.keys() - accepted.keys():
            view.nodes.setdefault(node, NodeView(known=node in self._before)).state = DRAWN
        for node in dict.fromkeys([*drafts, *kept]):
            parent = view.forest.parents[node]
            weight = kept.get(node, _weight(event.context.target, parent, view.forest.tokens[node]))
            if parent in self._weights and weight is not None:
                view.nodes[node].target = weight - self._weights[parent]
        taken = len(kept.keys() - accepted.keys())
        counts = record.draft_width, record.target_width, record.accepted, record.passed, taken
        view.layers[place] = LayerView(*counts, _counted(event))
        self._weights = kept

    def _judge(self, event: LayerEvent, drafts: list[int], kept: dict[int, float]) -> dict[int, None]:
        """Set the states of a layer's drafts; returns the accepted ones."""
        assert self.view is not None
        # A bit for each draft that was judged. Without coins a draft is kept or it is not, and of
        # those that are the first M count.
        if event.verdict is None:
            order = {node: place for place, node in enumerate(event.slots or kept)}
            drafts = sorted(drafts, key=lambda node: order.get(node, len(order)))
        bits = [node in kept for node in drafts] if event.verdict is None else event.verdict.bits
        accepted: dict[int, None] = {}
        slots = 0
        for node, bit in zip(drafts, bits, strict=False):
            if bit:
                slots += 1
                if node not in accepted:
                    self.view.nodes[node].state = ACCEPTED if slots <= event.record.target_width else SURPLUS
                accepted[node] = None
            elif node not in accepted and self.view.forest.parents[node] in self._weights:
                self.view.nodes[node].state = REJECTED
        return accepted


def _known_parents(context: DraftContext) -> set[int]:
    """Parents whose children were proposed by the target itself."""
    if context.known is None:
        return set()
    return {node for node, is_known in zip(context.parents, context.known, strict=True) if is_known}


def _counted(event: LayerEvent) -> str:
    """Name what K of a layer counts."""
    if event.verdict is not None:
        return "accepted"
    searched = event.context.draft.root.config.mode == "beam_search"
    return "of the best in a row" if searched else "of the selection in a row"


def _weight(joint: Distribution, parent: int, token: int) -> float | None:
    """The child's log-weight, None outside the support."""
    found = np.flatnonzero((joint.parents == parent) & (joint.tokens == token))
    return float(joint.weights[found[0]]) if len(found) else None


# ------------------------------------------------------------------------------------------ drawing


def render(view: ForestView, text_of: TextOf, ascii_only: bool = False) -> RenderableType:
    """The forest for rich: a line per layer, a tree per input beam, a legend.

    Args:
        view: of a finished iteration.
        text_of: text of tokens, given those before them.
        ascii_only: nothing but ASCII, for streams that cannot take more.
    """
    return _Drawing(view, text_of, ascii_only).whole()


class _Drawing:
    def __init__(self, view: ForestView, text_of: TextOf, ascii_only: bool) -> None:
        self.view, self.forest, self.text_of, self.ascii_only = view, view.forest, text_of, ascii_only
        self.children: dict[int, list[int]] = {}
        for node in view.nodes:
            self.children.setdefault(view.forest.parents[node], []).append(node)

    def whole(self) -> RenderableType:
        lines = [Text(f"forest of iteration {self.view.iteration}", "bold")]
        lines += [Text(f"layer {place}: {_words(layer)}") for place, layer in enumerate(self.view.layers, start=1)]
        return Group(*lines, *self.trees(), *self.legend())

    def trees(self) -> Iterator[Tree]:
        """A tree for each input beam, best first."""
        for rank, (node, weight) in enumerate(self.view.beams, start=1):
            label = "the prompt" if node == 0 else self.tail(node)
            tree = Tree(Text(f"beam {rank}: {label}  weight {weight:.2f}", "bold"), guide_style="dim")
            self.grow(tree, node)
            yield tree

    def grow(self, tree: Tree, node: int) -> None:
        """Hang a node's children on its tree, theirs below them."""
        before = [] if node == 0 else [self.forest.tokens[node]]
        for child in self.children.get(node, []):
            seen, token = self.view.nodes[child], self.forest.tokens[child]
            text = self.text_of(before, [token])
            number = f" #{token}" if not text or "\ufffd" in text else ""  # part of a character
            label = Text(f"{self.mark(seen.state)} {self.quoted(text)}{number}", _STYLES[seen.state].colour)
            values = [
                f"{name} {value:.2f}"
                for name, value in (("target", seen.target), ("draft", seen.draft))
                if value is not None
            ]
            known = ["known"] if seen.known else []
            times = [f"drawn {seen.drawn} times"] if seen.drawn > 1 else []
            label.append("".join(f"  {part}" for part in values + known + times), "dim")
            self.grow(tree.add(label), child)

    def tail(self, node: int) -> str:
        """The end of a beam's text."""
        text = self.text_of([], self.forest.path(node))
        return self.quoted(text) if len(text) <= _TAIL else "..." + self.quoted(text[-_TAIL:])

    def legend(self) -> Iterator[Text]:
        """Lines on the meaning of the marks in use, and of the numbers."""
        used = {seen.state for seen in self.view.nodes.values()}
        for state, style in _STYLES.items():
            if state in used:
                yield Text(f"{self.mark(state)} {style.meaning}", style.colour)
        if any(seen.known for seen in self.view.nodes.values()):
            yield Text("known: scored by the target in an earlier iteration", "dim")
        yield Text("target, draft: log-probability after the parent; no target: cut off, or the parent dropped", "dim")
        yield Text("no draft: the target itself proposed it, or it was not drafted", "dim")

    def mark(self, state: str) -> str:
        return _STYLES[state].ascii_mark if self.ascii_only else _STYLES[state].mark

    def quoted(self, text: str) -> str:
        """The text as Python writes it: no control character reaches the terminal."""
        return ascii(text) if self.ascii_only else repr(text)


def _words(layer: LayerView) -> str:
    """A layer's numbers in words."""
    if layer.target_width is None:
        return f"{layer.draft_width} drafted (w), not reached"
    if not layer.draft_width:
        return f"none drafted, {layer.taken} taken from the target (M = {layer.target_width})"
    return (
        f"{layer.draft_width} drafted (w), {layer.target_width} asked for (M), {layer.accepted} {layer.counted} (K): "
        f"{'passed' if layer.passed else 'failed'}"
        f"{f', {layer.taken} taken from the target' if layer.taken else ''}"
    )
