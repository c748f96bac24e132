"""CTranslate2 in a process of its own: a request a line on standard input, an answer a line on
standard output, all JSON.

It is run as a script and imports nothing else of this project, nor torch: two OpenMP pools in one
process would halve each other's speed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def serve(directory: str, compute_type: str, threads: int) -> None:
    """Load a converted model, say so, and answer requests until the input ends.

    A request holds `tokens` and `options` of `Generator.generate_batch`; its answer the `ids` of
    each hypothesis, their `scores`, and the `seconds` that they took.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not look like an answer
    import ctranslate2

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    generator = ctranslate2.Generator(directory, device="cpu", compute_type=compute_type, intra_threads=threads)
    answer({"version": ctranslate2.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        try:
            (found,) = generator.generate_batch([request["tokens"]], **request["options"])
        except (RuntimeError, ValueError) as error:
            answer({"error": str(error)})
            continue
        answer({"ids": found.sequences_ids, "scores": found.scores, "seconds": time.perf_counter() - began})


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
