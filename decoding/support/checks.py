"""Guards of what a user gives: a whole number, a number, one of several names; what they refuse is
one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from decoding.errors import UserError


def is_whole(value: object) -> bool:
    """True if a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True if a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(name: str, value: Any, least: int | None = None, most: int | None = None, hint: str = "") -> int:
    """The value, if it is a whole number from `least` to `most`, both of them allowed.

    Args:
        name: what the user calls it.
        hint: said in parentheses behind what is allowed.

    Raises:
        UserError: it is not.
    """
    if is_whole(value) and (least is None or value >= least) and (most is None or value <= most):
        return int(value)
    ends = f" of at least {least}" if least is not None else ""
    if most is not None:
        ends = f" from {least} to {most}" if least is not None else f" of at most {most}"
    raise _refused(name, value, f"give a whole number{ends}", hint)


def number(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    hint: str = "",
) -> float:
    """The value, if it is a finite number, from `least` on or above `above`, and up to `most`.

    Args:
        name: what the user calls it.
        hint: said in parentheses behind what is allowed.

    Raises:
        UserError: it is not.
    """
    low = (least is None or value >= least) and (above is None or value > above) if is_number(value) else False
    if low and (most is None or value <= most):
        return float(value)
    start = f"[{least}" if above is None else f"({above}"
    if most is not None:
        ends = f" in {start}, {most}]"
    elif above is not None:
        ends = f" above {above}"
    else:
        ends = f" of at least {least}" if least is not None else ""
    raise _refused(name, value, f"give a number{ends}", hint)


def choice(name: str, value: Any, allowed: Iterable[Any], hint: str = "") -> None:
    """Refuse a value that is none of those allowed; true and false are not 1 and 0.

    Raises:
        UserError: it is none of them.
    """
    allowed = list(allowed)
    if not any(type(value) is type(option) and value == option for option in allowed):
        raise _refused(name, value, f"choose one of {', '.join(map(_word, allowed))}", hint)


def _word(option: Any) -> str:
    return option if isinstance(option, str) else repr(option)


def _refused(name: str, value: Any, allowed: str, hint: str) -> UserError:
    return UserError(f"{name} is {value!r}; {allowed}{f' ({hint})' if hint else ''}.")
