"""WidthNet: a layer's context -> accept logits a[i, k] and survivor-rank logits. Saved as safetensors + config.json."""

from __future__ import annotations

import json
import math
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
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from decoding.errors import UserError

FORMAT = "dsbd-controller"  # what config.json says it is
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_SIZES = ("features", "draft_width", "target_width", "draft_hidden", "target_hidden")
_ARGUMENTS = (*_SIZES, "hidden", "layers", "dropout")
_BASES = 16  # patterns over (i, k) that a context can add to the accept logits
_HIDDEN_BUDGET = 100_000  # parameters that one hidden vector's projection may cost
FloatVector = NDArray[np.float32]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class WidthLogits(NamedTuple):
    """What WidthNet returns, calibrated by the temperatures in its buffers."""

    accept: Tensor  # [N, W, W] logit that draft i is accepted when k were before; k <= i has a meaning
    survivor: Tensor  # [N, R] logit of survivor rank 1..R


class WidthNet(nn.Module, PyTorchModelHubMixin, library_name="dsbd", tags=["speculative-decoding", "beam-sampling"]):
    """A small MLP with two heads (design section 8); under 300k parameters with the default `hidden`.

    It starts at the best constant predictor (`start_from`), and the accept head moves a few learned patterns over
    (i, k) rather than W² free logits.

    Args:
        features: F, scalars from `ContextFeatures`.
        draft_width, target_width: widest w (W) and widest M (R) it answers for.
        draft_hidden, target_hidden: H_q, H_p; 0 leaves that hidden vector out.
        hidden, layers, dropout: of the MLP.
    """

    feature_mean: Tensor
    feature_std: Tensor
    accept_temperature: Tensor
    survivor_temperature: Tensor

    def __init__(
        self,
        features: int,
        draft_width: int,
        target_width: int,
        draft_hidden: int = 0,
        target_hidden: int = 0,
        hidden: int = 128,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (features, draft_width, target_width, draft_hidden, target_hidden)
        self.sizes: dict[str, int] = dict(zip(_SIZES, sizes, strict=True))
        self.arguments = {**self.sizes, "hidden": hidden, "layers": layers, "dropout": dropout}
        self.draft_projection = _projection(draft_hidden)
        self.target_projection = _projection(target_hidden)
        inputs = features + _projected(draft_hidden) + _projected(target_hidden)
        widths = [inputs, *[hidden] * layers]
        blocks = ((nn.Linear(a, b), nn.GELU(), nn.Dropout(dropout)) for a, b in pairwise(widths))
        self.trunk = nn.Sequential(*chain.from_iterable(blocks))
        top = widths[-1]
        self.accept_head = nn.Linear(top, _BASES)
        self.accept_basis = nn.Parameter(torch.randn(_BASES, draft_width * draft_width) / _BASES**0.5)
        self.accept_bias = nn.Parameter(torch.zeros(draft_width, draft_width))
        self.survivor_head = nn.Linear(top, target_width)
        for head in (self.accept_head, self.survivor_head):  # zero: the first prediction is the bias
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.register_buffer("accept_temperature", torch.ones(()))
        self.register_buffer("survivor_temperature", torch.ones(()))

    def forward(
        self,
        features: Tensor,  # [N, F] float32
        draft_hidden: Tensor | None = None,  # [N, H_q]
        target_hidden: Tensor | None = None,  # [N, H_p]
    ) -> WidthLogits:
        """Logits of both heads; hidden vectors are needed where the sizes say so."""
        inputs = [((features - self.feature_mean) / self.feature_std).clamp(-5, 5)]
        for projection, vector in ((self.draft_projection, draft_hidden), (self.target_projection, target_hidden)):
            if projection is not None:
                assert vector is not None, "this network was built with hidden vectors"
                inputs.append(projection(F.layer_norm(vector, vector.shape[-1:])))
        top = self.trunk(torch.cat(inputs, -1))
        accept = (self.accept_head(top) @ self.accept_basis).unflatten(-1, self.accept_bias.shape) + self.accept_bias
        return WidthLogits(accept / self.accept_temperature, self.survivor_head(top) / self.survivor_temperature)

    @torch.no_grad()
    def start_from(
        self,
        feature_mean: Tensor,  # [F]
        feature_std: Tensor,  # [F]
        accept_rate: Tensor,  # [W, W] in (0, 1)
        survivor_rate: Tensor,  # [R] sums to one
    ) -> None:
        """Set the standardisation of the inputs, and both heads to constant predictions."""
        self.feature_mean.copy_(feature_mean)
        self.feature_std.copy_(feature_std.clamp(min=1e-3))
        self.accept_bias.copy_(accept_rate.clamp(1e-4, 1 - 1e-4).logit())
        self.survivor_head.bias.copy_(survivor_rate.clamp(min=1e-4).log())

    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


class HostNet:
    """A WidthNet for one row at a time, in numpy: the same numbers at a fraction of the call overhead.

    Args:
        net: its weights are copied; later changes to it are not seen.
    """

    def __init__(self, net: WidthNet) -> None:
        def host(tensor: Tensor) -> FloatVector:
            return tensor.detach().float().cpu().numpy().copy()

        self._mean, self._scale = host(net.feature_mean), 1.0 / host(net.feature_std)
        projections = (net.draft_projection, net.target_projection)
        self._projections = [None if p is None else host(p.weight.T) for p in projections]
        linears = [module for module in net.trunk if isinstance(module, nn.Linear)]
        self._layers = [(host(linear.weight.T), host(linear.bias)) for linear in linears]
        # The accept head and its basis are two linear maps in a row, and temperatures only scale: one map each.
        accept = net.accept_basis.T / net.accept_temperature  # [W * W, bases]
        bias = accept @ net.accept_head.bias + net.accept_bias.flatten() / net.accept_temperature
        self._accept = host((accept @ net.accept_head.weight).T), host(bias)
        survivor = net.survivor_head
        self._survivor = tuple(host(t.T / net.survivor_temperature) for t in (survivor.weight, survivor.bias[None]))
        self._shape = tuple(net.accept_bias.shape)

    def __call__(
        self,
        features: FloatVector,  # [F]
        draft_hidden: FloatVector,  # [H_q]; not read where the network does without
        target_hidden: FloatVector,  # [H_p]
    ) -> tuple[FloatVector, FloatVector]:
        """Accept logits [W, W] and survivor logits [R]."""
        scaled = (features - self._mean) * self._scale
        inputs = [np.minimum(np.maximum(scaled, -5, out=scaled), 5, out=scaled)]
        for projection, vector in zip(self._projections, (draft_hidden, target_hidden), strict=True):
            if projection is not None:
                inputs.append(_layer_norm(vector) @ projection)
        top = np.concatenate(inputs)
        for weight, bias in self._layers:
            top = top @ weight + bias
            top = 0.5 * top * (1.0 + torch.from_numpy(top * 0.5**0.5).erf_().numpy())  # GELU
        accept, bias = self._accept
        weight, offset = self._survivor
        return (top @ accept + bias).reshape(self._shape), top @ weight + offset[:, 0]


def _layer_norm(vector: FloatVector) -> FloatVector:
    """F.layer_norm without weights, [H]; two plain sums beat numpy's mean at these sizes."""
    count = len(vector)
    centred = vector - np.add.reduce(vector) / count
    return centred * np.float32(1.0 / math.sqrt(float(centred @ centred) / count + 1e-5))


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
    temperatures = {"accept": float(net.accept_temperature), "survivor": float(net.survivor_temperature)}
    config = {**net.arguments, "format": FORMAT, "provenance": {**provenance, "temperatures": temperatures}}
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
            raise UserError(
                f"{path} has no {name}: it is not a controller. Give the directory that train.py wrote "
                f"({CONFIG} and {WEIGHTS} in it)."
            )
    try:
        config = json.loads((directory / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{directory / CONFIG} is not JSON ({error}); train the controller again.") from error
    provenance = config.get("provenance") if isinstance(config, dict) else None
    if not isinstance(provenance, dict) or config.get("format") != FORMAT or set(_ARGUMENTS) - set(config):
        raise UserError(
            f"{directory / CONFIG} does not describe a width controller; give a directory that train.py wrote."
        )
    net = WidthNet(**{name: config[name] for name in _ARGUMENTS})
    try:
        net.load_state_dict(load_file(directory / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{directory / WEIGHTS} is damaged or of another network ({reason}); train it again."
        ) from error
    return net.eval().requires_grad_(False), provenance


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


def _projected(size: int) -> int:
    """Width of a hidden vector's projection."""
    return max(4, min(32, _HIDDEN_BUDGET // size)) if size else 0


def _projection(size: int) -> nn.Linear | None:
    return nn.Linear(size, _projected(size), bias=False) if size else None
