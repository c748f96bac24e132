"""Dynamic-width speculative beam decoding: prompts in, several hypotheses out."""

from decoding.bandit import BanditWidth
from decoding.config import DecodingConfig
from decoding.custom_generate import dsbd_generate
from decoding.decoder import DSBDDecoder, beam_sample
from decoding.errors import UserError
from decoding.exploration import ExploringWidth
from decoding.hand_set import EntropyWidth, GapWidth, MassWidth
from decoding.key_gap import KeyGapWidth
from decoding.pair import ModelPair
from decoding.results import DecodeResult, DecodeStats
from decoding.widths import FixedWidth, RandomWidth, ThresholdWidth, WidthPolicy

__all__ = [
    "BanditWidth",
    "DSBDDecoder",
    "DecodeResult",
    "DecodeStats",
    "DecodingConfig",
    "EntropyWidth",
    "ExploringWidth",
    "FixedWidth",
    "GapWidth",
    "KeyGapWidth",
    "MassWidth",
    "ModelPair",
    "RandomWidth",
    "ThresholdWidth",
    "UserError",
    "WidthPolicy",
    "beam_sample",
    "dsbd_generate",
]
