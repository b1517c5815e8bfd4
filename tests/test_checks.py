"""Checks of arguments: what they accept, and what their errors say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sdeflow._utils.checks import (
    fraction,
    is_number,
    is_whole,
    one_of,
    positive_number,
    whole_number,
)
from sdeflow.errors import GridError


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (1, True, True),
        (6, True, True),
        (0, False, False),
        (7, False, False),
        (2.0, False, True),
        (True, False, False),
        ("2", False, False),
        (None, False, False),
        (math.nan, False, False),
        (math.inf, False, False),
    ],
)
def test_what_is_a_number_in_a_range(value: Any, whole: bool, number: bool) -> None:
    assert is_whole(value, 1, 6) is whole
    assert is_number(value, 1, 6) is number


def test_values_pass_and_errors_say_what_is_possible() -> None:
    assert (whole_number("n", 3), positive_number("rho", 0.5), fraction("p", 1)) == (3, 0.5, 1)
    assert one_of("order", 2, (1, 2)) == 2
    with pytest.raises(ValueError, match="n is a whole number of levels, at least 3; got 2"):
        whole_number("n", 2, 3, of="levels")
    with pytest.raises(GridError, match="rho > 0 is needed, a positive finite number; got inf"):
        positive_number("rho", math.inf, error=GridError)
    with pytest.raises(ValueError, match=r"p is a number from 0 to 1; got 1\.5"):
        fraction("p", 1.5)
    with pytest.raises(ValueError, match="format is 'png', 'npz' or 'parquet'; got 'jpg'"):
        one_of("format", "jpg", ("png", "npz", "parquet"))
