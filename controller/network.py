"""WidthNet: which candidates the target will select, and whether a layer passes. Design section 8.

Of each candidate the network says how likely it is selected if its parent is; along a path these chances multiply, so
that no child is likelier than its parent. Of each layer two logistic rules say how likely w drafts hold the first j
of the selection: one before the layer is drafted, one with the candidates in hand. Both fall in j and rise in w.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controller.features import CANDIDATE, LAYER, OF_CANDIDATE, OF_LAYER, places

LARGEST = 4096  # of each size of a network
ARGUMENTS = ("target_width", "hidden", "layers")
COLUMNS = ("names", "candidate_names")  # its further arguments; those of the built-in features where none are given
CALIBRATED = ("temperature",)
LIMIT = 5.0  # standardised inputs are clipped here
CUT = 10  # candidates, by chance, that the last of is looked at
LEAST = 1e-6  # the chance that a candidate is (not) selected
SOFT = 0.02  # added to what is left out, whose logarithm is taken
# What is seen of a candidate beside its own columns; s is log Q and the log of the parent's chance.
DERIVED = (
    "log_parent",  # log of the parent's chance to be selected
    "key_gap",  # log key less the R-th smallest
    "key_rank",  # log of the place by key
    "chance",  # s
    "chance_gap",  # s less the CUT-th largest
    "chance_rank",  # log of the place by s
    "race_gap",  # the log key that s gives less the R-th smallest
    "race_rank",  # log of the place by that
    "noise",  # log E
)
# What the rule sees, beside the widths, before a layer is drafted; the other one sees the layer's features.
BEFORE = ("first", "layer", "roots", "root_entropy", "last_passed", "last_layers", "left_out", "missing", "unknown")


class WidthNet(nn.Module):
    """A small MLP for candidates and two rules for layers; about 3,000 parameters.

    Args:
        target_width: R, the widest selection that it answers for.
        hidden, layers: of the MLP.
        names, candidate_names: of the features of a layer and of a candidate, in order.

    Raises:
        UserError: features without those that others are derived from.
    """

    mean: Tensor
    scale: Tensor
    temperature: Tensor
    after_mean: Tensor
    after_scale: Tensor

    def __init__(
        self,
        target_width: int,
        hidden: int = 32,
        layers: int = 2,
        names: Sequence[str] = LAYER,
        candidate_names: Sequence[str] = CANDIDATE,
    ) -> None:
        super().__init__()
        self.target_width = target_width
        given = target_width, hidden, layers, list(names), list(candidate_names)
        self.arguments: dict[str, Any] = dict(zip((*ARGUMENTS, *COLUMNS), given, strict=True))
        self.of_layer = places(names, OF_LAYER)
        self.of_candidate = places(candidate_names, OF_CANDIDATE)
        self.sizes = len(candidate_names), len(names)  # G, F
        inputs = len(candidate_names) + len(DERIVED) + len(names)
        widths = [inputs, *[hidden] * layers]
        blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.mlp = nn.Sequential(*blocks, nn.Linear(widths[-1], 1))
        self.before = PassRule(len(BEFORE), target_width, evidence=1)
        self.after = PassRule(len(names), target_width, evidence=2)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.register_buffer("after_mean", torch.zeros(len(names)))
        self.register_buffer("after_scale", torch.ones(len(names)))
        self.register_buffer("temperature", torch.ones(()))

    def layer(self, candidates: Tensor, features: Tensor, log_parent: Tensor, valid: Tensor) -> Tensor:
        """Log-odds that candidates of a layer are selected if their parents are, [N, C].

        Args:
            candidates: [N, C, G].
            features: [N, F] of the layer.
            log_parent: [N, C] log of the parents' chances.
            valid: [N, C] bool; others are padding, at the end.
        """
        inputs = self.inputs(candidates, features, log_parent, valid)
        inputs = ((inputs - self.mean) / self.scale).clamp(-LIMIT, LIMIT)
        odds: Tensor = self.mlp(inputs).squeeze(-1) / self.temperature
        return odds

    def inputs(self, candidates: Tensor, features: Tensor, log_parent: Tensor, valid: Tensor) -> Tensor:
        """What the MLP sees, [N, C, I]; arguments as for `layer`."""
        log_q, log_key, _ = candidates[..., self.of_candidate].unbind(-1)
        chance = log_q + log_parent
        race = log_key - log_parent
        places = torch.arange(1, valid.shape[1] + 1, device=valid.device, dtype=log_q.dtype)
        derived = (
            log_parent,
            log_key - _nth(log_key, valid, self.target_width),
            places.log().expand_as(log_q),
            chance,
            chance + _nth(-chance, valid, CUT),
            _log_ranks(-chance, valid),
            race - _nth(race, valid, self.target_width),
            _log_ranks(race, valid),
            log_key + log_q,
        )
        shared = features[:, None].expand(-1, valid.shape[1], -1)
        return torch.cat([candidates, torch.stack(derived, -1), shared], -1)

    def forward(self, rows: dict[str, Tensor]) -> Tensor:
        """log π of the candidates of whole iterations, [N, L, C], layer after layer.

        Args:
            rows: "candidates" [N, L, C, G], "features" [N, L, F], "parents" [N, L, C] (-1: an input beam), "valid"
                [N, L, C].
        """
        above, found = None, []
        for depth in range(rows["parents"].shape[1]):
            parents = rows["parents"][:, depth]
            log_parent = torch.zeros_like(rows["candidates"][:, depth, :, 0])
            if above is not None:
                log_parent = torch.where(parents >= 0, above.gather(1, parents.clamp(min=0)), log_parent)
            valid = rows["valid"][:, depth]
            odds = self.layer(rows["candidates"][:, depth], rows["features"][:, depth], log_parent.detach(), valid)
            above = log_parent + F.logsigmoid(odds)
            found.append(above)
        return torch.stack(found, 1)

    def passes(self, features: Tensor, left_out: Tensor, missing: Tensor) -> Tensor:
        """Log-odds that drafts hold the first j of the selection, with the candidates in hand; [N, R].

        Args:
            features: [N, F] of the layer.
            left_out, missing: [N] see `leftovers`.
        """
        context = ((features - self.after_mean) / self.after_scale).clamp(-LIMIT, LIMIT)
        return self.after(context, torch.stack([(left_out + SOFT).log(), missing], -1))

    def expects(self, context: Tensor, width: Tensor) -> Tensor:
        """The same before the layer is drafted, by BEFORE [N, B] and the number of drafts [N]."""
        return self.before(context, -width.float().log()[..., None])

    @property
    def fingerprint(self) -> str:
        """Hash of the sizes, the weights and the calibration; equal for equal networks, wherever they were loaded."""
        digest = hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode())
        for name, values in sorted(self.state_dict().items()):
            digest.update(name.encode() + values.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def start_from(self, inputs: Tensor, features: Tensor) -> None:
        """Standardise by the inputs of many candidates [M, I] and the features of many layers [M, F]."""
        for mean, scale, seen in (
            (self.mean, self.scale, inputs),
            (self.after_mean, self.after_scale, features),
        ):
            mean.copy_(seen.mean(0))
            scale.copy_(seen.std(0, correction=0).clamp(min=1e-2))

    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


class PassRule(nn.Module):
    """Log-odds of `need_j <= w`, j = 1..R: falls in j, and in each of its evidences, which fall in w."""

    def __init__(self, context: int, target_width: int, evidence: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context, 1)
        nn.init.zeros_(self.linear.weight)
        self.steps = nn.Parameter(torch.full((target_width,), -1.0))  # how much harder the next place is
        self.rates = nn.Parameter(torch.zeros(evidence))

    def forward(self, context: Tensor, evidence: Tensor) -> Tensor:
        """[..., B], [..., E] -> [..., R]."""
        common = self.linear(context) - (evidence * F.softplus(self.rates)).sum(-1, keepdim=True)
        return common - F.softplus(self.steps).cumsum(-1)


def leftovers(chances: Tensor, drafted: Tensor, target_width: int) -> tuple[Tensor, Tensor]:
    """How much of the selection is expected outside of the drafts, [N] twice.

    Args:
        chances: [N, C] π; 0 for padding.
        drafted: [N, C] bool; what the target has scored counts as drafted.
        target_width: R.

    Returns:
        `left_out`, the sum of -log(1 - π) over the others; `missing`, R less the sum of π over the drafts.
    """
    surprise = -torch.log1p(-chances.clamp(max=1 - LEAST))
    return surprise.masked_fill(drafted, 0).sum(-1), target_width - chances.masked_fill(~drafted, 0).sum(-1)


def _nth(values: Tensor, valid: Tensor, place: int) -> Tensor:
    """The n-th smallest of each row, or the largest where there are fewer; [N, 1]."""
    ordered = values.masked_fill(~valid, torch.inf).sort(-1).values
    last = (valid.sum(-1, keepdim=True) - 1).clamp(0, place - 1)
    return ordered.gather(-1, last).nan_to_num(posinf=0.0)


def _log_ranks(values: Tensor, valid: Tensor) -> Tensor:
    """Log of each entry's place in its row, from 1."""
    order = values.masked_fill(~valid, torch.inf).sort(stable=True, dim=-1).indices
    places = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype).expand_as(values)
    return torch.zeros_like(values).scatter(-1, order, places).log()
