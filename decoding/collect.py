"""Log decoding traces: `python -m decoding.collect pair=... data=...`. Design section 7.

Prompts are decoded under a randomised width policy; a trace directory is named after everything
that decides its content, so the same settings find it again, and an interrupted run goes on where
it stopped. What decides is what the built objects say of themselves: paths of files and of modules
do not count.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from decoding.config import DecodingConfig
from decoding.decoder import DSBDDecoder
from decoding.dice.sampling import NotNumbers
from decoding.errors import UserError
from decoding.pairs.pair import ModelPair, check_lengths
from decoding.policies.base import WidthPolicy, check_unloaded
from decoding.support.checks import whole
from decoding.support.entry import entry_point
from decoding.support.in_use import in_use
from decoding.support.progress import RunProgress
from decoding.support.provenance import git_sha, library_versions
from decoding.tasks.base import Prompt, Task, check_files
from decoding.traces.recorder import TraceRecorder
from decoding.traces.schema import SCHEMA_VERSION, Column, ContextFeatures, own_columns
from decoding.traces.store import damaged_shards, read_manifest, write_manifest, write_shard

SHARD_PROMPTS = 25


@entry_point(config_name="collect")
def main(cfg: DictConfig) -> None:
    """Collect the traces that the config describes, unless they are there."""
    directory = ensure_traces(cfg)
    manifest = read_manifest(directory) or {}
    print(f"{manifest.get('rows', 0)} trace rows of {manifest.get('prompts', 0)} prompts are in {directory}")


@dataclass(frozen=True)
class Collection:
    """Everything that decides the content of traces, built from a config."""

    cfg: DictConfig
    pair: ModelPair
    config: DecodingConfig
    policy: WidthPolicy
    task: Task
    features: ContextFeatures
    columns: tuple[Column, ...] = ()  # of the user's own

    @classmethod
    def of(cls, cfg: DictConfig, pair: ModelPair | None = None) -> Self:
        """Build what the config names; `pair` where the models are loaded already.

        Raises:
            UserError: settings that cannot work.
        """
        config: DecodingConfig = instantiate(cfg.decoding)
        if config.mode != "beam_sample" or config.verification != "shared_noise":
            raise UserError(
                f"decoding.mode is {config.mode!r} and decoding.verification {config.verification!r}, but traces are "
                "logged of shared noise, which says what the target selects whatever was drafted. Set "
                "decoding.mode=beam_sample and decoding.verification=shared_noise."
            )
        policy, task, features = (instantiate(node) for node in (cfg.policy, cfg.data, cfg.features))
        columns = own_columns(cfg.collect.get("columns", []))
        check_counts(cfg)
        check_unloaded(policy, config)
        held_out = ["test"] if cfg.collect.get("test_prompts", 0) != 0 else []
        check_files(task, ["train", "val", *held_out])
        return cls(cfg, pair or instantiate(cfg.pair), config, policy, task, features, columns)

    def describe(self) -> dict[str, Any]:
        """The parts' descriptions of themselves, JSON-able: neither where files lie nor which
        modules hold the classes.
        """
        own = {column.name: repr(column.type) for column in self.columns}
        return {
            "schema_version": SCHEMA_VERSION,
            "pair": self.pair.fingerprint,
            "decoding": asdict(self.config),
            "policy": _said_by(self.policy, inherited=False),
            "task": _said_by(self.task, inherited=True),
            "features": {
                "version": self.features.version,
                "names": list(self.features.names),
                "candidate_names": list(self.features.candidate_names),
            },
            "train_prompts": self.cfg.collect.train_prompts,
            "val_prompts": self.cfg.collect.val_prompts,
            "test_prompts": self.cfg.collect.get("test_prompts", 0),
            "seed": self.cfg.seed,
            **({"columns": own} if own else {}),
        }


def ensure_traces(cfg: DictConfig, pair: ModelPair | None = None) -> Path:
    """The directory of the traces that `cfg` describes; what is absent of them is collected now.

    Args:
        cfg: with pair, data, decoding, policy, features, collect and seed, as in conf/collect.yaml.
        pair: the models, where they are loaded already.

    Raises:
        UserError: settings that cannot work, or a directory with foreign traces.
    """
    collection = Collection.of(cfg, pair)
    about = collection.describe()
    key = trace_key(about)
    directory = Path(cfg.collect.traces_dir) / f"{collection.pair.name}-{key[:12]}"
    manifest = read_manifest(directory)
    if manifest is not None and manifest["trace_key"] != key:
        raise UserError(f"{directory} holds traces of another collection; move it away or change collect.traces_dir.")
    if manifest is None or not manifest["complete"] or damaged_shards(directory, manifest):
        manifest = manifest or _new_manifest(about, key, collection.pair)
        _collect(collection, directory, manifest)
    return directory


def trace_key(about: dict[str, Any]) -> str:
    """Hash of a collection's description, by which its traces are found again."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _said_by(part: Any, inherited: bool) -> dict[str, Any]:
    """The description that an object gives of itself; UserError where its class, or with
    `inherited` no base of it, has any.
    """
    classes = type(part).__mro__ if inherited else (type(part),)
    if not any("describe" in vars(one) for one in classes):
        raise UserError(
            f"{type(part).__name__} does not describe itself, so that its traces could not be told from others. Give "
            "the class a describe() that returns its name and all settings, JSON-able."
        )
    return dict(part.describe())


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


