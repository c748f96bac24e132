"""Sources of a pair's models: the package, a size to imitate, the hub or a directory.

Each function returns the arguments of a `ModelPair`, whose class methods say what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from decoding.engine.placement import same_device
from decoding.errors import UserError, first_line
from decoding.pairs.architecture import check_architecture
from decoding.pairs.builtin import load_tiny
from decoding.pairs.drafts import ALLOWED, is_named
from decoding.pairs.inflate import inflate, shape_of
from decoding.pairs.packaged import PREFIX, unpacked
from decoding.support.checks import choice

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def tiny_parts(device: str | torch.device, draft: str | None) -> dict[str, Any]:
    """The built-in pair, on a device; `draft` in text replaces its own."""
    check_device(device)
    target, small, tokenizer = load_tiny()
    torch.nn.Module.to(target, device)
    torch.nn.Module.to(small, device)
    return {"target": target, "draft": draft or small, "tokenizer": tokenizer, "name": _name("tiny", draft)}


def inflated_parts(
    target_size: str | Mapping[str, Any],
    draft_size: str | Mapping[str, Any],
    device: str | torch.device,
    dtype: str | torch.dtype,
    draft: str | None,
) -> dict[str, Any]:
    """The built-in pair in models of real size."""
    dtype = _dtype_name(dtype, _DTYPES[1:])
    if draft is not None and (not draft.startswith("ngram") or "+" in draft):
        raise UserError(f"draft is {draft!r}; an inflated pair takes ngram, ngram:N, or null for draft_size.")
    try:
        check_device(device)
    except UserError as error:
        small = "pair.target_size=400m pair.draft_size=68m pair.device=cpu pair.dtype=float32"
        raise UserError(f"{error} On a CPU choose small sizes: {small}.") from error
    sizes = (target_size,) if draft else (target_size, draft_size)
    shapes = [shape_of(size) for size in sizes]
    names = [size if isinstance(size, str) else "custom" for size in sizes]
    if shapes[0].vocab_size != shapes[-1].vocab_size:
        raise UserError(
            f"target_size {names[0]} has {shapes[0].vocab_size} tokens, draft_size {names[1]} has "
            f"{shapes[1].vocab_size}: choose two sizes with one vocabulary, such as 8b and 1b, or 13b and 68m."
        )
    kind = getattr(torch, dtype)
    _check_memory(sum(shape.parameters for shape in shapes) * kind.itemsize, device)
    target, model, tokenizer = load_tiny()
    wide = [inflate(model, shape, device, kind) for model, shape in zip((target, model), shapes, strict=False)]
    note = (
        f"The built-in pair in the shapes {' and '.join(names)}: a model of what these sizes cost, not trained "
        "models of these sizes. Acceptance and text are the built-in pair's; draft=layers:N says nothing."
    )
    name = _name("-".join(["inflated", *names]), draft)
    return {"target": wide[0], "draft": draft or wide[1], "tokenizer": tokenizer, "name": name, "note": note}


def loaded_parts(
    target: str,
    draft: str | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    draft_dtype: str | torch.dtype | None,
    trust_remote_code: bool,
    name: str | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """A pair from the hub, from local directories, from GGUF files, or from installed packages."""
    dtypes = {
        "target": _dtype_name(dtype),
        "draft": _dtype_name(draft_dtype or dtype, said="draft_dtype" if draft_dtype else "dtype"),
    }
    placed = any(options.get(option) is not None for option in ("device_map", "tp_plan"))
    if not placed:
        check_device(device)
    target = unpacked(str(target))
    sources = {"target": target}
    if draft is not None and not _comes_without_model(str(draft)):
        sources["draft"] = unpacked(str(draft))
    models, tokenizers = {}, {}
    for role, source in sources.items():
        config = _from_hub(AutoConfig, source, role, trust_remote_code=trust_remote_code)
        check_architecture(config, role)
        given = {"dtype": dtypes[role], "trust_remote_code": trust_remote_code, "use_safetensors": True, **options}
        model = _from_hub(AutoModelForCausalLM, source, role, **given)
        models[role] = model if placed else _moved(model, source, role, torch.device(device))
    for role, source in sources.items():
        tokenizers[role] = _from_hub(AutoTokenizer, source, role, trust_remote_code=trust_remote_code)
    return {
        "target": models["target"],
        "draft": models.get("draft", draft),
        "tokenizer": tokenizers["target"],
        "draft_tokenizer": tokenizers.get("draft"),
        "name": name or _name(Path(target).name.removesuffix(".gguf"), draft if "draft" not in sources else None),
    }


def _dtype_name(dtype: str | torch.dtype, allowed: tuple[str, ...] = _DTYPES, said: str = "dtype") -> str:
    """A dtype's name, given as a name or as torch's own."""
    name = str(dtype).removeprefix("torch.")
    choice(said, name, allowed)
    return name


def _moved(model: Any, source: str, role: str, device: torch.device) -> Any:
    """A loaded model on a device, without a call of `.to` where it lies there already.

    Quantised and dispatched models choose their place when they are loaded, and some cannot be
    moved.
    """
    if getattr(model, "hf_device_map", None) or all(same_device(w.device, device) for w in model.parameters()):
        return model
    try:
        return model.to(device)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"The {role} model {source!r} cannot be moved to {device}: {first_line(error)} Say where it is to be "
            "loaded: device_map=... in Python, +pair.device_map=... on the command line."
        ) from error


def check_device(device: str | torch.device) -> None:
    """Refuse a device that torch does not know or this machine does not have (UserError)."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device is {str(device)!r}; give cpu, cuda, or one of several GPUs as in cuda:1.") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {str(device)!r} but this machine has no CUDA device; set pair.device=cpu.")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {str(device)!r} but this machine has {torch.cuda.device_count()}, counted from cuda:0."
        )


