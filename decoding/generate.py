"""Continue a text: `python -m decoding.generate "text"`, conf/generate.yaml. Prints, and writes
nothing.

The text stands first, or last behind `--` where Hydra would read it as a setting; all else is
Hydra's. It may also come as file=... or through a pipe.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from decoding.config import DecodingConfig
from decoding.decoder import DSBDDecoder
from decoding.errors import UserError
from decoding.forest_view import ForestRecorder, render
from decoding.pairs.pair import ModelPair
from decoding.policies.base import check_unloaded
from decoding.results import DecodeResult, DecodeStats
from decoding.support.checks import whole
from decoding.support.entry import entry_point
from decoding.tasks.base import read_bytes

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)  # what moves a terminal's cursor, sets its colours or turns its lines around
_PROMPT_SHOWN = 1500  # characters of a long prompt


def main() -> DecodeResult:
    """Run on `sys.argv`; whoever reads the output may stop early, as `| head` does."""
    text, sys.argv[1:] = read_arguments(sys.argv[1:])

    @entry_point("generate")
    def generate(cfg: DictConfig) -> DecodeResult:
        return run(cfg, text)

    try:
        result: DecodeResult = generate()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        raise SystemExit(1) from None
    return result


def run(cfg: DictConfig, text: str | None = None) -> DecodeResult:
    """Decode one text and print the outcome.

    Args:
        cfg: the config; it may name the text too.
        text: what to continue; None: what `text` or `file` of the config say, or else what is piped
            in.

    Returns:
        What was decoded.

    Raises:
        UserError: no text, or one that the pair cannot take; settings that cannot work.
    """
    text = read_text({"the argument": text, "text": cfg.text, "file": cfg.file})
    recorder = forest_recorder(cfg)
    config: DecodingConfig = instantiate(cfg.decoding)
    policy = instantiate(cfg.policy)
    check_unloaded(policy, config)  # before the models are loaded
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    pair: ModelPair = instantiate(cfg.pair)
    prompt = tokenised(pair, text)
    decoder = DSBDDecoder(pair, config, policy)
    (result,) = decoder.generate([prompt], torch.Generator().manual_seed(cfg.seed), recorder)
    show(text, prompt, result, pair.tokenizer, config, recorder)
    if recorder is not None and recorder.view is None:
        raise UserError(
            f"forest_iteration is {cfg.forest_iteration}, but there were {recorder.iterations} iterations; give 1 to "
            f"{recorder.iterations}."
        )
    return result


# -------------------------------------------------------------------------------------------- input


def read_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The text that a command line (without the program's name) holds, None without one, and what
    is left for Hydra.
    """
    if "--" in arguments:
        place = arguments.index("--")
        settings, words = arguments[:place], arguments[place + 1 :]
    else:
        words = list(itertools.takewhile(_is_text, arguments))
        settings = arguments[len(words) :]
    text = " ".join(words) if words else None
    return text, ["show_forest=true" if setting == "--show-forest" else setting for setting in settings]


def _is_text(word: str) -> bool:
    """True if a word is neither an option nor readable for Hydra as a setting."""
    if word.startswith("-"):
        return False
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return True
    return False


def read_text(given: Mapping[str, str | None]) -> str:
    """The one text that was given; from a pipe where none was.

    Args:
        given: texts by where they stand, None where there is none; that of "file" is a path.

    Raises:
        UserError: none, several, an empty one, or one that is not UTF-8.
    """
    found = {name: str(text) for name, text in given.items() if text is not None}
    if len(found) > 1:
        raise UserError(f"There are {len(found)} texts, by {' and by '.join(found)}; give one.")
    if "file" in found:
        return _decoded(read_bytes(found["file"]), found["file"])
    if found:
        (text,) = found.values()
        return _decoded(text.encode(errors="surrogateescape"), "The text", whole=True)
    piped = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
    if not piped:
        raise UserError('No text: give it as python -m decoding.generate "text", as file=..., or through a pipe.')
    return _decoded(piped, "What was piped in")


