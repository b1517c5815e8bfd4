r"""The methods of torchdiffeq and torchsde, on states of any shape under any process.

torchdiffeq integrates the probability-flow ODE in one of four pairs of clock and state,

| clock | state | slope |
|---|---|---|
| `t` | `x` | `dx/dt = s' x0 + sigma' eps` |
| `nsr = sigma / s` | `z = x / s` | `dz/dnsr = eps` |
| `lam = log(s / sigma)` | `z = x / s` | `dz/dlam = -nsr eps` |
| `asinh` (`a = asinh(s / sigma)`) | `u = x / sqrt(s^2 + sigma^2)` | `du/da = x0 - tanh(a) u` |

and torchsde the reverse SDE, whose noise is scalar and additive, in the first three:

$$dx = (f x - g^2\,\nabla\log p)\,dt + g\,d\bar w, \qquad
dz = 2\,\varepsilon\,d\,\mathrm{nsr} + \sqrt{2\,\mathrm{nsr}}\,d\bar w, \qquad
dz = -2\,\mathrm{nsr}\,\varepsilon\,d\lambda + \sqrt2\,\mathrm{nsr}\,d\bar w .$$

Its states are flattened to `[batch * dims, 1]`, its time is `-t`, `-nsr` or `lam`, and its Brownian
motion comes from sdeflow's noise: one generator a sample, so that rows do not depend on their
batch. Every interval of the grid is one call of `sdeint` and one step. What torchsde evaluates
twice (the shape of the drift before each call, a stage of SRK) is not asked of the network twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sdeflow._utils.checks import whole_number
from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError, unknown
from sdeflow.noise import Noise
from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import OnCall, Solution, Solver, check_levels, check_times, search_levels

# --------------------------------------------------------------------------------------- the clocks
from sdeflow.solvers.external.clock import Clock, check_clock, watch


class _Method(NamedTuple):
    order: int
    calls: int | None = None  # a step; None where the method chooses its steps
    stages: tuple[float, ...] = ()  # where they stand within a step


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
class TorchDiffEq(Solver):
    """A method of torchdiffeq on the probability-flow ODE: dopri8, dopri5, bosh3, rk4 and the
    others, by name.

    - `method`: `dopri8`, `dopri5`, `bosh3`, `fehlberg2`, `adaptive_heun` and `scipy_solver` choose
      their own steps; `euler`, `midpoint`, `heun2`, `heun3`, `rk4` (the 3/8 rule), `explicit_adams`
      and `implicit_adams` step the given grid.
    - `rtol`, `atol`: of the adaptive methods, in units of the state of the clock, over the whole
      batch as torchdiffeq measures it: step sizes are shared, so that a sample depends on its batch
      mates. `RK45` is the one that does not.
    - `clock`: the variable stepped in, `"t"`, `"nsr"`, `"lam"` or `"asinh"` (see the module);
      `"nsr"` and `"lam"` cannot start where `s = 0`.
    - `max_nfe`: network calls that an adaptive method may take. `options`: torchdiffeq's own.

    The Adams methods assume equal steps on any grid, and are refused on grids that are not uniform
    in the clock; here they are of order 4 (`max_order` 5 and 4), as torchdiffeq's own 12 is
    unstable. States in half precision are stepped in float32. On accelerators time is as precise as
    the state, elsewhere float64.

    Errors: `UnknownNameError` for a method or a clock; `BudgetError` where a budget is asked of a
    method without one; `SolverError` where torchdiffeq gives up or `max_nfe` is spent;
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

    order: ClassVar[int] = 5
    adaptive: ClassVar[bool] = True
    source: ClassVar[str] = "Chen et al. 2018"
    cost: ClassVar[str] = "the method's"

    def __post_init__(self) -> None:
        if self.method not in _ODE_METHODS:
            raise unknown("method of torchdiffeq", self.method, _ODE_METHODS)
        check_clock(self.clock, ("t", "nsr", "lam", "asinh"))
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
                f"torchdiffeq's {self.method} takes no nfe, as it {what}; for an exact budget take"
                " a fixed method, such as 'rk4'"
            )
        steps = levels - 1
        # Adams starts with two steps of rk4, where there are more than two.
        return cost * steps + (3 * min(steps, 2) if self.method in _ADAMS else 0) + int(finish)

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        return search_levels(
            f"torchdiffeq's {self.method}",
            lambda n: self.calls(n, finish=finish),
            nfe,
            1 if finish else 2,
        )

    def integrate(
        self,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        noise: Noise | None,
        *,
        finish: bool = True,
        record: bool = False,
        on_call: OnCall | None = None,
    ) -> Solution:
        times = check_times(times)
        if finish and len(times) > 1 and times[-1] > times[0]:
            raise GridError("a solve towards noise does not end at zero noise: pass finish=False")
        before = reverse.nfe
        levels = check_levels(reverse.prepare(times), reverse.process)
        states, dtype = [x.to(torch.promote_types(x.dtype, torch.float32))], x.dtype
        if len(times) > 1:
            states = self._odeint(reverse, states[0], times, levels, record, on_call)
        trajectory = states if record else None
        result = states[-1]
        if finish:
            result = reverse(result, levels[-1])
            watch(on_call, reverse.nfe - before - 1, levels[-1], states[-1], result)
            trajectory = [*states, result] if record else None
        spent = reverse.nfe - before
        stacked = torch.stack(trajectory).to(dtype) if trajectory is not None else None
        return Solution(
            result.to(dtype), spent, spent, trajectory=stacked, statistics={"method": self.method}
        )

    def _odeint(
        self,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        levels: list[Level],
        record: bool,
        on_call: OnCall | None,
    ) -> list[Tensor]:
        """The states at all `times`, or at the first and the last."""
        from torchdiffeq import odeint

        clock = Clock(self.clock, reverse.process)
        shown = clock.read(levels)
        if self.method in _ADAMS and not torch.allclose(
            shown.diff(), shown.diff()[0], rtol=1e-5, atol=0.0
        ):
            raise GridError(
                f"torchdiffeq's {self.method} assumes equal steps, and this grid is not uniform in"
                f" {self.clock}: take one that is ('uniform_t' with clock='t', 'uniform_lam' with"
                " clock='lam'), or another method"
            )
        if self.adaptive and not record:
            shown, levels = shown[[0, -1]], [levels[0], levels[-1]]
        rhs = _RightHandSide(self, clock, reverse, shown, times, x.dtype, on_call)
        exact = x.device.type == "cpu"
        ticks = shown.to(torch.float64 if exact else x.dtype).to(x.device)
        # Without step_t, an adaptive method steps over the last time, where there may be no
        # process, and interpolates.
        defaults = (
            {"dtype": ticks.dtype, "step_t": ticks[-1:]}
            if self.adaptive and self.method != "scipy_solver"
            else {}
        )
        if self.method in _ADAMS:
            defaults = {"max_order": _ADAMS[self.method]}
        options = {**defaults, **self.options}
        try:
            found = odeint(
                rhs,
                x * (1.0 / clock.scale(levels[0])),
                ticks,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=options,
            )
        except AssertionError as error:
            raise self._gave_up(str(error), rhs) from error
        return [
            state * clock.scale(level) for state, level in zip(found.unbind(), levels, strict=True)
        ]

    def _gave_up(self, reason: str, rhs: _RightHandSide) -> Exception:
        where = (
            f"torchdiffeq's {self.method} stopped at t={rhs.t.t:.6g}, after {rhs.calls} network"
            " calls"
            if rhs.t
            else "torchdiffeq did not start"
        )
        if rhs.x0 is not None and not bool(torch.isfinite(rhs.x0).all()):
            bad = int((~torch.isfinite(rhs.x0).reshape(len(rhs.x0), -1).all(1)).nonzero()[0])
            return NonFiniteError(f"{where}: the network returned NaN or infinity for sample {bad}")
        return SolverError(
            f"{where}: {reason}. Loosen rtol and atol, compute in a wider dtype, or take another"
            " clock"
        )


