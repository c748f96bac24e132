"""DSBDDecoder: draft a forest, verify it in one target pass, commit what was accepted. 2409.16560.

`beam_sample` is the same engine without a draft model: each iteration draws one layer from the
target.
"""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from decoding.config import DecodingConfig
from decoding.errors import UserError, is_out_of_memory
from decoding.loop.batch import Batch
from decoding.loop.processing import Rules
from decoding.pairs.pair import ModelPair, check_prompt
from decoding.policies.base import WidthPolicy
from decoding.policies.fixed import FixedWidth
from decoding.results import DecodeResult, Recorder
from decoding.support.checks import whole

Prompts = Sequence[Sequence[int] | Tensor] | Tensor
Each = TypeVar("Each")


class DSBDDecoder:
    """Dynamic-width speculative beam decoding.

    Args:
        pair: the models.
        config: what to decode.
        policy: decides widths and depth; FixedWidth() asks for the config's widest.

    Raises:
        UserError: the policy cannot work with the config.
    """

    def __init__(
        self, pair: ModelPair, config: DecodingConfig | None = None, policy: WidthPolicy | None = None
    ) -> None:
        if not isinstance(policy, WidthPolicy | None):
            raise UserError(f"policy is {policy!r}; give a WidthPolicy, such as FixedWidth() or ThresholdWidth(0.9).")
        if torch.is_autocast_enabled(pair.device.type):
            raise UserError(
                "torch.autocast is on, but this decoder runs models in their own dtype; leave autocast, and load the "
                "models in the dtype you want (dtype='bfloat16')."
            )
        self.pair, self.config, self.policy = pair, config or DecodingConfig(), policy or FixedWidth()
        self.policy.check(self.config)
        self.policy.check_pair(pair)
        pair.check_forest_passes()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Prompts,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        recorder: Recorder | Sequence[Recorder] | None = None,
        batch_size: int | None = None,
        rules: Rules | Sequence[Rules | None] | None = None,
        halve: bool = True,
    ) -> list[DecodeResult]:
        """Continue each prompt.

        A prompt's result depends on its own random stream alone, not on its neighbours, unless its
        policy learns from them (LearnedWidth and BanditWidth do, where `share` is left on): every
        prompt has its own forest and its own copy of the policy (`WidthPolicy.fork`).

        Args:
            prompts: lists of token ids or 1-D tensors, or one 2-D tensor.
            generator: random stream, from which each prompt's own is derived with its tokens (and,
                of equal prompts, which of them it is); or one for each prompt.
            recorder: is told of every layer; one for each prompt, unless there is only one.
            batch_size: prompts decoded at a time, the next when one is done; None: all.
            rules: logits processors, stopping criteria and a listener; one for each prompt, unless
                there is only one.
            halve: where the device's memory does not suffice, go on with half as many prompts at a
                time, and warn of it; False: raise.

        Returns:
            One DecodeResult per prompt, with config.num_return_sequences hypotheses where there are
            as many.

        Raises:
            UserError: a prompt that the models cannot take, or NaN logits.
            OutOfDeviceMemory: a UserError that holds the results of the prompts that were done.
        """
        token_lists = as_token_lists(prompts)
        for i, tokens in enumerate(token_lists):
            check_prompt(self.pair, tokens, self.config, i)
        if batch_size is not None:
            whole("batch_size", batch_size, least=1, hint="or None for all")
        if not token_lists:
            return []
        recorders = _one_each(recorder, len(token_lists), "recorders")
        given = _one_each(rules, len(token_lists), "rules")
        streams = _streams(generator, token_lists)
        size = min(batch_size or len(token_lists), len(token_lists))
        halve = halve and all(one is None or one.listener is None for one in given)  # it would be told twice
        halve = halve and all(one is None or _restarts(one) for one in recorders)
        states = [stream.get_state() for stream in streams]
        results: list[DecodeResult | None] = [None] * len(token_lists)
        while (todo := [i for i, result in enumerate(results) if result is None]) and not self._decode(
            todo, size, results, (token_lists, streams, recorders, given), halve
        ):
            warnings.warn(
                f"The device ran out of memory with {size} prompts at a time; going on with {size // 2}.", stacklevel=2
            )
            size //= 2
            for i in (i for i in todo if results[i] is None):
                streams[i].set_state(states[i])
                if recorders[i] is not None:
                    recorders[i].restart()
        return [result for result in results if result is not None]

    def _decode(
        self,
        todo: Sequence[int],
        size: int,
        results: list[DecodeResult | None],
        given: tuple[Sequence[Any], ...],
        halve: bool,
    ) -> bool:
        """Decode prompts, `size` at a time; false if memory did not suffice and fewer may fit.

        Args:
            todo: which ones.
            results: filled in as they are done.
            given: token lists, streams, recorders and rules of all.
        """
        tokens, streams, recorders, rules = ([each[i] for i in todo] for each in given)
        found: list[DecodeResult | None] = [None] * len(todo)
        try:
            batch = Batch(self.pair, self.config, self.policy, tokens, streams, recorders, size, found, rules)
            try:
                batch.decode()
            except Exception as error:
                if isinstance(error, UserError) or is_out_of_memory(error):
                    batch.free()
                raise
            finally:
                batch.close()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _fill_in(results, todo, found)
            if size == 1 or not halve:
                raise OutOfDeviceMemory(self.config, size, results) from error.with_traceback(None)  # frees its tensors
            return False
        _fill_in(results, todo, found)
        return True


