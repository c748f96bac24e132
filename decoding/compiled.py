"""Functions as machine code where numba is installed, as they are where it is not: one source, the same numbers.

numba comes with `pip install -e ".[fast]"`. Records cross into compiled code as plain tuples, since numba works out
the type of a named one anew each time, in Python.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


def compiled(function: Function) -> Function:
    """The function as machine code, which is kept on disk for the next run; itself without numba."""
    if not COMPILED:
        return function
    import numba

    try:
        return cast(Function, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # no directory that it could be kept in
        return cast(Function, numba.njit(error_model="numpy")(function))
