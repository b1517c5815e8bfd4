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

Its states are flattened to `[batch * dims, 1]`, its time is `-t`, `-nsr` or `lam`, and its Brownian motion comes from
sdeflow's noise: one generator a sample, so that rows do not depend on their batch. Every interval of the grid is one call
of `sdeint` and one step. What torchsde evaluates twice (the shape of the drift before each call, a stage of SRK) is not
asked of the network twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError, unknown
from sdeflow.noise import Noise
from sdeflow.plan.instructions import Call
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import OnCall, Solution, Solver, check_levels, check_times

# ----------------------------------------------------------------------------------------------------------- the clocks


class _Clock:
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
            raise GridError(f"{self.kind} is infinite at t={where.t:g}, where no signal is left: use clock='t'")
        return shown

    def levels(self, shown: Tensor, times: Tensor) -> list[Level]:
        """The levels at which it shows `shown`, within `times`; derivatives only where they are needed."""
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
        return t.ds * x0 + t.dsigma * eps if self.kind == "t" else eps if self.kind == "nsr" else -t.nsr * eps


def _check_clock(clock: str, known: tuple[str, ...]) -> None:
    if clock not in known:
        raise unknown("clock", clock, known)


def _watch(on_call: OnCall | None, index: int, t: Level, x: Tensor, x0: Tensor) -> None:
    if on_call is not None:
        on_call(index, Call(1, 0, t.t, t.s, t.sigma), x, x0)


def _search_levels(name: str, calls: Callable[[int], int], nfe: int, least: int) -> int:
    """Grid levels that spend exactly `nfe` calls."""
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise BudgetError(f"nfe is a whole number of network calls, at least 1; got {nfe!r}")
    levels, below = least, 0
    while (cost := calls(levels)) < nfe:
        levels, below = levels + 1, cost
    if cost != nfe:
        near = f"{below} and {cost}" if below else f"{cost}"
        raise BudgetError(f"{name} cannot spend nfe={nfe}; the nearest it can {'are' if below else 'is'} {near}")
    return levels


