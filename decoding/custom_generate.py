"""dsbd_generate: this decoder behind transformers' own call, `model.generate(..., custom_generate=dsbd_generate)`."""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TopKLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from decoding.config import DecodingConfig
from decoding.decoder import DSBDDecoder
from decoding.errors import UserError
from decoding.loop.processing import Rules
from decoding.loop.search import candidates_per_beam
from decoding.pairs.architecture import check_architecture
from decoding.pairs.drafts import Draft, named_draft
from decoding.pairs.pair import ModelPair
from decoding.policies.base import WidthPolicy
from decoding.results import DecodeResult
from decoding.support.checks import whole

# Fields of GenerationConfig that ask for something this decoder does not do, with their neutral values.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "assistant_ensemble_weight": (None,),
    "cache_implementation": (
        *(None, "dynamic", "offloaded", "static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked"),
        *("offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),  # where keys lie; not "quantized", which rounds them
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
    "penalty_alpha": (None, 0.0),
    "speculation_type": (None,),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}
# Processors that are no functions of a row: they keep the batch, or what they saw before.
_NOT_BY_ROW = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
_TIES = 32  # tokens that a TopKLogitsWarper may keep beyond top_k, where scores are equal
_named: weakref.WeakKeyDictionary[Any, dict[str, Draft]] = weakref.WeakKeyDictionary()  # model -> drafts by their text
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

    Without do_sample the tokens are those of `generate` without `custom_generate`, in fewer passes. With do_sample they
    are distributed as those of `generate` are, with one beam and with several; a seed gives other tokens than there,
    but the same ones whatever the draft. Logits processors, stopping criteria and stop strings apply to each beam;
    those of your own must be functions of the row they are given.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: from transformers.
        assistant_model: the draft: a model, "layers:8" or "ngram", or a `Draft`; None: the model alone.
        tokenizer: for stop_strings.
        num_beams, num_return_sequences, length_penalty, early_stopping, stop_strings: as in transformers; before those
            of the generation config.
        width_policy: decides widths; None asks for num_beams at every layer, which is what makes the tokens equal.
        draft_width, draft_depth: the widest and the deepest forest; None: 2 * num_beams, and 3.
        engine: as for ModelPair.

    Returns:
        Sequences [B * num_return_sequences, L + new tokens], prompts included; with return_dict_in_generate an output
        that holds them, `sequences_scores` and `beam_indices` where several beams are kept, and with output_scores and
        output_logits the rows of every step, [B * num_beams, V] each; -inf stands for beams that do not exist and for
        prompts that are done. Criteria are told the scores of their own prompt. A streamer is told of tokens as soon as
        all beams share them.

    Raises:
        UserError: a setting or an input that this decoder does not know, by name.
    """
    check_architecture(model.config, "target")  # before what it was given is looked at
    _check_fields(generation_config, model_kwargs, logits_processor)
    _check_inputs_of(model)
    given = _of_the_call(generation_config)
    draft = _draft(model, assistant_model if assistant_model is not None else given.get("assistant_model"))
    streamer = given.get("streamer")
    settings = _settings(
        generation_config,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    _check_beams(settings, draft_width, generation_config.do_sample)
    wanted = settings["num_return_sequences"]
    if settings["num_beams"] == 1 and generation_config.do_sample:
        settings["num_return_sequences"] = 1  # as many samples of one beam each
    depth = 0 if draft is None else 3 if draft_depth is None else draft_depth
    longest = min(c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria))
    processors = _for_width(logits_processor, settings["num_beams"], generation_config, given["logits_processor"])
    cuts = [p.top_k for p in processors if isinstance(p, TopKLogitsWarper) and p not in given["logits_processor"]]
    config = _decoding_config(
        generation_config,
        settings,
        _ends(stopping_criteria, generation_config),
        min(cuts) + _TIES if cuts else None,
        max(longest - int(input_ids.shape[1]), 1),
        draft_width,
        depth,
    )
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    samples = wanted if config.target_width == 1 and generation_config.do_sample else 1
    padded, prompts = _texts(input_ids, model_kwargs, copies, samples)
    if streamer is not None and len(padded) > 1:
        raise UserError(f"streamer with {len(padded)} texts at a time: it can follow one only; ask for one at a time.")
    tokenizer = tokenizer if tokenizer is not None else given["tokenizer"]
    criteria = _criteria(stopping_criteria, stop_strings, tokenizer, generation_config)
    listener = (lambda tokens: streamer.put(torch.tensor(tokens))) if streamer is not None else None
    distinct = len(padded) // samples
    rules = [
        Rules(
            row,
            _for_prompt(processors, i // samples, distinct, config.target_width),
            criteria,
            listener,
            scores=bool(generation_config.return_dict_in_generate and generation_config.output_scores),
            logits=bool(generation_config.return_dict_in_generate and generation_config.output_logits),
        )
        for i, row in enumerate(padded)
    ]
    # torch.manual_seed and set_seed reach the draws; the global stream goes on only where plain generate draws too.
    seed = int(torch.randint(2**62, (1,))) if generation_config.do_sample else 0
    models = draft.models.values() if isinstance(draft, Draft) else [draft]
    with _modes_kept(model, *models):  # a pair puts its models into eval mode
        pair = ModelPair(model, draft, tokenizer, engine=engine, draft_tokenizer=given["assistant_tokenizer"])
        decoder = DSBDDecoder(pair, config, width_policy)
        results = decoder.generate(prompts, torch.Generator().manual_seed(seed), rules=rules)
    if streamer is not None:
        streamer.end()
    return _output(input_ids[::copies].repeat_interleave(samples, 0), results, config, generation_config)


class _Signature(inspect.Signature):
    """The arguments of `dsbd_generate` as transformers asks for them, before it checks a call.

    It has taken the tokenizer out of the arguments then, and would miss it where a generation
    config holds stop strings: it is put back. And samples that a config asks for, of beams that the
    call asks for, it would take for assisted sampling: the beams are left to the config, too.
    """

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:  # type: ignore[override]
        own: Mapping[str, inspect.Parameter] = super().parameters
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_extract_generation_mode_kwargs":
            frame = frame.f_back
        if frame is None or frame.f_back is None:
            return own
        arguments, call = frame.f_locals["kwargs"], frame.f_back
        tokenizer = _around(call).get("tokenizer")
        if tokenizer is not None and "tokenizer" not in inspect.signature(GenerationMixin._sample).parameters:
            arguments.setdefault("tokenizer", tokenizer)
        config = call.f_locals.get("generation_config") or call.f_locals["self"].generation_config
        samples = config.num_return_sequences or 1
        if samples == 1 or arguments.get("num_return_sequences") is not None:
            return own
        if (arguments.get("num_beams") or config.num_beams or 1) == 1 and call.f_locals["assistant_model"] is not None:
            raise UserError(
                f"num_return_sequences ({samples}) of one beam each, in a generation config and with an "
                "assistant_model, is refused by transformers; give num_return_sequences to generate as an argument."
            )
        return {name: parameter for name, parameter in own.items() if name != "num_beams"}


dsbd_generate.__signature__ = _Signature.from_callable(dsbd_generate)  # type: ignore[attr-defined]


def _around(call: Any) -> dict[str, Any]:
    """The arguments of a call of `generate` as they were given: the `no_grad` around it keeps them."""
    given = call.f_back.f_locals.get("kwargs") if call.f_back is not None else None
    return given if isinstance(given, dict) else {}


def _draft(model: Any, draft: Any) -> Any:
    """The draft of a call; the model's own first layers are made once, and probed once."""
    if not isinstance(draft, str):
        return draft
    known = _named.setdefault(model, {})
    if draft not in known:
        with _modes_kept(model):  # its first layers are modules of its own, which drafting puts into eval mode
            known[draft] = named_draft(draft, model)
    return known[draft]


def _of_the_call(config: GenerationConfig) -> dict[str, Any]:
    """What `generate` was given but does not pass on to a callable: assistant_model, streamer, tokenizers, its own list
    of processors.

    transformers (5.17 to 5.23) hands a callable its own new keyword arguments only, so these are read from the frame of
    the `generate` that called it, and from that of the `no_grad` around it, which keeps the arguments as they were. The
    frame is known by the generation config, which every call makes for itself.
    """
    frame: Any = sys._getframe(2)
    while frame is not None and not (frame.f_code.co_name == "generate" and _serves(frame.f_locals, config)):
        frame = frame.f_back
    if frame is None:
        raise UserError(
            "dsbd_generate was not called by generate, or from another thread or with another generation config than "
            "generate's, so that it cannot see a streamer or an assistant_model; call model.generate(..., "
            "custom_generate=dsbd_generate)."
        )
    if frame.f_locals.get("synced_gpus"):
        raise UserError("synced_gpus is True, but dsbd_generate runs on one process; leave it out.")
    around = _around(frame)
    return {
        **{name: frame.f_locals.get(name) for name in ("assistant_model", "streamer")},
        "logits_processor": list(frame.f_locals.get("logits_processor") or []),
        **{name: around.get(name) for name in ("tokenizer", "assistant_tokenizer")},
    }


def _serves(names: Mapping[str, Any], config: GenerationConfig) -> bool:
    """Whether local variables are those of transformers' `generate` as it serves the call that has this config."""
    return "custom_generate" in names and names.get("generation_config") is config


@contextmanager
def _modes_kept(*models: Any) -> Iterator[None]:
    """Training modes of all modules are afterwards what they were."""
    modes = [(m, m.training) for model in models if isinstance(model, torch.nn.Module) for m in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_fields(config: GenerationConfig, model_kwargs: Mapping[str, Any], processors: LogitsProcessorList) -> None:
    for name, neutral in REFUSED.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise UserError(
                f"{name} is {value!r}, which dsbd_generate does not do; leave it at {neutral[-1]!r}, or call generate "
                "without custom_generate."
            )
    for processor in processors:
        if isinstance(processor, _NOT_BY_ROW):
            raise UserError(
                f"logits_processor holds {type(processor).__name__}, which is no function of the row that it is "
                "given, as dsbd_generate needs; remove it, or call generate without custom_generate."
            )
    for name, value in model_kwargs.items():
        if name not in _KNOWN_INPUTS and not _says_nothing(name, value):
            raise UserError(
                f"dsbd_generate takes token ids and an attention mask, not the input {name}; remove it, or call "
                "generate without custom_generate."
            )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError(
            "past_key_values holds tokens already; dsbd_generate keeps its own cache: pass the whole prompt."
        )


def _check_inputs_of(model: PreTrainedModel) -> None:
    """Refuse a model that makes its own inputs of each step: this decoder makes them itself."""
    own = next((kind for kind in type(model).__mro__ if "prepare_inputs_for_generation" in vars(kind)), None)
    if own is not None and not own.__module__.startswith("transformers."):
        raise UserError(
            f"{own.__name__} has a prepare_inputs_for_generation of its own, which dsbd_generate does not call: tokens "
            "and positions would be other ones. Call generate without custom_generate."
        )


def _check_positions(positions: Tensor | None, lengths: Sequence[int], copies: int) -> None:
    """Positions must count the tokens of each prompt; `generate` makes them where none were given."""
    if positions is None or positions.ndim != 2:
        return
    for row, length in zip(positions[::copies].expand(len(lengths), -1), lengths, strict=True):
        if row[len(row) - length :].tolist() != list(range(length)):
            raise UserError(
                "The positions of a prompt's tokens do not count from 0, which is all that dsbd_generate does. They "
                "are those of position_ids, or else of attention_mask: give a mask with a number for each of input_ids "
                "and no position_ids, or call generate without custom_generate."
            )


def _settings(generation: GenerationConfig, **given: Any) -> dict[str, Any]:
    """Arguments before the generation config before transformers' defaults."""
    usual = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False}
    chosen = {}
    for name, default in usual.items():
        options = (given[name], getattr(generation, name, None), default)
        chosen[name] = next(option for option in options if option is not None)
    return chosen


def _says_nothing(name: str, value: Any) -> bool:
    """Whether an input tells a model nothing, as those do that come with every prompt of text to a vision-language
    model: no pictures, and that all tokens are text."""
    if name in ("token_type_ids", "mm_token_type_ids") and isinstance(value, Tensor):
        return not value.any()
    return value is None or (isinstance(value, Mapping) and not value)


def _check_beams(settings: Mapping[str, Any], draft_width: int | None, samples: bool) -> None:
    """Refuse numbers in the caller's words; DecodingConfig checks the rest."""
    for name in ("num_beams", "num_return_sequences"):
        whole(name, settings[name], least=1)
    beams, returned = settings["num_beams"], settings["num_return_sequences"]
    if returned > beams and not (beams == 1 and samples):
        sample = ", or set do_sample=True for several samples" if beams == 1 else ""
        raise UserError(
            f"num_return_sequences ({returned}) is more than num_beams ({beams}): there are never more beams than "
            f"that. Lower it or raise num_beams{sample}."
        )
    if isinstance(draft_width, int) and draft_width < beams:
        raise UserError(
            f"draft_width ({draft_width}) is less than num_beams ({beams}): a layer could never pass. Raise it, or "
            "leave it out for twice num_beams."
        )


def _decoding_config(
    generation: GenerationConfig,
    settings: Mapping[str, Any],
    ends: list[int],
    most: int | None,
    max_new_tokens: int,
    draft_width: int | None,
    draft_depth: int,
) -> DecodingConfig:
    """transformers' settings in this decoder's words. Warpers stay processors; they leave at most `most` tokens."""
    beams = settings["num_beams"]
    # Of several beams transformers draws so many candidates for each one that it keeps; one beam is sampled plainly.
    drawn = candidates_per_beam(len(_special(generation, "eos"))) if generation.do_sample and beams > 1 else 1
    return DecodingConfig(
        mode="beam_sample" if generation.do_sample else "beam_search",
        target_width=beams,
        draft_width=2 * beams if draft_width is None else draft_width,
        draft_depth=draft_depth,
        max_new_tokens=max_new_tokens,
        top_k=most if generation.do_sample else None,
        warp="beam",
        oversample=drawn,
        verification="shared_noise",
        length_penalty=settings["length_penalty"],
        early_stopping=settings["early_stopping"],
        eos_token_id=ends,
        num_return_sequences=settings["num_return_sequences"],
    )


def _ends(criteria: StoppingCriteriaList, generation: GenerationConfig) -> list[int]:
    """Tokens that end a hypothesis: the generation config's.

    A criterion of the caller's replaces what they end, but not how many candidates a step looks at: as many ids then
    stand for them that never occur, and the criterion stays one.
    """
    ids = _special(generation, "eos")
    return ids if any(_is_of_config(c, generation) for c in criteria) else [-1] * len(ids)


def _is_of_config(criterion: Any, generation: GenerationConfig) -> bool:
    """Whether a criterion is the one that `generate` made of the generation config's EOS tokens."""
    made_of = getattr(generation, "_eos_token_tensor", None)
    return type(criterion) is EosTokenCriteria and made_of is not None and criterion.eos_token_id is made_of


def _special(generation: GenerationConfig, name: str) -> list[int]:
    """Ids of the special tokens "eos" or "pad", as `generate` has prepared them."""
    tensor = getattr(generation, f"_{name}_token_tensor", None)
    return [] if tensor is None else [int(id_) for id_ in tensor.flatten()]


def _texts(
    input_ids: Tensor, model_kwargs: Mapping[str, Any], copies: int, samples: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows with their padding, and prompts without; each as often as it is sampled.

    Args:
        input_ids: [B * copies, L].
        model_kwargs: from transformers, with attention_mask and position_ids where there are any.
        copies: rows that transformers has made of each prompt.
        samples: texts wanted of each.
    """
    rows, mask = input_ids[::copies], model_kwargs.get("attention_mask")
    lengths = _lengths(rows, mask[::copies] if mask is not None else None)
    _check_positions(model_kwargs.get("position_ids"), lengths, copies)
    padded = rows.tolist()
    prompts = [row[len(row) - length :] for row, length in zip(padded, lengths, strict=True)]
    return [row for row in padded for _ in range(samples)], [prompt for prompt in prompts for _ in range(samples)]


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


def _for_width(
    processors: LogitsProcessorList, beams: int, generation: GenerationConfig, own: Sequence[Any]
) -> LogitsProcessorList:
    """Warpers as transformers makes them for so many beams: of several, a row keeps more tokens than there are EOS's.

    `generate` made them for the num_beams of its config, and did not see one that came as an argument. Those of the
    caller's own stay as they are.
    """
    least = 1 if beams == 1 else max(len(_special(generation, "eos")), 1) + 1
    made = LogitsProcessorList()
    for processor in processors:
        if getattr(processor, "min_tokens_to_keep", least) != least and processor not in own:
            processor = copy.copy(processor)
            processor.min_tokens_to_keep = least
            if isinstance(processor, TopKLogitsWarper):
                processor.top_k = max(generation.top_k, least)
        made.append(processor)
    return made


class _AllowedTokens(PrefixConstrainedLogitsProcessor):
    """Of several beams one whose allowed tokens all are impossible goes; only where no beam can go on does transformers
    force them, and as a row knows of no other, nothing is forced here."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        processed = super().__call__(input_ids, scores)
        return processed.masked_fill(scores == -torch.inf, -torch.inf)


def _for_prompt(processors: LogitsProcessorList, prompt: int, prompts: int, beams: int) -> LogitsProcessorList:
    """The processors for one prompt: those that know about the batch are told which of its rows they see."""
    made = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = _of_prompt(processor._prefix_allowed_tokens_fn, prompt)
            if type(processor) is PrefixConstrainedLogitsProcessor and beams > 1:
                processor = _AllowedTokens(allowed, 1)
            else:
                processor = copy.copy(processor)
                processor._prefix_allowed_tokens_fn, processor._num_beams = allowed, 1
        elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
            ignored = processor.prompt_ignore_length
            if isinstance(ignored, Tensor):  # a number for each row, as many rows for each prompt
                processor = copy.copy(processor)
                processor.prompt_ignore_length = int(ignored[prompt * len(ignored) // prompts])
        made.append(processor)
    return made


def _of_prompt(allowed: Callable[[int, Tensor], list[int]], prompt: int) -> Callable[[int, Tensor], list[int]]:
    return lambda _, tokens: allowed(prompt, tokens)


def _criteria(
    criteria: StoppingCriteriaList,
    stop_strings: str | list[str] | None,
    tokenizer: Any,
    generation: GenerationConfig,
) -> StoppingCriteriaList:
    """What ends a hypothesis beside its length and EOS."""
    known = [c for c in criteria if isinstance(c, MaxLengthCriteria) or _is_of_config(c, generation)]
    kept = StoppingCriteriaList([c for c in criteria if c not in known])
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
    fill = [*_special(generation, "pad"), -1][0]
    if config.target_width > 1 and fill == 0:
        fill = [*_special(generation, "eos"), 0][0]  # as transformers' beam search: a pad token 0 counts as none
    new = torch.full((len(flat), max(map(len, flat))), fill, dtype=torch.long)  # [B * N, new]
    for i, tokens in enumerate(flat):
        new[i, : len(tokens)] = torch.tensor(tokens)
    sequences = torch.cat([input_ids.repeat_interleave(wanted, 0), new.to(input_ids.device)], dim=1)
    if not generation.return_dict_in_generate:
        return sequences
    kept: dict[str, Any] = {
        "sequences": sequences,
        "scores": _steps([result.step_scores for result in results]) if generation.output_scores else None,
        "logits": _steps([result.step_logits for result in results]) if generation.output_logits else None,
    }
    if config.target_width == 1:
        return GenerateDecoderOnlyOutput(**kept)
    beams = torch.full_like(new, -1, dtype=torch.int32)  # [B * N, new]
    for i, result in enumerate(results):
        for j, places in enumerate(result.beams + result.beams[-1:] * (wanted - len(result.beams))):
            beams[i * wanted + j, : len(places)] = torch.tensor(places) + i * config.target_width
    return GenerateBeamDecoderOnlyOutput(
        **kept,
        sequences_scores=torch.tensor([s for row in scores for s in row], device=input_ids.device),
        beam_indices=beams.to(input_ids.device),  # type: ignore[arg-type]
    )


def _steps(of_prompts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Rows [M, V] of every step of each prompt -> [B * M, V] of every step; -inf where a prompt is done."""
    nothing = torch.full_like(of_prompts[0][0], -torch.inf)
    steps = range(max(map(len, of_prompts)))
    return tuple(torch.cat([rows[t] if t < len(rows) else nothing for rows in of_prompts]) for t in steps)
