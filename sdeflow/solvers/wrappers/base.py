"""What solvers that hold a solver share: its budget, its times, its first steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.runge_kutta import RungeKutta
from sdeflow.solvers.ode.weights import has_signal


@dataclass(frozen=True)
class Nested(GridSolver):
    """A solver that holds a solver, `solver`, which steps over a grid."""

    solver: GridSolver

    def __post_init__(self) -> None:
        if not isinstance(self.solver, GridSolver):
            name = type(self).__name__
            raise TypeError(
                f"{name} holds a solver that steps over a grid: {name}(Heun()), say, or the name "
                f"'{name.lower()}:heun' in its place; got {self.solver!r}"
            )

    @property
    def one_step_calls(self) -> int:
        """What one step of the inner solver costs, when it is a solve of its own."""
        return self.solver.calls(2, finish=False)

    @property
    def one_step_order(self) -> int:
        """Its order when every step is a solve of its own: a method of so many calls, without a
        past, has at most their number.
        """
        return min(self.solver.order, self.one_step_calls)

    def one_step_budget(self, levels: int, finish: bool) -> int:
        """Network calls where every step, and the last to zero noise, is a solve of its own."""
        return self.one_step_calls * (levels - 1) + (self.solver.calls(1) if finish else 0)

    def one_step(self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any) -> Any:
        """A step of the inner solver as a solve of its own."""
        if not has_signal(t):
            return from_pure_noise(reverse, x, t, t_next, self.one_step_calls, noise)
        return self.solver.step(reverse, x, t, t_next, noise, self.solver.start(1))[0]

    @property
    def needs_signal(self) -> bool:
        """Whether the inner solver may not leave a level without signal by so many calls, or not at
        all.
        """
        return self.one_step_calls > 1 or (
            isinstance(self.solver, RungeKutta) and self.solver.clock in ("nsr", "lam")
        )


def from_pure_noise(
    reverse: Reverse, x: Any, t: Level, t_next: Level, calls: int, noise: Any, eta: float = 0.0
) -> Any:
    """The way from a level where no signal is left, in `calls` steps of `DDIM(eta)`,
    batch_invariant spaced in the angle `atan nsr`.
    """
    flows = isinstance(t_next.s, Tensor)  # gradients, through the levels between too
    end: Any = torch.atan2(t_next.sigma, t_next.s) if flows else math.atan2(t_next.sigma, t_next.s)
    angles = [math.pi / 2 + (end - math.pi / 2) * k / calls for k in range(1, calls)]
    lams = [
        -torch.log(torch.tan(angle)) if flows else -math.log(math.tan(angle)) for angle in angles
    ]
    for a, b in pairwise([t, *map(reverse.level_of_lam, lams), t_next]):
        x, _ = DDIM(eta).step(reverse, reverse.materialise(x), a, b, noise, None)
    return x


def independent(noise: Any) -> Callable[..., Any]:
    """Noise that knows no levels, for steps over intervals that are passed more than once."""
    return lambda *levels: noise()
