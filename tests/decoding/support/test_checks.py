"""The guards: what they let through, and the sentences in which they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from decoding import UserError
from decoding.support.checks import choice, number, whole


def test_what_fits_is_returned() -> None:
    assert whole("n", 3) == whole("n", 3, least=3, most=3) == 3
    assert number("x", 2) == 2.0 and number("x", 0.5, above=0, most=1) == 0.5 and number("x", -1.5) == -1.5
    choice("mode", "a", ("a", "b"))
    choice("early", None, (None, True))


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (lambda: whole("n", True), "n is True; give a whole number."),
        (lambda: whole("n", 1.0, least=1), "n is 1.0; give a whole number of at least 1."),
        (lambda: whole("n", 9, 1, 8), "n is 9; give a whole number from 1 to 8."),
        (lambda: whole("n", 9, most=8), "n is 9; give a whole number of at most 8."),
        (lambda: whole("n", 0, 1, hint="or null"), "n is 0; give a whole number of at least 1 (or null)."),
        (lambda: number("x", "1"), "x is '1'; give a number."),
        (lambda: number("x", math.nan, least=0), "x is nan; give a number of at least 0."),
        (lambda: number("x", math.inf), "x is inf; give a number."),
        (lambda: number("x", 0, above=0), "x is 0; give a number above 0."),
        (lambda: number("x", 2, above=0, most=1), "x is 2; give a number in (0, 1]."),
        (lambda: number("x", False, 0, 1), "x is False; give a number in [0, 1]."),
        (lambda: choice("mode", "c", ("a", "b")), "mode is 'c'; choose one of a, b."),
        (lambda: choice("early", 1, (True, "never")), "early is 1; choose one of True, never."),
    ],
)
def test_what_does_not_fit_is_refused(refused: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        refused()
    assert str(caught.value) == sentence
