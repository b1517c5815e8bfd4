r"""Problems whose answers are known, written without `sdeflow.targets`, and exact laws of plans on
Gaussian data.

`Mixture` is nonlinear: its ODE is solved by scipy's DOP853 at a tolerance of 1e-13. On
`GaussianData` every step is affine, so that the law of a sampler, its noise included, follows from
its plan by propagating one row of numbers: no Monte Carlo (`law`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sdeflow import registry
from sdeflow._utils.math import as_time
from sdeflow.denoisers import Denoiser
from sdeflow.noise import Noise
from sdeflow.plan.instructions import Call, Combine, Draw
from sdeflow.plan.plan import Plan
from sdeflow.process import EDM, VE, VP, Cosine, Process, RectifiedFlow, SubVP
from sdeflow.solvers.base import GridSolver, Solver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.deis import DEIS
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.solvers.sde.classic import DDPM
from sdeflow.solvers.wrappers.ancestral import Ancestral
from sdeflow.solvers.wrappers.churn import Churn
from sdeflow.solvers.wrappers.langevin import Langevin
from sdeflow.solvers.wrappers.restart import Restart

LINEAR_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)

PROCESSES: dict[str, Process] = {
    "vp": VP(),
    "subvp": SubVP(),
    "cosine": Cosine(),
    "ve": VE(),
    "edm": EDM(),
    "rectified_flow": RectifiedFlow(),
    "from_betas": Process.from_betas(LINEAR_BETAS),
    "from_sde": Process.from_sde(lambda t: -0.5 * (0.1 + 19.9 * t), lambda t: 0.1 + 19.9 * t),
}
"""One process of each kind, at its defaults."""


class Problem(Denoiser):
    """A denoiser that is a function of `x`, `s` and `sigma`, on any path."""

    known_density = True

    def __init__(self, process: Process | None = None):
        self.process = EDM() if process is None else process

    def under(self, process: Process) -> Problem:
        return type(self)(process)

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        s, sigma = self.process.kernel(as_time(t).double())
        if s.ndim:
            s, sigma = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in (s, sigma))
        return (
            self.denoise(x, s.to(x), sigma.to(x))
            if s.ndim
            else self.denoise(x, s.to(x.dtype), sigma.to(x.dtype))
        )

    def denoise(self, x: Any, s: Any, sigma: Any) -> Any:
        raise NotImplementedError


class Mixture(Problem):
    """Three isotropic Gaussians in the plane."""

    shape = (2,)
    weights = (0.5, 0.3, 0.2)
    means = ((1.0, 0.5), (-0.8, 0.3), (0.1, -1.1))
    stds = (0.35, 0.25, 0.5)

    def denoise(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        means = x.new_tensor(self.means)
        c2 = x.new_tensor(self.stds) ** 2
        r = (
            x.unsqueeze(-2) - s * means
            if s.ndim == 0
            else x.unsqueeze(-2) - s.unsqueeze(-1) * means
        )
        s_, sigma_ = (s, sigma) if s.ndim == 0 else (s.reshape(-1, 1), sigma.reshape(-1, 1))
        v = s_**2 * c2 + sigma_**2
        logits = x.new_tensor(self.weights).log() - 0.5 * (r**2).sum(-1) / v - torch.log(v)
        posterior = torch.softmax(logits, -1).unsqueeze(-1)
        return (posterior * (means + (s_ * c2 / v).unsqueeze(-1) * r)).sum(-2)

    @classmethod
    def draw(cls, n: int, seed: int) -> np.ndarray:
        """`n` samples of the data."""
        rng = np.random.default_rng(seed)
        k = rng.choice(3, n, p=cls.weights)
        return np.array(cls.means)[k] + np.array(cls.stds)[k, None] * rng.standard_normal((n, 2))

    @classmethod
    def moments(cls) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the data."""
        w, m, c = np.array(cls.weights), np.array(cls.means), np.array(cls.stds)
        mean = w @ m
        return mean, (w * c**2).sum() * np.eye(2) + (m - mean).T @ (w[:, None] * (m - mean))


def _mixture_numpy(x: np.ndarray, nsr: float) -> np.ndarray:
    """The mixture's denoiser for `s = 1`, in numpy."""
    w, m, c2 = np.array(Mixture.weights), np.array(Mixture.means), np.array(Mixture.stds) ** 2
    r = x[:, None, :] - m
    v = c2 + nsr**2
    logits = np.log(w / v) - 0.5 * (r**2).sum(-1) / v
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return (p[..., None] * (m + (c2 / v)[:, None] * r)).sum(1)


