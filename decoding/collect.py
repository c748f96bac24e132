"""Log decoding traces: `python -m decoding.collect pair=... data=...`. Design section 7.

Prompts are decoded under a randomised width policy; a trace directory is named after everything that
decides its content, so the same settings find it again, and an interrupted run goes on where it stopped.
Files count by what is in them, not by their paths.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from decoding.architecture import text_config
from decoding.config import DecodingConfig
from decoding.decoder import DSBDDecoder
from decoding.entry import entry_point
from decoding.errors import UserError
from decoding.pair import ModelPair
from decoding.progress import RunProgress
from decoding.provenance import git_sha, library_versions, to_plain
from decoding.tasks.base import FileTask, Prompt, content_hash
from decoding.traces import SCHEMA_VERSION, TraceRecorder, read_manifest, write_manifest, write_shard

SHARD_PROMPTS = 25
_FILES = ("path", "results", "latency")  # settings of policies that name what is read


@entry_point(config_name="collect")
def main(cfg: DictConfig) -> None:
    """Collect the traces that the config describes, unless they are there."""
    directory = ensure_traces(cfg)
    manifest = read_manifest(directory) or {}
    print(f"{manifest.get('rows', 0)} trace rows of {manifest.get('prompts', 0)} prompts are in {directory}")


def ensure_traces(cfg: DictConfig, pair: ModelPair | None = None) -> Path:
    """The directory of the traces that `cfg` describes; collected now if they are absent or incomplete.

    Args:
        cfg: with pair, data, decoding, policy, features, collect and seed, as in conf/collect.yaml.
        pair: the models, where they are loaded already.

    Raises:
        UserError: settings that cannot work, or a directory with foreign traces.
    """
    mode = instantiate(cfg.decoding).mode
    if mode != "beam_sample":
        raise UserError(
            f"decoding.mode is {mode!r}, but traces are logged of sampling: controllers learn from accept "
            "bits, which beam search does not have. Leave decoding.mode=beam_sample; a policy can be used in both."
        )
    pair = pair or instantiate(cfg.pair)
    features = instantiate(cfg.features)
    about = _describe(cfg, pair, features)
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    directory = Path(cfg.collect.traces_dir) / f"{pair.name}-{key[:12]}"
    manifest = read_manifest(directory)
    if manifest is not None and manifest["trace_key"] != key:
        raise UserError(f"{directory} holds traces of another collection; move it away or change collect.traces_dir.")
    if manifest is None or not manifest["complete"]:
        manifest = manifest or _new_manifest(about, key, pair)
        _collect(cfg, pair, features, directory, manifest)
    return directory


def _describe(cfg: DictConfig, pair: ModelPair, features: Any) -> dict[str, Any]:
    """Everything that decides the content of the traces."""
    return {
        "schema_version": SCHEMA_VERSION,
        "pair": pair.fingerprint,
        "decoding": to_plain(cfg.decoding),
        "policy": _by_content(to_plain(cfg.policy)),
        "task": _describe_task(cfg.data),
        "features": {
            "version": features.version,
            "names": list(features.names),
            "target_names": list(features.target_names),
        },
        "train_prompts": cfg.collect.train_prompts,
        "val_prompts": cfg.collect.val_prompts,
        "test_prompts": cfg.collect.get("test_prompts", 0),
        "seed": cfg.seed,
    }


def _describe_task(node: DictConfig) -> dict[str, Any]:
    """The settings of a task; of one that reads a file, what it says of its prompts."""
    task = instantiate(node)
    return {"_target_": node._target_, **task.describe()} if isinstance(task, FileTask) else to_plain(node)


def _by_content(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a policy with a hash in place of the path of every file, and of every folder with weights."""
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, dict):
            found[key] = _by_content(value)
        elif key in _FILES and isinstance(value, str):
            path = Path(value).expanduser()
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
            if files:  # none: an id on the hub, or nothing, which the policy refuses
                found[key] = "sha256:" + "+".join(map(content_hash, files))
    return found


def _new_manifest(about: dict[str, Any], key: str, pair: ModelPair) -> dict[str, Any]:
    return about | {
        "trace_key": key,
        "pair": pair.describe(),
        "versions": library_versions(),
        "git_sha": git_sha(),
        "complete": False,
        "shards": [],
        "done": [],
        "rows": 0,
        "prompts": 0,
    }


