"""Same seed, same tokens? Shared noise and beam sampling by the target alone, at random settings.

    python -m studies.equal_tokens [settings] [prompts]

The built-in pair, 64 settings of 16 prompts where nothing else is said: drafts, widths, depths,
policies, cuts, EOS, stopping rules, batches, and joint distributions on the host and on the device.
Prints what differs, and how much.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

import decoding.dice.sampling
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
    beam_sample,
)
from decoding.tasks.stdlib import StdlibTask

POLICIES = {
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


def different(pair: ModelPair, seed: int, count: int) -> list[str]:
    """Sentences on the prompts whose tokens differ under the setting of a seed."""
    dice = random.Random(seed)
    config, name = setting(dice), dice.choice(sorted(POLICIES))
    decoding.dice.sampling.HOST_VOCABULARY = dice.choice(
        [16, 2048, 10**6]
    )  # 16: joints without top-k stay on the device
    policy: WidthPolicy = POLICIES[name]()
    prompts = [p.tokens for p in StdlibTask(prompt_tokens=32).prompts("val", count, pair.tokenizer)]
    ours = DSBDDecoder(pair, config, policy).generate(
        prompts, torch.Generator().manual_seed(seed), batch_size=dice.choice([None, 1, 5])
    )
    alone = beam_sample(pair.target, prompts, config, torch.Generator().manual_seed(seed))
    pairs = enumerate(zip(ours, alone, strict=True))
    return [f"setting {seed} ({name}, {config}): prompt {i}" for i, (a, b) in pairs if a.sequences != b.sequences]


def main() -> None:
    """Compare; exit status 1 where anything differs."""
    settings, prompts = (int(word) for word in [*sys.argv[1:], "64", "16"][:2])
    target = ModelPair.tiny().target
    tokenizer = ModelPair.tiny().tokenizer
    drafts = [ModelPair.tiny().draft, "ngram", "layers:2"]
    found: list[str] = []
    for seed in range(settings):
        pair = ModelPair(target, drafts[seed % len(drafts)], tokenizer)
        found += different(pair, seed, prompts)
    print("\n".join([*found, f"{len(found)} of {settings * prompts} prompts x settings differ"]))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
