"""Model families, as far as their configs do not tell: a record each. The others run as
transformers runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Args:
        fused: the class of models that `FusedForward` computes: each block is norm, attention with
            rotary positions, residual, norm, gated SiLU, residual, and its parts are called as
            Llama's. None: their own forward runs.
        alibi: they make an ALiBi bias, unless a field `alibi` of the config says that they do not.
        side_by_side: their attention takes keys and values only where those of a row lie side by
            side.
        unfit: why they are refused although the probe could accept them: some of their passes would
            be wrong.
    """

    fused: str | None = None
    alibi: bool = False
    side_by_side: bool = False
    unfit: str | None = None


FAMILIES = {
    "llama": Family(fused="LlamaForCausalLM"),
    "mistral": Family(fused="MistralForCausalLM"),
    "qwen2": Family(fused="Qwen2ForCausalLM"),
    "qwen3": Family(fused="Qwen3ForCausalLM"),
    "bloom": Family(alibi=True),
    "falcon": Family(alibi=True),
    "gpt_neox_japanese": Family(side_by_side=True),
    "mpt": Family(
        unfit="its attention takes one ALiBi bias for all prompts of a batch, whose tokens lie in different slots"
    ),
    "gpt_neo": Family(unfit="its attention hides tokens by their place in the cache, whatever the mask says"),
}


def family_of(config: Any) -> Family:
    """The record of a model's config; that of an unknown family claims nothing."""
    return FAMILIES.get(getattr(config, "model_type", None) or "", Family())


def has_alibi(config: Any) -> bool:
    """True if a model of this config makes an ALiBi bias."""
    return family_of(config).alibi and getattr(config, "alibi", True)
