"""Every registered solver converges at the order it claims, on grids that are smoothly non-uniform,
under several processes.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import (
    DETERMINISTIC,
    GRID_SOLVERS,
    NO_ORDER,
    PROCESSES,
    SOLVERS,
    STOCHASTIC,
    GaussianData,
    Mixture,
    PathNoise,
    each,
    law,
    observed_order,
    reference,
    slopes,
    thinned,
    warped,
)

from sdeflow import registry
from sdeflow.noise import BrownianNoise, Noise, SeededNoise
from sdeflow.plan.instructions import Draw
from sdeflow.process import Process
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import solve
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.runge_kutta import Clock, Euler, Heun, Midpoint, OpenRungeKutta, Ralston

UNDER = ("vp", "edm", "rectified_flow", "cosine")
ELSEWHERE = {
    "rk45": "test_adaptive.py",
    "rk23": "test_adaptive.py",
    "dpm_adaptive_12": "test_dpm_adaptive.py",
    "dpm_adaptive_23": "test_dpm_adaptive.py",
    "adaptive_sde": "test_adaptive_sde.py",
    "adaptive_ancestral": "test_adaptive_sde.py",
    "torchdiffeq": "test_external.py",
    "torchsde": "test_external.py",
}
"""Registered solvers that do not step over a grid, and the file that shows their accuracy."""

STARTS_QUIETLY = {
    "auto": 4,
    "adams4": 4,
    "unipc_3": 4,
    "unipc_3_bh1": 4,
    "dpmpp_3m_exact": 3,
    "deis_tab2": 3,
    "deis_tab3": 4,
    "deis_rho2": 3,
    "deis_rho3": 4,
    "lms": 4,
    "ipndm_v3": 3,
}
"""Order shown where the path is still straight at the start, by methods whose first step takes an
order that shows elsewhere.
"""

FINER = {"dpmpp_2m_sde": 192, "stochastic_adams2-t": 384}
"""Stochastic solvers whose order shows on finer grids, and their steps."""
BETTER_ON_GAUSSIANS = {"dpmpp_sde": 3}
"""Weak order shown on Gaussian data, above the one that holds on any (`test_sde_solvers.py`)."""

SHOWS_LATER = {
    "auto": 160,  # from 100 levels on it is one method
    "dpm_solver_fast": 96,
    "dpmpp_3s_fast": 96,
    "dpmpp_3m": 96,
    "dpm_solver_3m": 96,
    "deis_tab3": 104,
    "ipndm_v": 128,
}
"""Deterministic solvers whose order shows on finer grids, and their steps: three intervals long, or
with weights a little off.
"""

STEPS = {1: (64, 128), 2: (40, 80), 3: (24, 48), 4: (20, 40)}


@pytest.mark.parametrize(
    ("name", "under", "direction"),
    thinned(
        [
            (name, under, direction)
            for name, under in each(DETERMINISTIC, UNDER)
            for direction in ("sample", *["encode"] * DETERMINISTIC[name].reversible)
        ],
        one_in=3,
    ),
)
def test_order_of_deterministic_solvers(name: str, under: str, direction: str) -> None:
    solver, process = DETERMINISTIC[name], PROCESSES[under]

    def error(n: int) -> float:
        times = warped(process, n)
        times = times if direction == "sample" else times.flip(0)
        x, exact = reference(process, float(times[0]), float(times[-1]))
        solution = solver.integrate(Reverse(Mixture(process)), x, times, None, finish=False)
        return float((solution.x - exact).norm() / exact.norm())

    shown = STARTS_QUIETLY.get(name.split("-")[0], solver.order)
    coarse = SHOWS_LATER.get(name, 80 if shown != solver.order else 0)
    steps = (coarse, 2 * coarse) if coarse else STEPS[solver.order]
    order = observed_order(error, steps)
    assert abs(order - shown) < 0.25, f"{solver} claims order {solver.order}, shows {order:.2f}"


@pytest.mark.parametrize(
    ("start_up", "order"), [("orders", 2), ("corrected", 3), ("singlestep", 4)]
)
def test_the_start_bounds_the_order(start_up: Any, order: int) -> None:
    # From the middle of the path, where it bends: the first steps' error is not small there.
    process, solver = PROCESSES["vp"], ExponentialAdams(4, start_up=start_up)
    ends = [-math.log(nsr) for nsr in (1.5, 0.1)]

    def error(n: int) -> float:
        times = process.t_of_lam(
            ends[0] + (ends[1] - ends[0]) * torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
        )
        x, exact = reference(process, float(times[0]), float(times[-1]))
        solution = solver.integrate(Reverse(Mixture(process)), x, times, None, finish=False)
        return float((solution.x - exact).norm() / exact.norm())

    assert solver.order == order
    assert abs(observed_order(error, (160, 320)) - order) < 0.25


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize("name", ["ddim", "heun", "midpoint", "rk4"])
def test_order_against_the_closed_form_of_a_gaussian(name: str, under: str) -> None:
    solver, data = DETERMINISTIC[name], GaussianData(PROCESSES[under], mean=0.7, std=0.4)
    x = torch.linspace(-9.0, 9.0, 5, dtype=torch.float64).unsqueeze(-1)

    def error(n: int) -> float:
        times = warped(data.process, n)
        exact = data.transport(x, float(times[0]), float(times[-1]))
        return float(
            (solver.integrate(Reverse(data), x, times, None, finish=False).x - exact).norm()
            / exact.norm()
        )

    # At least the order: on a linear problem the midpoint rule gains one where the path is a
    # polynomial in time.
    assert observed_order(error, (96, 192)) > solver.order - 0.25


@pytest.mark.parametrize(
    ("name", "under"), each([name for name in STOCHASTIC if name not in NO_ORDER], UNDER)
)
def test_weak_order_from_the_exact_law(name: str, under: str) -> None:
    """On Gaussian data the sampler's law is Gaussian and known exactly: mean and variance converge
    at the claimed order.
    """
    solver, process = STOCHASTIC[name], PROCESSES[under]
    mean, std = 0.7, 0.5

    def errors(n: int) -> tuple[float, float]:
        plan = solver.plan(process, warped(process, n), finish=False)
        _, s, sigma = plan.grid[-1]
        m, d = law(plan, mean, std)
        return abs(m - s * mean), abs(d**2 - (s**2 * std**2 + sigma**2))

    n = FINER.get(name, 96)
    coarse, fine = errors(n), errors(2 * n)
    shown = BETTER_ON_GAUSSIANS.get(name, solver.order)
    assert fine[0] < 0.02
    assert fine[1] < 0.02
    for a, b in zip(coarse, fine, strict=True):
        if max(a, b) < 1e-13:  # ancestral steps keep the mean exactly
            continue
        order = math.log2(a / b)
        assert abs(order - shown) < 0.25, (
            f"{solver} claims weak order {solver.order}, shows {order:.2f}"
        )


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize("name", ["euler_maruyama", "ddpm", "ddim-eta=1"])
def test_strong_order_one_on_a_given_brownian_path(name: str, under: str) -> None:
    """With additive noise on one path in nsr^2, states converge pathwise at order 1."""
    solver, process = STOCHASTIC[name], PROCESSES[under]
    x, _ = reference(process, float(warped(process, 1)[0]), float(warped(process, 1)[1]), n=256)
    finest = 384
    nodes = [level.nsr for level in process.levels(warped(process, finest))]

    def run(n: int) -> torch.Tensor:
        noise = PathNoise(len(x), (2,), nodes)
        return solver.integrate(
            Reverse(Mixture(process)), x, warped(process, n), noise, finish=False
        ).x

    ends = [run(n) for n in (48, 96, 192, finest)]
    steps = [float((a - b).norm(dim=1).median()) for a, b in pairwise(ends)]
    assert abs(slopes(steps)[-1] - 1.0) < 0.25, slopes(steps)


@pytest.mark.parametrize("name", ["euler_maruyama", "ddpm"])
def test_brownian_noise_couples_step_counts(name: str) -> None:
    """The library's own paths show the same order, as long as steps are wider than the tree's
    leaves; unrelated draws show none.
    """
    solver, process = STOCHASTIC[name], PROCESSES["edm"]
    x, _ = reference(process, 8.0, 0.1, n=256)

    def gaps(kind: type[Noise]) -> list[float]:
        noises = [kind(range(256), (2,), dtype=torch.float64) for _ in range(3)]
        ends = [
            solver.integrate(
                Reverse(Mixture(process)), x, warped(process, n), noise, finish=False
            ).x
            for n, noise in zip((12, 24, 48), noises, strict=True)
        ]
        return [float((a - b).norm(dim=1).median()) for a, b in pairwise(ends)]

    (coarse, fine), (_, unrelated) = gaps(BrownianNoise), gaps(SeededNoise)
    assert fine < coarse / 1.6
    assert fine < unrelated / 4


@pytest.mark.parametrize("name", GRID_SOLVERS)
def test_law_is_what_a_plan_does(name: str) -> None:
    """`law` reads the table; here the loop runs it on the basis: the start and every draw, one a
    row.
    """
    solver, data = GRID_SOLVERS[name], GaussianData(PROCESSES["vp"], mean=0.7, std=0.5)
    plan = solver.plan(data.process, warped(data.process, 5))

    class Basis(Noise):
        count = 0

        def draw(self, *levels: object, **keywords: object) -> torch.Tensor:
            self.count += 1
            return (
                torch.nn.functional.one_hot(torch.tensor(self.count + 1), 2 + plan.draws)
                .double()
                .unsqueeze(-1)
            )

    _, s, sigma = plan.grid[0]
    x = torch.full((2 + plan.draws, 1), s * data.mean, dtype=torch.float64)
    x[1] += math.hypot(s * data.std, sigma)
    with torch.no_grad():
        y, _ = plan.execute(Reverse(data), x, Basis([0], (1,)))
    mean, std = float(y[0]), float((y[1:] - y[0]).norm())
    assert plan.draws == sum(isinstance(i, Draw) for i in plan.instructions)
    assert (mean, std) == pytest.approx(law(plan, data.mean, data.std), rel=1e-12)


def test_every_registered_solver_has_a_problem() -> None:
    for name, solver in SOLVERS.items():
        assert isinstance(solver.order, int), f"{name} declares no order"
        if not isinstance(solver, GridSolver):
            assert name in ELSEWHERE, f"{name} is in the registry, and no test shows its accuracy"
            assert (Path(__file__).parent / ELSEWHERE[name]).exists(), (
                f"{ELSEWHERE[name]} should show the accuracy of {name}"
            )
        elif solver.order == 0:
            assert name in NO_ORDER, (
                f"{name} claims no order: say why in problems.NO_ORDER and bound its bias in"
                " test_stochastic.py"
            )
        else:
            assert solver.order in STEPS, f"add step counts for order {solver.order}"
    assert set(registry.SOLVERS) <= set(SOLVERS)


def test_a_grid_refined_where_it_matters_beats_a_uniform_one() -> None:
    """Order is a property of smooth grids; a grid that is not even continuous still converges, to
    the first order at least.
    """
    process: Process = PROCESSES["edm"]
    x, exact = reference(process, 8.0, 0.1)

    def error(n: int) -> float:
        times = warped(process, n)
        times[1:-1:2] *= 0.995  # every other step a little longer
        return float(
            (
                Heun().integrate(Reverse(Mixture(process)), x, times, None, finish=False).x - exact
            ).norm()
        )

    assert observed_order(error, (32, 64)) > 1.75


def _to_zero(kind: type[OpenRungeKutta], under: str, n: int) -> torch.Tensor:
    """The end of `n` steps of which the last is to zero noise."""
    clock: Clock = "nsr" if under == "edm" else "t"
    top = 1.0 if under == "edm" else 0.9
    x = torch.tensor([[1.0, -0.5], [0.2, 0.7], [-0.6, -1.1]], dtype=torch.float64)
    times = top * torch.arange(n, 0, -1, dtype=torch.float64) / n
    solver = kind(clock, to_zero=True)
    solution = solve(Mixture(PROCESSES[under]), solver=solver, grid=times, x=x, t=top)
    assert solution.nfe == n * solver.tableau.stages
    return solution.x


@cache
def _end_at_zero(under: str) -> torch.Tensor:
    # The denoised prediction from any t_min would be off by more than the errors below: this steps
    # to zero noise as well.
    return _to_zero(Midpoint, under, 4096)


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize(("kind", "order"), [(Euler, 1), (Midpoint, 2), (Ralston, 2)])
def test_a_method_that_steps_to_zero_noise_itself_keeps_its_order(
    kind: type[OpenRungeKutta], order: int, under: str
) -> None:
    errors = [
        float((_to_zero(kind, under, n) - _end_at_zero(under)).norm()) for n in (64, 128, 256)
    ]
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(rate - order) < 0.15 for rate in measured), (errors, measured)


def test_what_cannot_step_to_zero_noise_says_so() -> None:
    with pytest.raises(ValueError, match="lam is infinite"):
        Midpoint("lam", to_zero=True)
    with pytest.raises(TypeError):
        Heun("t", to_zero=True)  # type: ignore[call-arg]
