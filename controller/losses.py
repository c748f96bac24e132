"""What a controller learns from: which candidates were selected, and which layers would have passed with w drafts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from controller.data import Batch
from controller.network import BEFORE, LEAST, WidthNet, leftovers

WIDTHS = (4, 8, 12, 16, 24, 32, 48)  # numbers of drafts at which layers are judged


class Predicted(NamedTuple):
    """Chances and what happened, one entry for each candidate or (layer, w, j)."""

    chances: Tensor  # [E]
    happened: Tensor  # [E] float


def candidate_events(log_chances: Tensor, rows: Batch) -> Predicted:
    """π of every candidate, and whether it was selected."""
    inside = rows["valid"]
    return Predicted(log_chances[inside].exp(), (rows["places"][inside] > 0).float())


def after_events(net: WidthNet, log_chances: Tensor, rows: Batch) -> Predicted:
    """P(need_j <= w) of layers whose predecessors passed, candidates in hand, drafted in the order of π."""
    layers = rows["there"] & rows["reached"]
    chances = (log_chances.exp() * rows["valid"])[layers].detach()  # [K, C]
    scored = _scored(net, rows)[layers]
    places, size = rows["places"][layers], rows["size"][layers]
    features = rows["features"][layers]
    ranks = chances.masked_fill(scored, 2.0).argsort(stable=True, dim=-1, descending=True).argsort(-1)
    ranks = ranks - scored.sum(-1, keepdim=True) + 1  # what is scored has a rank of 0 or less
    predicted, happened = [], []
    for width in WIDTHS:
        drafted = ranks <= width
        odds = net.passes(features, *leftovers(chances, drafted, net.target_width))
        held = _held(places, drafted, net.target_width)
        inside = torch.arange(1, net.target_width + 1, device=size.device) <= size[:, None]
        predicted.append(odds[inside].sigmoid())
        happened.append(held[inside])
    return Predicted(torch.cat(predicted), torch.cat(happened))


def before_events(net: WidthNet, log_chances: Tensor, rows: Batch) -> Predicted:
    """The same before they were drafted, by the drafts that there were."""
    chances = (log_chances.exp() * rows["valid"]).detach()
    drafted = torch.arange(chances.shape[-1], device=chances.device) < rows["drafts"][..., None]
    known = _scored(net, rows)
    left_out, missing = leftovers(chances.flatten(0, 1), (drafted | known).flatten(0, 1), net.target_width)
    unknown = (chances * (drafted & ~known)).sum(-1) / (chances * drafted).sum(-1).clamp(min=LEAST)
    context = before_context(
        rows["features"][..., net.of_layer], left_out.view_as(unknown), missing.view_as(unknown), unknown
    )
    layers = rows["there"] & rows["reached"] & (rows["drafts"] > 0)
    odds = net.expects(context[layers], rows["drafts"][layers])
    need, size = rows["need"][layers], rows["size"][layers]
    held = ((need >= 0) & (need <= rows["drafts"][layers][:, None])).float()
    inside = torch.arange(1, net.target_width + 1, device=size.device) <= size[:, None]
    return Predicted(odds[inside].sigmoid(), held[inside])


def before_context(features: Tensor, left_out: Tensor, missing: Tensor, unknown: Tensor) -> Tensor:
    """BEFORE of every layer of iterations, [N, L, B].

    Args:
        features: [N, L, 5] the OF_LAYER of the layers.
        left_out, missing, unknown: [N, L] what a layer leaves for the one below it.
    """
    context = torch.zeros(*left_out.shape, len(BEFORE), device=features.device)
    context[:, 0, 0] = 1.0
    context[..., 1] = torch.arange(1, features.shape[1] + 1, device=features.device)
    context[..., 2:6] = features[:, :1, :4]  # of the iteration
    context[:, 1:, 6] = (left_out[:, :-1] + 0.02).log()
    context[:, 1:, 7] = missing[:, :-1]
    context[:, 1:, 8] = unknown[:, :-1]
    context[:, 0, 8] = 1 - features[:, 0, 4]
    return context


def _scored(net: WidthNet, rows: Batch) -> Tensor:
    """Candidates that the target has scored before, [N, L, C]."""
    return rows["candidates"][..., net.of_candidate[2]] > 0


def _held(places: Tensor, drafted: Tensor, target_width: int) -> Tensor:
    """Whether the first j of a selection are among the drafts, j = 1..R; [K, R] float."""
    got = torch.zeros(len(places), target_width + 1, dtype=torch.bool, device=places.device)
    got.scatter_(1, places * drafted, True)  # place 0: not selected, or not drafted
    return got[:, 1:].cumprod(-1).float()


def loss_of(predicted: Predicted) -> Tensor:
    """Mean binary cross entropy, nats."""
    return F.binary_cross_entropy(predicted.chances.clamp(LEAST, 1 - LEAST), predicted.happened)
