"""A tiny random model of every family that decodes as a forest, models that do not and why, and the tables of
docs/families.md: `python -m tests.decoding.families` writes them into the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoding.engine.families import has_alibi
from decoding.engine.fused import can_fuse

MARK = "<!-- python -m tests.decoding.families -->"
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
END, WINDOW = 3, 8  # tokens: the one that ends a hypothesis; what a sliding layer sees
TREE, SAMPLING, SEARCH = "tree = sequential", "sampling exact", "beam search = generate"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        kind: `model_type` of its config.
        positions, attention: in words, for the table.
        changes: fields of the config beyond `_SHAPE`.
        tested: which of the tests of test_families.py it runs through.
    """

    kind: str
    positions: str
    attention: str
    changes: Mapping[str, Any]
    tested: tuple[str, ...] = (TREE, SAMPLING, SEARCH)

    def model(self, vocabulary: int = 61, seed: int = 0) -> Any:
        """Every parameter random, so that tokens, positions and windows matter and ties are rare."""
        return randomised(AutoModelForCausalLM, config_of(self.kind, {"vocab_size": vocabulary, **self.changes}), seed)


# Fields in the two spellings that configs have.
_SHAPE = dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
_NEOX_JAPANESE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_multiple_size=2,
    max_position_embeddings=128,
)
_GPT_SHAPE = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
_BLOOM_SHAPE = dict(hidden_size=32, n_layer=2, n_head=4)
_FALCON_SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
_HALF = dict(layer_types=["full_attention", "sliding_attention"], sliding_window=WINDOW)
_SLIDES = "sliding window, all layers"
_MIXED = "sliding window, some layers"

