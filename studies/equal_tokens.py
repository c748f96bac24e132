"""Same seed, same tokens? Shared noise and beam sampling by the target alone, at random settings.

    python -m studies.equal_tokens [settings] [prompts] [first]

The built-in pair, 64 settings of 16 prompts from setting 0 on where nothing else is said: drafts,
widths, depths, policies, processors, cuts, EOS, stopping rules, batches, and joint distributions on
the host and on the device. Each prompt that differs is shown with the two keys (or weights) that
changed places at its first differing step; the learned policy is a network of random weights.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import decoding.dice.sampling
from controller import LearnedWidth, WidthNet
from controller.features import ContextFeatures
from decoding import (
    DecodingConfig,
    DSBDDecoder,
    EntropyWidth,
    FixedWidth,
    MassWidth,
    ModelPair,
    RandomWidth,
    ThresholdWidth,
    WidthPolicy,
)
from decoding.dice.selection import run_race
from decoding.loop.noise_run import NoiseRun, Step
from decoding.loop.processing import Rules
from decoding.support.plain import plain_command
from decoding.tasks.stdlib import StdlibTask

NEAR = 1e-5  # of two keys, relative to the larger: what another shape of a pass may change
_FURTHER = 8  # keys beyond the selection that are noted, so that what was swapped in is found
POLICIES: dict[str, type[WidthPolicy]] = {
    "fixed": FixedWidth,
    "random": RandomWidth,
    "threshold": ThresholdWidth,
    "mass": MassWidth,
    "entropy": EntropyWidth,
}  # with min_width = target_width they decide the drafts alone


STOPS: list[bool | str] = [False, True, "never"]


def setting(dice: random.Random) -> DecodingConfig:
    """A config at full widths."""
    width, oversample = dice.choice([1, 2, 3, 4, 6, 8]), dice.choice([1, 1, 2])
    cuts = [cut for cut in (10, 20) if cut >= oversample * width]
    most: dict[str, Any] = {"draft_width": max(width, dice.choice([8, 16, 24])), "draft_depth": dice.choice([1, 2, 3])}
    return DecodingConfig(
        target_width=width,
        min_width=width,
        **most,
        max_new_tokens=16,
        temperature=dice.choice([0.7, 1.0, 1.3]),
        top_k=dice.choice([None, *cuts]),
        warp=dice.choice(["joint", "beam"]),
        oversample=oversample,
        eos_token_id=dice.choice([-1, None, [3, 17]]),
        early_stopping=dice.choice(STOPS),
        length_penalty=dice.choice([0.0, 0.6, 1.0]),
        min_new_tokens=dice.choice([0, 3]),
    )


def learned(pair: ModelPair, width: int, seed: int) -> LearnedWidth:
    """A controller that has learned nothing: its decisions vary more than a trained one's."""
    torch.manual_seed(seed)
    net, features = WidthNet(width), ContextFeatures()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    names = {"names": list(features.names), "candidate_names": list(features.candidate_names)}
    return LearnedWidth(
        net.requires_grad_(False), {"features": {"version": features.version, **names}, "pair": pair.describe()}
    )


Steps = dict[int, list[dict[tuple[int, ...], tuple[float, float]]]]  # by prompt, of each step: path -> key, weight


@contextmanager
def noted() -> Iterator[Steps]:
    """Notes the first entries of every race on P while the block runs, in their order."""
    steps: Steps = defaultdict(list)
    plain = NoiseRun._step

    def step(self: NoiseRun, target: Any) -> Step:
        race = run_race(target, self.noise, self.config.oversample * self.config.target_width + _FURTHER)
        children = zip(race.parents.tolist(), race.tokens.tolist(), strict=True)
        paths = [(*self.forest.path(parent), token) for parent, token in children]
        values = zip(race.keys.tolist(), race.weights.tolist(), strict=True)
        steps[self.index].append(dict(zip(paths, values, strict=True)))
        return plain(self, target)

    NoiseRun._step = step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        NoiseRun._step = plain  # type: ignore[method-assign]


def gap(a: float, b: float) -> float:
    """The distance of two numbers relative to the larger."""
    return abs(a - b) / max(abs(a), abs(b))


def heaviest_first(
    order: list[tuple[int, ...]], noted: dict[tuple[int, ...], tuple[float, float]]
) -> list[tuple[int, ...]]:
    """Paths by their weights."""
    return sorted(order, key=lambda path: -noted[path][1])


