"""Dynamic-width speculative beam decoding: prompts in, several hypotheses out."""

import decoding.support.early  # noqa: F401  # before what takes seconds to import

# isort: split
from importlib import import_module
from types import ModuleType

from decoding.config import DecodingConfig
from decoding.custom_generate import dsbd_generate
from decoding.decoder import DSBDDecoder, beam_sample
from decoding.errors import UserError
from decoding.pairs.pair import ModelPair
from decoding.policies.bandit import BanditWidth
from decoding.policies.base import WidthPolicy
from decoding.policies.exploration import ExploringWidth, RandomWidth, UniformWidth
from decoding.policies.fixed import FixedWidth
from decoding.policies.hand_set import EntropyWidth, GapWidth, MassWidth
from decoding.policies.key_gap import KeyGapWidth
from decoding.policies.threshold import ExpectedWidth, ThresholdWidth
from decoding.results import DecodeResult, DecodeStats

__all__ = [
    "BanditWidth",
    "DSBDDecoder",
    "DecodeResult",
    "DecodeStats",
    "DecodingConfig",
    "EntropyWidth",
    "ExpectedWidth",
    "ExploringWidth",
    "FixedWidth",
    "GapWidth",
    "KeyGapWidth",
    "MassWidth",
    "ModelPair",
    "RandomWidth",
    "ThresholdWidth",
    "UniformWidth",
    "UserError",
    "WidthPolicy",
    "beam_sample",
    "dsbd_generate",
]

_MOVED = {"energy": "decoding.machine.joules", "device_model": "decoding.machine.modelled"}


def __getattr__(name: str) -> ModuleType:
    """Modules by the names that older configs have in `_target_`."""
    if name in _MOVED:
        return import_module(_MOVED[name])
    raise AttributeError(f"module 'decoding' has no attribute {name!r}")
