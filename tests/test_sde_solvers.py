"""The exponential integrators of the reverse SDE: what they agree with, their laws, orders and
distributions, and their plans.

Laws are exact, by propagating numbers through plans; only the last tests draw samples, with fixed
seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    PROCESSES,
    STOCHASTIC,
    FixedNoise,
    Mixture,
    PathNoise,
    law,
    observed_order,
    reference,
    slopes,
    warped,
)
from scipy.integrate import quad
from torch import Tensor

from sdeflow import grid, registry
from sdeflow.plan.instructions import Combine, Draw
from sdeflow.plan.plan import Plan
from sdeflow.process import EDM, VP, Level, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import sample
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.dpm_solver import DPMSolver, DPMSolverPP
from sdeflow.solvers.sde.adams import StochasticAdams
from sdeflow.solvers.sde.classic import DDPM
from sdeflow.solvers.sde.dpm_solver import SDEDPMSolverPP, SDEDPMSolverPPSingle
from sdeflow.solvers.sde.er_sde import ERSDE, POWERS, SCALES
from sdeflow.solvers.sde.exponential import rate_weights, ratio_weights
from sdeflow.solvers.sde.sa_solver import SASolver
from sdeflow.solvers.sde.seeds import SEEDS

KINDS = (SDEDPMSolverPP, SDEDPMSolverPPSingle, SEEDS, SASolver, ERSDE, StochasticAdams)
OURS = {name: entry.make() for name, entry in registry.SOLVERS.items() if entry.kind in KINDS}
UNDER = ("vp", "edm", "rectified_flow")


def same(
    a: GridSolver, b: GridSolver, process: Process, times: Tensor, tolerance: float = 1e-12
) -> None:
    """One method: the same weights of start, predictions and noise in every call's input and in the
    result.
    """
    for finish in (True, False):
        one, two = a.plan(process, times, finish=finish), b.plan(process, times, finish=finish)
        assert one.draws == two.draws
        torch.testing.assert_close(one.times, two.times, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.matrix(), two.matrix(), rtol=tolerance, atol=tolerance)


def from_the_end(process: Process, levels: int) -> Tensor:
    """A grid from the end of time: under rectified flow its first level has no signal."""
    return grid.uniform_sqrt_t(process, levels)


# --------------------------------------------------------------------------------- what equals what

ODE: list[tuple[GridSolver, GridSolver]] = [
    (SDEDPMSolverPP(1, 0.0), DDIM()),
    (SDEDPMSolverPP(2, 0.0), DPMSolverPP(2, lower_final=False)),
    (SDEDPMSolverPP(3, 0.0), DPMSolverPP(3, "heun", lower_final=False)),
    (SDEDPMSolverPP(2, 0.0, exact_weights=True), ExponentialAdams(2, start_up="orders")),
    (SDEDPMSolverPP(3, 0.0, exact_weights=True), ExponentialAdams(3, start_up="orders")),
    *[(StochasticAdams(p, 0.0, c), ExponentialAdams(p, "x0", c, start_up="orders"))
      for p, c in ((1, "lam"), (2, "t"), (3, "nsr"), (4, "angle"), (5, "lam"))],
    *[(StochasticAdams(p, 0.0, corrector=True), ExponentialAdams(p, corrector=True, start_up="orders")) for p in (1, 2, 3)],
    (SASolver(3, 4, 0.0, lower_final=False), ExponentialAdams(3, corrector=True, start_up="orders")),
    (SASolver(3, 0, 0.0), ExponentialAdams(3, start_up="orders", lower_final=True)),
    (SASolver(2, 0, nsr_min=1e5, nsr_max=1e6), ExponentialAdams(2, start_up="orders")),
    *[(ERSDE(p, "ode", exact_weights=True), ExponentialAdams(p, "x0", "nsr", start_up="orders")) for p in (1, 2, 3)],
    (ERSDE(2, 1.0), ExponentialAdams(2, "x0", "nsr", start_up="orders")),
]  # fmt: skip


@pytest.mark.parametrize("under", [*UNDER, "cosine"])
@pytest.mark.parametrize(("stochastic", "ode"), ODE, ids=lambda s: repr(s))
def test_without_noise_it_is_the_ode_s_method(
    stochastic: GridSolver, ode: GridSolver, under: str
) -> None:
    process = PROCESSES[under]
    same(stochastic, ode, process, warped(process, 9))
    same(stochastic, ode, process, from_the_end(process, 7))
    if ode.reversible and stochastic.reversible:
        times = warped(process, 6).flip(0)
        assert (
            stochastic.plan(process, times, finish=False)
            .compare(ode.plan(process, times, finish=False))
            .close()
        )


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize(
    ("stochastic", "ode"),
    [
        (SDEDPMSolverPPSingle(0.0), DPMSolver(2, "x0", stages="inner")),
        (SEEDS(1, 0.0), DPMSolver(1, "x0", stages="inner")),
        (SEEDS(2, 0.0), DPMSolver(2, "x0", stages="inner")),
        (SEEDS(2, 0.0, taylor=True), DPMSolver(2, "x0", "taylor", stages="inner")),
        (SEEDS(3, 0.0), DPMSolver(3, "x0", stages="inner")),
    ],
    ids=lambda s: repr(s),
)
def test_without_noise_single_steps_are_the_ode_s(
    stochastic: GridSolver, ode: GridSolver, under: str
) -> None:
    process = PROCESSES[under]
    same(stochastic, ode, process, warped(process, 9))


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[(first, DDPM()) for first in (SDEDPMSolverPP(1), SEEDS(1), StochasticAdams(1), ERSDE(1, "sde"), SASolver(1, 0))],
        (SDEDPMSolverPP(1, 0.3), SEEDS(1, 0.3)),
        (SDEDPMSolverPP(2, 0.3, exact_weights=True), StochasticAdams(2, 0.3)),
        (SDEDPMSolverPP(3, 1.7, exact_weights=True), StochasticAdams(3, 1.7)),
        *[(StochasticAdams(p, 0.6, "nsr"), ERSDE(p, 1.6, exact_weights=True)) for p in (1, 2, 3)],
        (ERSDE(3, "sde_2"), ERSDE(3, 1.5)),
        (ERSDE(3, "sde_3"), ERSDE(3, 2.5)),
        (StochasticAdams(3, 0.64, corrector=True), SASolver(3, 4, 0.8, lower_final=False)),
        (StochasticAdams(1, 0.64, corrector=True), SASolver(1, 2, 0.8, lower_final=False)),
    ],
    ids=lambda s: repr(s),
)  # fmt: skip
def test_members_of_the_family_that_are_one_method(
    one: GridSolver, other: GridSolver, under: str
) -> None:
    process = PROCESSES[under]
    same(one, other, process, warped(process, 9))
    same(one, other, process, from_the_end(process, 7))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_ratio_is_ddim_s(eta: float) -> None:
    for process in (VP(), RectifiedFlow()):
        a, b = process.level(process.t_max), process.level(0.3)
        for t, t_next in ((a, process.level(0.5)), (process.level(0.5), b)):
            kept, whole, spread = ratio_weights(t, t_next, eta)
            lost = 1.0 - (t_next.nsr / t.nsr) ** 2
            assert spread == pytest.approx(
                eta * t_next.sigma * math.sqrt(lost), rel=1e-12, abs=1e-15
            )
            assert kept == pytest.approx(
                math.sqrt(t_next.sigma**2 - spread**2) / t.sigma, rel=1e-9, abs=1e-15
            )
            assert whole == pytest.approx(t_next.s - kept * t.s, rel=1e-9)


# -------------------------------------------------------------------------------- published weights


def phi(k: int, z: float) -> float:
    """`phi_k(z)`, by its series."""
    return sum(z**j / math.factorial(j + k) for j in range(60))


def test_published_weights_of_two_and_three_predictions() -> None:
    """From the formula with phi functions: `-phi_2` and `phi_3` of `-(1 + eta) h` times the
    differences, as k-diffusion has it.
    """
    process, eta = EDM(), 0.7
    times = warped(process, 4)
    levels = process.levels(times)
    lam = [level.lam for level in levels]
    h, r0, r1 = (
        lam[3] - lam[2],
        (lam[2] - lam[1]) / (lam[3] - lam[2]),
        (lam[1] - lam[0]) / (lam[3] - lam[2]),
    )
    H = (1 + eta) * h
    for solver, halves in (
        (SDEDPMSolverPP(3, eta), 1.0),
        (SDEDPMSolverPP(3, eta, exact_weights=True), 2.0),
    ):
        row = solver.plan(process, times).unrolled().predictions[3]
        # The change over the step: x_3 - kept x_2 in terms of the predictions.
        before = solver.plan(process, times).unrolled().predictions[2]
        got = row - rate_weights(levels[2], levels[3], eta)[0] * before
        one, two = H * phi(2, -H), halves * H * phi(3, -H)
        a = np.array([0.0, -1.0, 1.0]) / r0
        b = np.array([-1.0, 1.0, 0.0]) / r1
        d1, d2 = a + r0 / (r0 + r1) * (a - b), (a - b) / (r0 + r1)
        expected = -math.expm1(-H) * np.array([0.0, 0.0, 1.0]) + one * d1 + two * d2
        assert got[:3].tolist() == pytest.approx((levels[3].s * expected).tolist(), rel=1e-10)
    got = SDEDPMSolverPP(2, eta).plan(process, times).unrolled().predictions
    middle = 0.5 * -math.expm1(-H) / r0
    assert float(got[3, 2] - 0.0) == pytest.approx(-math.expm1(-H) + middle, rel=1e-12)


@pytest.mark.parametrize("clock", ["lam", "nsr", "angle", "t"])
@pytest.mark.parametrize("rate", [0.25, 1.0, 4.0])
def test_weights_are_the_integrals_of_the_lagrange_polynomials(clock: str, rate: float) -> None:
    """By adaptive quadrature, of predictor and corrector, over a short step and over one from nsr
    1000 to 0.001.
    """
    process = VP()
    reading: dict[str, Callable[[Level], float]] = {
        "lam": lambda t: t.lam, "nsr": lambda t: t.nsr, "angle": lambda t: math.atan(t.nsr), "t": lambda t: t.t
    }  # fmt: skip
    for lams, rel in (([-2.0, -1.7, -1.65, -1.0], 1e-12), ([-9.0, -8.0, -6.9, 6.9], 1e-7)):
        levels = [process.level(float(process.t_of_lam(lam))) for lam in lams]
        t, t_next = levels[2], levels[3]
        solver = StochasticAdams(3, rate, clock)  # type: ignore[arg-type]
        for nodes in (levels[2::-1], levels[:0:-1]):
            got = solver.weights(nodes, t, t_next, process)
            c = [reading[clock](node) for node in nodes]

            def integrand(lam: float, j: int, c: Sequence[float] = c, end: Level = t_next) -> float:
                here = reading[clock](process.level(float(process.t_of_lam(lam)))) if clock == "t" else (
                    lam if clock == "lam" else math.exp(-lam) if clock == "nsr" else math.atan(math.exp(-lam)))  # fmt: skip
                basis = math.prod((here - c[i]) / (c[j] - c[i]) for i in range(3) if i != j)
                return end.s * (1 + rate) * math.exp(-(1 + rate) * (end.lam - lam)) * basis

            if clock == "t" and t_next.lam - t.lam > 2:
                continue  # slow, and the same code
            for j in range(3):
                exact = quad(
                    integrand, t.lam, t_next.lam, (j,), epsabs=1e-13, epsrel=1e-12, limit=200
                )[0]
                assert float(got[j]) == pytest.approx(
                    exact, rel=rel, abs=rel * max(map(abs, map(float, got)))
                )


@pytest.mark.parametrize("phi_name", [*POWERS, *SCALES])
def test_er_sde_s_weights_are_the_paper_s_integrals(phi_name: str) -> None:
    scale: dict[str, Callable[[float], float]] = {
        "ode": lambda n: n, "sde": lambda n: n**2, "sde_1": lambda n: n * (math.exp(-1 / n) + 10), "sde_2": lambda n: n**1.5,
        "sde_3": lambda n: n**2.5, "sde_4": lambda n: n**0.9 * math.log10(1 + 100 * n**1.5),
        "sde_5": lambda n: n * (math.exp(n**0.3) + 10),
    }  # fmt: skip
    f = scale[phi_name]
    for process, (high, low) in itertools.product(
        (EDM(), VP()), ((3.0, 2.0), (50.0, 0.05), (0.3, 0.299))
    ):
        t, t_next = (process.level(float(process.t_of_lam(-math.log(n)))) for n in (high, low))
        high, low = t.nsr, t_next.nsr
        k_1 = low - high + f(low) * quad(lambda n: 1 / f(n), low, high, epsrel=1e-13)[0]
        k_2 = (low - high) ** 2 / 2 + f(low) * quad(
            lambda n, a=high: (n - a) / f(n), low, high, epsrel=1e-13
        )[0]
        got = ERSDE(3, phi_name)._moments(t, t_next)
        assert got == pytest.approx((t_next.s * k_1, t_next.s * k_2), rel=1e-9, abs=1e-14)
        plan = ERSDE(1, phi_name).plan(process, [t.t, t_next.t], finish=False)
        r = f(low) / f(high)
        kept, x0 = plan.matrix()[-1, :2].tolist()
        assert kept == pytest.approx(t_next.s / t.s * r, rel=1e-12)
        assert x0 == pytest.approx(t_next.s * (1 - r), rel=1e-10)
        if phi_name == "ode":
            assert plan.draws == 0
        else:
            expected = t_next.s * math.sqrt(low**2 - (r * high) ** 2)
            assert float(plan.matrix()[-1, 2]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("phi_name", SCALES)
def test_noise_scales_never_take_noise_away(phi_name: str) -> None:
    n = torch.logspace(-5, 6, 2000, dtype=torch.float64)
    value, rate = SCALES[phi_name](n)
    assert bool((value.diff() > -1e-14).all())
    assert bool((rate >= 0.0).all())
    numeric = torch.gradient(value, spacing=(n.log(),))[0]
    torch.testing.assert_close(rate[1:-1], numeric[1:-1], rtol=1e-3, atol=1e-3)


def test_few_steps_takes_the_step_s_length_for_the_moment() -> None:
    """Of two predictions, `H / 2` for `I_1(H)`; of more, and of the whole, nothing changes."""
    process, tau = VP(), 0.8
    times = warped(process, 2, 4.0, 0.5)
    a, b, c = process.levels(times)
    h, H = c.lam - b.lam, (1 + tau**2) * (c.lam - b.lam)
    row = SASolver(2, 0, tau, few_steps=True).plan(process, times).unrolled().predictions[2]
    slope = c.s * H / 2 / ((b.lam - a.lam) / h)
    assert float(row[1]) == pytest.approx(-c.s * math.expm1(-H) + slope, rel=1e-12)
    corrected = SASolver(1, 2, tau, few_steps=True).plan(process, times).unrolled().predictions[2]
    H_before = (1 + tau**2) * (b.lam - a.lam)
    kept = rate_weights(b, c, tau**2)[0]
    assert float(corrected[1]) == pytest.approx(
        -c.s * math.expm1(-H) + kept * b.s * H_before / 2, rel=1e-12
    )


# --------------------------------------------------------------------------------------- exact laws


def keeps_the_marginals(plan: Plan) -> None:
    rows = plan.unrolled()
    _, s, sigma = plan.grid[0]
    signal = rows.start * s + rows.predictions.sum(1)
    noise = torch.sqrt((rows.start * sigma) ** 2 + (rows.draws**2).sum(1))
    torch.testing.assert_close(signal, rows.s, rtol=0, atol=1e-12)
    torch.testing.assert_close(noise[:-1], rows.sigma[:-1], rtol=1e-12, atol=0)
    assert bool(torch.isfinite(rows.matrix).all())


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow", "cosine"])
@pytest.mark.parametrize("name", OURS)
def test_signal_and_noise_are_exact_where_the_prediction_is_constant(name: str, under: str) -> None:
    """Of one data point every call's input is `s x0 + sigma eps`, stages included, on any grid:
    coarse, huge, from pure noise.
    """
    solver, process = OURS[name], PROCESSES[under]
    grids = [warped(process, 7), warped(process, 160), from_the_end(process, 9)]
    if process.level(process.t_max).nsr > 50.0:
        grids += [warped(process, n, 40.0, 0.01) for n in (1, 2, 3)]
    for times in grids:
        keeps_the_marginals(solver.plan(process, times))
    for nsr in ([1e3, 0.5, 1e-3], [1e3, 1e-3]):
        keeps_the_marginals(solver.plan(EDM(), nsr))


def variance_error(plan: Plan, mean: float, std: float) -> float:
    _, s, sigma = plan.grid[-1]
    return law(plan, mean, std)[1] ** 2 - (s**2 * std**2 + sigma**2)


def weak_order(
    solver: GridSolver, process: Process, steps: Sequence[int], stds: Sequence[float] = (0.2, 0.5)
) -> float:
    """Observed order of the variance; of data of several widths, as a single one's error may cross
    zero.
    """

    def error(n: int) -> float:
        plan = solver.plan(process, warped(process, n), finish=False)
        return sum(abs(variance_error(plan, 0.7, std)) for std in stds)

    return observed_order(error, steps)


WEAK: list[tuple[GridSolver, tuple[int, int]]] = [
    (SDEDPMSolverPP(1, 0.3), (96, 192)), (SDEDPMSolverPP(2, 0.3), (192, 384)), (SDEDPMSolverPP(2, 3.0), (384, 768)),
    (SDEDPMSolverPP(2, 0.3, exact_weights=True), (96, 192)), (SDEDPMSolverPP(3, 0.5), (192, 384)),
    (SDEDPMSolverPP(3, 1.0, exact_weights=True), (192, 384)), (SDEDPMSolverPPSingle(0.5), (96, 192)),
    (SDEDPMSolverPPSingle(0.3, 0.4), (192, 384)), (SDEDPMSolverPPSingle(1.0, 1.0), (96, 192)), (SEEDS(2, 0.5, 0.3), (96, 192)),
    (SEEDS(2, 1.0, 0.5, taylor=True), (192, 384)), (SEEDS(3, 0.3), (192, 384)), (SEEDS(3, 2.0), (192, 384)),
    (SASolver(1, 0), (96, 192)), (SASolver(1, 2), (96, 192)), (SASolver(2, 0, 0.5), (96, 192)), (SASolver(2, 2), (192, 384)),
    (SASolver(2, 3), (96, 192)), (SASolver(3, 2), (192, 384)), (SASolver(2, 3, few_steps=True), (192, 384)),
    (SASolver(2, 0, few_steps=True), (384, 768)), (StochasticAdams(4, 0.5), (192, 384)),
    (StochasticAdams(2, 1.0, "angle"), (192, 384)), (ERSDE(2, "sde"), (96, 192)), (ERSDE(3, "sde", exact_weights=True), (192, 384)),
    (ERSDE(3, "sde_1"), (192, 384)), (ERSDE(2, "sde_3"), (96, 192)), (ERSDE(3, 1.5), (192, 384)),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "steps"), WEAK, ids=lambda s: repr(s))
def test_weak_order_of_other_members(solver: GridSolver, steps: tuple[int, int]) -> None:
    order = weak_order(solver, PROCESSES["vp"], steps)
    assert abs(order - solver.order) < 0.25, (
        f"{solver} claims weak order {solver.order}, shows {order:.2f}"
    )


@dataclasses.dataclass(frozen=True)
class OwnNoise(SDEDPMSolverPPSingle):
    """The same with a fresh normal for the whole step."""

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        return super().step(reverse, x, t, t_next, lambda *_: noise(), state)

    def _shares(self, t: Level, level: Level, t_next: Level) -> tuple[Any, Any]:
        return 0.0, 1.0


@dataclasses.dataclass(frozen=True)
class NoiseInNsr(SDEDPMSolverPPSingle):
    """The same with a Brownian path in nsr, as k-diffusion's tree has it."""

    def _shares(self, t: Level, level: Level, t_next: Level) -> tuple[Any, Any]:
        first = (t.nsr - level.nsr) / (t.nsr - t_next.nsr)
        return math.sqrt(first), math.sqrt(1.0 - first)


