"""Train a draft: `python -m decoding.train_draft pair=... kind=eagle3`. See
conf/train_draft.yaml.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from decoding.engine.feature_head import DraftHead, FeatureHead
from decoding.engine.sampled_head import SampledHead
from decoding.engine.trigram_head import TrigramHead
from decoding.errors import UserError
from decoding.pairs.drafts.eagle3 import save_head
from decoding.pairs.drafts.head import save_own
from decoding.pairs.pair import ModelPair
from decoding.support.checks import choice, is_whole, number
from decoding.support.entry import build_all, entry_point
from decoding.support.files import write_whole
from decoding.support.fits import interruptible, load_whole, read_fit, this_job
from decoding.support.in_use import in_use
from decoding.support.progress import RunProgress
from decoding.support.provenance import provenance, to_plain
from decoding.support.settings import check_counts, check_seconds
from decoding.train_draft.chimera import ChimeraModule
from decoding.train_draft.eagle3 import HeadModule
from decoding.train_draft.fit import DraftModule, TextData
from decoding.train_draft.fspad import FspadModule
from decoding.train_draft.model import ModelModule, small_model
from decoding.train_draft.states import TargetStates
from decoding.train_draft.text import Document, TextConfig, documents, token_counts


class HeadKind(NamedTuple):
    """A kind of head: its class, what fits it, and what writes it."""

    head: type[DraftHead]
    module: type[HeadModule]
    save: Callable[[Any, Path], None]


HEADS = {
    "eagle3": HeadKind(FeatureHead, HeadModule, save_head),
    "fspad": HeadKind(SampledHead, FspadModule, save_own),
    "chimera": HeadKind(TrigramHead, ChimeraModule, save_own),
}


@entry_point(config_name="train_draft")
def main(cfg: DictConfig) -> float:
    """Write text, fit a head to it, save the best; returns its acceptance on held-out text."""
    text = read_settings(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    pair: ModelPair = instantiate(cfg.pair)
    check_layers(cfg, pair)
    with ExitStack() as held:  # other runs may be told to write there, too
        for folder in {Path(cfg[name]).resolve() for name in ("out", "text_dir")} - {Path(cfg.output_dir).resolve()}:
            held.enter_context(in_use(folder))
        return train(cfg, pair, text)


def train(cfg: DictConfig, pair: ModelPair, text: TextConfig) -> float:
    """Do what the command is for, in directories of its own; returns acceptance on held-out text."""
    with RunProgress() as progress:
        texts = documents(pair, text, Path(cfg.text_dir), progress)
    data = TextData(texts, cfg.fit.batch_tokens, cfg.seed)
    module = new_module(pair, cfg, texts, data)
    loggers = [instantiate(node) for node in cfg.logger.values() if node]
    on_gpu = pair.device.type == "cuda"
    options = {"accelerator": "gpu" if on_gpu else "cpu", "precision": "bf16-mixed" if on_gpu else "32-true"}
    trainer: Trainer = instantiate(cfg.trainer, **options, callbacks=build_all(cfg.callbacks), logger=loggers or False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        with interruptible(lambda: what_is_kept(trainer, cfg)):
            trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best and Path(best).is_file():
        module.load_state_dict(load_whole(best)["state_dict"])
    metrics = {name: float(value) for name, value in trainer.validate(module, data, verbose=False)[0].items()}
    out = Path(cfg.out)
    named = save(module, pair, cfg.kind, out)
    recipe = {
        **provenance(),
        "target": pair.describe()["models"]["target"] | {"name": pair.name},
        "kind": cfg.kind,
        "text": to_plain(cfg.text) | {"written": sum(len(t.tokens) for t in texts), "documents": len(texts)},
        cfg.kind: to_plain(cfg["head" if cfg.kind in HEADS else "model"]),
        "fit": to_plain(cfg.fit) | {"batches": trainer.global_step, "epochs": trainer.current_epoch},
        "metrics": metrics,
    }
    write_whole(out / "recipe.json", json.dumps(recipe, indent=2).encode() + b"\n")
    for name, value in sorted(metrics.items()):
        print(f"{name:24s} {value:.4f}")
    print(f"draft saved in {out}; use it with pair.draft={named}")
    return metrics["val/accepted"]


def read_settings(cfg: DictConfig) -> TextConfig:
    """The text's settings; whatever cannot be is refused, before a model is loaded.

    Raises:
        UserError: a value that cannot be, or a file that is not there.
    """
    choice("kind", cfg.kind, (*HEADS, "model"))
    check_counts(cfg, {"seed": 0, "head.draft_vocab_size": 1, "model.hidden_size": 2, "model.layers": 1})
    check_counts(cfg, {"fit.steps": 1, "fit.batch_tokens": 1})
    check_seconds(cfg.fit.max_seconds, "fit.max_seconds")
    for name in ("lr", "decay", "room_gb"):
        number(f"fit.{name}", cfg.fit[name], above=0)
    number("fit.weight_decay", cfg.fit.weight_decay, least=0)
    size = cfg.model.hidden_size
    if size % (64 if size > 64 else 2):
        raise UserError(f"model.hidden_size is {size}; give a multiple of 64, or an even number below.")
    layers = cfg.head.layers
    if layers is not None and (not OmegaConf.is_list(layers) or not all(map(is_whole, layers))):
        raise UserError(f"head.layers is {layers!r}; give a list of whole numbers, or null.")
    if cfg.kind in HEADS and HEADS[cfg.kind].head is not FeatureHead and len(layers or ()) > 1:
        raise UserError(f"head.layers is {list(layers)}; a head of kind={cfg.kind} reads one layer: give one, or null.")
    if cfg.ckpt_path is not None:
        read_fit(cfg.ckpt_path, "Give one that this command wrote, or leave ckpt_path out to start afresh.")
    return TextConfig(**OmegaConf.to_container(cfg.text, resolve=True))  # type: ignore[arg-type]


def check_layers(cfg: DictConfig, pair: ModelPair) -> None:
    """Refuse layers that the target does not have, before any text is written (UserError)."""
    blocks = pair.target.config.get_text_config().num_hidden_layers
    for layer in cfg.head.layers or ():
        if not 0 <= layer <= blocks:
            raise UserError(
                f"head.layers holds {layer}; give layers from 0, the embeddings, to {blocks}, the last block."
            )


def what_is_kept(trainer: Trainer, cfg: DictConfig) -> str:
    """The sentence on how to go on after an interrupted fit."""
    kept = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    last = next((callback.best_model_path for callback in kept if callback.monitor is None), "")
    text = f"text_dir={cfg.text_dir}"
    if not last or not Path(last).is_file():
        return f"The text is kept, no epoch yet; {this_job(text)} fits anew."
    return f"The last epoch is kept; {this_job(text, f'ckpt_path={last}')} goes on from there."


def new_module(pair: ModelPair, cfg: DictConfig, texts: list[Document], data: TextData) -> DraftModule:
    """A new draft of the kind that is asked for, and what fits it."""
    options = {name: cfg.fit[name] for name in ("decay", "lr", "weight_decay", "max_seconds")}
    target, room = pair.target.requires_grad_(False), cfg.fit.room_gb * 1e9
    if cfg.kind == "model":
        model: Any = small_model(target, cfg.model.hidden_size, cfg.model.layers)
        return ModelModule(model.to(pair.device), TargetStates(target, (), texts, room), **options)
    head = new_head(pair, cfg, [texts[i] for i in data.train])
    return HEADS[cfg.kind].module(head, TargetStates(target, head.shape.layers, texts, room), cfg.fit.steps, **options)


def save(module: DraftModule, pair: ModelPair, kind: str, out: Path) -> str:
    """Write a draft; returns how `pair.draft` names it."""
    if isinstance(module, ModelModule):
        module.model.save_pretrained(out)
        pair.tokenizer.save_pretrained(out)
        return str(out)
    assert isinstance(module, HeadModule)
    HEADS[kind].save(module.head, out)
    return f"{kind}:{out}"


def new_head(pair: ModelPair, cfg: DictConfig, texts: list[Any]) -> Any:
    """A head that proposes the tokens that occur most, and begins with the target's output for
    them.
    """
    layers = tuple(cfg.head.layers or ())
    head = HEADS[cfg.kind].head.for_target(pair.target, cfg.head.draft_vocab_size, layers or None)
    counts = token_counts(iter(texts), pair.vocab_size)
    ids = counts.argsort(descending=True, stable=True)[: head.shape.draft_vocab_size].sort().values
    head.t2d.zero_()
    head.use_tokens(ids)
    output = pair.target.get_output_embeddings().weight.detach()
    with torch.no_grad():
        head.lm_head.weight.copy_(output.index_select(0, ids.to(output.device)))
    return head.float().to(pair.device)


if __name__ == "__main__":
    main()
