"""Functions as machine code where numba is installed, as they are where it is not: one source, the
same numbers.

numba comes with `pip install -e ".[fast]"`. Records cross into compiled code as plain tuples, since
numba works out the type of a named one anew each time, in Python.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


def compiled(function: Function) -> Function:
    """The function as machine code, which is kept on disk for the next run; itself without numba.

    What it calls must be defined above it.
    """
    if not COMPILED:
        return function
    import numba

    try:
        made: Any = numba.njit(cache=True, error_model="numpy")(function)
        made._cache._cache_file._source_stamp = _stamp(function)
    except RuntimeError:  # no directory that it could be kept in
        made = numba.njit(error_model="numpy")(function)
    return cast(Function, made)


def inlined(function: Function) -> Function:
    """The function as it is, which compiled functions may call as well."""
    if not COMPILED:
        return function
    from numba.extending import register_jitable

    return cast(Function, register_jitable(function))


def _stamp(function: Any) -> tuple[tuple[int, int], ...]:
    """Times of change and sizes of the files that machine code is made from.

    numba looks at the file of the function alone, and would go on with what other files said when
    it was compiled.
    """
    waiting, seen = [function], {function}
    for used in waiting:
        names = used.__code__.co_names if hasattr(used, "__code__") else ()
        for name in names:
            value = used.__globals__.get(name)
            value = getattr(value, "py_func", value)
            if (inspect.isfunction(value) or inspect.isclass(value)) and value not in seen:
                seen.add(value)
                waiting.append(value)
    files = {str(getattr(sys.modules.get(used.__module__), "__file__", None) or "") for used in seen}
    found = [os.stat(file) for file in sorted(files) if file]
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in found)
