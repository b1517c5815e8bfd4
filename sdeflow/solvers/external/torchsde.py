"""torchsde's methods as solvers: the reverse SDE handed to the library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import GridError, SolverError, unknown
from sdeflow.noise import Noise
from sdeflow.process import Level
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import OnCall, Solution, Solver, check_levels, check_times, search_levels

# --------------------------------------------------------------------------------------- the clocks
from sdeflow.solvers.external.clock import Clock, check_clock, watch


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
    """A method of torchsde on the reverse SDE, stepping the given grid: srk, euler, milstein, heun
    and the others, by name.

    `method` is `srk`, `euler`, `milstein`, `heun`, `euler_heun`, `midpoint`, `log_ode` or
    `reversible_heun`; `clock` the variable stepped in, `"t"`, `"nsr"` or `"lam"`. Noise comes from
    sdeflow: the same seed gives the same sample whatever the batch, and `BrownianNoise` the same
    path at every number of steps (SRK's second integral of it is drawn step by step). Where no
    signal is left (`s = 0`) the first step is ancestral, in as many parts as the method takes
    calls.

    Errors: `UnknownNameError` for a method or a clock; `SolverError` without a source of noise;
    `GridError` for a grid towards noise.

    Cost: SRK, `heun`, `midpoint` and `log_ode` 2 calls a step, the others 1; `reversible_heun` one
    more at its start. Weak order: 2 for `srk` (strong 1.5) and `heun`, 1 for the others. Source: Li
    et al., "Scalable gradients for stochastic differential equations" (2020); Rössler (2010) for
    SRK.
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
        check_clock(self.clock, ("t", "nsr", "lam"))
        object.__setattr__(self, "order", _SDE_METHODS[self.method].order)

    def calls(self, levels: int, *, finish: bool = True) -> int:
        """Network calls on a grid of `levels`."""
        steps = levels - 1
        extra = 1 if self.method == "reversible_heun" and steps else 0
        return _SDE_METHODS[self.method].calls * steps + extra + int(finish)

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        return search_levels(
            f"torchsde's {self.method}",
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
        if len(times) > 1 and times[-1] > times[0]:
            raise GridError(
                "the reverse SDE runs from noise to data; encode with a solver of the ODE, such as"
                " 'heun'"
            )
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
                parts = (
                    _SDE_METHODS[self.method].calls
                    if len(levels) > 2
                    else self.calls(2, finish=False)
                )
                y = sde.ancestral(y, t, t_next, noise, parts)
            else:
                y = sde.step(y, t, t_next, noise)
            states = [*states, y] if record else [y]
        if finish:
            y = sde.ask(y, levels[-1])
        spent = reverse.nfe - before
        trajectory = torch.stack([*states, y] if finish else states).to(dtype) if record else None
        return Solution(
            y.to(dtype), spent, spent, trajectory=trajectory, statistics={"method": self.method}
        )


class _ReverseSDE:
    """The reverse SDE as torchsde sees it: flat states, additive noise, a clock that rises."""

    noise_type = "additive"

    def __init__(
        self, solver: TorchSDE, reverse: Reverse, shape: torch.Size, on_call: OnCall | None
    ):
        self.method, self.sign = _SDE_METHODS[solver.method], 1.0 if solver.clock == "lam" else -1.0
        self.name, self.sde_type = solver.method, self.method.kind
        self.reverse, self.shape, self.on_call = reverse, shape, on_call
        self.clock = Clock(solver.clock, reverse.process)
        self.probe = False
        self.calls = 0
        self.extra: Any = None
        self.known: dict[float, Level] = {}
        self.last: tuple[float, Tensor, Tensor] | None = None

    def ask(self, x: Tensor, t: Level) -> Tensor:
        """The prediction for a state in its own shape."""
        x0 = self.reverse(x, t).to(x.dtype)
        watch(self.on_call, self.calls, t, x, x0)
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
        self.known = dict(zip(inner.tolist(), found, strict=True)) | {
            float(shown[0]): t,
            float(shown[1]): t_next,
        }
        y = (x * (1.0 / self.clock.scale(t))).reshape(-1, 1)
        self.probe, self.last = True, None
        # A dt beyond the interval: torchsde stops at its end, so that it is one step.
        span = 2.0 * float(shown[1] - shown[0])
        motion = _increments(noise, t, t_next, y, self.method.area)
        ys, self.extra = sdeint(
            self,
            y,
            shown,
            bm=motion,
            method=self.name,
            dt=span,
            extra=True,
            extra_solver_state=self.extra,
        )
        return ys[-1].reshape(self.shape) * self.clock.scale(t_next)

    def ancestral(self, x: Tensor, t: Level, t_next: Level, noise: Noise, parts: int) -> Tensor:
        """From where no signal is left, by the exact ancestral step, in as many parts as the method
        takes calls.
        """
        process = self.reverse.process
        angle = math.atan2(t_next.sigma, t_next.s)
        cuts = [angle + (math.pi / 2 - angle) * (1 - k / parts) for k in range(1, parts)]
        between = [process.level(process.t_of_nsr(math.tan(cut))) for cut in cuts]

        for a, b in pairwise([t, *between, t_next]):
            x0 = self.ask(x, a)
            ratio = b.nsr / a.nsr
            z = noise.draw(float(a.nsr), float(b.nsr)).to(x)
            x = (
                b.s * x0
                + (b.sigma * ratio) * eps_of(x, x0, a)
                + (b.sigma * math.sqrt(1.0 - ratio**2)) * z
            )
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
                    f"torchsde's {self.name} asked at an unexpected time, {shown!r}: is this"
                    " torchsde 0.2.6?"
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

        def __call__(
            self,
            ta: Tensor,
            tb: Tensor | None = None,
            return_U: bool = False,
            return_A: bool = False,
        ) -> Any:
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
