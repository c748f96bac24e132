"""dsbd_generate: this decoder behind transformers' own call, `model.generate(..., custom_generate=dsbd_generate)`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
)

from decoding.config import DecodingConfig
from decoding.decoder import DSBDDecoder
from decoding.errors import UserError
from decoding.pair import ModelPair
from decoding.results import DecodeResult
from decoding.rules import Rules
from decoding.widths import WidthPolicy

# Fields of GenerationConfig that ask for something this decoder does not do, with their neutral values.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "cache_implementation": (None, "dynamic", "static", "offloaded", "offloaded_static", "hybrid"),  # not quantized
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1),
    "is_assistant": (None, False),
    "low_memory": (None, False),
    "num_beam_groups": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "penalty_alpha": (None, 0.0),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}
_KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def dsbd_generate(
    model: PreTrainedModel,
    input_ids: Tensor,  # [B, L], or each row `num_beams` times where the generation config holds num_beams
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant_model: Any = None,
    tokenizer: Any = None,
    num_beams: int | None = None,
    num_return_sequences: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    stop_strings: str | list[str] | None = None,
    width_policy: WidthPolicy | None = None,
    draft_width: int | None = None,
    draft_depth: int | None = None,
    engine: str = "auto",
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """For transformers: `model.generate(**inputs, assistant_model=draft, num_beams=4, custom_generate=dsbd_generate)`.

    Without do_sample the tokens are those of `generate` without `custom_generate`, in fewer passes. With do_sample and
    several beams each step draws num_beams continuations without replacement from the distribution that transformers
    draws its 2 * num_beams candidates from; with one beam it is transformers' sampling. Logits processors, stopping
    criteria and stop strings apply to each beam; those of your own must be functions of the row they are given.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: from transformers.
        assistant_model: the draft: a model, "layers:8" or "ngram"; None: the model alone.
        tokenizer: for stop_strings.
        num_beams, num_return_sequences, length_penalty, early_stopping, stop_strings: as in transformers; before those
            of the generation config.
        width_policy: decides widths; None asks for num_beams at every layer, which is what makes the tokens equal.
        draft_width, draft_depth: the widest and the deepest forest; None: 2 * num_beams (1 for one beam), and 3.
        engine: as for ModelPair.

    Returns:
        Sequences [B * num_return_sequences, L + new tokens], prompts included; with return_dict_in_generate an output
        that holds them, and `sequences_scores` where several beams are kept. A streamer is told of tokens as soon as
        all beams share them.

    Raises:
        UserError: a setting or an input that this decoder does not know, by name.
    """
    _check_fields(generation_config, model_kwargs)
    given = _of_the_call(model)
    draft = assistant_model if assistant_model is not None else given.get("assistant_model")
    streamer = given.get("streamer")
    settings = _settings(
        generation_config,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    wanted = settings["num_return_sequences"]
    if settings["num_beams"] == 1 and generation_config.do_sample:
        settings["num_return_sequences"] = 1  # as many samples of one beam each
    depth = 0 if draft is None else 3 if draft_depth is None else draft_depth
    longest = min(c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria))
    config = _decoding_config(
        generation_config, settings, logits_processor, longest - int(input_ids.shape[1]), draft_width, depth
    )
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    mask = model_kwargs.get("attention_mask")
    lengths = _lengths(input_ids[::copies], mask[::copies] if mask is not None else None)
    samples = wanted if config.target_width == 1 and generation_config.do_sample else 1
    padded = [row for row in input_ids[::copies].tolist() for _ in range(samples)]
    lengths = [length for length in lengths for _ in range(samples)]
    if streamer is not None and len(padded) > 1:
        raise UserError(f"streamer with {len(padded)} texts at a time: it can follow one only; ask for one at a time.")
    processors = _for_width(logits_processor, config.target_width, _ends(generation_config))
    criteria = _criteria(stopping_criteria, stop_strings, tokenizer or given.get("tokenizer"))
    rules = [
        Rules(
            row,
            _for_row(processors, i // samples, i // samples * copies),
            criteria,
            (lambda tokens: streamer.put(torch.tensor(tokens))) if streamer is not None else None,
        )
        for i, row in enumerate(padded)
    ]
    decoder = DSBDDecoder(ModelPair(model, draft, engine=engine), config, width_policy)
    seed = int(torch.randint(2**62, (1,)))  # so that torch.manual_seed and set_seed reach the draws
    prompts = [row[len(row) - length :] for row, length in zip(padded, lengths, strict=True)]
    results = decoder.generate(prompts, torch.Generator().manual_seed(seed), rules=rules)
    if streamer is not None:
        streamer.end()
    return _output(input_ids[::copies].repeat_interleave(samples, 0), results, config, generation_config)


def _of_the_call(model: Any) -> dict[str, Any]:
    """What `generate` was given but does not pass on to a callable: assistant_model, streamer and tokenizer.

    transformers (5.17 to 5.23) hands a callable its own new keyword arguments only, so these are read from the frame of
    the `generate` that called it, and from that of the `no_grad` around it, which keeps the arguments as they were.
    """
    frame: Any = sys._getframe(2)
    while frame is not None and not (frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model):
        frame = frame.f_back
    if frame is None:
        return {}
    found = {name: frame.f_locals.get(name) for name in ("assistant_model", "streamer")}
    around = frame.f_back.f_locals.get("kwargs") if frame.f_back is not None else None
    return found | {"tokenizer": around.get("tokenizer") if isinstance(around, dict) else None}


def _check_fields(config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    for name, neutral in REFUSED.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise UserError(
                f"{name} is {value!r}, which dsbd_generate does not do; leave it at {neutral[-1]!r}, or call generate "
                "without custom_generate."
            )
    for name, value in model_kwargs.items():
        if value is not None and name not in _KNOWN_INPUTS:
            raise UserError(
                f"dsbd_generate takes token ids and an attention mask, not the input {name}; remove it, or call "
                "generate without custom_generate."
            )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError(
            "past_key_values holds tokens already; dsbd_generate keeps its own cache: pass the whole prompt."
        )


def _settings(generation: GenerationConfig, **given: Any) -> dict[str, Any]:
    """Arguments before the generation config before transformers' defaults."""
    usual = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False}
    chosen = {}
    for name, default in usual.items():
        options = (given[name], getattr(generation, name, None), default)
        chosen[name] = next(option for option in options if option is not None)
    return chosen