@pytest.mark.parametrize("std", [0.2, 1.0])
def test_the_noise_of_stage_and_step_is_one_path_in_nsr_squared(std: float) -> None:
    """Unrelated noises cost an order; k-diffusion's clock costs the third that Gaussian data then
    shows.
    """
    process = PROCESSES["vp"]
    shown = {
        kind: weak_order(kind(), process, (192, 384), [std])
        for kind in (OwnNoise, NoiseInNsr, SDEDPMSolverPPSingle)
    }
    assert shown[OwnNoise] == pytest.approx(1.0, abs=0.15)
    assert shown[NoiseInNsr] == pytest.approx(2.0, abs=0.15)
    assert shown[SDEDPMSolverPPSingle] == pytest.approx(3.0, abs=0.15)


def test_third_order_of_the_ode_needs_the_exact_forms() -> None:
    """Of `p=3` without noise, and a start that keeps the order: corrected steps keep it, and the
    last weights are the same.
    """
    process = PROCESSES["vp"]
    times = warped(process, 12)
    for solver in (SDEDPMSolverPP(3, 0.0, exact_weights=True), ERSDE(3, "ode", exact_weights=True)):
        clock = "lam" if isinstance(solver, SDEDPMSolverPP) else "nsr"
        for published in (False, True):
            made = dataclasses.replace(solver, exact_weights=not published)
            change = made.plan(process, times).compare(
                ExponentialAdams(3, "x0", clock, start_up="orders").plan(process, times)
            )  # type: ignore[arg-type]
            assert change.close() != published
    assert weak_order_of_ode(SASolver(3, 4, 0.0)) == pytest.approx(3.0, abs=0.25)
    assert weak_order_of_ode(SASolver(2, 3, 0.0, few_steps=True)) == pytest.approx(3.0, abs=0.25)
    assert weak_order_of_ode(SASolver(2, 3, 0.0, pece=True)) == pytest.approx(3.0, abs=0.25)


