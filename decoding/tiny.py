"""The built-in pair: a small target and a draft distilled from it, trained on Python source code.

    python -m decoding.tiny [--out DIR] [--steps N] [--compile]

is the whole recipe: it reads the standard library of the running interpreter (`tasks/stdlib.py`,
split "model"), trains a byte-level BPE tokenizer and two Llama-architecture models on it, measures
both on the held-out modules and writes what `ModelPair.tiny()` loads.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decoding.pairs.builtin import TINY_DIR, load_tiny
from decoding.support.plain import plain_command
from decoding.tasks.stdlib import split_of, stdlib_modules

EOS = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 512  # tokens, also the length of the training sequences
TARGET_SHAPE = dict(hidden_size=256, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2)
DRAFT_SHAPE = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)

# Line ends and indentation are words of their own, so that a prefix cut at a line end is tokenised
# as it would be inside the file.
_WORDS = Regex(r"\n+| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+")


@dataclass(frozen=True)
class FitConfig:
    """Optimiser settings of one model of the pair."""

    steps: int
    rows: int = 8  # sequences of CONTEXT tokens per step
    matrix_lr: float = 4e-3  # Muon, hidden matrices
    other_lr: float = 4e-3  # AdamW, embeddings and norms
    weight_decay: float = 0.1
    seed: int = 0


TARGET_FIT = FitConfig(steps=2800)
DRAFT_FIT = FitConfig(steps=4500, seed=1)
TEACHER_TOP = 32  # of the target's distribution, per token, that the draft learns from


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer of the pair."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",  # so that batches can be continued
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def read_tokens(tokenizer: PreTrainedTokenizerFast, split: str, tests: bool) -> tuple[Tensor, int]:
    """Tokenise all modules of a split, EOS after each; returns (tokens [N] int64, number of bytes)."""
    texts = [text for name, text in stdlib_modules(tests=tests) if split_of(name) == split]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids = [token for row in encoded for token in [*row, tokenizer.eos_token_id]]
    return torch.tensor(ids, dtype=torch.int64), sum(len(text.encode()) for text in texts)


def draw_batches(fit: FitConfig, epoch: Callable[[torch.Generator], Tensor]) -> Iterator[Tensor]:
    """Yield `fit.steps` batches [fit.rows, ...] of what `epoch` gives, [N, ...] in a fresh order
    each time.
    """
    generator = torch.Generator().manual_seed(fit.seed)
    queue: list[Tensor] = []
    for _ in range(fit.steps):
        while len(queue) < fit.rows:
            queue += list(epoch(generator))
        yield torch.stack([queue.pop() for _ in range(fit.rows)])


def shuffled_rows(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of CONTEXT tokens from a random offset on, shuffled; [N] -> [rows, CONTEXT] int64."""
    rows = cut_rows(tokens[int(torch.randint(CONTEXT, (1,), generator=generator)) :])
    return rows[torch.randperm(len(rows), generator=generator)]


def cut_rows(tokens: Tensor) -> Tensor:
    """[N] -> [N // CONTEXT, CONTEXT]; the rest is dropped."""
    return tokens[: tokens.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT)


Logits = Callable[[Tensor], Tensor]  # tokens [B, T] -> logits [B, T, V] float32


