"""The time variable that an external library integrates in, and what the two pass-throughs
share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.errors import GridError, unknown
from sdeflow.plan.instructions import Call
from sdeflow.process import Level, Process
from sdeflow.reverse import eps_of
from sdeflow.solvers.base import OnCall

# --------------------------------------------------------------------------------------- the clocks


class Clock:
    """A variable in which an external method steps, and the state that belongs to it."""

    def __init__(self, kind: str, process: Process):
        self.kind, self.process = kind, process

    def read(self, levels: list[Level]) -> Tensor:
        """What the clock shows at some levels, float64."""
        kind = {
            "t": lambda v: v.t,
            "nsr": lambda v: v.nsr,
            "lam": lambda v: v.lam,
            "asinh": lambda v: math.asinh(v.s / v.sigma),
        }[self.kind]
        shown = torch.tensor([kind(level) for level in levels], dtype=torch.float64)
        if not bool(torch.isfinite(shown).all()):
            where = levels[int((~torch.isfinite(shown)).nonzero()[0])]
            raise GridError(
                f"{self.kind} is infinite at t={where.t:g}, where no signal is left: use clock='t'"
            )
        return shown

    def levels(self, shown: Tensor, times: Tensor) -> list[Level]:
        """The levels at which it shows `shown`, within `times`; derivatives only where they are
        needed.
        """
        if self.kind == "t":
            return self.process.levels(shown.clamp(float(times.min()), float(times.max())))
        lam = {
            "nsr": lambda v: -v.log(),
            "lam": lambda v: v,
            "asinh": lambda v: v - math.log(2.0) + torch.log(-torch.expm1(-2.0 * v)),
        }[self.kind](shown)
        t = self.process.t_of_lam(lam).clamp(float(times.min()), float(times.max()))
        s, sigma = (torch.broadcast_to(c, t.shape).tolist() for c in self.process.kernel(t))
        return [Level(*row, math.nan, math.nan) for row in zip(t.tolist(), s, sigma, strict=True)]

    def scale(self, t: Level) -> float:
        """`x` is so many times the state."""
        return {"t": 1.0, "nsr": t.s, "lam": t.s, "asinh": math.hypot(t.s, t.sigma)}[self.kind]

    def slope(self, y: Tensor, x: Tensor, x0: Tensor, t: Level) -> Tensor:
        """Derivative of the state in the clock."""
        if self.kind == "asinh":
            return x0 - (t.s / math.hypot(t.s, t.sigma)) * y
        eps = eps_of(x, x0, t)
        return (
            t.ds * x0 + t.dsigma * eps
            if self.kind == "t"
            else eps
            if self.kind == "nsr"
            else -t.nsr * eps
        )


def check_clock(clock: str, known: tuple[str, ...]) -> None:
    """An error for a clock that is not among the known ones."""
    if clock not in known:
        raise unknown("clock", clock, known)


def watch(on_call: OnCall | None, index: int, t: Level, x: Tensor, x0: Tensor) -> None:
    """Tell a callback of a network call, if there is one."""
    if on_call is not None:
        on_call(index, Call(1, 0, t.t, t.s, t.sigma), x, x0)


# -------------------------------------------------------------------------------------- torchdiffeq
