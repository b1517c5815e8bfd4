r"""The methods of torchsde on the reverse SDE, whose noise is scalar and additive.

It is integrated in one of three clocks, `t`, `nsr` and `lam`, with `z = x / s`:

$$dx = (f x - g^2\,\nabla\log p)\,dt + g\,d\bar w, \qquad
dz = 2\,\varepsilon\,d\,\mathrm{nsr} + \sqrt{2\,\mathrm{nsr}}\,d\bar w, \qquad
dz = -2\,\mathrm{nsr}\,\varepsilon\,d\lambda + \sqrt2\,\mathrm{nsr}\,d\bar w .$$

torchsde sees states `[batch * dims, 1]` and a time of `-t`, `-nsr` or `lam`. Its Brownian motion
comes from sdeflow's noise: one generator a sample, so that rows do not depend on their batch. Every
interval of the grid is one call of `sdeint` and one step. torchsde evaluates the drift twice in
places (for its shape before each call, in a stage of SRK); the network is called once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import SolverError, unknown
from sdeflow.noise import Noise
from sdeflow.process import Level
from sdeflow.process.clock import Clock
from sdeflow.reverse import eps_of
from sdeflow.solvers.base import Task
from sdeflow.solvers.external.base import External, Watched, finite_readings, levels_at
from sdeflow.solvers.ode.ddim import from_pure_noise


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
class TorchSDE(External):
    """A method of torchsde on the reverse SDE, stepping the given grid: srk, euler, milstein, heun
    and the others, by name.

    - `method`: `srk`, `euler`, `milstein`, `heun`, `euler_heun`, `midpoint`, `log_ode` or
      `reversible_heun`.
    - `clock`: the variable of the steps, `"t"`, `"nsr"` or `"lam"`.

    Noise comes from sdeflow: the same seed gives the same sample whatever the batch, and
    `BrownianNoise` the same path at every number of steps (SRK's second integral of it is random
    for each step). Where no signal is left (`s = 0`) the first step is ancestral, in as many parts
    as the method takes calls.

    Errors: `UnknownNameError` for a method or a clock; `SolverError` without a source of noise;
    `GridError` for a grid towards noise.

    Cost: SRK, `heun`, `midpoint` and `log_ode` 2 calls a step, the others 1; `reversible_heun` one
    more at its start. Weak order: 2 for `srk` (strong 1.5) and `heun`, 1 for the others. Source: Li
    et al., "Scalable gradients for stochastic differential equations" (2020); Rössler (2010) for
    SRK.
    """

    method: str = "srk"
    clock: Literal["t", "nsr", "lam"] = "t"

    library: ClassVar[str] = "torchsde"
    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    source: ClassVar[str] = "Li et al. 2020; Rössler 2010"
    cost: ClassVar[str] = "the method's"

    def __post_init__(self) -> None:
        if self.method not in _SDE_METHODS:
            raise unknown("method of torchsde", self.method, _SDE_METHODS)
        super().__post_init__()
        object.__setattr__(self, "order", _SDE_METHODS[self.method].order)

    def calls(self, levels: int, *, finish: bool = True) -> int:
        """Network calls on a grid of `levels`."""
        steps = levels - 1
        extra = 1 if self.method == "reversible_heun" and steps else 0
        return _SDE_METHODS[self.method].calls * steps + extra + int(finish)

    def states(self, task: Task, reverse: Watched, levels: list[Level]) -> list[Tensor]:
        if (noise := task.noise) is None:
            raise SolverError(f"{self.title} draws noise: give it a source of noise")
        x = task.x
        sde, states = _ReverseSDE(self, reverse, x.shape), [x]

        def draw(t: Level, t_next: Level) -> Tensor:
            return noise.draw(float(t.nsr), float(t_next.nsr)).to(x)

        for t, t_next in pairwise(levels):
            if t.s == 0.0:
                # In as many parts as the method takes calls.
                parts = (
                    _SDE_METHODS[self.method].calls
                    if len(levels) > 2
                    else self.calls(2, finish=False)
                )
                x = from_pure_noise(reverse, x, t, t_next, parts, draw, eta=1.0)
            else:
                x = sde.step(x, t, t_next, noise)
            states = [*states, x] if task.record else [x]
        return states


class _ReverseSDE:
    """The reverse SDE in torchsde's interface: flat states, additive noise, a rising clock."""

    noise_type = "additive"

    def __init__(self, solver: TorchSDE, reverse: Watched, shape: torch.Size):
        self.method = _SDE_METHODS[solver.method]
        self.sign = 1.0 if solver.clock == "lam" else -1.0
        self.name, self.sde_type = solver.method, self.method.kind
        self.reverse, self.shape = reverse, shape
        self.clock = Clock(solver.clock)
        self.probe = False
        self.extra: Any = None
        self.known: dict[float, Level] = {}
        self.last: tuple[float, Tensor, Tensor] | None = None

    def step(self, x: Tensor, t: Level, t_next: Level, noise: Noise) -> Tensor:
        """One step of the method."""
        from torchsde import sdeint

        shown = finite_readings(self.clock, [t, t_next]) * self.sign
        inner = (
            torch.stack([shown[0] + c * (shown[1] - shown[0]) for c in self.method.stages])
            if self.method.stages
            else shown[:0]
        )
        found = levels_at(self.clock, self.reverse.process, self.sign * inner, t.t, t_next.t)
        self.known = dict(zip(inner.tolist(), found, strict=True)) | {
            float(shown[0]): t,
            float(shown[1]): t_next,
        }
        y = (x * (1.0 / self.clock.state_scale(t))).reshape(-1, 1)
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
        return ys[-1].reshape(self.shape) * self.clock.state_scale(t_next)

    def f(self, tick: Tensor, y: Tensor) -> Tensor:
        """Drift in the rising clock."""
        if self.probe:  # torchsde looks at the shape
            self.probe = False
            return torch.zeros_like(y)
        shown = float(tick)
        if self.last is not None and self.last[0] == shown and self.last[1] is y:
            return self.last[2]
        t = self.level(shown)
        x = y.reshape(self.shape) * self.clock.state_scale(t)
        eps = eps_of(x, self.reverse(x, t), t)
        match self.clock.name:
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
        return math.sqrt({"t": t.g2, "nsr": 2.0 * t.nsr, "lam": 2.0 * t.nsr**2}[self.clock.name])

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
    """The Brownian motion over one step, from sdeflow's noise, in torchsde's interface."""
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
