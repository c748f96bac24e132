"""The built-in pair's weights and tokenizer, which `python -m decoding.tiny` trained."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

TINY_DIR = Path(__file__).parent.parent / "tiny_weights"


def load_tiny(folder: Path = TINY_DIR) -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load (target, draft, tokenizer) of the built-in pair, in float32 on the CPU."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # for 24 MB
    try:
        target, draft = (
            AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, local_files_only=True)
            for name in ("target", "draft")
        )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
    return target.eval(), draft.eval(), tokenizer