def weak_order_of_ode(solver: GridSolver) -> float:
    """Order against the exact solution, over a part of the path where it bends."""
    process = PROCESSES["vp"]

    def error(n: int) -> float:
        ends = torch.tensor([1.5, 0.1], dtype=torch.float64).log().neg()
        times = process.t_of_lam(
            ends[0] + (ends[1] - ends[0]) * torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
        )
        x, exact = reference(process, float(times[0]), float(times[-1]))
        return float(
            (
                solver.integrate(Reverse(Mixture(process)), x, times, None, finish=False).x - exact
            ).norm()
        )

    return observed_order(error, (160, 320))


STRONG = [n for n in OURS if n not in ("seeds_1", "stochastic_adams2")]


@pytest.mark.parametrize("name", STRONG)
def test_strong_order_one_on_a_given_brownian_path(name: str) -> None:
    """All step counts draw the increments of one path in nsr^2, stages too; states then converge
    pathwise.
    """
    solver, process = OURS[name], PROCESSES["edm"]
    x, _ = reference(process, float(warped(process, 1)[0]), float(warped(process, 1)[1]), n=128)
    counts = (32, 64, 128, 256)
    plans = [solver.plan(process, warped(process, n), finish=False) for n in counts]
    draws = [i for plan in plans for i in plan.instructions if isinstance(i, Draw)]
    nodes = merged(sorted(n for i in draws for n in (i.nsr, i.nsr_next) if n is not None))
    denoiser = Mixture(process)
    ends = [plan.execute(Reverse(denoiser), x, PathNoise(len(x), (2,), nodes))[0] for plan in plans]
    steps = [float((a - b).norm(dim=1).median()) for a, b in itertools.pairwise(ends)]
    assert abs(slopes(steps)[-1] - 1.0) < 0.25, slopes(steps)