def _decoded(content: bytes, name: str, whole: bool = False) -> str:
    """Bytes as text; of files and pipes without the newline that editors and `echo` put at the end."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from None
    text = text if whole else text.replace("\r\n", "\n").removesuffix("\n")
    if not text:
        raise UserError(f"{name} is empty; give at least one character.")
    return text


def tokenised(pair: ModelPair, text: str) -> list[int]:
    """Token ids of the text, with whatever the tokenizer puts in front."""
    if pair.tokenizer is None:
        raise UserError(f"The pair {pair.name!r} has no tokenizer, so it cannot read text; give one that has.")
    return list(pair.tokenizer(text, verbose=False)["input_ids"])


def forest_recorder(cfg: DictConfig) -> ForestRecorder | None:
    """The recorder that --show-forest asks for; None without it."""
    wanted = cfg.forest_iteration
    if wanted is not None:
        whole("forest_iteration", wanted, least=1)
    return ForestRecorder(wanted) if cfg.show_forest or wanted is not None else None


# ------------------------------------------------------------------------------------------- output


def show(
    text: str,
    prompt: Sequence[int],
    result: DecodeResult,
    tokenizer: Any,
    config: DecodingConfig,
    recorder: ForestRecorder | None,
) -> None:
    """Print the prompt, the forest if there is one, the continuations, and what they took."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=160)

    def text_of(before: Sequence[int], tokens: Sequence[int]) -> str:
        return continuation(tokenizer, before or prompt, tokens)

    cut = f"[{len(text) - _PROMPT_SHOWN} characters]..." if len(text) > _PROMPT_SHOWN else ""
    console.out(fit(cut + text[-_PROMPT_SHOWN:], console), style="dim")
    if recorder is not None and recorder.view is not None:
        console.print()
        console.print(render(recorder.view, text_of, console.options.ascii_only))
    for place in range(len(result.sequences)):
        tokens = result.sequences[place]
        console.print(Text(f"\n{heading(place, result, config)}", "bold"))
        console.out(fit(continuation(tokenizer, prompt, tokens, special=False), console))
    console.print(Text(f"\n{footer(result.stats)}", "dim"))


def heading(rank: int, result: DecodeResult, config: DecodingConfig) -> str:
    """A hypothesis in numbers."""
    score, length = result.scores[rank], len(result.sequences[rank])
    per_token = score * length**config.length_penalty / length
    if result.finished[rank]:
        end = f"finished after {length} tokens"
    elif length >= config.max_new_tokens:
        end = f"cut at max_new_tokens ({length})"
    else:
        end = f"unfinished after {length} tokens"
    return f"[{rank + 1}] score {score:.3f}, log-probability {per_token:.3f} a token, {end}"


def footer(stats: DecodeStats) -> str:
    """Speed, calls, and seconds by phase."""
    seconds = ", ".join(f"{name} {spent:.2f}" for name, spent in stats.seconds.items() if spent >= 0.005)
    return (
        f"{stats.new_tokens / stats.total_seconds:.0f} tokens/s, {stats.block_efficiency:.2f} tokens per target pass; "
        f"{stats.target_calls} target and {stats.draft_calls} draft calls; {stats.prompt_tokens} prompt tokens; "
        f"seconds: {seconds or 'under 0.01'}"
    )


def continuation(tokenizer: Any, before: Sequence[int], tokens: Sequence[int], special: bool = True) -> str:
    """Text of tokens as it follows those before: some tokenizers drop a space at the beginning.

    Args:
        special: write special tokens, such as EOS, too.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    left, whole = decode(before), decode([*before, *tokens])
    return whole[len(left) :] if whole.startswith(left) and not left.endswith("\ufffd") else decode(tokens)


def fit(text: str, console: Console) -> str:
    """Text that a terminal shows and does not obey, in characters that the stream can take."""
    text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


if __name__ == "__main__":
    main()
