"""What solvers that hold a solver share: its budget and its first steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdeflow._utils.math import sqrt
from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import from_pure_noise
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
    def active(self) -> bool:
        """Whether it changes anything; if not, it is `solver`, bit for bit."""
        return True

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.active or self.solver.stochastic

    @property
    def reversible(self) -> bool:
        """Whether it also encodes."""
        return not self.active and self.solver.reversible

    @property
    def one_step_calls(self) -> int:
        """What one step of the inner solver costs, when it is a solve of its own."""
        return self.solver.calls(2, finish=False)

    @property
    def one_step_order(self) -> int:
        """Its order when every step is a solve of its own: at most the number of its calls."""
        return min(self.solver.order, self.one_step_calls)

    def one_step(self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any) -> Any:
        """A step of the inner solver as a solve of its own."""
        if not has_signal(t):
            return from_pure_noise(reverse, x, t, t_next, self.one_step_calls, noise)
        return self.solver.step(reverse, x, t, t_next, noise, self.solver.start(1))[0]

    @property
    def needs_signal(self) -> bool:
        """Whether the inner solver cannot leave a level without signal, or not with its usual
        calls.
        """
        return self.one_step_calls > 1 or (
            isinstance(self.solver, RungeKutta) and self.solver.clock in ("nsr", "lam")
        )


class Stepwise(Nested):
    """A wrapper that makes every step, and the last to zero noise, a solve of its own.

    Subclasses give `one`, a step while active.
    """

    s_noise: float

    @property
    def order(self) -> int:  # type: ignore[override]
        """That of the solver within, of a step at a time; 0 unless `s_noise=1`."""
        if not self.active:
            return self.solver.order
        return self.one_step_order if self.s_noise == 1.0 else 0

    def calls(self, levels: int, *, finish: bool = True) -> int:
        if not self.active:
            return self.solver.calls(levels, finish=finish)
        return self.one_step_calls * (levels - 1) + (self.solver.calls(1) if finish else 0)

    def start(self, steps: int) -> Any:
        return None if self.active else self.solver.start(steps)

    @abstractmethod
    def one(self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any) -> Any:
        """The state at `t_next`."""

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        if not self.active:
            return self.solver.step(reverse, x, t, t_next, noise, state)
        return self.one(reverse, x, t, t_next, noise, state), state

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        inner = self.solver.start(0) if self.active else state
        return self.solver.finish(reverse, x, t, noise, inner)


def noised(x: Any, t: Level, up: Level, s_noise: float, noise: Any) -> Any:
    """The state taken from `t` up to the noisier level `up`, with the fresh noise times `s_noise`:
    `(s_up / s) x + s_up s_noise sqrt(nsr_up^2 - nsr^2) z`.
    """
    x = (up.s / t.s) * x
    if not s_noise:
        return x
    return x + (s_noise * up.s * sqrt((up.nsr - t.nsr) * (up.nsr + t.nsr))) * noise()


def independent(noise: Any) -> Callable[..., Any]:
    """Noise that knows no levels, for steps over intervals that are passed more than once."""
    return lambda *levels: noise()
