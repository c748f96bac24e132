"""Traces and controllers of the small random pair: made within a second, nothing in them is learned from text."""

from __future__ import annotations

import functools
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from controller import LearnedWidth, WidthNet
from controller.features import ContextFeatures
from decoding import DecodingConfig, DSBDDecoder, ExploringWidth
from decoding.traces import TraceRecorder
from decoding.traces.schema import SCHEMA_VERSION
from decoding.traces.store import write_manifest, write_shard
from tests.small_pair import small_pair

CONFIG = DecodingConfig(
    target_width=3,
    draft_width=12,
    draft_depth=3,
    top_k=8,
    max_new_tokens=12,
    eos_token_id=-1,
    verification="shared_noise",
)
FEATURES = ContextFeatures()
ABOUT = {
    "version": FEATURES.version,
    "names": list(FEATURES.names),
    "candidate_names": list(FEATURES.candidate_names),
}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids of the small pair."""
    draw = random.Random(seed)
    return [[draw.randrange(3, 60) for _ in range(draw.randrange(3, 9))] for _ in range(count)]


def streams(count: int) -> list[torch.Generator]:
    """A random stream for each prompt."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@functools.cache
def rows(count: int = 8) -> tuple[dict[str, Any], ...]:
    """Rows of traces; every fourth prompt is of split val."""
    recorders = [TraceRecorder(FEATURES) for _ in range(count)]
    for i, recorder in enumerate(recorders):
        recorder.start(f"p{i}", "val" if i % 4 == 3 else "train")
    DSBDDecoder(small_pair(), CONFIG, ExploringWidth()).generate(prompts(count), streams(count), recorders)
    return tuple(row for recorder in recorders for row in recorder.take_rows())


def write_traces(directory: Path, count: int = 8, tested: int | None = None, **changes: Any) -> Path:
    """Traces as `decoding.collect` leaves them; `changes` of the manifest. Prompt `tested` is of split test."""
    directory.mkdir(exist_ok=True)
    chosen = [row | ({"split": "test"} if row["prompt_id"] == f"p{tested}" else {}) for row in rows(count)]
    shard = write_shard(directory, "traces-00000.parquet", chosen, {"trace_key": "k", "feature_names": []})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "trace_key": "k",
        "complete": True,
        "shards": [shard],
        "rows": len(rows(count)),
        "prompts": count,
        "features": ABOUT,
        "decoding": asdict(CONFIG),
        "pair": small_pair().describe(),
    }
    write_manifest(directory, manifest | changes)
    return directory


def random_net(seed: int = 0, target_width: int = CONFIG.target_width) -> WidthNet:
    """A network that has learned nothing, its rules neither."""
    torch.manual_seed(seed)
    net = WidthNet(target_width)
    for parameter in [*net.before.parameters(), *net.after.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    return net.eval().requires_grad_(False)


def random_policy(seed: int = 0, **options: Any) -> LearnedWidth:
    """LearnedWidth by `random_net`, for the small pair."""
    about = {"features": ABOUT, "pair": small_pair().describe(), "decoding": asdict(CONFIG)}
    return LearnedWidth(random_net(seed), about, **options)
