"""Dynamic-width speculative beam decoding: prompts in, several hypotheses out."""

from decoding.config import DecodingConfig
from decoding.custom_generate import dsbd_generate
from decoding.decoder import DSBDDecoder, beam_sample
from decoding.errors import UserError
from decoding.pairs.pair import ModelPair
from decoding.policies.bandit import BanditWidth
from decoding.policies.base import FixedWidth, RandomWidth, ThresholdWidth, WidthPolicy
from decoding.policies.hand_set import EntropyWidth, GapWidth, MassWidth
from decoding.results import DecodeResult, DecodeStats

__all__ = [
    "BanditWidth",
    "DSBDDecoder",
    "DecodeResult",
    "DecodeStats",
    "DecodingConfig",
    "EntropyWidth",
    "FixedWidth",
    "GapWidth",
    "MassWidth",
    "ModelPair",
    "RandomWidth",
    "ThresholdWidth",
    "UserError",
    "WidthPolicy",
    "beam_sample",
    "dsbd_generate",
]