def fit_model(
    model: LlamaForCausalLM,
    batches: Iterator[Tensor],
    fit: FitConfig,
    loss_of: Callable[[Logits, Tensor, float], Tensor],
    title: str,
    compiled: bool = False,
) -> None:
    """Train `model` in place: Muon for matrices, AdamW for the rest, linear warm-up and decay.

    Args:
        loss_of: (the model's forward, a batch, share of the run done) -> scalar loss.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=fit.matrix_lr, weight_decay=fit.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=fit.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 100, 1.0) * (1 - step / fit.steps))
        for o in optimizers
    ]
    module = torch.compile(model) if compiled else model

    def forward(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(input_ids=tokens, use_cache=False).logits.float()

    model.train()
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=fit.steps, status="")
        for step, batch in enumerate(batches):
            loss = loss_of(forward, batch, step / fit.steps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            progress.update(task, advance=1, status=f"loss {loss.item():.3f}")
            if step % 100 == 0:
                progress.console.print(f"{title} step {step}: loss {loss.item():.3f}", highlight=False)
    model.eval()


def next_token_loss(logits_of: Logits, batch: Tensor, done: float) -> Tensor:
    """Cross entropy of the next token; batch [B, T]."""
    return F.cross_entropy(logits_of(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@dataclass(frozen=True)
class Lessons:
    """The target's TEACHER_TOP likeliest tokens after every token of some sequences, with their
    probabilities.
    """

    rows: Tensor  # [N, CONTEXT] int64
    likely: Tensor  # [N, CONTEXT, TEACHER_TOP] int16
    probs: Tensor  # [N, CONTEXT, TEACHER_TOP] bfloat16

    @classmethod
    @torch.no_grad()
    def from_target(cls, target: LlamaForCausalLM, tokens: Tensor, batch: int = 8) -> Lessons:
        """Run the target once over all sequences."""
        rows = cut_rows(tokens)
        likely, probs = [], []
        for part in track(rows.split(batch), "target's lessons"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = target(input_ids=part, use_cache=False).logits
            top = logits.float().softmax(-1).topk(TEACHER_TOP)
            likely.append(top.indices.short())
            probs.append(top.values.bfloat16())
        return cls(rows, torch.cat(likely), torch.cat(probs))

    def loss(self, logits_of: Logits, batch: Tensor, done: float) -> Tensor:
        """KL(p || q), then, from the middle of the run, mostly the total variation distance; batch
        [B] of rows.

        The accept probability of a draft is Σ min(p, q) = 1 - TV(p, q) (2211.17192, theorem 3.5),
        so the total variation is what the draft is for; it gives no useful gradient far from the
        target, hence the KL first.
        """
        likely, p = self.likely[batch].long(), self.probs[batch].float()  # [B, T, K]
        log_q = logits_of(self.rows[batch]).log_softmax(-1).gather(-1, likely)
        kl = (p * (p.clamp_min(1e-9).log() - log_q)).sum(-1).mean()
        if done < 0.5:
            return kl
        q = log_q.exp()
        rest = ((1 - p.sum(-1)) - (1 - q.sum(-1))).abs()  # tokens outside of the target's likeliest, as one
        return 0.1 * kl + ((q - p).abs().sum(-1) + rest).mean()


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokens: Tensor, num_bytes: int) -> float:
    """Held-out loss in bits per byte; every token sees at least half a context before it."""
    stride, nats = CONTEXT // 2, 0.0
    for start in track(range(0, tokens.numel() - 1, stride), "held-out loss"):
        window = tokens[max(0, start - stride) : start + stride + 1][None]
        fresh = min(stride, tokens.numel() - 1 - start)
        logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
        nats += F.cross_entropy(logits[0, -fresh:], window[0, -fresh:], reduction="sum").item()
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def mean_overlap(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokens: Tensor, top_k: int = 10) -> float:
    """Mean of Σ min(P, Q) over held-out positions, both cut to `top_k` tokens and re-normalised."""
    shares = []
    rows = cut_rows(tokens)
    for window in track(rows[:: max(1, len(rows) // 200)], "overlap"):
        cut = []
        for model in (target, draft):
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()  # [T, V]
            floor = logits.topk(top_k, dim=-1).values[:, -1:]
            cut.append(logits.masked_fill(logits < floor, -torch.inf).softmax(-1))
        shares.append(torch.minimum(*cut).sum(-1).mean())
    return torch.stack(shares).mean().item()


def build_model(shape: dict[str, Any], intermediate_size: int, eos: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            **shape,
            intermediate_size=intermediate_size,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=None,
        )
    )


def measure_pair(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Held-out numbers of the pair, on the library modules of split "test"."""
    tokens, num_bytes = read_tokens(tokenizer, "test", tests=False)
    return {
        "target_bits_per_byte": round(bits_per_byte(target, tokens, num_bytes), 4),
        "draft_bits_per_byte": round(bits_per_byte(draft, tokens, num_bytes), 4),
        "overlap_top_k_10": round(mean_overlap(target, draft, tokens), 4),
        "held_out_bytes": num_bytes,
        "held_out_tokens": tokens.numel(),
    }


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write bf16 safetensors."""
    model.bfloat16().save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Train both models and write them to `--out`."""
    parser = argparse.ArgumentParser(prog="python -m decoding.tiny", description="Train the built-in pair.")
    parser.add_argument("--out", type=Path, default=TINY_DIR, help="folder to write (default: the package's own)")
    parser.add_argument("--steps", type=int, default=TARGET_FIT.steps, help="optimiser steps of the target")
    parser.add_argument("--draft-steps", type=int, default=DRAFT_FIT.steps, help="optimiser steps of the draft")
    parser.add_argument("--compile", action="store_true", help="torch.compile (about 1.2x, needs a C++ compiler)")
    parser.add_argument("--draft-only", action="store_true", help="distil a new draft from the target in --out")
    options = parser.parse_args(argv)
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    numbers = train_pair(partial, options)
    (partial / "recipe.json").write_text(json.dumps(numbers, indent=2) + "\n")
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)
    print(json.dumps(numbers, indent=2))


def train_pair(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train, save and measure the pair in a new folder; the old one stays until this is done.

    Returns:
        The held-out numbers and the settings, for recipe.json.
    """
    torch.manual_seed(0)
    if options.draft_only:
        target, _, tokenizer = load_tiny(options.out)
    else:
        tokenizer = train_tokenizer(text for name, text in stdlib_modules() if split_of(name) == "model")
        target = build_model(TARGET_SHAPE, 640, tokenizer.eos_token_id)
    draft = build_model(DRAFT_SHAPE, 512, tokenizer.eos_token_id)
    library, tests = (read_tokens(tokenizer, "model", tests)[0] for tests in (False, True))
    tokens = torch.cat([library, tests])
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in (("target", target), ("draft", draft))}
    print(f"{tokens.numel():,} training tokens, {library.numel():,} of them for the draft; parameters: {sizes}")
    if not options.draft_only:
        fit = FitConfig(steps=options.steps, seed=TARGET_FIT.seed)
        fit_model(
            target, draw_batches(fit, partial(shuffled_rows, tokens)), fit, next_token_loss, "target", options.compile
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    save_model(target, folder / "target")
    lessons = Lessons.from_target(target.float(), library)
    fit = FitConfig(steps=options.draft_steps, seed=DRAFT_FIT.seed)
    batches = draw_batches(fit, lambda generator: torch.randperm(len(lessons.rows), generator=generator))
    fit_model(draft, batches, fit, lessons.loss, "draft", options.compile)
    save_model(draft, folder / "draft")
    return measure_pair(*load_tiny(folder)) | {
        "parameters": sizes,
        "train_tokens": tokens.numel(),
        "steps": options.steps,
        "draft_steps": options.draft_steps,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    with plain_command():
        main()
