"""What users would run instead, as functions of one shape: `method(prompts, generator) -> list[DecodeResult]`.

`METHODS` names them all. Those of this engine are settings of DSBDDecoder, so that a comparison with it compares
methods and not implementations; the `hf_` ones are transformers' own `generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from decoding.bandit import BanditWidth
from decoding.config import DecodingConfig
from decoding.decoder import DSBDDecoder, Prompts, as_token_lists
from decoding.errors import UserError
from decoding.hand_set import EntropyWidth, GapWidth, HandSetWidth, MassWidth
from decoding.lookup import NgramDraft
from decoding.oracles import SurvivorOracle
from decoding.pair import ModelPair, check_prompt, end_tokens
from decoding.results import DecodeResult, DecodeStats
from decoding.widths import FixedWidth, RandomWidth, ThresholdWidth, WidthPolicy

_LOOKUP_TOKENS = 10  # that transformers' prompt lookup drafts at a time, as its documentation does
Streams = torch.Generator | Sequence[torch.Generator]  # one for each prompt, or one for all
Generate = Callable[[Prompts, Streams], list[DecodeResult]]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to decode.

    Args:
        build: (pair, config, settings) -> Generate.
        axes: settings that are worth sweeping: the DecodingConfig fields target_width, draft_width and draft_depth, and
            asked_width (M of fixed widths and of the bandit), final_width, surplus, threshold, share, gap, scale,
            stop_entropy, width_value.
        fixed: DecodingConfig fields that it always has.
    """

    build: Callable[[ModelPair, DecodingConfig, Settings], Generate]
    axes: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def configure(self, config: DecodingConfig, settings: Settings) -> DecodingConfig:
        """The config with the method's and the row's settings; narrower widths pull their dependents along."""
        names = ("target_width", "draft_width", "draft_depth", "surplus")
        changes: dict[str, Any] = {key: settings[key] for key in names if key in settings}
        changes.update(self.fixed)
        if {"surplus", "refill"} <= set(self.fixed):
            changes["exact"] = False  # a method that is nothing without its own rules, whatever the config says
        width = changes.get("target_width", config.target_width)
        changes["min_width"] = min(config.min_width, width)
        changes["num_return_sequences"] = min(config.num_return_sequences, width)
        if "draft_width" not in changes:
            changes["draft_width"] = max(config.draft_width, width)
        return config.with_changes(**changes)

    def __call__(self, pair: ModelPair, config: DecodingConfig, settings: Settings | None = None) -> Generate:
        """The method for a pair, with the row's settings."""
        settings = settings or {}
        return self.build(pair, self.configure(config, settings), settings)