def merged(nodes: list[float]) -> list[float]:
    """Without the duplicates that rounding makes."""
    return [n for i, n in enumerate(nodes) if i == 0 or n - nodes[i - 1] > 1e-9 * n]


# -------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", OURS)
def test_plans_are_one_combination_a_call(name: str) -> None:
    solver = OURS[name]
    plan = solver.plan(VP(), warped(VP(), 12))
    assert sum(isinstance(i, Combine) for i in plan.instructions) == plan.nfe - 1
    assert plan.buffers <= 2
    most = max(len(i.terms) for i in plan.instructions if isinstance(i, Combine))
    history = 6 if isinstance(solver, SASolver | StochasticAdams) else 5
    assert most <= history + (solver.calls_of_step - 1)


def test_noise_is_drawn_where_it_has_weight_and_only_there() -> None:
    times = warped(VP(), 10)
    per_step = {"dpmpp_sde": 2, "seeds_2": 2, "seeds_3": 3}
    for name, solver in OURS.items():
        assert solver.plan(VP(), times).draws == 10 * per_step.get(name, 1), name
    off: list[GridSolver] = [
        SDEDPMSolverPP(2, 0.0), SDEDPMSolverPPSingle(0.0), SEEDS(3, 0.0), SASolver(tau=0.0), SASolver(nsr_min=90.0, nsr_max=99.0),
        ERSDE(3, "ode"), StochasticAdams(2, 0.0),
    ]  # fmt: skip
    for solver in off:
        noise = FixedNoise(2, (2,))
        solver.textbook(Reverse(Mixture(VP())), torch.ones(2, 2, dtype=torch.float64), times, noise)
        assert noise.drawn == solver.plan(VP(), times).draws == 0
    # Within an interval of nsr, where a step ends in it.
    solver = SASolver(nsr_min=0.5, nsr_max=2.0)
    inside = [level.nsr for level in VP().levels(times[1:]) if 0.5 <= level.nsr <= 2.0]
    drawn = [i.nsr_next for i in solver.plan(VP(), times).instructions if isinstance(i, Draw)]
    assert drawn == inside
    assert 0 < len(drawn) < 10


