"""Everything that learns: what is seen of candidates, the network, its training and calibration, the learned policy."""

from __future__ import annotations

import decoding.support.early  # noqa: F401  # before what takes seconds to import

# isort: split
from controller.network import WidthNet
from controller.policy import LearnedWidth

__all__ = ["LearnedWidth", "WidthNet"]
