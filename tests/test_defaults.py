"""The promise of the issue: `sample(..., solver="heun", nfe=35)` returns a Gaussian's standard
deviation, computed exactly.
"""

from __future__ import annotations

import math

import pytest
import torch
from problems import PROCESSES, GaussianData, law

from sdeflow.process import Process
from sdeflow.sampling import DEFAULT_NFE, DEFAULT_SOLVER, sample, solve
from sdeflow.solvers.auto.solver import Auto
from sdeflow.solvers.ode.runge_kutta import Heun

WITHIN = {"vp": 0.02, "rectified_flow": 0.02, "edm": 0.06}


def reached(process: Process, std: float, **how: object) -> float:
    """The result's standard deviation: the plan of the very solve, with its covariance propagated.
    The start is noise alone.
    """
    solution = solve(GaussianData(process, std=std), shape=(1,), seeds=0, **how)  # type: ignore[arg-type]
    assert solution.plan is not None
    _, s, sigma = solution.plan.grid[0]
    _, result = law(solution.plan, 0.0, std)
    # `law` starts from the true marginal; samplers start from N(0, sigma^2): deterministic steps
    # only scale it.
    return result * sigma / math.hypot(s * std, sigma)


@pytest.mark.parametrize("std", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("under", WITHIN)
def test_the_defaults_return_a_gaussians_spread(under: str, std: float) -> None:
    for how in ({}, {"solver": "heun", "nfe": 35}):
        assert reached(PROCESSES[under], std, **how) == pytest.approx(std, rel=WITHIN[under])


@pytest.mark.parametrize("std", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("under", [*WITHIN, "subvp", "cosine", "ve", "from_betas"])
def test_the_default_solver_is_closer(under: str, std: float) -> None:
    assert reached(PROCESSES[under], std) == pytest.approx(std, rel=0.003)


def test_the_defaults_are_these() -> None:
    assert (DEFAULT_SOLVER, DEFAULT_NFE) == ("auto", 35)
    solution = solve(GaussianData(PROCESSES["vp"]), shape=(1,), seeds=0)
    assert (solution.solver, solution.grid) == (Auto(table="density"), "auto")
    assert solution.nfe == 35
    assert solution.times is not None
    assert len(solution.times) == 35
    assert float(solution.times[0]) == 1.0
    assert solution.x.dtype == torch.float32


def test_a_named_solver_stands_on_the_grid_of_the_process() -> None:
    solution = solve(GaussianData(PROCESSES["vp"]), shape=(1,), seeds=0, solver="heun")
    assert (solution.solver, solution.grid) == (Heun(), "uniform_sqrt_t")
    assert solution.nfe == 35
    assert solution.times is not None
    assert len(solution.times) == 18
    assert (float(solution.times[0]), float(solution.times[-1])) == (1.0, 1e-3)


@pytest.mark.parametrize("std", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("under", ["subvp", "cosine", "ve", "from_betas"])
def test_other_processes_are_sane_too(under: str, std: float) -> None:
    for how in ({}, {"solver": "heun"}):
        assert reached(PROCESSES[under], std, **how) == pytest.approx(std, rel=0.08)


@pytest.mark.parametrize("under", WITHIN)
def test_samples_have_the_spread_that_the_law_says(under: str) -> None:
    """The same number by drawing: 20,000 one-dimensional samples, within 4 standard errors."""
    data = GaussianData(PROCESSES[under], std=0.5)
    x = sample(data, shape=(20_000,), seeds=0)
    expected = reached(PROCESSES[under], 0.5)
    assert abs(float(x.std()) - expected) < 4 * expected / math.sqrt(2 * x.numel())
    assert abs(float(x.mean())) < 4 * expected / math.sqrt(x.numel())