def test_draws_of_a_step_lie_side_by_side() -> None:
    """Stages draw the increments of disjoint intervals that make up the step."""
    times = warped(VP(), 3)
    for name, parts in (("dpmpp_sde", 2), ("seeds_2", 2), ("seeds_3", 3)):
        draws = [i for i in OURS[name].plan(VP(), times).instructions if isinstance(i, Draw)]
        levels = VP().levels(times)
        assert len(draws) == 3 * parts
        assert all(a.nsr_next == b.nsr for a, b in itertools.pairwise(draws))
        assert [i.nsr for i in draws[::parts]] == [level.nsr for level in levels[:-1]]


@pytest.mark.parametrize("name", OURS)
def test_gradients_flow_through_the_times(name: str) -> None:
    """The tables of tensors are those of numbers, and their derivatives those of differences."""
    solver, process = OURS[name], VP()
    times = warped(process, 4)
    traced = times.clone().requires_grad_()
    matrix = solver.plan(process, traced).matrix()
    torch.testing.assert_close(
        matrix.detach(), solver.plan(process, times).matrix(), rtol=1e-10, atol=1e-11
    )
    weights = torch.sin(torch.arange(matrix.numel(), dtype=torch.float64)).reshape(matrix.shape)
    (gradient,) = torch.autograd.grad((weights * matrix).sum(), traced)
    for k in (1, 3):
        e = 1e-6 * torch.nn.functional.one_hot(torch.tensor(k), 5).double()
        up, down = ((weights * solver.plan(process, times + d).matrix()).sum() for d in (e, -e))
        assert float(gradient[k]) == pytest.approx(float(up - down) / 2e-6, rel=1e-5, abs=1e-6)


