r"""Runge-Kutta methods on the probability-flow ODE: Euler, Heun, midpoint, Ralston, RK4.

The ODE can be stepped in three clocks. In the process's own time, `clock="t"`,

$$\frac{dx}{dt} = s' x_0 + \sigma' \varepsilon,$$

which is finite even where no signal is left (rectified flow at t = 1). Or, with the scaled state
$z = x/s$, in the noise-to-signal ratio, `clock="nsr"` (EDM's choice; Euler there is DDIM), or in
its logarithm, `clock="lam"`:

$$\frac{dz}{d\,\mathrm{nsr}} = \varepsilon,
\qquad \frac{dz}{d\lambda} = -\mathrm{nsr}\,\varepsilon.$$

The same method in two clocks is two methods, see the table of `docs/benchmarks/defaults.md`;
`clock=None` is the process's own choice (`Process.default_clock`): its time, save for `VE`, whose
time is logarithmic in the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sdeflow.errors import SolverError
from sdeflow.process import Level
from sdeflow.process.clock import Clock
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode import tableaus
from sdeflow.solvers.ode.tableaus import Tableau

ODEClock = Literal["t", "nsr", "lam"]
"""The variable in which a Runge-Kutta method steps."""


@dataclass(frozen=True)
class RungeKutta(GridSolver):
    """An explicit Runge-Kutta method on the probability-flow ODE; its subclasses name a tableau.

    `clock` is the variable in which it steps, `"t"`, `"nsr"` or `"lam"`; None is the process's own
    choice.
    """

    clock: ODEClock | None = None

    tableau: ClassVar[Tableau]

    @property
    def calls_of_step(self) -> int:
        return self.tableau.stages

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        clock = Clock(self.clock or reverse.process.default_clock)
        if clock.name == "t":
            return self._combine(reverse, x, t, t_next, clock), state
        if any(isinstance(level.s, float) and level.s == 0.0 for level in (t, t_next)):
            raise SolverError(
                f'{type(self).__name__} in clock="{clock.name}" cannot start where no signal is'
                f' left (t={t.t:g}); use clock="t"'
            )
        # The ODE of z = x / s; a slope is asked for at x = s z.
        return self._combine(reverse, x * (1.0 / t.s), t, t_next, clock) * t_next.s, state

    def _combine(self, reverse: Reverse, z: Any, t: Level, t_next: Level, clock: Clock) -> Any:
        h = clock.reading(t_next) - clock.reading(t)
        slopes: list[Any] = []
        for c, row in zip(self.tableau.c, self.tableau.a, strict=True):
            level = t if c == 0.0 else t_next if c == 1.0 else _between(reverse, t, h, c, clock)
            slopes.append(_slope(reverse, _add(z, h, row, slopes), level, clock))
        return _add(z, h, self.tableau.b, slopes)


def _add(z: Any, h: Any, weights: Sequence[float], slopes: list[Any]) -> Any:
    """`z + h sum_i w_i slope_i`, without the zeros."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            z = z + (h * weight) * slope
    return z


def _slope(reverse: Reverse, z: Any, t: Level, clock: Clock) -> Any:
    """`dz / dq` in the clock, at a level."""
    if clock.name == "t":
        return reverse.velocity(z, t)
    return clock.slope(z, None, reverse.eps(z * t.s, t), t)


def _between(reverse: Reverse, t: Level, h: Any, c: float, clock: Clock) -> Level:
    """The level a fraction `c` of the step `h` after `t`, by the clock."""
    q = clock.reading(t) + c * h
    return reverse.level(q) if clock.name == "t" else reverse.level_of_lam(clock.lam(q))


@dataclass(frozen=True)
class OpenRungeKutta(RungeKutta):
    """A method without a stage at the end of a step, which therefore can step to zero noise itself.

    With `to_zero` the last step, to `t = 0`, is one of its own, as flow matching integrates, and
    not the denoised prediction.
    """

    to_zero: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to_zero and self.clock == "lam":
            raise ValueError(
                'to_zero=True steps to where lam is infinite: use clock="t" or clock="nsr"'
            )

    def calls(self, levels: int, *, finish: bool = True) -> int:
        return self.tableau.stages * (levels - 1) + (
            self.tableau.stages if self.to_zero else 1
        ) * int(finish)

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        if not self.to_zero:
            return super().finish(reverse, x, t, noise, state)
        return self.step(reverse, x, t, reverse.level(0.0 * t.t), noise, state)[0]


@dataclass(frozen=True)
class Euler(OpenRungeKutta):
    r"""Euler's method: `x_next = x + h dx/dt`.

    Cost: 1 call a step. Order: 1. Source: Song et al. (2021); with `clock="nsr"` it is DDIM.
    """

    order: ClassVar[int] = 1
    tableau: ClassVar[Tableau] = tableaus.EULER
    source: ClassVar[str] = "Song et al. 2021"


@dataclass(frozen=True)
class Heun(RungeKutta):
    r"""Heun's method, the explicit trapezoid: `y = x + h v(x, t)`,
    `x_next = x + h/2 (v(x, t) + v(y, t_next))`.

    Cost: 2 calls a step. Order: 2. Source: Karras et al. (2022), algorithm 1 (with `clock="nsr"`).
    """

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = tableaus.HEUN
    source: ClassVar[str] = "Karras et al. 2022, alg. 1"
    cost: ClassVar[str] = "2 a step"

    def _combine(self, reverse: Reverse, z: Any, t: Level, t_next: Level, clock: Clock) -> Any:
        # The mean of where z is and where a second Euler step from y would lead: one state less to
        # combine.
        h = clock.reading(t_next) - clock.reading(t)
        y = z + h * _slope(reverse, z, t, clock)
        return 0.5 * z + 0.5 * (y + h * _slope(reverse, y, t_next, clock))


@dataclass(frozen=True)
class Midpoint(OpenRungeKutta):
    r"""The explicit midpoint method: `x_next = x + h v(x + h/2 v(x, t), t + h/2)`.

    Cost: 2 calls a step. Order: 2. Source: Runge (1895); DPM-Solver-2 is its exponential relative.
    """

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = tableaus.MIDPOINT
    source: ClassVar[str] = "Runge 1895"
    cost: ClassVar[str] = "2 a step"


@dataclass(frozen=True)
class Ralston(OpenRungeKutta):
    r"""Ralston's method: the second-order method of least error bound,
    `x_next = x + h/4 (v_1 + 3 v_2)`, `v_2` at `2/3`.

    Cost: 2 calls a step. Order: 2. Source: Ralston (1962).
    """

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = tableaus.RALSTON
    source: ClassVar[str] = "Ralston 1962"
    cost: ClassVar[str] = "2 a step"


@dataclass(frozen=True)
class RK4(RungeKutta):
    r"""The classical Runge-Kutta method: `x_next = x + h/6 (v_1 + 2 v_2 + 2 v_3 + v_4)`.

    Cost: 4 calls a step. Order: 4. Source: Kutta (1901).
    """

    order: ClassVar[int] = 4
    tableau: ClassVar[Tableau] = tableaus.RK4
    source: ClassVar[str] = "Kutta 1901"
    cost: ClassVar[str] = "4 a step"