@functools.cache
def _reference(lam: float, lam_next: float, n: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    start = Mixture.draw(n, seed) + math.exp(-lam) * rng.standard_normal((n, 2))

    def slope(
        lam: float, z: np.ndarray
    ) -> np.ndarray:  # dz/dlam = -nsr eps = D - z, with z = x / s
        z = z.reshape(n, 2)
        return (_mixture_numpy(z, math.exp(-lam)) - z).ravel()

    end = solve_ivp(
        slope, (lam, lam_next), start.ravel(), method="DOP853", rtol=1e-13, atol=1e-14
    ).y[:, -1]
    return torch.from_numpy(start), torch.from_numpy(end.reshape(n, 2))


def reference(
    process: Process, t: float, t_next: float, n: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """States of `Mixture` at `t` and where the probability-flow ODE takes them at `t_next`, to
    1e-12; float64 `[n, 2]`.
    """
    a, b = process.level(t), process.level(t_next)
    start, end = _reference(round(a.lam, 12), round(b.lam, 12), n, seed)
    return a.s * start, b.s * end


def ends(process: Process, t: float, n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States of `Mixture` at `t` and where the ODE takes them at zero noise, to 1e-10."""
    a = process.level(t)
    start, end = _reference(round(a.lam, 12), 14.0, n, seed)
    return a.s * start, end


class GaussianData(Problem):
    """Data `N(mean, std^2 I)` of any shape."""

    def __init__(self, process: Process | None = None, mean: float = 0.0, std: float = 0.5):
        super().__init__(process)
        self.mean, self.std = mean, std

    def under(self, process: Process) -> GaussianData:
        return GaussianData(process, self.mean, self.std)

    def denoise(self, x: Any, s: Any, sigma: Any) -> Any:
        return self.mean + (s * self.std**2 / (s**2 * self.std**2 + sigma**2)) * (x - s * self.mean)

    def transport(self, x: Tensor, t: float, t_next: float) -> Tensor:
        """Where the probability-flow ODE takes `x`: its standardised value stays."""
        a, b = self.process.level(t), self.process.level(t_next)
        ratio = math.hypot(b.s * self.std, b.sigma) / math.hypot(a.s * self.std, a.sigma)
        return b.s * self.mean + ratio * (x - a.s * self.mean)


class Point(Problem):
    """Data that is one point, `value`: every prediction is that point."""

    value = 0.75

    def denoise(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


def law(plan: Plan, mean: float, std: float) -> tuple[float, float]:
    """Exact mean and standard deviation of a plan's result on data `N(mean, std^2)`, from the true
    marginal at its first level.

    A register is `constant + sum_k weight_k z_k` over independent standard normals: the start and
    one for each draw.
    """
    _, s, sigma = plan.grid[0]
    size = 2 + plan.draws
    registers: dict[int, np.ndarray] = {0: np.zeros(size)}
    registers[0][0], registers[0][1] = s * mean, math.hypot(s * std, sigma)
    draws = 0
    for i in plan.instructions:
        match i:
            case Draw():
                registers[i.out] = np.zeros(size)
                registers[i.out][2 + draws] = 1.0
                draws += 1
            case Combine():
                registers[i.out] = sum(
                    (float(c) * registers[r] for r, c in i.terms), np.zeros(size)
                )
            case Call():
                gain = i.s * std**2 / (i.s**2 * std**2 + i.sigma**2)
                x0 = gain * registers[i.input]
                x0[0] += mean * (1.0 - gain * i.s)
                registers[i.out] = x0
    result = registers[plan.result]
    return float(result[0]), float(np.sqrt((result[1:] ** 2).sum()))


def warped(process: Process, n: int, nsr: float = 8.0, nsr_next: float = 0.1) -> Tensor:
    """`n` steps between two noise-to-signal ratios, smoothly non-uniform (by a factor of 5), with
    the same ends for all n.
    """
    u = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    u = u - 2.0 / 3.0 * torch.sin(2 * math.pi * u) / (2 * math.pi)
    a, b = (process.t_of_lam(-math.log(r)) for r in (nsr, nsr_next))
    if nsr < nsr_next:
        assert a < b
    lam_a, lam_b = process.lam(a), process.lam(b)
    times = process.t_of_lam(lam_a + u * (lam_b - lam_a))
    times[0], times[-1] = a, b
    return times


def slopes(errors: Sequence[float]) -> list[float]:
    """Observed orders of successive halvings."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def observed_order(run: Callable[[int], float], counts: Iterable[int]) -> float:
    """The order between the two finest of `counts`, each twice the one before."""
    errors = [run(n) for n in counts]
    return slopes(errors)[-1]


class FixedNoise(Noise):
    """Draws made beforehand, in float64, so that two executions can be compared to rounding."""

    def __init__(
        self, batch: int, shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0
    ):
        super().__init__(range(batch), shape, dtype=dtype)
        self._generator = torch.Generator().manual_seed(seed)
        self.drawn = 0

    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        self.drawn += 1
        z = torch.randn(
            len(self.seeds), *self.shape, generator=self._generator, dtype=torch.float64
        )
        return z.to(self.dtype)


class PathNoise(Noise):
    """Increments of a Brownian path in nsr^2 a sample, fixed by its values at `nodes`: steps
    between nodes agree exactly.
    """

    def __init__(self, batch: int, shape: Sequence[int], nodes: Sequence[float], seed: int = 0):
        super().__init__(range(batch), shape, dtype=torch.float64)
        self._nodes = sorted(nodes)
        generator = torch.Generator().manual_seed(seed)
        tau = torch.tensor(self._nodes, dtype=torch.float64) ** 2
        steps = torch.randn(len(tau) - 1, batch, *shape, generator=generator, dtype=torch.float64)
        steps = steps * tau.diff().sqrt().reshape(-1, *[1] * (steps.ndim - 1))
        self._path = torch.cat([torch.zeros_like(steps[:1]), steps.cumsum(0)])

    def _at(self, nsr: float) -> int:
        i = int(np.searchsorted(self._nodes, nsr))
        return min(
            (j for j in (i - 1, i) if 0 <= j < len(self._nodes)),
            key=lambda j: abs(self._nodes[j] - nsr),
        )

    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if nsr is None or nsr_next is None:
            raise AssertionError("a step on a path names its interval")
        a, b = self._at(nsr), self._at(nsr_next)
        assert abs(self._nodes[a] - nsr) < 1e-9 * nsr
        assert abs(self._nodes[b] - nsr_next) < 1e-9 * nsr_next
        return (self._path[a] - self._path[b]) / math.sqrt(
            self._nodes[a] ** 2 - self._nodes[b] ** 2
        )


# -------------------------------------------------------------------------- what the registry holds


def variants() -> dict[str, Solver]:
    """Every registered solver by name, and once for each clock where it has a choice."""
    found: dict[str, Solver] = {}
    for name, entry in registry.SOLVERS.items():
        made = entry.make()
        found[name] = made
        # The registered names of DEIS are its clocks.
        if (
            isinstance(made, GridSolver)
            and not isinstance(made, DEIS)
            and any(f.name == "clock" for f in dataclasses.fields(made))
        ):
            found.update(
                {f"{name}-{clock}": entry.make(clock=clock) for clock in ("t", "nsr", "lam")}
            )
    found["ddim-eta=0.5"], found["ddim-eta=1"] = DDIM(0.5), DDIM(1.0)
    found["ddpm-large"] = DDPM("large")
    found["langevin-ddim"], found["langevin-heun"] = Langevin(DDIM(), steps=2), Langevin(Heun())
    found["langevin-adams3"], found["restart-adams3"] = (
        Langevin(ExponentialAdams()),
        Restart(ExponentialAdams()),
    )
    found["churn-ddim"], found["ancestral-heun"] = (
        Churn(DDIM(), s_churn=4.0),
        Ancestral(Heun("nsr"), eta=0.7),
    )
    return found


SOLVERS: dict[str, Solver] = variants()
GRID_SOLVERS: dict[str, GridSolver] = {
    name: solver for name, solver in SOLVERS.items() if isinstance(solver, GridSolver)
}
DETERMINISTIC = {name: solver for name, solver in GRID_SOLVERS.items() if not solver.stochastic}
STOCHASTIC = {name: solver for name, solver in GRID_SOLVERS.items() if solver.stochastic}
RUNGE_KUTTA = ("euler", "heun", "midpoint", "ralston", "rk4")
CLOCKED = {
    f"{name}-{c}"
    for name in registry.SOLVERS
    if name not in RUNGE_KUTTA
    for c in ("t", "nsr", "lam")
} & {*SOLVERS}
"""Multistep methods with a clock that is not their default: another polynomial in the same
weights.
"""
NO_ORDER = {
    "langevin",
    "langevin-ddim",
    "langevin-heun",
    "langevin-adams3",
    "annealed_langevin",
    "restart",
    "restart-adams3",
}
"""Solvers whose bias does not fall with the grid: `test_stochastic.py` bounds it, and
`test_wrappers.py` that of restarts.
"""


def each(
    names: Iterable[str], processes: Iterable[str], once: Sequence[str] = ("vp",)
) -> list[tuple[str, str]]:
    """Pairs of solver and process: all of `processes`, and for the clocks of one method `once`:
    they are one formula everywhere.
    """
    processes = tuple(processes)
    return [
        (name, under)
        for name in names
        for under in processes
        if under in once or not CLOCKED.intersection({name})
    ]


def thinned(
    cases: Sequence[tuple[Any, ...]], always: Sequence[str] = ("vp",), one_in: int = 4
) -> list[Any]:
    """Cases (solver, process, ...): all of the processes `always`, and one in `one_in` of the
    others; the rest are slow tests.

    Which ones is a hash of the case: every solver and every process stays among them, and the same
    ones each time.
    """
    return [
        case
        if case[1] in always or zlib.crc32(repr(case).encode()) % one_in == 0
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in cases
    ]


def from_the_start(solver: Solver, process: Process) -> bool:
    """Whether a solver can leave the process's end of time: the clocks nsr and lam have no reading
    where no signal is left.
    """
    clock = getattr(solver, "clock", None)
    return clock not in ("nsr", "lam") or math.isfinite(process.level(process.t_max).nsr)
