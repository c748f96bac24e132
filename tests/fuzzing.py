"""How hard to fuzz, a bound on every input's time, and the counts of what was tried.

DSBD_FUZZ=20 tries twenty times as many inputs, other ones each time; without it they are few, and the same ones.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import HypothesisException

SCALE = int(os.environ.get("DSBD_FUZZ", "0"))
SECONDS = 60.0  # of one input: more is a hang
HANG, FOREIGN = "HANG", "FOREIGN ERROR"  # how an input may not end
TRIED: Counter[str] = Counter()  # by what was fuzzed and how it ended


def examples(count: int) -> Callable[[Any], Any]:
    """Settings of hypothesis: so many inputs, or DSBD_FUZZ times as many."""
    return settings(
        max_examples=count * max(SCALE, 1),
        derandomize=SCALE == 0,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


class Late(AssertionError):
    """An input took too long."""


@contextmanager
def counted(what: str, *allowed: type[BaseException]) -> Iterator[None]:
    """Try an input: it may end well, or in one of the allowed errors, whose message is one sentence or more; not in
    another error, and not never."""

    def late(*_: Any) -> None:
        raise Late(f"{what} took more than {SECONDS:.0f} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
        TRIED[f"{what}: done"] += 1
    except allowed as error:
        TRIED[f"{what}: refused"] += 1
        text = str(error)
        assert len(text) > 20 and "Traceback" not in text, text
    except Late:
        TRIED[f"{what}: {HANG}"] += 1
        raise
    except (AssertionError, HypothesisException):  # a wrong result; an input that hypothesis takes back
        raise
    except Exception:
        TRIED[f"{what}: {FOREIGN}"] += 1
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@atexit.register
def _write_counts() -> None:
    if where := os.environ.get("DSBD_FUZZ_COUNTS"):
        Path(where, f"{os.getpid()}.json").write_text(json.dumps(TRIED))
