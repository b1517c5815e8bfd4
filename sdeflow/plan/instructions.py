"""What a plan is made of: draws, linear combinations, network calls, and marks where a state is
recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sdeflow._utils.math import Scalar


@dataclass(frozen=True, slots=True)
class Draw:
    """`out := z`, a standard normal: the Brownian increment between two noise-to-signal ratios, or
    an independent draw.
    """

    out: int
    nsr: float | None = None
    nsr_next: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The two ratios, both infinite for an independent draw."""
        if self.nsr is None or self.nsr_next is None:
            return math.inf, math.inf
        return self.nsr, self.nsr_next


@dataclass(frozen=True, slots=True)
class Combine:
    """`out := sum_k c_k register_k`; `terms` are pairs `(register, coefficient)`."""

    out: int
    terms: tuple[tuple[int, Scalar], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """`out := denoiser(register, t)`; `s` and `sigma` say what a consistent input holds of signal
    and noise.
    """

    out: int
    input: int
    t: Scalar
    s: Scalar
    sigma: Scalar


@dataclass(frozen=True, slots=True)
class Record:
    """The state at grid level `index` is in `input`; present in plans traced with `record=True`."""

    index: int
    input: int


Instruction = Draw | Combine | Call | Record


def reads(i: Instruction) -> Iterator[int]:
    """The registers that an instruction reads."""
    if isinstance(i, Combine):
        yield from (value for value, _ in i.terms)
    elif isinstance(i, Call | Record):
        yield i.input
