"""WidthNet: a layer's context -> accept logits a[i, k] and survivor-rank logits."""

from __future__ import annotations

import hashlib
import json
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

_SIZES = ("features", "draft_width", "target_width", "draft_hidden", "target_hidden", "target_features")
ARGUMENTS = (*_SIZES, "hidden", "layers", "dropout", "late_hidden", "projected")
CALIBRATED = (
    "accept_temperature",
    "survivor_temperature",
    "late_survivor_temperature",
    "regret_shift",
    "late_regret_shift",
)
LIMIT = 5.0  # standardised inputs are clipped here
_BASES = 16  # patterns over (i, k) that a context can add to the accept logits
_HIDDEN_BUDGET = 100_000  # parameters that one hidden vector's projection may cost


class WidthLogits(NamedTuple):
    """What WidthNet returns, calibrated by its buffers; the late heads have seen the layer's P."""

    accept: Tensor  # [N, W, W] logit that draft i is accepted when k were before; k <= i has a meaning
    survivor: Tensor  # [N, R] logit of survivor slot 1..R
    regret: Tensor  # [N, R - 1] log of the nats that slot k + 1 adds to slots 1..k
    late_survivor: Tensor  # [N, R]
    late_regret: Tensor  # [N, R - 1]


class WidthNet(nn.Module, PyTorchModelHubMixin, library_name="dsbd", tags=["speculative-decoding", "beam-sampling"]):
    """Two small MLPs (design section 8); under 300k parameters with the default sizes.

    One sees a layer before its drafts are drawn: which drafts will be accepted, and what each slot is worth. The other
    sees P too, and says the latter again. Both start at the best constant predictor (`start_from`); the accept head
    moves a few learned patterns over (i, k) rather than W² free logits.

    Args:
        features: F, scalars from `ContextFeatures`.
        draft_width, target_width: widest w (W) and widest M (R) it answers for.
        draft_hidden, target_hidden: H_q, H_p; 0 leaves that hidden vector out.
        target_features: G, scalars from `ContextFeatures.of_target`.
        hidden, layers, dropout: of the first MLP.
        late_hidden: width of the second, which has two layers.
        projected: what each hidden vector is projected to, at most.
    """

    feature_mean: Tensor
    feature_std: Tensor
    late_mean: Tensor
    late_std: Tensor
    accept_temperature: Tensor
    survivor_temperature: Tensor
    late_survivor_temperature: Tensor
    regret_shift: Tensor
    late_regret_shift: Tensor

    def __init__(
        self,
        features: int,
        draft_width: int,
        target_width: int,
        draft_hidden: int = 0,
        target_hidden: int = 0,
        target_features: int = 0,
        hidden: int = 128,
        layers: int = 2,
        dropout: float = 0.0,
        late_hidden: int = 48,
        projected: int = 32,
    ) -> None:
        super().__init__()
        sizes = (features, draft_width, target_width, draft_hidden, target_hidden, target_features)
        self.sizes: dict[str, int] = dict(zip(_SIZES, sizes, strict=True))
        sized = {"hidden": hidden, "layers": layers, "dropout": dropout, "late_hidden": late_hidden}
        self.arguments = {**self.sizes, **sized, "projected": projected}
        self.draft_projection = _projection(draft_hidden, projected)
        self.target_projection = _projection(target_hidden, projected)
        self.projection_dropout = nn.Dropout(dropout)
        inputs = features + _projected(draft_hidden, projected) + _projected(target_hidden, projected)
        widths = [inputs, *[hidden] * layers]
        blocks = ((nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)) for a, b in pairwise(widths))
        self.trunk = nn.Sequential(*chain.from_iterable(blocks))
        top = widths[-1]
        self.accept_head = nn.Linear(top, _BASES)
        self.accept_basis = nn.Parameter(torch.randn(_BASES, draft_width * draft_width) / _BASES**0.5)
        self.accept_bias = nn.Parameter(torch.zeros(draft_width, draft_width))
        self.survivor_head, self.regret_head = nn.Linear(top, target_width), nn.Linear(top, target_width - 1)
        self.late_trunk = nn.Sequential(
            nn.Linear(target_features, late_hidden), nn.ReLU(), nn.Linear(late_hidden, late_hidden), nn.ReLU()
        )
        self.late_survivor_head = nn.Linear(late_hidden, target_width)
        self.late_regret_head = nn.Linear(late_hidden, target_width - 1)
        quality = (self.survivor_head, self.regret_head, self.late_survivor_head, self.late_regret_head)
        for head in (self.accept_head, *quality):  # zero: the first prediction is the bias
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        for name, size in (("feature", features), ("late", target_features)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        for name in CALIBRATED:
            self.register_buffer(name, torch.ones(()) if name.endswith("temperature") else torch.zeros(()))

    def forward(
        self,
        features: Tensor,  # [N, F] float32
        draft_hidden: Tensor | None = None,  # [N, H_q]
        target_hidden: Tensor | None = None,  # [N, H_p]
        target_features: Tensor | None = None,  # [N, G] float32; None: as if nothing of P were known
    ) -> WidthLogits:
        """What all heads say; hidden vectors are needed where the sizes say so."""
        inputs = [((features - self.feature_mean) / self.feature_std).clamp(-LIMIT, LIMIT)]
        for projection, vector in ((self.draft_projection, draft_hidden), (self.target_projection, target_hidden)):
            if projection is not None:
                assert vector is not None, "this network was built with hidden vectors"
                inputs.append(self.projection_dropout(projection(F.layer_norm(vector, vector.shape[-1:]))))
        top = self.trunk(torch.cat(inputs, -1))
        accept = (self.accept_head(top) @ self.accept_basis).unflatten(-1, self.accept_bias.shape) + self.accept_bias
        if target_features is None:
            target_features = self.late_mean.expand(len(features), -1)
        late = self.late_trunk(((target_features - self.late_mean) / self.late_std).clamp(-LIMIT, LIMIT))
        return WidthLogits(
            accept / self.accept_temperature,
            self.survivor_head(top) / self.survivor_temperature,
            self.regret_head(top) + self.regret_shift,
            self.late_survivor_head(late) / self.late_survivor_temperature,
            self.late_regret_head(late) + self.late_regret_shift,
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the sizes, the weights and the calibration; equal for equal networks, wherever they were loaded."""
        digest = hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode())
        for name, values in sorted(self.state_dict().items()):
            digest.update(name.encode() + values.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def start_from(
        self,
        features: tuple[Tensor, Tensor],  # mean and standard deviation, [F] each
        target_features: tuple[Tensor, Tensor],  # [G] each
        accept_rate: Tensor,  # [W, W] in (0, 1)
        survivor_rate: Tensor,  # [R] sums to one
        regret_rate: Tensor,  # [R - 1] mean nats of each step
    ) -> None:
        """Set the standardisation of the inputs, and all heads to constant predictions."""
        for name, (mean, std) in (("feature", features), ("late", target_features)):
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_std").copy_(std.clamp(min=1e-3))
        self.accept_bias.copy_(accept_rate.clamp(1e-4, 1 - 1e-4).logit())
        for survivor in (self.survivor_head, self.late_survivor_head):
            survivor.bias.copy_(survivor_rate.clamp(min=1e-4).log())
        for regret in (self.regret_head, self.late_regret_head):
            regret.bias.copy_(regret_rate.clamp(min=1e-4).log())

    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


def _projected(size: int, most: int) -> int:
    """Width of a hidden vector's projection: `most`, less where that would cost too many parameters."""
    return min(most, max(4, _HIDDEN_BUDGET // size)) if size else 0


def _projection(size: int, most: int) -> nn.Linear | None:
    return nn.Linear(size, _projected(size, most), bias=False) if size else None
