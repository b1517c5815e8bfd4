r"""Clocks: the variables in which methods step, interpolate and measure.

| clock $q$ | reading | state $z$ of the ODE | $dz/dq$ |
|---|---|---|---|
| `t` | the process's time | $x$ | $s' x_0 + \sigma' \varepsilon$ |
| `nsr` | $\sigma / s$ | $x / s$ | $\varepsilon$ |
| `lam` | $\log(s / \sigma)$ | $x / s$ | $-\mathrm{nsr}\,\varepsilon$ |
| `asinh` | $\operatorname{asinh}(s / \sigma)$ | $x / \sqrt{s^2 + \sigma^2}$ | $x_0 - \tanh(q)\,z$ |
| `angle` | $\operatorname{atan}(\mathrm{nsr} / c)$ | | |
| `flow` | $\sigma / (c s + \sigma)$ | | |
| `bounded_lam` | $\log(s / \sigma + 1 / c)$ | | |

The scale $c$ belongs to the last three; it is 1 in their textbook form. `angle`, `flow`, `asinh`
and `bounded_lam` are finite where no signal is left, `nsr` and `lam` are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow._utils import math as _math
from sdeflow._utils.math import Scalar, batch_invariant
from sdeflow.errors import GridError, unknown
from sdeflow.process.base import Level, Process

CLOCKS: tuple[str, ...] = ("t", "nsr", "lam", "asinh", "angle", "flow", "bounded_lam")


@dataclass(frozen=True)
class Clock:
    """A variable in which a method steps, by name; `scale` is the `c` of the module's table.

    Errors: `UnknownNameError` for a name that is not in the table.
    """

    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in CLOCKS:
            raise unknown("clock", self.name, CLOCKS)

    def reading(self, t: Level) -> Scalar:
        """The clock's value at a level.

        A level whose entries are tensors gives a tensor of values.
        """
        match self.name:
            case "t":
                return t.t
            case "nsr":
                return t.nsr
            case "lam":
                return t.lam
            case "asinh":
                return _apply("asinh", t.s / t.sigma)
            case "angle":
                return _apply("atan2", t.sigma, self.scale * t.s)
            case "flow":
                return t.sigma / (self.scale * t.s + t.sigma)
        return _math.log(t.s / t.sigma + 1.0 / self.scale)

    def readings(self, process: Process, times: Tensor) -> Tensor:
        """The clock's value at each of some times."""
        s, sigma = process.kernel(times)
        shown: Tensor = self.reading(Level(times, s, sigma, math.nan, math.nan))
        return shown

    def of_lam(self, lam: Tensor, process: Process | None = None) -> Tensor:
        """The clock's value where `log(s / sigma) = lam`. The clock `t` needs the process."""
        if self.name == "lam":
            return lam
        if self.name == "t":
            if process is None:
                raise ValueError("the time at a given lam depends on the process: pass process=")
            return process.t_of_lam(lam)
        level = Level(math.nan, torch.exp(lam), torch.ones_like(lam), math.nan, math.nan)
        shown: Tensor = self.reading(level)
        return shown

    def lam(self, reading: Scalar) -> Scalar:
        """`log(s / sigma)` where the clock has a given value; the inverse of `of_lam`.

        The clock `t` has none without a process: see `times`.
        """
        match self.name:
            case "lam":
                return reading
            case "nsr":
                return -_math.log(reading)
            case "asinh":  # log(sinh a), without overflow
                return reading - math.log(2.0) + _math.log(-_math.expm1(-2.0 * reading))
            case "angle":
                return -_math.log(self.scale * _apply("tan", reading))
            case "flow":
                return _math.log((1.0 - reading) / (self.scale * reading))
            case "bounded_lam":
                return _math.log(_math.exp(reading) - 1.0 / self.scale)
        raise ValueError("lam at a given time depends on the process: ask the process")

    def times(self, process: Process, readings: Tensor) -> Tensor:
        """The times at which the clock has given values; the inverse of `readings`."""
        return readings if self.name == "t" else process.t_of_lam(self.lam(readings))

    # --------------------------------------------------------------------- the state that it scales

    def state_scale(self, t: Level) -> Scalar:
        """`x / z`: how many times the state `z` of the ODE in this clock `x` is, at a level."""
        match self.name:
            case "t":
                return 1.0
            case "nsr" | "lam":
                return t.s
            case "asinh":
                return _apply("hypot", t.s, t.sigma)
        raise ValueError(f"no method steps the ODE in the clock {self.name}: it has no state")

    def slope(self, z: Any, x0: Any, eps: Any, t: Level) -> Any:
        """`dz / dq`, the right-hand side of the probability-flow ODE in this clock, at a level."""
        match self.name:
            case "t":
                return t.ds * x0 + t.dsigma * eps
            case "nsr":
                return eps
            case "lam":
                return -t.nsr * eps
        return x0 - (t.s / self.state_scale(t)) * z


class ClockRange:
    """A clock over the given times of a process: its values there (`levels`, float64 on the CPU),
    and the way back to times.

    Values that are met exactly give their times exactly: the first and the last, and all of them
    with `every=True`.

    Errors: `GridError` where the clock is not monotone between the times.
    """

    def __init__(self, clock: Clock, process: Process, times: Tensor, *, every: bool = False):
        self.clock, self.process, self.times = clock, process, times
        self.levels = clock.readings(process, times)
        self.exact = range(len(times)) if every else (0, -1)
        steps = self.levels.diff()
        if len(times) > 1 and not bool((steps * torch.sign(steps[0]) > 0).all()):
            raise GridError(
                f"sigma / s of {process!r} is not monotone between the times of the grid"
            )

    @property
    def sign(self) -> float:
        """+1 where the clock rises along the times, else -1."""
        return 1.0 if self.levels[-1] >= self.levels[0] else -1.0

    def time(self, reading: Tensor) -> Tensor:
        """The times, within the range, at which the clock has given values."""
        t = self.clock.times(self.process, reading)
        t = t.clamp(min=float(self.times.min()), max=float(self.times.max()))
        for i in self.exact:
            t = torch.where(reading == self.levels[i], self.times[i], t)
        return t

    def read(
        self, reading: Tensor, what: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`what(reading, t, s, sigma)` where the clock has given values (of any shape).

        No entry depends on how many others there are, to the last bit.
        """

        def numbers(reading: Tensor) -> Tensor:
            t = self.time(reading)
            s, sigma = self.process.kernel(t)
            return torch.stack(what(reading, t, s, sigma))

        return tuple(batch_invariant(numbers, reading))


def _apply(name: str, *values: Scalar) -> Scalar:
    """A function that `torch` and `math` have under one name."""
    return getattr(torch if _math.is_tensor(*values) else math, name)(*values)
