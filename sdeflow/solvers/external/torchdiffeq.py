r"""The methods of torchdiffeq on the probability-flow ODE.

States have any shape, under any process.

torchdiffeq integrates it in one of four pairs of clock and state,

| clock | state | slope |
|---|---|---|
| `t` | `x` | `dx/dt = s' x0 + sigma' eps` |
| `nsr = sigma / s` | `z = x / s` | `dz/dnsr = eps` |
| `lam = log(s / sigma)` | `z = x / s` | `dz/dlam = -nsr eps` |
| `asinh` (`a = asinh(s / sigma)`) | `u = x / sqrt(s^2 + sigma^2)` | `du/da = x0 - tanh(a) u` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sdeflow._utils.checks import whole_number
from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError, unknown
from sdeflow.process import Level
from sdeflow.process.clock import Clock
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import Task
from sdeflow.solvers.external.base import External, Watched, finite_readings, levels_at


class _Method(NamedTuple):
    order: int
    calls: int | None = None  # a step; None where the method chooses its steps
    stages: tuple[float, ...] = ()  # their positions within a step


_ODE_METHODS: dict[str, _Method] = {
    "dopri8": _Method(8),
    "dopri5": _Method(5),
    "bosh3": _Method(3),
    "fehlberg2": _Method(2),
    "adaptive_heun": _Method(2),
    "scipy_solver": _Method(5),
    "euler": _Method(1, 1),
    "midpoint": _Method(2, 2, (0.5,)),
    "heun2": _Method(2, 2),
    "heun3": _Method(3, 3, (1 / 3, 2 / 3)),
    "rk4": _Method(4, 4, (1 / 3, 2 / 3)),
    "explicit_adams": _Method(4, 1, (1 / 3, 2 / 3)),
    "implicit_adams": _Method(4, None, (1 / 3, 2 / 3)),
    "fixed_adams": _Method(4, None, (1 / 3, 2 / 3)),
}
_ADAMS = {"explicit_adams": 5, "implicit_adams": 4, "fixed_adams": 4}
"""Their `max_order` here, which makes them of order 4; torchdiffeq's 12 is unstable."""


