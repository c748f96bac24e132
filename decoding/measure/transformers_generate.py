"""transformers' own `generate` behind this engine's interface, to compare with: prompts in,
DecodeResults out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from decoding.config import DecodingConfig
from decoding.decoder import Prompts, as_token_lists
from decoding.dice.sampling import NotNumbers, nan_message
from decoding.pairs.pair import ModelPair, check_prompt, end_tokens
from decoding.results import DecodeResult, DecodeStats
from decoding.support.clock import now

Streams = torch.Generator | Sequence[torch.Generator]  # one for each prompt, or one for all


def hf_generate(
    pair: ModelPair,
    prompts: Prompts,
    config: DecodingConfig,
    generator: Streams,
    assisted: bool = False,
    num_beams: int = 1,
) -> list[DecodeResult]:
    """transformers' `generate`, one prompt at a time: sampling, beam sampling, assisted sampling,
    beam search.

    Differences from this engine that a reader of a comparison should know: top_k and top_p cut each
    beam's row, not the joint distribution; beam sampling draws 2 * num_beams candidates (more with
    several EOS tokens) and keeps the best num_beams of them; `scores` are NaN, because asking for
    them would slow it down. The generation config that comes with the target (temperature,
    penalties, ...) is set aside, so that nothing but `config` counts.

    Args:
        pair: the models; the draft is used where `assisted`.
        prompts: as for DSBDDecoder.generate.
        config: mode, max_new_tokens, min_new_tokens, temperature, top_k, top_p, EOS,
            length_penalty, early_stopping, num_return_sequences.
        generator: seeds torch's global generators within the call; they are restored after it. One,
            or one a prompt.
        assisted: speculative sampling with pair.draft as `assistant_model`, or by transformers' own
            prompt lookup where the draft is n-grams; needs num_beams=1.
        num_beams: beams; 1 is plain sampling.

    Returns:
        One DecodeResult per prompt. `iterations` counts the prompt's own pass, which gives a token
        here; `target_calls` does not, as everywhere; kv_slots are those of one copy of the sequence
        per beam; all seconds are "other".
    """
    ends = end_tokens(pair, config)
    options: dict[str, Any] = {
        "do_sample": config.mode == "beam_sample",
        "num_beams": num_beams,
        "num_return_sequences": min(config.num_return_sequences, num_beams),
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens or None,
        "eos_token_id": config.eos_token_id if isinstance(config.eos_token_id, list) else sorted(ends) or None,
        "pad_token_id": min(ends, default=0),
    }
    if options["do_sample"]:
        options |= {
            "temperature": config.temperature,
            "top_k": config.top_k or 0,  # 0 is no cut; None would be transformers' default of 50
            "top_p": 1.0 if config.top_p is None else config.top_p,
        }
    if num_beams > 1:
        options |= {"length_penalty": config.length_penalty, "early_stopping": config.early_stopping}
    if assisted:
        options |= pair.drafter.assistance() if pair.drafter is not None else {"assistant_model": None}
    results = []
    for i, row in enumerate(as_token_lists(prompts)):
        check_prompt(pair, row, config, i)
        stream = generator if isinstance(generator, torch.Generator) else generator[i]
        results.append(_hf_one(pair, row, options, ends, stream))
    return results


def _hf_one(
    pair: ModelPair, row: list[int], options: dict[str, Any], ends: frozenset[int], generator: torch.Generator
) -> DecodeResult:
    ids = torch.tensor([row], device=pair.device)  # [1, T]
    beams = options["num_beams"]
    assisted = "assistant_model" in options or "prompt_lookup_num_tokens" in options
    with ExitStack() as stack:
        stack.enter_context(_seeded(generator, pair.device))
        stack.enter_context(own_settings_aside(pair.target))
        target, draft = (stack.enter_context(_count_calls(pair.models.get(role))) for role in ("target", "draft"))
        began = now(pair.device)
        try:
            output = pair.target.generate(ids, attention_mask=torch.ones_like(ids), **options)  # [N, T + new]
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise NotNumbers(nan_message("target")) from error  # where it draws; its search goes on
        seconds = now(pair.device) - began
    ended = [_cut_at_end(tokens, ends) for tokens in output[:, len(row) :].tolist()]
    sequences = [tokens for tokens, _ in ended]
    stats = DecodeStats(
        prompt_tokens=len(row),
        new_tokens=len(sequences[0]) if assisted else target[0],  # unassisted, every pass makes all beams one longer
        iterations=target[0],
        target_calls=target[0] - 1,
        draft_calls=draft[0],
    )
    stats.seconds["other"] = seconds
    stats.kv_slots_peak = stats.kv_slots_end = beams * (len(row) + stats.new_tokens - 1)
    return DecodeResult(sequences, [float("nan")] * len(sequences), [finished for _, finished in ended], stats)


def _cut_at_end(tokens: list[int], ends: frozenset[int]) -> tuple[list[int], bool]:
    """Tokens up to the first EOS, itself included, without padding; and whether there is one."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1], True
    return tokens, False


@contextmanager
def _seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Global generators seeded from `generator`; restored afterwards. `generate` takes no generator
    of its own.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
        yield


@contextmanager
def own_settings_aside(model: Any) -> Iterator[None]:
    """transformers' defaults instead of the generation config that came with the model."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _count_calls(model: Any) -> Iterator[list[int]]:
    """A one-element list that counts the model's forward passes."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    with model.register_forward_pre_hook(count) if model is not None else nullcontext():
        yield calls