class OutOfDeviceMemory(UserError):
    """The device's memory did not suffice; `finished` holds the results of the prompts that were
    done, by index.
    """

    def __init__(self, config: DecodingConfig, batch_size: int, results: Sequence[DecodeResult | None]) -> None:
        self.finished = {i: result for i, result in enumerate(results) if result is not None}
        lower = f"batch_size ({batch_size})" if batch_size > 1 else f"max_new_tokens ({config.max_new_tokens})"
        super().__init__(
            f"The device ran out of memory; {len(self.finished)} of {len(results)} prompts were done. Lower {lower}, "
            f"target_width ({config.target_width}) or draft_width ({config.draft_width})."
        )


def beam_sample(
    target: torch.nn.Module,
    prompts: Prompts,
    config: DecodingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    batch_size: int | None = None,
    engine: str = "auto",
) -> list[DecodeResult]:
    """Beam sampling with the target alone, with the engine and the semantics of DSBDDecoder.

    Args, Returns, Raises: as `DSBDDecoder.generate`; drafting settings are ignored. `engine` as for
    `ModelPair`.
    """
    pair = ModelPair(target=target, draft=None, tokenizer=None, engine=engine)
    return DSBDDecoder(pair, config.with_changes(draft_depth=0)).generate(prompts, generator, batch_size=batch_size)


def _fill_in(results: list[DecodeResult | None], places: Sequence[int], found: Sequence[DecodeResult | None]) -> None:
    for i, result in zip(places, found, strict=True):
        results[i] = result


def as_token_lists(prompts: Prompts) -> list[list[int]]:
    """Prompts in any accepted form -> one list of token ids each."""
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise UserError(
            f"prompts is a tensor of {prompts.ndim} dimension(s); give a 2-D tensor [prompts, tokens], or a list "
            "of token lists."
        )
    if isinstance(prompts, str):
        raise UserError("prompts holds text; give token ids, for instance tokenizer(text)['input_ids'].")
    if not isinstance(prompts, Iterable):
        raise UserError(f"prompts is {prompts!r}; give a list of lists of token ids.")
    return [_token_list(i, prompt) for i, prompt in enumerate(prompts)]


def _token_list(index: int, prompt: Any) -> list[int]:
    """One prompt's token ids as Python's own numbers."""
    if isinstance(prompt, str):
        raise UserError("prompts holds text; give token ids, for instance tokenizer(text)['input_ids'].")
    if isinstance(prompt, Integral):
        raise UserError("prompts is one list of token ids; give a list of such lists: [prompt].")
    try:
        return [operator.index(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
    except TypeError:
        raise UserError(
            f"Prompt {index} is {str(prompt)[:80]}; give a list of token ids, which are whole numbers."
        ) from None


def _streams(
    generator: torch.Generator | Sequence[torch.Generator] | None, token_lists: list[list[int]]
) -> list[torch.Generator]:
    """A random stream for each prompt."""
    if generator is not None and not isinstance(generator, torch.Generator):
        if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
            raise UserError(
                f"generator is {generator!r}; give a torch.Generator, such as torch.Generator().manual_seed(0), or one "
                "for each prompt."
            )
        if len(generator) != len(token_lists):
            raise UserError(
                f"{len(generator)} generators for {len(token_lists)} prompts; give one generator, or one for each "
                "prompt."
            )
        return list(generator)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    base = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    seen: Counter[tuple[int, ...]] = Counter()
    streams = []
    for tokens in token_lists:
        copy = seen[tuple(tokens)]
        seen[tuple(tokens)] += 1
        digest = hashlib.sha256(f"{base} {copy} {tokens}".encode()).digest()
        streams.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
    return streams


def _one_each(given: Each | Sequence[Each | None] | None, count: int, what: str) -> list[Any]:
    if given is None:
        return [None] * count
    listed = list(given) if isinstance(given, Sequence) else [given]
    if len(listed) != count:
        raise UserError(f"{len(listed)} {what} for {count} prompts; give one for each prompt.")
    return listed


def _restarts(recorder: Recorder) -> bool:
    """True if a recorder can begin a prompt again."""
    own = getattr(type(recorder), "restart", None)
    return own is not None and own is not Recorder.restart
