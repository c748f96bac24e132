"""Placement: the device that a model takes its inputs on, and the dtype that it computes in.

Neither need be that of its first weight: weights may be packed integers, and may wait elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch


def device_of(model: Any) -> torch.device:
    """The device of a model's inputs and outputs; of its first weight, unless it is dispatched."""
    hook = getattr(model, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)  # weights that are offloaded lie on "meta"
    if execution is not None:
        return torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    return next((w.device for w in model.parameters() if w.device.type != "meta"), next(model.parameters()).device)


def dtype_of(model: Any) -> torch.dtype:
    """The dtype of a model's activations: of its first weight that is no packed integer."""
    return next((w.dtype for w in model.parameters() if w.is_floating_point()), torch.get_default_dtype())


def packed(model: Any) -> bool:
    """True if some weights are quantised or belong to a tensor class of their own."""
    return any(
        not w.is_floating_point() or type(w) not in (torch.Tensor, torch.nn.Parameter) for w in model.parameters()
    )


def same_device(one: torch.device, other: torch.device) -> bool:
    """True for one place under two names: cuda is the current one of several GPUs."""
    if one.type != other.type:
        return False
    current = torch.cuda.current_device() if one.type == "cuda" else 0
    return (current if one.index is None else one.index) == (current if other.index is None else other.index)