def _collect(cfg: DictConfig, pair: ModelPair, features: Any, directory: Path, manifest: dict[str, Any]) -> None:
    """Decode what is not done yet, a shard at a time."""
    config: DecodingConfig = instantiate(cfg.decoding)
    decoder = DSBDDecoder(pair, config, instantiate(cfg.policy))
    size = int(cfg.collect.batch_size)
    if size < 1:
        raise UserError(f"collect.batch_size is {size}; give a whole number of at least 1.")
    if pair.drafter is None:
        raise UserError("Traces are logged of a target with a draft: give the pair one, such as pair.draft=ngram.")
    sizes = int(text_config(pair.target).hidden_size), pair.drafter.hidden_size
    prompts = _prompts(cfg, pair)
    directory.mkdir(parents=True, exist_ok=True)
    todo = [p for p in prompts if p[1].id not in set(manifest["done"])]
    with RunProgress() as progress, _kept(directory, manifest):
        task = progress.add_task("logging traces of prompts", total=len(prompts), completed=len(prompts) - len(todo))
        for first in range(0, len(todo), SHARD_PROMPTS):
            chunk = todo[first : first + SHARD_PROMPTS]
            rows = []
            for at in range(0, len(chunk), size):
                group = chunk[at : at + size]
                seeds = [prompt_seed(cfg.seed, prompt.id) for _, prompt in group]
                recorders = [TraceRecorder(features, sizes, shadow_seed=seed + 1) for seed in seeds]
                for recorder, (split, prompt) in zip(recorders, group, strict=True):
                    recorder.start(prompt.id, split)
                streams = [torch.Generator().manual_seed(seed) for seed in seeds]
                decoder.generate([prompt.tokens for _, prompt in group], streams, recorders)
                rows += [row for recorder in recorders for row in recorder.take_rows()]
                progress.advance(task, len(group))
            _add_shard(directory, manifest, rows, [prompt.id for _, prompt in chunk])
    manifest["complete"] = True
    write_manifest(directory, manifest)


@contextmanager
def _kept(directory: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """Say what is kept when someone stops the collection."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"{manifest['prompts']} prompts are kept in {directory}; the same command goes on from there.",
            file=sys.stderr,
        )
        raise


def _add_shard(directory: Path, manifest: dict[str, Any], rows: list[dict[str, Any]], done: list[str]) -> None:
    """Write a shard, then the manifest that names it."""
    about = {"trace_key": manifest["trace_key"], "feature_names": manifest["features"]["names"]}
    name = f"traces-{len(manifest['shards']):05d}.parquet"
    manifest["shards"].append(write_shard(directory, name, rows, about))
    manifest["done"] += done
    manifest["rows"] += len(rows)
    manifest["prompts"] += len(done)
    write_manifest(directory, manifest)


def _prompts(cfg: DictConfig, pair: ModelPair) -> list[tuple[str, Prompt]]:
    for name in ("train_prompts", "val_prompts"):
        if cfg.collect[name] is not None and cfg.collect[name] < 1:
            raise UserError(f"collect.{name} is {cfg.collect[name]}; give a whole number of at least 1.")
    held_out = cfg.collect.get("test_prompts", 0)
    if held_out is not None and held_out < 0:
        raise UserError(f"collect.test_prompts is {held_out}; give a whole number of at least 0.")
    task = instantiate(cfg.data)
    chosen = [
        (split, prompt)
        for split, limit in (("train", cfg.collect.train_prompts), ("val", cfg.collect.val_prompts), ("test", held_out))
        if limit != 0
        for prompt in task.prompts(split, limit, pair.tokenizer)
    ]
    for split in ("train", "val"):
        if not any(s == split for s, _ in chosen):
            raise UserError(
                f"The task {task.name!r} has no prompts in split {split!r}; a controller needs both train and val. "
                f"Raise collect.{split}_prompts or choose another data=..."
            )
    home: dict[str, str] = {}
    for split, prompt in chosen:
        if home.setdefault(prompt.id, split) != split:
            raise UserError(
                f"Prompt {prompt.id!r} is in the splits {home[prompt.id]!r} and {split!r}: validation would be "
                "optimistic. Give each prompt one split; data.shares=null is for evaluation only."
            )
    return chosen


def prompt_seed(seed: int, prompt_id: str) -> int:
    """A prompt's own seed: independent of which other prompts are decoded, and in what order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()[:6], "big")


if __name__ == "__main__":
    main()
