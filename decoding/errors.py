"""The one exception that a user's mistake raises; entry points print its sentence and exit with 2."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and what to do."""
