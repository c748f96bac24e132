"""The one exception that a user's mistake raises; entry points print its sentence and exit with 2."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or what kind of error it is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
