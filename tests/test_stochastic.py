"""Moments of stochastic samplers: exact on Gaussians, by drawing on mixtures at a stated
significance, seeds fixed.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from problems import (
    NO_ORDER,
    PROCESSES,
    STOCHASTIC,
    GaussianData,
    Mixture,
    each,
    law,
    thinned,
    warped,
)
from test_sde_solvers import OURS

from sdeflow import grid
from sdeflow.plan.instructions import Call, Combine, Draw
from sdeflow.plan.plan import Plan
from sdeflow.process import EDM, VP
from sdeflow.sampling.api import sample
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.solvers.sde.classic import DDPM, AnnealedLangevin, EulerMaruyama
from sdeflow.solvers.wrappers.langevin import Langevin

N = 2048
Z = 4.5  # per moment, so that five moments of twenty cases are wrong together with probability 1e-3
STEPS = {"langevin": 80, "langevin-ddim": 60, "langevin-heun": 40, "annealed_langevin": 25}


def moments_within(x: torch.Tensor, mean: np.ndarray, covariance: np.ndarray, slack: float) -> None:
    """Mean and covariance of the rows within `Z` standard errors, plus what the discretisation is
    allowed (`slack`, relative).
    """
    rows = x.double().numpy()
    std = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(rows.mean(0) - mean) < (Z / math.sqrt(N) + slack) * std)
    centred = (rows - rows.mean(0)) / std
    correlation = covariance / np.outer(std, std)
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / math.sqrt(N)
    assert np.all(np.abs(products.mean(0) - correlation) < Z * error + 2 * slack)


@functools.cache
def many() -> torch.Tensor:
    """Enough of the data to know its shares."""
    return torch.from_numpy(Mixture.draw(200_000, 1))


@pytest.mark.parametrize(
    ("name", "under"),
    # Samples of the exponential integrators under VP are compared with the data in
    # test_sde_solvers.py.
    thinned(
        [
            pair
            for pair in each(STOCHASTIC, ["vp", "rectified_flow"])
            if pair[0] not in OURS or pair[1] != "vp"
        ],
        one_in=2,
    ),
)
def test_moments_and_modes_of_a_mixture(name: str, under: str) -> None:
    """Mean and covariance, and the share of every half-plane: what moments do not see, each mode's
    weight.
    """
    solver, process = STOCHASTIC[name], PROCESSES[under]
    if isinstance(solver, AnnealedLangevin):
        if under != "vp":
            pytest.skip("the moves are the same under every process, and many")
        solver = AnnealedLangevin(steps=20)  # 5 moves a level do not mix
    x = sample(
        Mixture(process),
        solver=solver,
        grid=grid.uniform_lam(process, STEPS.get(name, 80)),
        seeds=range(N),
    )
    mean, covariance = Mixture.moments()
    moments_within(x, mean, covariance, slack=0.03)
    data = many()
    for direction in torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, -0.7]], dtype=torch.float64):
        for threshold in (-0.5, 0.0, 0.5):
            share = float((data @ direction > threshold).double().mean())
            got = float((x.double() @ direction > threshold).double().mean())
            assert abs(got - share) < Z * math.sqrt(share * (1 - share) / N) + 0.015


@pytest.mark.parametrize(
    ("name", "under"),
    thinned(each([name for name in STOCHASTIC if name not in NO_ORDER], sorted(PROCESSES))),
)
def test_the_law_on_a_gaussian_is_near_the_truth(name: str, under: str) -> None:
    """Exact, at 200 steps: no sampler is off by more than 3 % in spread under any process."""
    solver, process = STOCHASTIC[name], PROCESSES[under]
    times = grid.uniform_lam(
        process, 200, nsr_max=min(50.0, 0.9 * process.level(process.t_max).nsr), nsr_min=0.02
    )
    plan = solver.plan(process, times)
    for std in (0.2, 1.0):
        mean, reached = law(plan, 0.7, std)
        assert mean == pytest.approx(0.7, abs=0.02)
        assert reached == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("inner", [EulerMaruyama(), DDIM(), Heun(), DDPM()], ids=str)
def test_the_langevin_corrector_forgets_errors_and_keeps_the_marginal(inner: GridSolver) -> None:
    """The more it moves, the less of an error at the start is left; a start that is right stays
    right.
    """
    process, std = EDM(), 0.5
    times = warped(process, 40, 5.0, 0.2)
    _, s, sigma = Langevin(inner).plan(process, times).grid[-1]
    exact = math.hypot(s * std, sigma)
    shares = []
    for steps, snr in ((1, 0.01), (1, 0.16), (3, 0.16)):
        plan = Langevin(inner, steps=steps, snr=snr).plan(process, times, finish=False)
        assert law(plan, 0.3, std)[1] == pytest.approx(exact, rel=0.08)
        shares.append(abs(start_share(plan, std)))
    assert shares[0] > 1.2 * shares[1] > 1.44 * shares[2]


def start_share(plan: Plan, std: float) -> float:
    """The coefficient of the start's noise in the result: what is left of an error made there."""
    values: dict[int, float] = {0: 1.0}
    for i in plan.instructions:
        match i:
            case Draw():
                values[i.out] = 0.0
            case Combine():
                values[i.out] = sum(float(c) * values[r] for r, c in i.terms)
            case Call():
                values[i.out] = i.s * std**2 / (i.s**2 * std**2 + i.sigma**2) * values[i.input]
    return values[plan.result]