@dataclass(frozen=True)
class TorchDiffEq(External):
    """A method of torchdiffeq on the probability-flow ODE: dopri8, dopri5, bosh3, rk4 and the
    others, by name.

    - `method`: `dopri8`, `dopri5`, `bosh3`, `fehlberg2`, `adaptive_heun` and `scipy_solver` choose
      their own steps; `euler`, `midpoint`, `heun2`, `heun3`, `rk4` (the 3/8 rule), `explicit_adams`
      and `implicit_adams` step the given grid.
    - `rtol`, `atol`: of the adaptive methods, in units of the state of the clock. torchdiffeq
      measures the error over the whole batch: step sizes are shared, so that a sample depends on
      the others of its batch. With `RK45` it does not.
    - `clock`: the variable of the steps, `"t"`, `"nsr"`, `"lam"` or `"asinh"` (see the module).
      `"nsr"` and `"lam"` cannot start where `s = 0`.
    - `max_nfe`: network calls that an adaptive method may take. `options`: torchdiffeq's own.

    The Adams methods assume equal steps, and are refused on grids that are not uniform in the
    clock. Here they are of order 4 (`max_order` 5 and 4), as torchdiffeq's own 12 is unstable.
    States in half precision are stepped in float32. Gradients flow through the states and the
    network; step sizes are constants to them, as with `RK45`, and they are those of the steps that
    were taken. `scipy_solver` has none. Time is float64 on the CPU, and as precise as
    the state on accelerators.

    Errors: `UnknownNameError` for a method or a clock; `BudgetError` for an `nfe` of a method
    without one; `SolverError` where torchdiffeq gives up or `max_nfe` is spent;
    `NonFiniteError` where the network returns NaN.

    Cost: the method's. Order: the method's. Source: Chen et al., "Neural ordinary differential
    equations" (2018).
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    clock: Literal["t", "nsr", "lam", "asinh"] = "t"
    max_nfe: int = 10_000
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    library: ClassVar[str] = "torchdiffeq"
    order: ClassVar[int] = 5
    adaptive: ClassVar[bool] = True
    source: ClassVar[str] = "Chen et al. 2018"
    cost: ClassVar[str] = "the method's"

    def __post_init__(self) -> None:
        if self.method not in _ODE_METHODS:
            raise unknown("method of torchdiffeq", self.method, _ODE_METHODS)
        super().__post_init__()
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0):
            raise ValueError(
                f"tolerances are positive numbers, such as 1e-5; got rtol={self.rtol},"
                f" atol={self.atol}"
            )
        whole_number("max_nfe", self.max_nfe, of="network calls")
        object.__setattr__(self, "order", _ODE_METHODS[self.method].order)
        object.__setattr__(
            self, "adaptive", _ODE_METHODS[self.method].calls is None and self.method not in _ADAMS
        )

    def calls(self, levels: int, *, finish: bool = True) -> int:
        """Network calls on a grid of `levels`."""
        cost = _ODE_METHODS[self.method].calls
        if cost is None:
            what = (
                "iterates until it has converged"
                if self.method in _ADAMS
                else "is adaptive: say how accurate with rtol= and atol="
            )
            raise BudgetError(
                f"{self.title} takes no nfe, as it {what}; for an exact budget take"
                " a fixed method, such as 'rk4'"
            )
        steps = levels - 1
        # Adams starts with two steps of rk4, where there are more than two.
        return cost * steps + (3 * min(steps, 2) if self.method in _ADAMS else 0) + int(finish)

    def states(self, task: Task, reverse: Watched, levels: list[Level]) -> list[Tensor]:
        from torchdiffeq import odeint

        x, clock = task.x, Clock(self.clock)
        shown = finite_readings(clock, levels)
        if self.method in _ADAMS and not torch.allclose(
            shown.diff(), shown.diff()[0], rtol=1e-5, atol=0.0
        ):
            raise GridError(
                f"{self.title} assumes equal steps, and this grid is not uniform in"
                f" {self.clock}: take one that is ('uniform_t' with clock='t', 'uniform_lam' with"
                " clock='lam'), or another method"
            )
        if self.adaptive and not task.record:
            shown, levels = shown[[0, -1]], [levels[0], levels[-1]]
        rhs = _RightHandSide(self, clock, reverse, shown, levels, x.dtype)
        ticks = shown.to(torch.float64 if x.device.type == "cpu" else x.dtype).to(x.device)
        # Without step_t, an adaptive method steps over the last time, where there may be no
        # process, and interpolates.
        defaults: dict[str, Any] = {}
        options = dict(self.options)
        if self.adaptive and self.method != "scipy_solver":
            # Steps are constants to gradients: the first one is a function of the state, through
            # the norm, and the time of a stage is not.
            options["norm"] = _constant(self.options.get("norm", _rms))
            defaults = {"dtype": ticks.dtype, "step_t": ticks[-1:]}
        if self.method == "scipy_solver" and _wants_gradients(reverse, x):
            raise SolverError(
                "torchdiffeq's scipy_solver computes in numpy, so that no gradient flows through"
                " it: take another method, such as 'dopri5', or solver='rk45'"
            )
        if self.method in _ADAMS:
            defaults = {"max_order": _ADAMS[self.method]}
        try:
            found = odeint(
                rhs,
                x * (1.0 / clock.state_scale(levels[0])),
                ticks,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options={**defaults, **options},
            )
        except AssertionError as error:
            raise self._gave_up(str(error), rhs) from error
        return [
            state * clock.state_scale(level)
            for state, level in zip(found.unbind(), levels, strict=True)
        ]

    def _gave_up(self, reason: str, rhs: _RightHandSide) -> Exception:
        where = "torchdiffeq did not start"
        if rhs.t is not None:
            where = (
                f"{self.title} stopped at t={rhs.t.t:.6g}, after {rhs.reverse.made} network calls"
            )
        if rhs.x0 is not None and not bool(torch.isfinite(rhs.x0).all()):
            bad = int((~torch.isfinite(rhs.x0).reshape(len(rhs.x0), -1).all(1)).nonzero()[0])
            return NonFiniteError(f"{where}: the network returned NaN or infinity for sample {bad}")
        return SolverError(
            f"{where}: {reason}. Loosen rtol and atol, compute in a wider dtype, or take another"
            " clock"
        )


def _rms(x: Tensor) -> Tensor:
    return x.abs().pow(2).mean().sqrt()


def _constant(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A norm without gradients."""

    def detached(x: Tensor) -> Tensor:
        with torch.no_grad():
            return norm(x.detach())

    return detached


def _wants_gradients(reverse: Reverse, x: Tensor) -> bool:
    weights = (p for network in reverse.denoiser.networks for p in network.parameters())
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in weights))


class _RightHandSide:
    """The function of the clock and the state that torchdiffeq integrates.

    It counts the calls, shows them to the callback, and stops at `max_nfe`.
    """

    def __init__(
        self,
        solver: TorchDiffEq,
        clock: Clock,
        reverse: Watched,
        shown: Tensor,
        levels: list[Level],
        dtype: torch.dtype,
    ):
        self.solver, self.clock, self.reverse = solver, clock, reverse
        self.ends = levels[0].t, levels[-1].t
        self.t: Level | None = None
        self.x0: Tensor | None = None
        self.low, self.high = float(shown.min()), float(shown.max())
        stages = [shown[:-1] + c * shown.diff() for c in _ODE_METHODS[solver.method].stages]
        nodes = torch.cat([*stages, shown])
        # torchdiffeq gives times in the dtype of the state: levels are looked up by the rounded
        # values.
        found = levels_at(clock, reverse.process, nodes, *self.ends)
        self.known = dict(zip(nodes.to(dtype).tolist(), found, strict=True))

    def __call__(self, tick: Tensor, y: Tensor) -> Tensor:
        if self.reverse.made >= self.solver.max_nfe:
            at = f" at t={self.t.t:.6g}" if self.t is not None else ""
            raise SolverError(
                f"{self.solver.title} spent max_nfe={self.solver.max_nfe} network calls{at}: raise"
                " it, or loosen rtol and atol"
            )
        shown = float(tick.detach())
        level = self.known.get(shown)
        if level is None:
            # A stage at the end of a step may round beyond it.
            inside = min(max(shown, self.low), self.high)
            value = torch.tensor([inside], dtype=torch.float64)
            (level,) = levels_at(self.clock, self.reverse.process, value, *self.ends)
        x = y * self.clock.state_scale(level)
        x0 = self.reverse(x, level)
        self.t, self.x0 = level, x0
        return self.clock.slope(y, x0, eps_of(x, x0, level), level)