class _RightHandSide:
    """What torchdiffeq integrates, as a function of the clock and the state; counts, watches and
    bounds the calls.
    """

    def __init__(
        self,
        solver: TorchDiffEq,
        clock: Clock,
        reverse: Reverse,
        shown: Tensor,
        times: Tensor,
        dtype: torch.dtype,
        on_call: OnCall | None,
    ):
        self.solver, self.clock, self.reverse, self.times, self.on_call = (
            solver,
            clock,
            reverse,
            times,
            on_call,
        )
        self.calls = 0
        self.t: Level | None = None
        self.x0: Tensor | None = None
        self.known: dict[float, Level] = {}
        self.low, self.high = float(shown.min()), float(shown.max())
        stages = [shown[:-1] + c * shown.diff() for c in _ODE_METHODS[solver.method].stages]
        nodes = torch.cat([*stages, shown])
        # torchdiffeq hands out times in the dtype of the state: they are known by what that makes
        # of them.
        for node, level in zip(nodes.to(dtype).tolist(), clock.levels(nodes, times), strict=True):
            self.known[node] = level

    def __call__(self, tick: Tensor, y: Tensor) -> Tensor:
        if self.calls >= self.solver.max_nfe:
            at = f" at t={self.t.t:.6g}" if self.t is not None else ""
            raise SolverError(
                f"torchdiffeq's {self.solver.method} spent max_nfe={self.solver.max_nfe} network"
                f" calls{at}: raise it, or loosen rtol and atol"
            )
        shown = float(tick.detach())
        level = self.known.get(shown)
        if level is None:
            inside = min(
                max(shown, self.low), self.high
            )  # a stage at the end of a step may round beyond it
            level = self.clock.levels(torch.tensor([inside], dtype=torch.float64), self.times)[0]
        x = y * self.clock.scale(level)
        x0 = self.reverse(x, level).to(y.dtype)
        self.t, self.x0 = level, x0
        watch(self.on_call, self.calls, level, x, x0)
        self.calls += 1
        return self.clock.slope(y, x, x0, level)


# ----------------------------------------------------------------------------------------- torchsde