def test_annealed_langevin_forgets_its_start_and_its_bias_falls_with_the_step_size() -> None:
    process, std = EDM(), 0.02
    times = grid.karras(process, 10, nsr_max=20.0, nsr_min=0.05)
    errors = []
    for step_size, steps in ((0.4, 40), (0.2, 80), (0.1, 160)):
        plan = AnnealedLangevin(steps=steps, step_size=step_size).plan(process, times, finish=False)
        # The bias of the unadjusted moves at the last level but one: a relative excess of variance
        # of step_size / 4.
        _, s, sigma = plan.grid[-2]
        _, reached = law(plan, 0.0, std)
        exact = math.hypot(s * std, sigma)
        errors.append(abs(reached / exact - 1.0))
        assert abs(start_share(plan, std)) < 1e-3
    assert errors == pytest.approx([0.054, 0.026, 0.013], rel=0.25)


def test_variance_large_is_the_forward_step_s() -> None:
    """On consecutive entries of a table the large variance is beta; the law then has more spread
    than the small one's.
    """
    process = PROCESSES["from_betas"]
    times = grid.linspace(process, 1000)
    _, small = law(DDPM().plan(process, times), 0.0, 0.5)
    _, large = law(DDPM("large").plan(process, times), 0.0, 0.5)
    assert small < large
    assert large == pytest.approx(0.5, rel=0.02)
    assert small == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
def test_ddpm_is_ddim_at_eta_one(under: str) -> None:
    process = PROCESSES[under]
    times = warped(process, 9)
    assert DDPM().plan(process, times).allclose(DDIM(1.0).plan(process, times), rtol=1e-13)


def test_gaussian_samples_follow_the_exact_law() -> None:
    """The drawn counterpart of `law`: 8192 samples of DDPM at 12 steps, mean and spread within 4.5
    standard errors.
    """
    data = GaussianData(VP(), mean=0.4, std=0.5)
    times = grid.uniform_sqrt_t(VP(), 12)
    x = sample(data, solver="ddpm", grid=times, shape=(8192,), seeds=3)
    mean, std = law(DDPM().plan(VP(), times), 0.4, 0.5)
    assert (
        abs(float(x.mean()) - mean) < Z * std / math.sqrt(8192) + 0.01
    )  # the start lacks the last 0.6 % of signal
    assert abs(float(x.std()) / std - 1.0) < Z / math.sqrt(2 * 8192)
