"""CTranslate2's beam search behind this engine's interface, to compare with: the target converted
once, decoding in a process that never imports torch.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from decoding.config import DecodingConfig
from decoding.decoder import Prompts, as_token_lists
from decoding.errors import UserError
from decoding.pairs.architecture import weight_sample
from decoding.pairs.pair import ModelPair, check_prompt, end_tokens
from decoding.results import DecodeResult, DecodeStats
from decoding.support.checks import choice
from decoding.support.files import cache_root

COMPUTE_TYPES = ("float32", "int8", "int8_float32", "bfloat16", "int8_bfloat16")
_WORKER = Path(__file__).with_name("ct2_worker.py")


class Peer:
    """CTranslate2's search over a pair's target, in a process of its own.

    Args:
        pair: its target must be one that CTranslate2 converts, on the CPU.
        compute_type: of its products: "float32", "int8", ...

    Raises:
        UserError: CTranslate2 is not installed, or cannot take the target.
    """

    def __init__(self, pair: ModelPair, compute_type: str = "float32") -> None:
        choice("compute_type", compute_type, COMPUTE_TYPES)
        if pair.tokenizer is None or pair.device.type != "cpu":
            raise UserError(
                f"ct2_beam_search takes a pair with a tokenizer on the CPU; this one is on {pair.device}. Set "
                "pair.device=cpu, or leave the row out."
            )
        self.pair = pair
        self._process = worker(str(converted(pair)), compute_type, torch.get_num_threads())

    def generate(self, prompts: Prompts, config: DecodingConfig) -> list[DecodeResult]:
        """Beam search of CTranslate2, one prompt at a time.

        Differences from this engine that a reader of a comparison should know: with EOS it stops
        once as many hypotheses ended as there are beams, whatever `early_stopping` says;
        `new_tokens` counts those of the best hypothesis; `scores` are its own.

        Args:
            prompts: as for DSBDDecoder.generate.
            config: target_width, max_new_tokens, min_new_tokens, EOS, length_penalty,
                num_return_sequences.
        """
        names = self.pair.tokenizer.convert_ids_to_tokens
        ends = end_tokens(self.pair, config)
        options: dict[str, Any] = {
            "beam_size": config.target_width,
            "num_hypotheses": config.num_return_sequences,
            "max_length": config.max_new_tokens,
            # It always has an end token; without any the shortest length keeps that one away.
            "min_length": config.min_new_tokens if ends else config.max_new_tokens,
            "length_penalty": config.length_penalty,
            "include_prompt_in_result": False,
            "return_end_token": True,
            "return_scores": True,
        } | ({"end_token": sorted(ends)} if ends else {})
        results = []
        for i, row in enumerate(as_token_lists(prompts)):
            check_prompt(self.pair, row, config, i)
            tokens = names(row)  # it takes tokens by name, these and no others
            if None in tokens:
                raise UserError(
                    f"Prompt {i} holds the id {row[tokens.index(None)]}, which the tokenizer has no token for, and "
                    "CTranslate2 takes tokens by name. Leave ct2_beam_search out."
                )
            answer = ask(self._process, {"tokens": tokens, "options": options})
            sequences = [list(ids) for ids in answer["ids"]]
            stats = DecodeStats(prompt_tokens=len(row), new_tokens=len(sequences[0]))
            stats.iterations = stats.new_tokens
            stats.target_calls = stats.new_tokens - 1  # as everywhere, without the prompt's own pass
            stats.seconds["other"] = answer["seconds"]
            stats.kv_slots_peak = stats.kv_slots_end = config.target_width * (len(row) + stats.new_tokens - 1)
            finished = [bool(ids) and ids[-1] in ends for ids in sequences]
            results.append(DecodeResult(sequences, list(answer["scores"]), finished, stats))
        return results


def converted(pair: ModelPair) -> Path:
    """The folder with the target as CTranslate2 reads it, in float32; converted now if it never
    was.

    Folders are kept in ctranslate2/ of `cache_root`, under a hash of the target's weights.
    """
    if importlib.util.find_spec("ctranslate2") is None:
        raise UserError("ct2_beam_search needs CTranslate2: pip install 'dsbd[peers]', or leave the row out.")
    version = importlib.metadata.version("ctranslate2")
    key = hashlib.sha256(weight_sample(pair.target)).hexdigest()
    folder = cache_root() / "ctranslate2" / f"{pair.name}-{key[:12]}-{version}"
    if folder.is_dir():
        return folder
    Console(stderr=True).print(f"converting the target for CTranslate2, once: {folder}", highlight=False)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        pair.target.save_pretrained(saved)
        pair.tokenizer.save_pretrained(saved)
        command = [sys.executable, "-m", "ctranslate2.converters.transformers"]
        found = subprocess.run(
            [*command, "--model", saved, "--output_dir", str(partial)], capture_output=True, text=True, check=False
        )
    try:
        if found.returncode:
            reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"CTranslate2 cannot convert the target: {reason} Leave ct2_beam_search out.")
        if not folder.is_dir():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@functools.cache
def worker(directory: str, compute_type: str, threads: int) -> subprocess.Popen[str]:
    """The process that serves a converted model; one for all rows that differ in beams alone."""
    command = [sys.executable, "-P", str(_WORKER), directory, compute_type, str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    _read(process)  # it has loaded
    return process


def ask(process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a worker.

    Raises:
        UserError: CTranslate2 refused, or its process ended.
    """
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except OSError:
        pass  # it has ended, which _read says
    return _read(process)


def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise UserError(
            f"The process of ct2_beam_search ended with {process.wait()}; its own message is above. Leave the row out."
        )
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise UserError(f"CTranslate2 refused: {answer['error']}")
    return answer