def test_pece_asks_anew_and_corrects_at_once() -> None:
    solver = SASolver(2, 3, pece=True)
    times = warped(VP(), 5)
    plan = solver.plan(VP(), times)
    assert plan.nfe == 11 == solver.calls(6)
    assert torch.equal(plan.times[1::2], plan.times[2::2])
    # The corrected state has another prediction in it, and the same noise.
    rows = plan.unrolled()
    torch.testing.assert_close(rows.draws[1], rows.draws[2], rtol=1e-14, atol=0)
    assert float(rows.predictions[2, 1]) != 0.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SDEDPMSolverPP(4), "p = 1, 2 or 3"),
        (lambda: SDEDPMSolverPP(2, -0.1), "eta says how much noise"),
        (lambda: SDEDPMSolverPP(2, math.inf), "eta says how much noise"),
        (lambda: SDEDPMSolverPP(2, True), "eta says how much noise"),
        (lambda: SDEDPMSolverPPSingle(1.5), "0 .the ODE. to 1"),
        (lambda: SDEDPMSolverPPSingle(r=0.0), "above 0, up to 1"),
        (lambda: SEEDS(4), "p = 1, 2 or 3"),
        (lambda: SEEDS(2, r=1.2), "above 0, up to 1"),
        (lambda: SASolver(0), "p = 1 to 6"),
        (lambda: SASolver(2, 1), "c = 2 or more"),
        (lambda: SASolver(2, 0, pece=True), "such as c=3"),
        (lambda: SASolver(nsr_min=2.0, nsr_max=1.0), "nsr_min < nsr_max"),
        (lambda: ERSDE(2, "sde_9"), "sde_5"),
        (lambda: ERSDE(2, 0.5), "power of nsr"),
        (lambda: ERSDE(0), "p = 1, 2 or 3"),
        (lambda: StochasticAdams(7), "p = 1 to 6"),
        (lambda: StochasticAdams(clock="sigma"), "angle"),  # type: ignore[arg-type]
    ],
)
def test_errors_say_what_is_possible(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# ------------------------------------------------------------------------------------ distributions

N = 1024
DIRECTIONS = torch.nn.functional.normalize(
    torch.stack([torch.cos(a := torch.arange(16) * math.pi / 16), torch.sin(a)], 1).double(), dim=1
)


def sliced(x: Tensor, y: Tensor) -> float:
    """The sliced Wasserstein-2 distance of two sets of as many points."""
    gaps = (x @ DIRECTIONS.T).sort(0).values - (y @ DIRECTIONS.T).sort(0).values
    return float(gaps.square().mean().sqrt())


@pytest.fixture(scope="module")
def null() -> list[float]:
    """Distances of 200 pairs of exact sets: what chance alone gives."""
    sets = [torch.from_numpy(Mixture.draw(N, 100 + k)) for k in range(400)]
    return sorted(sliced(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True))


@pytest.mark.parametrize("name", OURS)
def test_samples_of_a_mixture_cannot_be_told_from_exact_ones(name: str, null: list[float]) -> None:
    """By the sliced Wasserstein distance, at a significance of 1 in 200: below every one of 200
    distances between exact sets.
    """
    solver = OURS[name]
    steps = 120 if solver.order == 1 else 40  # bias well below chance
    times = grid.uniform_lam(VP(), steps + 1)
    exact = torch.from_numpy(Mixture.draw(N, 7))
    x = sample(Mixture(VP()), solver=solver, grid=times, seeds=range(N)).double()
    assert sliced(x, exact) < null[-1]


def test_the_distance_tells_a_wrong_sampler(null: list[float]) -> None:
    """Ten steps of first order are told; so is a sampler whose noise is a quarter too large."""
    exact = torch.from_numpy(Mixture.draw(N, 7))
    x = sample(
        Mixture(VP()), solver=SEEDS(1), grid=grid.uniform_lam(VP(), 11), seeds=range(N)
    ).double()
    assert sliced(x, exact) > 1.5 * null[-1]

    @dataclasses.dataclass(frozen=True)
    class Loud(SDEDPMSolverPP):
        def step(
            self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
        ) -> tuple[Any, Any]:
            return super().step(reverse, x, t, t_next, lambda *levels: 1.25 * noise(*levels), state)

    x = sample(
        Mixture(VP()), solver=Loud(), grid=grid.uniform_lam(VP(), 61), seeds=range(N)
    ).double()
    assert sliced(x, exact) > null[-1]


def test_every_name_of_the_family_is_here() -> None:
    assert {
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
        "dpmpp_sde",
        "seeds_3",
        "sa_solver",
        "er_sde_3",
        "stochastic_adams3",
    } <= set(OURS)
    assert set(OURS) <= set(STOCHASTIC)
    for alias, name in (
        ("sample_dpmpp_2m_sde", "dpmpp_2m_sde"),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde"),
        ("dpmpp_sde_gpu", "dpmpp_sde"),
        ("SASolverScheduler", "sa_solver"),
        ("sde-dpmsolver++", "dpmpp_2m_sde"),
        ("er_sde", "er_sde_3"),
    ):
        assert registry.solver(alias) == OURS[name]
