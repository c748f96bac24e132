"""Does a change of the code change what is decoded? Record what two commits decode, then compare
the records.

    PYTHONPATH=<checkout> python studies/same_decoding.py record <file.json> [controller directory]
    python studies/same_decoding.py compare <file.json> <file.json>

A record holds 40 prompts of the built-in pair under six policies, alone and in batches, and the
traces of a small collection. It uses public names alone, so that it runs at any commit; `learned`
needs a controller that both commits can read, and is left out without one. Traces are compared
where both records are of the rejection rule.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

PROMPTS, BATCH, NEW_TOKENS = 40, 8, 24
COLLECT = ("collect.train_prompts=12", "collect.val_prompts=4", "decoding.max_new_tokens=16", "collect.batch_size=4")
NOT_COMPARED = ("seconds", "hidden")  # parts of columns' names: clocks, and states that are written on request


def record(controller: str | None) -> dict[str, Any]:
    """Everything that this commit decodes, as plain lists."""
    from decoding import DecodingConfig, DSBDDecoder, ModelPair, beam_sample
    from decoding.tasks.stdlib import StdlibTask

    pair = ModelPair.tiny()
    prompts = [p.tokens for p in StdlibTask().prompts("val", PROMPTS, pair.tokenizer)]
    # The rule that the first commits have; without the field they know no other.
    rule: dict[str, Any] = (
        {"verification": "rejection"} if "verification" in DecodingConfig.__dataclass_fields__ else {}
    )
    configs = {
        "keep": DecodingConfig(
            target_width=4, draft_width=8, draft_depth=3, max_new_tokens=NEW_TOKENS, top_k=10, **rule
        ),
        "exact": DecodingConfig(
            target_width=3,
            draft_width=6,
            draft_depth=2,
            max_new_tokens=NEW_TOKENS,
            exact=True,
            num_return_sequences=2,
            **rule,
        ),
        "search": DecodingConfig(mode="beam_search", target_width=3, draft_depth=2, max_new_tokens=NEW_TOKENS),
    }
    found: dict[str, Any] = {}
    for name, config in configs.items():
        for policy_name, policy in policies(controller if name == "keep" else None).items():
            for size in (1, BATCH):
                decoder = DSBDDecoder(pair, config, policy())
                streams = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
                results = decoder.generate(prompts, streams, batch_size=size)
                found[f"{name} {policy_name} batch {size}"] = [content(result) for result in results]
        streams = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        found[f"{name} target alone"] = [content(r) for r in beam_sample(pair.target, prompts, config, streams)]
    found["traces"] = traces()
    return found


def policies(controller: str | None) -> dict[str, Any]:
    """Six policies by name, each a function that makes it anew."""
    from decoding import EntropyWidth, FixedWidth, MassWidth, RandomWidth, ThresholdWidth

    made: dict[str, Any] = {
        "fixed": FixedWidth,
        "fixed 2": lambda: FixedWidth(target_width=2, final_width=3),
        "threshold": lambda: ThresholdWidth(0.8),
        "random": lambda: RandomWidth(seed=3),
        "mass": lambda: MassWidth(0.6, stop_entropy=1.8),
        "entropy": lambda: EntropyWidth(0.5),
    }
    if controller is not None:
        from controller import LearnedWidth

        made["learned"] = lambda: LearnedWidth.load(controller, clock="table", share=False)
    return made


def content(result: Any) -> dict[str, Any]:
    """All that a result says, but for its seconds."""
    stats = result.stats
    return {
        "sequences": result.sequences,
        "scores": [round(score, 9) for score in result.scores],
        "finished": result.finished,
        "target_widths": list(stats.target_widths),
        "draft_widths": list(stats.draft_widths),
        "accepted": list(stats.accepted),
        "calls": [stats.iterations, stats.target_calls, stats.draft_calls],
    }


def traces() -> dict[str, list[Any]]:
    """Columns of a small collection, shadow coins and survivors among them."""
    import decoding

    root = Path(decoding.__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "decoding.collect", *COLLECT, f"collect.traces_dir={folder}/traces"]
        subprocess.run([*command, f"hydra.run.dir={folder}/run"], cwd=root, check=True, stdout=subprocess.DEVNULL)
        tables = [pq.read_table(path) for path in sorted(Path(folder).rglob("*.parquet"))]
    columns = [name for name in tables[0].column_names if not any(part in name for part in NOT_COMPARED)]
    return {name: [row for table in tables for row in table[name].to_pylist()] for name in columns}


def compare(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Sentences on what differs; a trace column that only one record has is no difference."""
    differences = [f"only in one record: {name}" for name in one.keys() ^ other.keys()]
    for name in (one.keys() & other.keys()) - {"traces"}:
        unequal = [i for i, (a, b) in enumerate(zip(one[name], other[name], strict=True)) if a != b]
        if unequal:
            differences.append(f"{name}: {len(unequal)} of {len(one[name])} prompts differ, first {unequal[0]}")
    for column in one["traces"].keys() & other["traces"].keys() if has_coins(one, other) else ():
        if one["traces"][column] != other["traces"][column]:
            differences.append(f"traces: the column {column} differs")
    return sorted(differences)


def has_coins(*records: dict[str, Any]) -> bool:
    """True if the traces of all records are of the rejection rule."""
    return all("accept_bits" in record["traces"] for record in records)


def main() -> None:
    """Record, or compare; exit status 1 where something differs."""
    match sys.argv[1:]:
        case ["record", path, *controller]:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            torch.set_num_threads(1)
            Path(path).write_text(json.dumps(record(controller[0] if controller else None)))
        case ["compare", one, other]:
            a, b = json.loads(Path(one).read_text()), json.loads(Path(other).read_text())
            differences = compare(a, b)
            traces = "traces too" if has_coins(a, b) else "traces not compared"
            print("\n".join(differences) or f"equal: {len(a) - 1} settings of {PROMPTS} prompts; {traces}")
            raise SystemExit(bool(differences))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:  # by public names alone
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