def first_swap(
    ours: list[dict[tuple[int, ...], tuple[float, float]]],
    alone: list[dict[tuple[int, ...], tuple[float, float]]],
    drawn: int,
    by_weight: bool,
) -> tuple[float, str]:
    """Find the margin of the entries that changed places at the first step that differs, in words.

    Args:
        ours, alone: what was noted of both.
        drawn: entries that a step draws.
        by_weight: whether the likeliest of those drawn are kept.
    """
    for number, (a, b) in enumerate(zip(ours, alone, strict=False)):
        for value, name in enumerate(["keys", "weights"][: 1 + by_weight]):
            orders = [list(x)[:drawn] for x in (a, b)]
            if name == "weights":
                orders = [heaviest_first(order, x) for order, x in zip(orders, (a, b), strict=True)]
            for mine, other in zip(*orders, strict=False):
                if mine == other:
                    continue
                if mine not in b:
                    return 1.0, f"step {number}: {mine} is not among the first {name} of the target alone"
                margin = gap(b[mine][value], b[other][value])
                return margin, f"step {number}: {name} {b[mine][value]!r} and {b[other][value]!r}"
    return 1.0, "no step differs"


def rules_of(prompt: list[int]) -> Rules:
    """A repetition penalty."""
    return Rules(prompt, LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)]))


def different(pair: ModelPair, seed: int, count: int, covered: Counter[str]) -> list[tuple[float, str]]:
    """Margins of, and sentences on, the prompts whose tokens differ under the setting of a seed."""
    dice = random.Random(seed)
    config = setting(dice)
    names = [*POLICIES, "learned"]
    name = names[seed % len(names)]
    # 16: joints without top-k stay on the device
    decoding.dice.sampling.HOST_VOCABULARY = dice.choice([16, 2048, 10**6])
    policy = learned(pair, config.target_width, seed) if name == "learned" else POLICIES[name]()
    prompts = [p.tokens for p in StdlibTask(prompt_tokens=32).prompts("val", count, pair.tokenizer)]
    rules = [rules_of(prompt) for prompt in prompts] if dice.random() < 0.4 else None
    batch = dice.choice([None, 1, 5])
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    with noted() as steps:
        ours = DSBDDecoder(pair, config, policy).generate(prompts, generators[0], batch_size=batch, rules=rules)
    plain = DSBDDecoder(ModelPair(pair.target, None), config.with_changes(draft_depth=0))
    with noted() as steps_alone:
        alone = plain.generate(prompts, generators[1], rules=rules)
    where = "full" if config.top_k is None else "compact"
    values = [f"policy {name}", f"R {config.target_width}", f"oversample {config.oversample}", f"vocabulary {where}"]
    values += [f"batch {batch}", f"processors {rules is not None}", f"EOS {config.eos_token_id}"]
    covered.update(dict.fromkeys(values, count))
    found = []
    for i, (a, b) in enumerate(zip(ours, alone, strict=True)):
        if a.sequences != b.sequences:
            drawn = config.oversample * config.target_width
            margin, sentence = first_swap(steps[i], steps_alone[i], drawn, config.oversample > 1)
            found.append((margin, f"setting {seed} ({name}, {config}): prompt {i}: {margin:.1e}, {sentence}"))
    return found


def main() -> None:
    """Compare; exit status 1 where anything differs by more than a near tie."""
    settings, prompts, first = (int(word) for word in [*sys.argv[1:], *["64", "16", "0"][len(sys.argv) - 1 :]])
    warnings.simplefilter("ignore", UserWarning)  # the controller was not trained for these settings
    tiny = ModelPair.tiny()
    drafts = {"model": tiny.draft, "ngram": "ngram", "layers:2": "layers:2"}
    found: list[tuple[float, str]] = []
    covered: Counter[str] = Counter()
    for seed in range(first, first + settings):
        name = list(drafts)[seed % len(drafts)]
        covered[f"draft {name}"] += prompts
        fresh = different(ModelPair(tiny.target, drafts[name], tiny.tokenizer), seed, prompts, covered)
        found += fresh
        done = (seed - first + 1) * prompts
        print(
            *(sentence for _, sentence in fresh),
            f"{len(found)} of {done} prompts x settings differ",
            sep="\n",
            flush=True,
        )
    print(", ".join(f"{value}: {count}" for value, count in sorted(covered.items())))
    far = sum(margin > NEAR for margin, _ in found)
    print(f"{len(found)} differ, {far} of them where no two keys lie closer than {NEAR:g}")
    raise SystemExit(far > 0)


if __name__ == "__main__":
    with plain_command():
        main()