def _decoding_config(
    generation: GenerationConfig,
    settings: Mapping[str, Any],
    processors: LogitsProcessorList,
    max_new_tokens: int,
    draft_width: int | None,
    draft_depth: int,
) -> DecodingConfig:
    """transformers' settings in this decoder's words. Warpers stay processors; top_k says how much they can leave."""
    ends, beams = _ends(generation), settings["num_beams"]
    cuts = [p.top_k for p in _for_width(processors, beams, ends) if isinstance(p, TopKLogitsWarper)]
    return DecodingConfig(
        mode="beam_sample" if generation.do_sample else "beam_search",
        target_width=beams,
        draft_width=(1 if beams == 1 else 2 * beams) if draft_width is None else draft_width,
        draft_depth=draft_depth,
        max_new_tokens=max_new_tokens,
        top_k=min(cuts) if cuts and generation.do_sample else None,
        warp="beam",
        length_penalty=float(settings["length_penalty"]),
        early_stopping=settings["early_stopping"],
        eos_token_id=ends or -1,
        num_return_sequences=settings["num_return_sequences"],
    )


def _ends(generation: GenerationConfig) -> list[int]:
    tensor = getattr(generation, "_eos_token_tensor", None)
    return [] if tensor is None else [int(id_) for id_ in tensor.flatten()]