# ---------------------------------------------------------------------------------------------------------- torchdiffeq


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
    """A method of torchdiffeq on the probability-flow ODE: dopri8, dopri5, bosh3, rk4 and the others, by name.

    - `method`: `dopri8`, `dopri5`, `bosh3`, `fehlberg2`, `adaptive_heun` and `scipy_solver` choose their own steps;
      `euler`, `midpoint`, `heun2`, `heun3`, `rk4` (the 3/8 rule), `explicit_adams` and `implicit_adams` step the given grid.
    - `rtol`, `atol`: of the adaptive methods, in units of the state of the clock, over the whole batch as torchdiffeq
      measures it: step sizes are shared, so that a sample depends on its batch mates. `RK45` is the one that does not.
    - `clock`: the variable stepped in, `"t"`, `"nsr"`, `"lam"` or `"asinh"` (see the module); `"nsr"` and `"lam"` cannot start
      where `s = 0`.
    - `max_nfe`: network calls that an adaptive method may take. `options`: torchdiffeq's own.

    The Adams methods assume equal steps on any grid, and are refused on grids that are not uniform in the clock; here they
    are of order 4 (`max_order` 5 and 4), as torchdiffeq's own 12 is unstable. States in half precision are stepped in
    float32. On accelerators time is as precise as the state, elsewhere float64.

    Errors: `UnknownNameError` for a method or a clock; `BudgetError` where a budget is asked of a method without one;
    `SolverError` where torchdiffeq gives up or `max_nfe` is spent; `NonFiniteError` where the network returns NaN.

    Cost: the method's. Order: the method's. Source: Chen et al., "Neural ordinary differential equations" (2018).
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
        _check_clock(self.clock, ("t", "nsr", "lam", "asinh"))
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0):
            raise ValueError(f"tolerances are positive numbers, such as 1e-5; got rtol={self.rtol}, atol={self.atol}")
        if isinstance(self.max_nfe, bool) or not isinstance(self.max_nfe, int) or self.max_nfe < 1:
            raise ValueError(f"max_nfe is a whole number of network calls, at least 1; got {self.max_nfe!r}")
        object.__setattr__(self, "order", _ODE_METHODS[self.method].order)
        object.__setattr__(self, "adaptive", _ODE_METHODS[self.method].calls is None and self.method not in _ADAMS)

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
                f"torchdiffeq's {self.method} takes no nfe, as it {what}; for an exact budget take a fixed method, such as 'rk4'"
            )
        steps = levels - 1
        # Adams starts with two steps of rk4, where there are more than two.
        return cost * steps + (3 * min(steps, 2) if self.method in _ADAMS else 0) + int(finish)

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        return _search_levels(
            f"torchdiffeq's {self.method}", lambda n: self.calls(n, finish=finish), nfe, 1 if finish else 2
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
            _watch(on_call, reverse.nfe - before - 1, levels[-1], states[-1], result)
            trajectory = [*states, result] if record else None
        spent = reverse.nfe - before
        stacked = torch.stack(trajectory).to(dtype) if trajectory is not None else None
        return Solution(result.to(dtype), spent, spent, trajectory=stacked, statistics={"method": self.method})

    def _odeint(
        self, reverse: Reverse, x: Tensor, times: Tensor, levels: list[Level], record: bool, on_call: OnCall | None
    ) -> list[Tensor]:
        """The states at all `times`, or at the first and the last."""
        from torchdiffeq import odeint

        clock = _Clock(self.clock, reverse.process)
        shown = clock.read(levels)
        if self.method in _ADAMS and not torch.allclose(shown.diff(), shown.diff()[0], rtol=1e-5, atol=0.0):
            raise GridError(
                f"torchdiffeq's {self.method} assumes equal steps, and this grid is not uniform in {self.clock}: take one that "
                "is ('uniform_t' with clock='t', 'uniform_lam' with clock='lam'), or another method"
            )
        if self.adaptive and not record:
            shown, levels = shown[[0, -1]], [levels[0], levels[-1]]
        rhs = _RightHandSide(self, clock, reverse, shown, times, x.dtype, on_call)
        exact = x.device.type == "cpu"
        ticks = shown.to(torch.float64 if exact else x.dtype).to(x.device)
        # Without step_t, an adaptive method steps over the last time, where there may be no process, and interpolates.
        defaults = (
            {"dtype": ticks.dtype, "step_t": ticks[-1:]} if self.adaptive and self.method != "scipy_solver" else {}
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
        return [state * clock.scale(level) for state, level in zip(found.unbind(), levels, strict=True)]

    def _gave_up(self, reason: str, rhs: _RightHandSide) -> Exception:
        where = (
            f"torchdiffeq's {self.method} stopped at t={rhs.t.t:.6g}, after {rhs.calls} network calls"
            if rhs.t
            else "torchdiffeq did not start"
        )
        if rhs.x0 is not None and not bool(torch.isfinite(rhs.x0).all()):
            bad = int((~torch.isfinite(rhs.x0).reshape(len(rhs.x0), -1).all(1)).nonzero()[0])
            return NonFiniteError(f"{where}: the network returned NaN or infinity for sample {bad}")
        return SolverError(f"{where}: {reason}. Loosen rtol and atol, compute in a wider dtype, or take another clock")


class _RightHandSide:
    """What torchdiffeq integrates, as a function of the clock and the state; counts, watches and bounds the calls."""

    def __init__(
        self,
        solver: TorchDiffEq,
        clock: _Clock,
        reverse: Reverse,
        shown: Tensor,
        times: Tensor,
        dtype: torch.dtype,
        on_call: OnCall | None,
    ):
        self.solver, self.clock, self.reverse, self.times, self.on_call = solver, clock, reverse, times, on_call
        self.calls = 0
        self.t: Level | None = None
        self.x0: Tensor | None = None
        self.known: dict[float, Level] = {}
        self.low, self.high = float(shown.min()), float(shown.max())
        stages = [shown[:-1] + c * shown.diff() for c in _ODE_METHODS[solver.method].stages]
        nodes = torch.cat([*stages, shown])
        # torchdiffeq hands out times in the dtype of the state: they are known by what that makes of them.
        for node, level in zip(nodes.to(dtype).tolist(), clock.levels(nodes, times), strict=True):
            self.known[node] = level

    def __call__(self, tick: Tensor, y: Tensor) -> Tensor:
        if self.calls >= self.solver.max_nfe:
            at = f" at t={self.t.t:.6g}" if self.t is not None else ""
            raise SolverError(
                f"torchdiffeq's {self.solver.method} spent max_nfe={self.solver.max_nfe} network calls{at}: raise it, "
                "or loosen rtol and atol"
            )
        shown = float(tick.detach())
        level = self.known.get(shown)
        if level is None:
            inside = min(max(shown, self.low), self.high)  # a stage at the end of a step may round beyond it
            level = self.clock.levels(torch.tensor([inside], dtype=torch.float64), self.times)[0]
        x = y * self.clock.scale(level)
        x0 = self.reverse(x, level).to(y.dtype)
        self.t, self.x0 = level, x0
        _watch(self.on_call, self.calls, level, x, x0)
        self.calls += 1
        return self.clock.slope(y, x, x0, level)


# ------------------------------------------------------------------------------------------------------------- torchsde


class _SDEMethod(NamedTuple):
    order: int
    kind: Literal["ito", "stratonovich"]  # the same here, as the noise is additive
    calls: int
    stages: tuple[float, ...] = ()
    area: str = "none"


_SDE_METHODS: dict[str, _SDEMethod] = {
    "euler": _SDEMethod(1, "ito", 1),
    "milstein": _SDEMethod(1, "ito", 1),
    "srk": _SDEMethod(2, "ito", 2, (0.75,), "space-time"),
    "euler_heun": _SDEMethod(1, "stratonovich", 1),
    "heun": _SDEMethod(2, "stratonovich", 2),
    "midpoint": _SDEMethod(1, "stratonovich", 2, (0.5,)),
    "log_ode": _SDEMethod(1, "stratonovich", 2, (0.5,), "foster"),
    "reversible_heun": _SDEMethod(1, "stratonovich", 1),
}


@dataclass(frozen=True)
class TorchSDE(Solver):
    """A method of torchsde on the reverse SDE, stepping the given grid: srk, euler, milstein, heun and the others, by name.

    `method` is `srk`, `euler`, `milstein`, `heun`, `euler_heun`, `midpoint`, `log_ode` or `reversible_heun`; `clock` the
    variable stepped in, `"t"`, `"nsr"` or `"lam"`. Noise comes from sdeflow: the same seed gives the same sample whatever
    the batch, and `BrownianNoise` the same path at every number of steps (SRK's second integral of it is drawn step by
    step). Where no signal is left (`s = 0`) the first step is ancestral, in as many parts as the method takes calls.

    Errors: `UnknownNameError` for a method or a clock; `SolverError` without a source of noise; `GridError` for a grid
    towards noise.

    Cost: SRK, `heun`, `midpoint` and `log_ode` 2 calls a step, the others 1; `reversible_heun` one more at its start.
    Weak order: 2 for `srk` (strong 1.5) and `heun`, 1 for the others. Source: Li et al., "Scalable gradients for stochastic
    differential equations" (2020); Rössler (2010) for SRK.
    """

    method: str = "srk"
    clock: Literal["t", "nsr", "lam"] = "t"

    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    reversible: ClassVar[bool] = False
    source: ClassVar[str] = "Li et al. 2020; Rössler 2010"
    cost: ClassVar[str] = "the method's"

    def __post_init__(self) -> None:
        if self.method not in _SDE_METHODS:
            raise unknown("method of torchsde", self.method, _SDE_METHODS)
        _check_clock(self.clock, ("t", "nsr", "lam"))
        object.__setattr__(self, "order", _SDE_METHODS[self.method].order)

    def calls(self, levels: int, *, finish: bool = True) -> int:
        """Network calls on a grid of `levels`."""
        steps = levels - 1
        extra = 1 if self.method == "reversible_heun" and steps else 0
        return _SDE_METHODS[self.method].calls * steps + extra + int(finish)

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        return _search_levels(
            f"torchsde's {self.method}", lambda n: self.calls(n, finish=finish), nfe, 1 if finish else 2
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
        if len(times) > 1 and times[-1] > times[0]:
            raise GridError("the reverse SDE runs from noise to data; encode with a solver of the ODE, such as 'heun'")
        if noise is None and len(times) > 1:
            raise SolverError(f"torchsde's {self.method} draws noise: give it a source of noise")
        before, dtype = reverse.nfe, x.dtype
        levels = check_levels(reverse.prepare(times), reverse.process)
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        states = [y]
        sde = _ReverseSDE(self, reverse, x.shape, on_call)
        for t, t_next in pairwise(levels):
            assert noise is not None
            if t.s == 0.0:
                parts = _SDE_METHODS[self.method].calls if len(levels) > 2 else self.calls(2, finish=False)
                y = sde.ancestral(y, t, t_next, noise, parts)
            else:
                y = sde.step(y, t, t_next, noise)
            states = [*states, y] if record else [y]
        if finish:
            y = sde.ask(y, levels[-1])
        spent = reverse.nfe - before
        trajectory = torch.stack([*states, y] if finish else states).to(dtype) if record else None
        return Solution(y.to(dtype), spent, spent, trajectory=trajectory, statistics={"method": self.method})


class _ReverseSDE:
    """The reverse SDE as torchsde sees it: flat states, additive noise, a clock that rises."""

    noise_type = "additive"

    def __init__(self, solver: TorchSDE, reverse: Reverse, shape: torch.Size, on_call: OnCall | None):
        self.method, self.sign = _SDE_METHODS[solver.method], 1.0 if solver.clock == "lam" else -1.0
        self.name, self.sde_type = solver.method, self.method.kind
        self.reverse, self.shape, self.on_call = reverse, shape, on_call
        self.clock = _Clock(solver.clock, reverse.process)
        self.probe = False
        self.calls = 0
        self.extra: Any = None
        self.known: dict[float, Level] = {}
        self.last: tuple[float, Tensor, Tensor] | None = None

    def ask(self, x: Tensor, t: Level) -> Tensor:
        """The prediction for a state in its own shape."""
        x0 = self.reverse(x, t).to(x.dtype)
        _watch(self.on_call, self.calls, t, x, x0)
        self.calls += 1
        return x0

    def step(self, x: Tensor, t: Level, t_next: Level, noise: Noise) -> Tensor:
        """One step of the method."""
        from torchsde import sdeint

        shown = self.clock.read([t, t_next]) * self.sign
        times = torch.tensor([t_next.t, t.t], dtype=torch.float64)
        inner = (
            torch.stack([shown[0] + c * (shown[1] - shown[0]) for c in self.method.stages])
            if self.method.stages
            else shown[:0]
        )
        found = self.clock.levels(self.sign * inner, times)
        self.known = dict(zip(inner.tolist(), found, strict=True)) | {float(shown[0]): t, float(shown[1]): t_next}
        y = (x * (1.0 / self.clock.scale(t))).reshape(-1, 1)
        self.probe, self.last = True, None
        # A dt beyond the interval: torchsde stops at its end, so that it is one step.
        span = 2.0 * float(shown[1] - shown[0])
        motion = _increments(noise, t, t_next, y, self.method.area)
        ys, self.extra = sdeint(
            self, y, shown, bm=motion, method=self.name, dt=span, extra=True, extra_solver_state=self.extra
        )
        return ys[-1].reshape(self.shape) * self.clock.scale(t_next)

    def ancestral(self, x: Tensor, t: Level, t_next: Level, noise: Noise, parts: int) -> Tensor:
        """From where no signal is left, by the exact ancestral step, in as many parts as the method takes calls."""
        process = self.reverse.process
        angle = math.atan2(t_next.sigma, t_next.s)
        cuts = [angle + (math.pi / 2 - angle) * (1 - k / parts) for k in range(1, parts)]
        between = [process.level(process.t_of_nsr(math.tan(cut))) for cut in cuts]

        for a, b in pairwise([t, *between, t_next]):
            x0 = self.ask(x, a)
            ratio = b.nsr / a.nsr
            z = noise.draw(float(a.nsr), float(b.nsr)).to(x)
            x = b.s * x0 + (b.sigma * ratio) * eps_of(x, x0, a) + (b.sigma * math.sqrt(1.0 - ratio**2)) * z
        return x

    def f(self, tick: Tensor, y: Tensor) -> Tensor:
        """Drift in the rising clock."""
        if self.probe:  # torchsde looks at the shape
            self.probe = False
            return torch.zeros_like(y)
        shown = float(tick)
        if self.last is not None and self.last[0] == shown and self.last[1] is y:
            return self.last[2]
        t = self.level(shown)
        x = y.reshape(self.shape) * self.clock.scale(t)
        eps = eps_of(x, self.ask(x, t), t)
        match self.clock.kind:
            case "t":
                drift = (-t.f) * x - (t.g2 / t.sigma) * eps
            case "nsr":
                drift = -2.0 * eps
            case _:
                drift = (-2.0 * t.nsr) * eps
        self.last = (shown, y, drift.reshape(-1, 1))
        return self.last[2]

    def strength(self, tick: Tensor) -> float:
        """Diffusion coefficient."""
        t = self.level(float(tick))
        return math.sqrt({"t": t.g2, "nsr": 2.0 * t.nsr, "lam": 2.0 * t.nsr**2}[self.clock.kind])

    def g(self, tick: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, self.strength(tick)).unsqueeze(-1)

    def level(self, shown: float) -> Level:
        known = self.known.get(shown)
        if known is None:
            near = min(self.known, key=lambda at: abs(at - shown))
            if abs(near - shown) > 1e-12 * (1.0 + abs(shown)):
                raise SolverError(
                    f"torchsde's {self.name} asked at an unexpected time, {shown!r}: is this torchsde 0.2.6?"
                )
            known = self.known[near]
        return known


def _increments(noise: Noise, t: Level, t_next: Level, y: Tensor, area: str) -> Any:
    """The Brownian motion over one step, drawn from sdeflow's noise, as torchsde asks for it."""
    from torchsde import BaseBrownian

    z = noise.draw(float(t.nsr), float(t_next.nsr)).reshape(-1, 1).to(y)
    # The space-time Levy area over the interval, of variance 1/12, is independent of the increment.
    h = noise.draw().reshape(-1, 1).to(y) * math.sqrt(1.0 / 12.0) if area == "space-time" else None

    class Increments(BaseBrownian):
        shape, dtype, device = torch.Size(y.shape), y.dtype, y.device
        levy_area_approximation = area

        def __call__(self, ta: Tensor, tb: Tensor | None = None, return_U: bool = False, return_A: bool = False) -> Any:
            assert tb is not None
            width = float(tb) - float(ta)
            w = math.sqrt(width) * z
            extra: list[Tensor] = []
            if return_U:
                assert h is not None
                extra.append(width * (0.5 * w + math.sqrt(width) * h))
            if return_A:
                extra.append(torch.zeros_like(w).unsqueeze(-1))  # antisymmetric in one channel
            return (w, *extra) if extra else w

        def __repr__(self) -> str:
            return "Increments()"

    return Increments()
