"""Objects by their dotted names, as configs and rows write them: `mine.HalfWidth`,
`controller.LearnedWidth.load`.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def is_dotted(name: str) -> bool:
    """True if a text has the form of a dotted name, `module.attribute` or longer."""
    return _DOTTED.fullmatch(name) is not None


def locate(name: str) -> Any:
    """The object with a dotted name; its module is imported, from the current folder too.

    Raises:
        ImportError, AttributeError, ValueError: there is no such module, or nothing of that name in
            it.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing installed is hidden by a file that lies there
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if "." not in module or error.name is None or not module.startswith(error.name):
            raise  # there is no such module, or it is there and one that it needs is not
        return getattr(locate(module), attribute)  # a method: module.Class.method
