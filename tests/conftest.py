"""Shared by all tests: offline, one torch thread per worker, gpu tests skipped without a GPU."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"})
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from decoding import ModelPair

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # behind & or nohup; what tests start would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Half a million objects of imported libraries are not looked through whenever garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_pair() -> ModelPair:
    """The built-in pair; do not change it."""
    return ModelPair.tiny()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables that tests measure are kept, and looked for, in a directory of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSBD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
