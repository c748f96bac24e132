"""Watch: notices that modules are no longer what a copy of their weights was made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Watch:
    """Modules as they are now: where their weights lie, a sample of what these hold, their
    settings.

    torch counts most writes to a tensor, but not those through `.data` or NumPy, nor those of fused
    optimisers. So an entry of every row and of every column is kept as well, read through views in
    one operation: a write to a row, a column or a whole weight is noticed, one to a few single
    entries behind torch's back may not be.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._seen = _seen(modules)
        with torch.inference_mode():  # views of weights that were made in it can be made nowhere else
            self._views = [view for tensor in _tensors(modules) for view in _sampled(tensor.detach())]
            self._sample = torch.cat(self._views)

    def holds(self, modules: Sequence[nn.Module]) -> bool:
        """True if nothing has changed."""
        return _seen(modules) == self._seen and torch.equal(torch.cat(self._views), self._sample)


def signature(weights: Iterable[Tensor]) -> tuple[Any, ...]:
    """Changes when a weight is replaced, moved or written to in a way that torch counts."""
    return tuple((_place(w), _writes(w)) for w in weights)


def _writes(weight: Tensor) -> int:
    """The number of writes that torch saw; 0 where the weight was made, or given its data, in
    inference mode, and nothing is counted.
    """
    try:
        return weight._version
    except RuntimeError:
        return 0


def _place(weight: Tensor) -> int:
    """The address of a weight; packed weights may have none of their own."""
    return weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) else id(weight)


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _seen(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """All that can be told without reading weights: their signature, and numbers and names that
    modules keep as attributes, such as the epsilon of a norm.
    """
    plain = (int, float, str, bool)
    settings = [
        value
        for module in modules
        for part in module.modules()
        for name, value in vars(part).items()
        if type(value) in plain and name != "training"
    ]
    return signature(_tensors(modules)), settings


def _sampled(tensor: Tensor) -> list[Tensor]:
    """Views of an entry of every row and of every column, as integers, which NaN equals."""
    tensor = tensor.view(_INTEGERS[tensor.element_size()])
    if tensor.ndim < 2:
        return [tensor.view(-1)]
    rows, columns = tensor.flatten(1).shape
    matrix = tensor.flatten(1)
    if rows < columns:
        rows, columns, matrix = columns, rows, matrix.t()
    return [matrix[first : first + columns].diagonal() for first in range(0, rows, columns)]