def _lengths(input_ids: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each prompt without the padding on its left; [B, L], [B, L] -> B."""
    if mask is None:
        return [input_ids.shape[1]] * input_ids.shape[0]
    if mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}; give a number a token."
        )
    seen = mask != 0
    if (seen[:, :-1] & ~seen[:, 1:]).any() or not seen[:, -1].all():
        raise UserError(
            "attention_mask hides tokens that are not padding on the left; make the batch with padding_side='left'."
        )
    return [int(count) for count in seen.sum(1)]


def _for_width(processors: LogitsProcessorList, beams: int, ends: Sequence[int]) -> LogitsProcessorList:
    """Warpers as transformers makes them for several beams: each row keeps one token more than there are EOS tokens.

    They were made for one beam where num_beams came as an argument: `generate` did not see it.
    """
    least = 1 if beams == 1 else len(ends) + 1 if ends else 2
    made = LogitsProcessorList()
    for processor in processors:
        if getattr(processor, "min_tokens_to_keep", least) < least:
            processor = copy.copy(processor)
            processor.min_tokens_to_keep = least
            if isinstance(processor, TopKLogitsWarper):
                processor.top_k = max(processor.top_k, least)
        made.append(processor)
    return made


def _for_row(processors: LogitsProcessorList, prompt: int, row: int) -> LogitsProcessorList:
    """The processors for one prompt: those that know about the batch are told which of its rows they see."""
    made = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = processor._prefix_allowed_tokens_fn
            processor = PrefixConstrainedLogitsProcessor(_of_prompt(allowed, prompt), 1)
        elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
            ignored = processor.prompt_ignore_length
            if isinstance(ignored, Tensor):
                processor = copy.copy(processor)
                processor.prompt_ignore_length = int(ignored[row])
        made.append(processor)
    return made


def _of_prompt(allowed: Callable[[int, Tensor], list[int]], prompt: int) -> Callable[[int, Tensor], list[int]]:
    return lambda _, tokens: allowed(prompt, tokens)


def _criteria(
    criteria: StoppingCriteriaList, stop_strings: str | list[str] | None, tokenizer: Any
) -> StoppingCriteriaList:
    """What ends a hypothesis beside its length and EOS."""
    kept = StoppingCriteriaList([c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)])
    if stop_strings is not None:
        if tokenizer is None:
            raise UserError("stop_strings needs the tokenizer that they are compared by; give tokenizer=... as well.")
        kept.append(StopStringCriteria(tokenizer, stop_strings))
    return kept


def _output(
    input_ids: Tensor, results: list[DecodeResult], config: DecodingConfig, generation: GenerationConfig
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """Tensors as transformers returns them. Where a prompt has fewer hypotheses than were asked for, its last is
    repeated with the score -1e9, which transformers gives beams that do not exist."""
    wanted = config.num_return_sequences
    rows = [result.sequences + result.sequences[-1:] * (wanted - len(result.sequences)) for result in results]
    scores = [result.scores + [-1e9] * (wanted - len(result.scores)) for result in results]
    flat = [tokens for row in rows for tokens in row]
    pad, ends = getattr(generation, "_pad_token_tensor", None), _ends(generation)
    fill = int(pad) if pad is not None else -1
    if config.target_width > 1 and fill <= 0 and ends:
        fill = ends[0]  # as transformers' beam search: a pad token 0 counts as none
    new = torch.full((len(flat), max(map(len, flat))), fill, dtype=torch.long)  # [B * N, new]
    for i, tokens in enumerate(flat):
        new[i, : len(tokens)] = torch.tensor(tokens)
    sequences = torch.cat([input_ids.repeat_interleave(wanted, 0), new.to(input_ids.device)], dim=1)
    if not generation.return_dict_in_generate:
        return sequences
    if config.target_width == 1:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        sequences_scores=torch.tensor([s for row in scores for s in row], device=input_ids.device),
    )