def _check_memory(needed: int, device: str | torch.device) -> None:
    """Refuse weights of `needed` bytes that do not fit a GPU."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise UserError(
                f"The pair's weights take {needed / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB free; choose "
                "smaller sizes, or a 16-bit dtype."
            )


def _name(base: str, draft: str | None) -> str:
    """A pair's name that tells drafts apart and can be a directory's: tiny, tiny-layers2."""
    if draft is None:
        return base
    kind, _, source = draft.partition(":")
    return f"{base}-{kind}{Path(source).name.replace(':', '')}"


def _comes_without_model(draft: str) -> bool:
    """True if a text names a draft that is not loaded; what only looks like one is refused."""
    if is_named(draft):
        return True
    if re.fullmatch(r"\w+:\w*", draft) and not draft.startswith(PREFIX) and not Path(draft).exists():
        raise UserError(f"draft is {draft!r}; give a directory written by save_pretrained, a hub id, or {ALLOWED}.")
    return False


def _from_hub(loader: Any, source: str, role: str, **options: Any) -> Any:
    """`from_pretrained` with a clear sentence when it fails."""
    folder, file = _gguf(source)
    there = Path(source).is_file() if file else Path(source).is_dir()
    if source.startswith(("/", "./", "../", "~")) and not there:
        what = "file" if file else "directory"
        raise UserError(f"The {role} model {source!r} could not be loaded: there is no such {what}. Look at the path.")
    if Path(source, "adapter_config.json").exists() and not Path(source, "config.json").exists():
        raise UserError(
            f"The {role} model {source!r} is an adapter without its model; merge it into the model that it adapts "
            "(merge_and_unload of peft), and give the directory to which save_pretrained writes the result."
        )
    try:
        return loader.from_pretrained(folder, **({"gguf_file": file} if file else {}), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"The {role} model {source!r} could not be loaded: {first_line(error)} Give a directory written by "
            "save_pretrained, a GGUF file, or a hub id that this machine can reach (pair.target=..., pair.draft=...)."
        ) from error


def _gguf(source: str) -> tuple[str, str | None]:
    """The folder or repository of a model, and the name of its GGUF file if it is one."""
    if not source.lower().endswith(".gguf"):
        return source, None
    path = Path(source)
    return str(path.parent), path.name
