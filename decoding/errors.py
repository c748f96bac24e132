"""The one exception that a user's mistake raises; entry points print its sentence and exit with 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and what to do."""


@contextmanager
def reading(what: object, remedy: str) -> Iterator[None]:
    """Say in one sentence that a file is not what it should be, whatever its content led to.

    Args:
        what: the file.
        remedy: what to do, a whole sentence.

    Raises:
        UserError: the block raised what data of a wrong kind or shape lead to.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, EOFError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what} is damaged, or not what this code wrote ({said}). {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that the memory of a device, or of this machine, does not suffice."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)  # what torch says of a CPU's, as RuntimeError


def one_line(text: str) -> str:
    """A sentence in one line, whatever a user's value or a library's words hold."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or what kind of error it is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