def policy_method(make: Callable[[ModelPair, DecodingConfig, Settings], WidthPolicy], axes: tuple[str, ...]) -> Method:
    """DSBDDecoder with the policy that `make` returns; one policy object serves all prompts of a row."""

    def build(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
        return DSBDDecoder(pair, config, make(pair, config, settings)).generate

    return Method(build, axes)


def hf_generate(
    pair: ModelPair,
    prompts: Prompts,
    config: DecodingConfig,
    generator: Streams,
    assisted: bool = False,
    num_beams: int = 1,
) -> list[DecodeResult]:
    """transformers' `generate`, one prompt at a time: sampling, beam sampling, assisted sampling, beam search.

    Differences from this engine that a reader of a comparison should know: top_k and top_p cut each beam's row, not the
    joint distribution; beam sampling draws 2 * num_beams candidates (more with several EOS tokens) and keeps the best
    num_beams of them; `scores` are NaN, because asking for them would slow it down. The generation config that comes
    with the target (temperature, penalties, ...) is set aside, so that nothing but `config` counts.

    Args:
        pair: the models; the draft is used where `assisted`.
        prompts: as for DSBDDecoder.generate.
        config: mode, max_new_tokens, min_new_tokens, temperature, top_k, top_p, EOS, length_penalty, early_stopping,
            num_return_sequences.
        generator: seeds torch's global generators within the call; they are restored after it. One, or one a prompt.
        assisted: speculative sampling with pair.draft as `assistant_model`, or by transformers' own prompt lookup where
            the draft is n-grams; needs num_beams=1.
        num_beams: beams; 1 is plain sampling.

    Returns:
        One DecodeResult per prompt. `iterations` counts the prompt's own pass, which gives a token here; `target_calls`
        does not, as everywhere; kv_slots are those of one copy of the sequence per beam; all seconds are "other".
    """
    ends = end_tokens(pair, config)
    options: dict[str, Any] = {
        "do_sample": config.mode == "beam_sample",
        "num_beams": num_beams,
        "num_return_sequences": min(config.num_return_sequences, num_beams),
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens or None,
        "eos_token_id": sorted(ends) or None,
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
        options |= _assistance(pair)
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
        stack.enter_context(_own_settings_aside(pair.target))
        target, draft = (stack.enter_context(_count_calls(pair.models.get(role))) for role in ("target", "draft"))
        began = now(pair.device)
        output = pair.target.generate(ids, attention_mask=torch.ones_like(ids), **options)  # [N, T + new]
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


def _assistance(pair: ModelPair) -> dict[str, Any]:
    """What `generate` takes to be assisted by the pair's draft."""
    if isinstance(pair.draft, NgramDraft):
        return {"prompt_lookup_num_tokens": _LOOKUP_TOKENS, "max_matching_ngram_size": pair.draft.max_ngram}
    if pair.vocabulary is not None:
        raise UserError(
            "hf_assisted needs a draft with the target's token ids and as many embedding rows, as transformers' own "
            f"generate does; the target has {pair.vocab_size}, the draft {pair.vocabulary.draft_size}."
        )
    return {"assistant_model": pair.draft}


def _cut_at_end(tokens: list[int], ends: frozenset[int]) -> tuple[list[int], bool]:
    """Tokens up to the first EOS, itself included, without the padding after it; and whether there is one."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1], True
    return tokens, False


def _seed_from(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


@contextmanager
def _seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Global generators seeded from `generator`; restored afterwards. `generate` takes no generator of its own."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_seed_from(generator))
        yield


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
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

    hook = model.register_forward_pre_hook(count) if model is not None else None
    try:
        yield calls
    finally:
        if hook is not None:
            hook.remove()


def now(device: torch.device) -> float:
    """Seconds of the clock once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _engine_alone(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
    return DSBDDecoder(pair, config.with_changes(draft_depth=0)).generate


def _hf(assisted: bool) -> Callable[[ModelPair, DecodingConfig, Settings], Generate]:
    def build(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
        def generate(prompts: Prompts, generator: Streams) -> list[DecodeResult]:
            return hf_generate(pair, prompts, config, generator, assisted, config.target_width)

        return generate

    return build


def _widest(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
    return DSBDDecoder(pair, config, FixedWidth()).generate


def _fixed(pair: ModelPair, config: DecodingConfig, settings: Settings) -> WidthPolicy:
    return FixedWidth(target_width=settings.get("asked_width"), final_width=settings.get("final_width"))


def _hand_set(rule: type[HandSetWidth], axis: str) -> Method:
    """A rule with its own axis; what no axis sets is as the rule has it."""
    axes = (axis, "final_width", "stop_entropy")

    def make(pair: ModelPair, config: DecodingConfig, settings: Settings) -> WidthPolicy:
        return rule(**{name: settings[name] for name in axes if name in settings})

    return policy_method(make, (*_DRAFT, *axes, "surplus"))


def _bandit(pair: ModelPair, config: DecodingConfig, settings: Settings) -> WidthPolicy:
    return BanditWidth(target_width=settings.get("asked_width"))


def _oracle_survivor(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
    return SurvivorOracle.make(pair, config)


def _threshold(as_shipped: bool) -> Callable[[ModelPair, DecodingConfig, Settings], WidthPolicy]:
    return lambda pair, config, settings: ThresholdWidth(settings.get("threshold", 0.9), as_shipped=as_shipped)


_DRAFT = ("draft_width", "draft_depth")
_ONE = {"target_width": 1}
_ALL_BEAMS = {"one_beam_cache": False}
_SEARCH = {"mode": "beam_search", "temperature": 1.0, "top_k": None, "top_p": None, "replacement": False}
_CHAIN = {"target_width": 1, "draft_width": 1}
_SAMPLE = {"mode": "beam_sample"}  # whatever the config says: their names do
METHODS: dict[str, Method] = {
    "multinomial": Method(_engine_alone, fixed=_CHAIN | _SAMPLE | _ALL_BEAMS),
    "beam_sample": Method(_engine_alone, ("target_width",), _SAMPLE | _ALL_BEAMS),
    "speculative": Method(_widest, ("draft_depth",), _CHAIN),  # a chain of single drafts, 2211.17192
    "multi_draft": Method(_widest, _DRAFT, _ONE),  # SpecInfer, 2305.09781: several drafts a layer, one sample
    "fixed": policy_method(_fixed, ("target_width", *_DRAFT, "asked_width", "final_width", "surplus")),
    "threshold": policy_method(_threshold(as_shipped=False), (*_DRAFT, "threshold", "surplus")),
    "threshold_as_shipped": policy_method(_threshold(as_shipped=True), (*_DRAFT, "threshold")),
    "paper": Method(  # the paper's rule as its authors ran it, widths by the right probabilities
        policy_method(_threshold(as_shipped=False), ()).build,
        (*_DRAFT, "threshold"),
        {"surplus": "drop", "refill": "full", "one_beam_cache": True},
    ),
    "mass": _hand_set(MassWidth, "share"),
    "gap": _hand_set(GapWidth, "gap"),
    "entropy": _hand_set(EntropyWidth, "scale"),
    "bandit": policy_method(_bandit, (*_DRAFT, "asked_width")),  # arms within draft_width, draft_depth
    "oracle_survivor": Method(_oracle_survivor, _DRAFT),  # not achievable: compare what it models, not what it takes
    "random": policy_method(lambda pair, config, settings: RandomWidth(), _DRAFT),
    "beam_search": Method(_engine_alone, ("target_width",), _SEARCH | _ALL_BEAMS),
    "speculative_beam_search": Method(_widest, ("target_width", *_DRAFT), _SEARCH),
    "hf_sample": Method(_hf(assisted=False), fixed=_CHAIN | _SAMPLE),
    "hf_beam_sample": Method(_hf(assisted=False), ("target_width",), _SAMPLE),
    "hf_beam_search": Method(_hf(assisted=False), ("target_width",), _SEARCH),
    "hf_assisted": Method(_hf(assisted=True), fixed=_CHAIN),
}