FAMILIES: dict[str, Family] = {
    "Llama": Family("llama", "rotary", "full", _SHAPE),
    "Mistral": Family("mistral", "rotary", _SLIDES, {**_SHAPE, "sliding_window": WINDOW}),
    "Mixtral": Family(
        "mixtral",
        "rotary",
        f"{_SLIDES}; experts",
        {**_SHAPE, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Qwen 2": Family(
        "qwen2",
        "rotary",
        _MIXED,
        {**_SHAPE, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    ),
    "Qwen 3": Family("qwen3", "rotary", _MIXED, {**_SHAPE, "use_sliding_window": True, **_HALF}),
    "Qwen 3 MoE": Family(
        "qwen3_moe",
        "rotary",
        "full; experts",
        {**_SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "Gemma": Family("gemma", "rotary", "full", _SHAPE),
    "Gemma 2": Family(
        "gemma2",
        "rotary",
        f"{_MIXED}; soft-capping",
        {**_SHAPE, **_HALF, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0, "query_pre_attn_scalar": 8},
    ),
    "Gemma 3, text": Family(
        "gemma3_text", "rotary, two kinds", _MIXED, {**_SHAPE, **_HALF, "query_pre_attn_scalar": 8}
    ),
    "OPT": Family("opt", "learned, offset 2", "full", {**_SHAPE, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "GPT-2": Family("gpt2", "learned", "full", _GPT_SHAPE),
    "GPT-J": Family("gptj", "rotary, part of a head", "full", {**_GPT_SHAPE, "rotary_dim": 4}),
    "GPT-BigCode, StarCoder": Family("gpt_bigcode", "learned", "full, one key head", _GPT_SHAPE),
    "GPT-NeoX, Pythia": Family("gpt_neox", "rotary, part of a head", "full", _SHAPE),
    "GPT-NeoX Japanese": Family("gpt_neox_japanese", "rotary", "full", _NEOX_JAPANESE),
    "gpt-oss": Family(
        "gpt_oss",
        "rotary",
        f"{_MIXED}; sinks; experts",
        {
            **_SHAPE,
            **_HALF,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "Phi": Family("phi", "rotary, part of a head", "full", {**_SHAPE, "num_key_value_heads": 4}),
    "Phi-3": Family("phi3", "rotary", _SLIDES, {**_SHAPE, "sliding_window": WINDOW}),
    "StarCoder 2": Family("starcoder2", "rotary", _SLIDES, {**_SHAPE, "sliding_window": WINDOW}),
    "StableLM": Family("stablelm", "rotary, part of a head", "full", _SHAPE),
    "OLMo 2": Family("olmo2", "rotary", "full", _SHAPE),
    "Command R7B (Cohere 2)": Family(
        "cohere2", "rotary where it slides", _MIXED, {**_SHAPE, **_HALF, "logit_scale": 1.0}
    ),
    "Falcon": Family("falcon", "rotary", "full, one key head", {**_FALCON_SHAPE, "alibi": False}),
    "Falcon, ALiBi": Family(
        "falcon", "ALiBi", "full", {**_FALCON_SHAPE, "alibi": True, "multi_query": False, "parallel_attn": False}
    ),
    "Bloom": Family("bloom", "ALiBi", "full", _BLOOM_SHAPE),
}


def randomised(loader: Any, config: Any, seed: int = 0) -> Any:
    """A model of a config, norm weights around one and all other parameters normal."""
    generator = torch.Generator().manual_seed(seed)
    model = loader.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.4 * noise if is_norm else 0.3 * noise)
    return model.eval()


def config_of(kind: str, changes: Mapping[str, Any]) -> Any:
    """A config with one end token and no others."""
    return AutoConfig.for_model(kind, **{"bos_token_id": None, "pad_token_id": None, "eos_token_id": END, **changes})


@dataclass(frozen=True)
class Refused:
    """One row of the second table.

    Args:
        kind: `model_type` of its config.
        changes: fields of the config.
        why: in words, for the table.
        says: what the refusal says, a regular expression.
        by_config: refused by its config alone, before any weight is loaded.
    """

    kind: str
    changes: Mapping[str, Any]
    why: str
    says: str
    by_config: bool = True


_RECURRENT = "recurrent state: one for a whole path, so it cannot branch"
_CHOOSING = "it chooses or compresses the tokens that it attends to, which no mask can follow"
_ENCODER = "encoder-decoder"
_DECODER = dict(
    d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=40, max_position_embeddings=128
)

REFUSED: dict[str, Refused] = {
    "Mamba": Refused("mamba", {}, _RECURRENT, "keeps a recurrent state"),
    "Mamba 2": Refused("mamba2", {}, _RECURRENT, "keeps a recurrent state"),
    "Falcon Mamba": Refused("falcon_mamba", {}, _RECURRENT, "keeps a recurrent state"),
    "RWKV": Refused("rwkv", {}, _RECURRENT, "keeps a recurrent state"),
    "xLSTM": Refused("xlstm", {}, _RECURRENT, "keeps a recurrent state"),
    "RecurrentGemma": Refused("recurrent_gemma", {}, _RECURRENT, "keeps a recurrent state"),
    "Jamba": Refused("jamba", {}, f"{_RECURRENT} (some layers)", "keeps a recurrent state"),
    "Zamba 2": Refused("zamba2", {}, f"{_RECURRENT} (some layers)", "keeps a recurrent state"),
    "Falcon-H1": Refused("falcon_h1", {}, f"{_RECURRENT} (beside attention)", "keeps a recurrent state"),
    "Nemotron-H": Refused("nemotron_h", {}, f"{_RECURRENT} (some layers)", "keeps a recurrent state"),
    "Qwen 3 Next": Refused("qwen3_next", {}, f"{_RECURRENT} (some layers)", "keeps a recurrent state"),
    "LFM2": Refused(
        "lfm2",
        {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        "short convolutions: their state is one for a whole path, so it cannot branch",
        "keeps a recurrent state",
    ),
    "DeepSeek V3.2": Refused("deepseek_v32", {}, _CHOOSING, "chooses or compresses the tokens"),
    "GLM MoE DSA": Refused("glm_moe_dsa", {}, _CHOOSING, "chooses or compresses the tokens"),
    "DeepSeek V4": Refused("deepseek_v4", {}, _CHOOSING, "chooses or compresses the tokens"),
    "T5": Refused("t5", {}, _ENCODER, "is an encoder-decoder"),
    "BART": Refused("bart", {}, _ENCODER, "is an encoder-decoder"),
    "MPT": Refused(
        "mpt",
        {},
        "its attention takes one ALiBi bias for all prompts of a batch",
        "takes one ALiBi bias for all prompts",
    ),
    "GPT-Neo": Refused(
        "gpt_neo",
        {},
        "its attention hides tokens by their place in the cache, whatever the mask says",
        "hides tokens by their place in the cache",
    ),
    "BART's decoder": Refused(
        "bart",
        {**_DECODER, "is_decoder": True, "is_encoder_decoder": False},
        "counts positions by the length of the cache, whatever positions it is given",
        "scores a forest of beams differently",
        by_config=False,
    ),
    "RoBERTa": Refused(
        "roberta",
        {**_SHAPE, "is_decoder": True, "pad_token_id": 1},
        "its first position is not 0",
        "scores a forest of beams differently",
        by_config=False,
    ),
    "BERT, as an encoder": Refused(
        "bert", {**_SHAPE, "is_decoder": False}, "its tokens see those after them", "differently", by_config=False
    ),
    "XLM": Refused(
        "xlm",
        {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
        "takes no mask of four dimensions",
        "cannot run a forest pass",
        by_config=False,
    ),
    "OpenAI GPT": Refused(
        "openai-gpt", _GPT_SHAPE, "keeps no keys and values", "cannot run a forest pass", by_config=False
    ),
}


def families_table() -> str:
    """Rows of the first table, in Markdown."""
    rows = [("family", "positions", "attention", "how it is run", TREE, SAMPLING, SEARCH)]
    for name, family in FAMILIES.items():
        model = family.model()
        run = "fused" if can_fuse(model) else "transformers' forward"
        run += ", bias by position" if has_alibi(model.config) else ""
        marks = ["yes" if test in family.tested else "no" for test in (TREE, SAMPLING, SEARCH)]
        rows.append((name, family.positions, family.attention, run, *marks))
    return _markdown(rows)


def refused_table() -> str:
    """Rows of the second table, in Markdown."""
    rows = [("model", "why it is refused", "known from")]
    for name, refused in REFUSED.items():
        rows.append((name, refused.why, "its config" if refused.by_config else "a test pass"))
    return _markdown(rows)


def page() -> str:
    """docs/families.md with its tables made anew."""
    parts = PAGE.read_text(encoding="utf-8").split(MARK)
    assert len(parts) == 5, f"two tables, each between two lines {MARK}"
    parts[1], parts[3] = f"\n\n{families_table()}\n\n", f"\n\n{refused_table()}\n\n"
    return MARK.join(parts)


def _markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
