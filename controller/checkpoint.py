"""Save and load a controller: WidthNet's weights as safetensors, what it was trained for in config.json."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from controller.network import ARGUMENTS, CALIBRATED, COLUMNS, LARGEST, WidthNet
from decoding.errors import UserError, reading
from decoding.support.checks import whole

FORMAT = "dsbd-controller"  # what config.json says it is
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def save_controller(net: WidthNet, directory: str | Path, provenance: dict[str, Any]) -> Path:
    """Write a controller: model.safetensors, config.json. Never half of it.

    Everything is written to a directory beside the final one, which is then renamed over it.

    Args:
        net: trained and calibrated.
        directory: where; an older controller there is replaced.
        provenance: JSON-able; must have the keys "features" (see `describe_features`), "pair" and "decoding".

    Returns:
        The directory.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fitted = {name: float(net.get_buffer(name)) for name in CALIBRATED}
    config = {**net.arguments, "format": FORMAT, "provenance": {**provenance, "calibration": fitted}}
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        fresh.mkdir()
        weights = save(net.state_dict())
        (fresh / WEIGHTS).write_bytes(weights)
        written = json.loads(json.dumps(config))  # as it will be read
        written["sha256"] = _digest(written, weights)
        (fresh / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
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
    if lacking := [name for name in ARGUMENTS if name not in config]:
        raise _of_another_version(path, f"{CONFIG} says nothing of {', '.join(lacking)}")
    if any(not isinstance(provenance.get(part, {}), dict) for part in ("features", "pair", "decoding")):
        raise _of_another_version(path, f"the provenance in {CONFIG} is of another form")
    for name in ARGUMENTS:
        whole(f"{name} in {directory / CONFIG}", config[name], least=1, most=LARGEST, hint="train the controller again")
    with reading(directory / CONFIG, "Train the controller again."):
        net = WidthNet(**{name: config[name] for name in (*ARGUMENTS, *COLUMNS) if name in config})
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
    given = config.get("sha256")  # older controllers have none
    if given is not None and given != _digest(config, (directory / WEIGHTS).read_bytes()):
        raise UserError(f"{directory} was changed since it was written, or is damaged; train the controller again.")
    return net.eval().requires_grad_(False), provenance


def _digest(config: dict[str, Any], weights: bytes) -> str:
    """SHA-256, in hex, of a controller's config, but for this entry, and of its weights."""
    told = json.dumps({name: value for name, value in config.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(told.encode() + hashlib.sha256(weights).digest()).hexdigest()


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
