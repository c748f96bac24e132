"""WidthNet: a layer's context -> accept logits a[i, k] and survivor-rank logits. Saved as safetensors + config.json."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from controller.kernels import LIMIT, EarlyWeights, FloatVector, LateWeights
from decoding.errors import UserError

FORMAT = "dsbd-controller"  # what config.json says it is
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_SIZES = ("features", "draft_width", "target_width", "draft_hidden", "target_hidden", "target_features")
_ARGUMENTS = (*_SIZES, "hidden", "layers", "dropout", "late_hidden", "projected")
_CALIBRATED = (
    "accept_temperature",
    "survivor_temperature",
    "late_survivor_temperature",
    "regret_shift",
    "late_regret_shift",
)
_BASES = 16  # patterns over (i, k) that a context can add to the accept logits
_HIDDEN_BUDGET = 100_000  # parameters that one hidden vector's projection may cost
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
        for name in _CALIBRATED:
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


class HostNet:
    """A WidthNet's weights for `controller.kernels`: one row at a time, at a fraction of the call overhead.

    `early` and `late` have the fields of `EarlyWeights` and `LateWeights`.

    Args:
        net: its weights are copied; later changes to it are not seen.
    """

    def __init__(self, net: WidthNet) -> None:
        def host(tensor: Tensor) -> FloatVector:
            return np.ascontiguousarray(tensor.detach().float().cpu().numpy()).copy()

        def linears(trunk: nn.Sequential) -> list[tuple[FloatVector, FloatVector]]:
            found = [module for module in trunk if isinstance(module, nn.Linear)]
            return [(host(linear.weight.T), host(linear.bias)) for linear in found]

        def projection(linear: nn.Linear | None) -> FloatVector:
            return host(linear.weight.T) if linear is not None else np.zeros((0, 0), np.float32)

        def quality(survivor: nn.Linear, temperature: Tensor, regret: nn.Linear, shift: Tensor) -> Any:
            weight = torch.cat([survivor.weight / temperature, regret.weight])  # [2 R - 1, hidden]
            return host(weight.T), host(torch.cat([survivor.bias / temperature, regret.bias + shift]))

        # The accept head and its basis are two linear maps in a row, and temperatures only scale: one map each.
        accept = net.accept_basis.T / net.accept_temperature  # [W * W, bases]
        bias = (accept @ net.accept_head.bias).view_as(net.accept_bias) + net.accept_bias / net.accept_temperature
        early = EarlyWeights(
            host(net.feature_mean),
            host(1.0 / net.feature_std),
            projection(net.draft_projection),
            projection(net.target_projection),
            tuple(linears(net.trunk)),
            host((accept @ net.accept_head.weight).T),
            host(bias),
            *quality(net.survivor_head, net.survivor_temperature, net.regret_head, net.regret_shift),
        )
        late = net.late_survivor_head, net.late_survivor_temperature, net.late_regret_head, net.late_regret_shift
        layers = (*linears(net.late_trunk), quality(*late))
        # Plain tuples, as the kernels take them: numba works out the type of a named one anew each time.
        self.early = tuple(early)
        self.late = tuple(LateWeights(host(net.late_mean), host(1.0 / net.late_std), layers))


def save_controller(net: WidthNet, directory: str | Path, provenance: dict[str, Any]) -> Path:
    """Write a controller: model.safetensors, config.json, a model card. Never half of it.

    Everything is written to a directory beside the final one, which is then renamed over it.

    Args:
        net: trained and calibrated.
        directory: where; an older controller there is replaced.
        provenance: JSON-able; must have the keys "features" {"version", "names"}, "pair" and "decoding".

    Returns:
        The directory.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fitted = {name: float(net.get_buffer(name)) for name in _CALIBRATED}
    config = {**net.arguments, "format": FORMAT, "provenance": {**provenance, "calibration": fitted}}
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        net.save_pretrained(fresh, config=config)
        if directory.exists():
            os.replace(directory, old)
        os.replace(fresh, directory)
    return directory


def load_controller(path: str | Path, revision: str | None = None) -> tuple[WidthNet, dict[str, Any]]:
    """Read what `save_controller` wrote, from a directory or from the Hugging Face hub.

    Args:
        path: a directory, or a hub id "owner/name".
        revision: of the hub repository.

    Returns:
        The network in eval mode on the CPU, and its provenance.

    Raises:
        UserError: nothing there, not a controller, or damaged; the message says which.
    """
    directory = _locate(path, revision)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise _no_controller(path, name)
    try:
        config = json.loads((directory / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{directory / CONFIG} is not JSON ({error}); train the controller again.") from error
    provenance = config.get("provenance") if isinstance(config, dict) else None
    if not isinstance(provenance, dict) or config.get("format") != FORMAT:
        raise UserError(
            f"{directory / CONFIG} does not describe a width controller; give a directory that train.py wrote."
        )
    if lacking := [name for name in _ARGUMENTS if name not in config]:
        raise _of_another_version(path, f"{CONFIG} says nothing of {', '.join(lacking)}")
    net = WidthNet(**{name: config[name] for name in _ARGUMENTS})
    try:
        weights = load_file(directory / WEIGHTS)
        if strange := sorted(set(weights) ^ set(net.state_dict())):
            raise _of_another_version(path, f"of {', '.join(strange)} only one of the two has weights")
        net.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{directory / WEIGHTS} is damaged or of another network ({reason}); train it again."
        ) from error
    return net.eval().requires_grad_(False), provenance


def weights_sha256(path: str | Path, revision: str | None = None) -> str:
    """SHA-256, in hex, of a saved controller's weights file: equal for equal networks, wherever they lie.

    Args:
        path, revision: as for `load_controller`.

    Raises:
        UserError: no controller there.
    """
    weights = _locate(path, revision) / WEIGHTS
    if not weights.is_file():
        raise _no_controller(path, WEIGHTS)
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def _no_controller(path: str | Path, lacking: str) -> UserError:
    return UserError(
        f"{path} has no {lacking}: it is not a controller. Give the directory that train.py wrote ({CONFIG} and "
        f"{WEIGHTS} in it)."
    )


def _of_another_version(path: str | Path, found: str) -> UserError:
    return UserError(f"{path} was trained by another version of this code: {found}. Train it again with train.py.")


def _locate(path: str | Path, revision: str | None) -> Path:
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    missing = f"No controller at {path}. Train one with `python train.py`, which prints its directory"
    if directory.exists() or not _HUB_ID.fullmatch(str(path)) or directory.parent.is_dir():
        raise UserError(f"{missing}, or give a Hugging Face hub id (owner/name).")
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{missing}; as a Hugging Face hub id it cannot be read either ({reason}).") from error


def _projected(size: int, most: int) -> int:
    """Width of a hidden vector's projection: `most`, less where that would cost too many parameters."""
    return min(most, max(4, _HIDDEN_BUDGET // size)) if size else 0


def _projection(size: int, most: int) -> nn.Linear | None:
    return nn.Linear(size, _projected(size, most), bias=False) if size else None
