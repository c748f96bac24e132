"""Seconds of a pair's passes and of the host, by the clock of this machine, as a `LatencyTable`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from decoding.config import DecodingConfig
from decoding.cost_table import NODE_COUNTS, LatencyTable
from decoding.decoder import DSBDDecoder
from decoding.machine.passes import TOP, ForestPasses, check_draft, forest_passes, rising, synthetic_prompt
from decoding.machine.store import cache_key, device_name, kept_or, timestamp
from decoding.pairs.pair import ModelPair
from decoding.policies.fixed import FixedWidth
from decoding.support.arrays import FloatArray
from decoding.support.checks import whole

_HOST_DEPTH, _HOST_TOKENS, _HOST_RUNS = 2, 24, 3
_SMALLEST = 1e-9  # what a clock that did not move counts as


def measure_seconds(
    pair: ModelPair,
    prompt_tokens: int = 128,
    repeats: int = 7,
    cache_dir: str | Path | None = None,
    fresh: bool = False,
) -> LatencyTable:
    """Seconds of passes over forests of several sizes, and of the host; medians.

    Measured once: later calls, of other processes too, read what is kept for this device, pair,
    engine and versions. A table is measured again after 30 days, or where what is kept cannot be
    read; one that was measured while the machine was busy (`spread` above BUSY) is not kept on
    disk.

    Args:
        pair: both models; what an n-gram draft takes to look up its nodes is timed in the same way.
        prompt_tokens: prompt length behind the forest (at most half of the context is used).
        repeats: timed passes per size, after two to warm up.
        cache_dir: where tables are kept; None: latency/ in DSBD_CACHE, or else in ~/.cache/dsbd.
        fresh: measure again, whatever is kept.

    Raises:
        UserError: a pair without a draft, or one that cannot be decoded.
    """
    check_draft(pair)
    prompt_tokens = whole("prompt_tokens of a latency table", prompt_tokens, least=1)
    repeats = whole("repeats of a latency table", repeats, least=1)
    key = cache_key(pair, unit="seconds", prompt_tokens=prompt_tokens, repeats=repeats)
    return kept_or(lambda: _measure(pair, prompt_tokens, repeats), key, cache_dir, fresh)


@torch.inference_mode()
def _measure(pair: ModelPair, prompt_tokens: int, repeats: int) -> LatencyTable:
    pair.check_forest_passes()  # a fused pass that turns out wrong is replaced: before it is timed
    prompt = synthetic_prompt(pair, prompt_tokens)
    with forest_passes(pair, "target", prompt) as target, forest_passes(pair, "draft", prompt) as draft:
        times = _alternating(target, draft, repeats)  # [2, N, R]
    low, medians, high = np.percentile(times, (25, 50, 75), axis=-1)
    medians = np.maximum(medians, _SMALLEST)
    iteration, layer = _host_seconds(pair, prompt)
    return LatencyTable(
        NODE_COUNTS,
        rising(medians[0]),
        rising(medians[1]),
        device_name(pair),
        iteration,
        layer,
        spread=float(np.median((high - low) / medians)),
        measured=timestamp(),
    )


def _alternating(target: ForestPasses, draft: ForestPasses, repeats: int) -> FloatArray:
    """Seconds of passes in turns, [2, N, repeats] for N = len(NODE_COUNTS).

    In turns over models and sizes, as in decoding: each finds the processor's caches as another
    left them, and a moment in which the machine was busy does not fall on one size alone.
    """
    times = [[[model.run(count)[0] for model in (target, draft)] for count in NODE_COUNTS] for _ in range(repeats + 2)]
    return np.array(times[2:]).transpose(2, 1, 0)  # the first two warm up


def _host_seconds(pair: ModelPair, prompt: list[int]) -> tuple[float, float]:
    """The host's seconds of an iteration without drafts, and of each drafted layer, from short
    decodings.

    Phases "verify" and "other": what is inside neither model, slots and masks of passes included,
    so that nothing is counted twice. Where the draft proposes nothing, a layer counts as an
    iteration does: joints and draws are alike.
    """
    top_k = min(TOP, pair.vocab_size)
    width = min(4, top_k)
    new_tokens = _HOST_TOKENS if pair.context is None else min(_HOST_TOKENS, pair.context - len(prompt))
    config = DecodingConfig(
        target_width=width,
        draft_width=max(width, min(8, pair.vocab_size)),
        draft_depth=_HOST_DEPTH,
        max_new_tokens=max(new_tokens, 1),
        top_k=top_k,
        eos_token_id=-1,
    )
    plain, drafting = (DSBDDecoder(pair, config, FixedWidth(draft_depth=depth)) for depth in (0, _HOST_DEPTH))
    iterations, layers = [], []
    for seed in range(_HOST_RUNS + 1):
        seconds, count, _ = _host_of(plain, prompt, seed)
        iterations.append(seconds / count)
        seconds, count, drafted = _host_of(drafting, prompt, seed)
        layers.append((seconds - count * iterations[-1]) / drafted if drafted else iterations[-1])
    return float(np.median(iterations[1:])), max(0.0, float(np.median(layers[1:])))  # the first runs warm up


def _host_of(decoder: DSBDDecoder, prompt: list[int], seed: int) -> tuple[float, int, int]:
    """The host's seconds of one decoding, its iterations, and the layers that it drafted."""
    (result,) = decoder.generate([prompt], torch.Generator().manual_seed(seed))
    stats = result.stats
    return stats.seconds["verify"] + stats.seconds["other"], stats.iterations, sum(map(len, stats.forests))