def _collect(collection: Collection, directory: Path, manifest: dict[str, Any]) -> None:
    """Decode what is not done yet, a shard at a time."""
    cfg, pair = collection.cfg, collection.pair
    decoder = DSBDDecoder(pair, collection.config, collection.policy)
    size = cfg.collect.batch_size
    if pair.drafter is None:
        raise UserError("Traces are logged of a target with a draft: give the pair one, such as pair.draft=ngram.")
    prompts = _prompts(cfg, collection.task, pair)
    check_lengths(pair, [prompt for _, prompt in prompts], collection.config)
    with in_use(directory), RunProgress() as progress, _kept(directory, manifest):
        manifest.update(read_manifest(directory) or {})  # another run may have gone on meanwhile
        _forget(manifest, damaged_shards(directory, manifest), directory)
        todo = [p for p in prompts if p[1].id not in set(manifest["done"])]
        task = progress.add_task("logging traces of prompts", total=len(prompts), completed=len(prompts) - len(todo))
        for first in range(0, len(todo), SHARD_PROMPTS):
            chunk = todo[first : first + SHARD_PROMPTS]
            rows = []
            for at in range(0, len(chunk), size):
                group = chunk[at : at + size]
                rows += _rows_of(collection, decoder, group, manifest)
                progress.advance(task, len(group))
            if not rows:
                raise UserError(
                    f"All of {len(chunk)} prompts make a model return NaN, {chunk[0][1].id!r} first; check the weights "
                    "and try dtype=float32."
                )
            about = {"trace_key": manifest["trace_key"], "feature_names": manifest["features"]["names"]}
            taken = {shard["file"] for shard in manifest["shards"]}
            name = next(name for i in range(len(taken) + 1) if (name := f"traces-{i:05d}.parquet") not in taken)
            shard = write_shard(directory, name, rows, about, collection.columns)
            _add_shard(directory, manifest, shard, [prompt.id for _, prompt in chunk])
    manifest["complete"] = True
    write_manifest(directory, manifest)


def _rows_of(
    collection: Collection, decoder: DSBDDecoder, group: Sequence[tuple[str, Prompt]], manifest: dict[str, Any]
) -> list[dict[str, Any]]:
    """Decode prompts together; one that makes a model return NaN is told of, noted and passed over,
    unless the config is strict.
    """
    seeds = [prompt_seed(collection.cfg.seed, prompt.id) for _, prompt in group]
    recorders = [TraceRecorder(collection.features, collection.columns) for _ in seeds]
    for recorder, (split, prompt) in zip(recorders, group, strict=True):
        recorder.start(prompt.id, split)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        decoder.generate([prompt.tokens for _, prompt in group], streams, recorders)
    except NotNumbers as error:
        if collection.cfg.collect.get("strict", False):
            raise
        if len(group) > 1:  # rows do not depend on who is decoded beside
            return [row for one in group for row in _rows_of(collection, decoder, [one], manifest)]
        prompt = group[0][1]
        print(f"Prompt {prompt.id!r} is passed over: {error}", file=sys.stderr)
        manifest["skipped"] = [*(name for name in manifest.get("skipped", []) if name != prompt.id), prompt.id]
        return []
    return [row for recorder in recorders for row in recorder.take_rows()]


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


def _add_shard(directory: Path, manifest: dict[str, Any], shard: dict[str, Any], done: list[str]) -> None:
    """Name a shard that is written, and the prompts that it holds, in the manifest."""
    shards = [*manifest["shards"], shard | {"prompts": done}]
    manifest["shards"] = sorted(shards, key=lambda shard: shard["file"])
    manifest["done"] += done
    manifest["rows"] += shard["rows"]
    manifest["prompts"] += len(done)
    write_manifest(directory, manifest)


def _forget(manifest: dict[str, Any], damaged: Sequence[str], directory: Path) -> None:
    """Take shards that are damaged or gone out of a manifest, with their prompts: those are
    collected again.

    A manifest that does not say which prompts a shard holds is begun anew.
    """
    if not damaged:
        return
    kept = [shard for shard in manifest["shards"] if shard["file"] not in damaged]
    if any("prompts" not in shard for shard in kept):
        kept = []
    done = [prompt for shard in kept for prompt in shard["prompts"]]
    rows = sum(shard["rows"] for shard in kept)
    print(
        f"{', '.join(damaged)} in {directory} is damaged or gone: the traces of {len(manifest['done']) - len(done)} "
        "prompts are collected again.",
        file=sys.stderr,
    )
    manifest.update(shards=kept, done=done, rows=rows, prompts=len(done), complete=False)


def check_counts(cfg: DictConfig) -> None:
    """Refuse numbers of prompts that cannot be (UserError)."""
    whole("collect.batch_size", cfg.collect.batch_size, least=1)
    for name, least in (("train_prompts", 1), ("val_prompts", 1), ("test_prompts", 0)):
        if (count := cfg.collect.get(name, 0 if name == "test_prompts" else None)) is not None:
            whole(f"collect.{name}", count, least)


def _prompts(cfg: DictConfig, task: Task, pair: ModelPair) -> list[tuple[str, Prompt]]:
    held_out = cfg.collect.get("test_prompts", 0)
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
