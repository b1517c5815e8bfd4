"""The step to zero noise and the end of time: every solver, every process, from one level up;
finite, and exact where it can be.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import (
    GRID_SOLVERS,
    LINEAR_BETAS,
    PROCESSES,
    GaussianData,
    Mixture,
    Point,
    each,
    from_the_start,
    thinned,
)
from torch import Tensor

from sdeflow import registry
from sdeflow.denoisers import Prediction
from sdeflow.errors import SolverError
from sdeflow.grid import ON_A_TABLE
from sdeflow.process import Cosine, Process, RectifiedFlow
from sdeflow.sampling.api import sample, solve

CALM = {"ddim", "ddim-eta=0.5", "ddim-eta=1", "ddpm", "langevin-ddim"}
"""Steps towards a mixture of the state and the prediction: bounded however large they are."""
WILD = {
    *(name for name in GRID_SOLVERS if name.endswith("-lam")),
    "annealed_langevin",
    "heun-nsr",
    "dpm_solver_2",
    "dpm_solver_3",
    "dpm_solver_fast",
    "pndm",
}
"""Explicit methods far from stable, or far from mixed, with few steps from nsr 1000."""
LEVELS = (1, 2, 3, 10, 11, 14, 20)


class Trigonometric(Process):
    """A user's process; its signal at the end of time is `cos(pi/2) = 6e-17`, which is none."""

    def s(self, t: Tensor) -> Tensor:
        return torch.cos(t * torch.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * torch.pi / 2)


SHORT = Process.from_betas(LINEAR_BETAS[::50] * 20)
ENDS = {
    **{name: process for name, process in PROCESSES.items() if name != "from_sde"},
    "short_table": SHORT,
    "cosine_to_the_end": Cosine(t_max=1.0),
    "trigonometric": Trigonometric(),
}


@pytest.mark.parametrize(
    ("name", "under"),
    # A clock is the same formula everywhere; where it has no reading as no signal is left, see the
    # next test.
    thinned(
        [
            (name, under)
            for name, under in each(GRID_SOLVERS, sorted(ENDS))
            if from_the_start(GRID_SOLVERS[name], ENDS[under])
            if under in ("vp", "rectified_flow") or not getattr(GRID_SOLVERS[name], "clock", None)
        ],
        always=("rectified_flow",),
    ),
)
def test_every_solver_ends_at_zero_noise_from_the_end_of_time(name: str, under: str) -> None:
    solver, process = GRID_SOLVERS[name], ENDS[under]
    for levels in LEVELS:
        nfe = solver.calls(levels)
        mixture = solve(Mixture(process), solver=solver, nfe=nfe, seeds=range(3))
        assert mixture.nfe == nfe
        assert mixture.times is not None
        assert len(mixture.times) == levels
        assert float(mixture.times[0]) == process.t_max
        assert bool(torch.isfinite(mixture.x).all())
        if name in CALM or (levels >= 10 and name not in WILD):
            assert float(mixture.x.abs().max()) < 12.0  # no noise is left: the data lies within 3
        point = sample(Point(process), solver=solver, nfe=nfe, shape=(2,), seeds=range(3))
        exact = torch.full_like(point, Point.value)
        if name == "auto":  # its step to zero noise is a combination, exact but for rounding
            torch.testing.assert_close(point, exact, rtol=1e-5, atol=0)
        else:
            assert torch.equal(point, exact)


@pytest.mark.parametrize("clock", ["nsr", "lam"])
@pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "ralston", "rk4"])
def test_a_clock_without_a_reading_at_the_end_says_so(name: str, clock: str) -> None:
    solver = GRID_SOLVERS[f"{name}-{clock}"]
    with pytest.raises(SolverError, match=r'no signal is left.*clock="t"'):
        sample(Mixture(RectifiedFlow()), solver=solver, nfe=solver.calls(3), seeds=0)
    # From just below it runs.
    x = sample(
        Mixture(RectifiedFlow(t_max=0.99)), solver=solver, nfe=solver.calls(40), seeds=range(4)
    )
    assert float(x.abs().max()) < 6.0


@pytest.mark.filterwarnings("ignore:the grid starts at")  # of three levels on a table, some do
@pytest.mark.parametrize("grid", sorted(registry.GRIDS))
@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow", "from_betas"])
def test_every_grid_carries_every_process_to_the_end(grid: str, under: str) -> None:
    process = PROCESSES[under]
    if registry.GRIDS[grid].kind in ON_A_TABLE and under != "from_betas":
        pytest.skip("stands on a table")
    for solver in ("heun", "ddim", "ddpm", "euler_maruyama"):
        for nfe in (1, 3, 21):
            point = sample(
                Point(process), solver=solver, nfe=nfe, grid=grid, shape=(2,), seeds=range(2)
            )
            assert torch.equal(point, torch.full_like(point, Point.value))


@pytest.mark.parametrize("under", sorted(ENDS))
@pytest.mark.parametrize("name", ["heun", "ddim", "ddpm"])
def test_one_call_is_the_mean_of_the_data(name: str, under: str) -> None:
    """From pure noise the best guess is the mean; one call returns it, up to the signal that is
    left at the end of time.
    """
    process = ENDS[under]
    data = GaussianData(process, mean=0.4, std=0.3)
    x = sample(data, solver=name, nfe=1, shape=(1,), seeds=range(8))
    left = data.std**2 / math.hypot(
        data.std,
        1 / max(process.level(process.t_max).s / process.level(process.t_max).sigma, 1e-12),
    )
    torch.testing.assert_close(x, torch.full_like(x, 0.4), rtol=0, atol=1e-6 + 8 * left)


@pytest.mark.parametrize("under", ["vp", "rectified_flow", "edm", "cosine"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "score", "v", "velocity"])
def test_every_prediction_starts_at_the_end_of_time(predicts: str, under: str) -> None:
    """A network of each kind, exact for a Gaussian; none divides by the signal that is gone."""
    process = PROCESSES[under]
    data = GaussianData(process, mean=0.3, std=0.5)

    def network(x: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        x0 = data(x.double(), t)
        s, sigma = (c.reshape(-1, 1) for c in process.kernel(t))
        eps = (x.double() - s * x0) / sigma
        r = torch.hypot(s, sigma)
        match predicts:
            case "eps":
                out = eps
            case "x0":
                out = x0
            case "score":
                out = -eps / sigma
            case "v":
                out = (s * eps - sigma * x0) / r
            case _:
                ds, dsigma = (c.reshape(-1, 1) for c in (process.ds(t), process.dsigma(t)))
                out = ds * x0 + dsigma * eps
        return out.to(x.dtype)

    denoiser = Prediction(network, predicts, process, shape=(1,))  # type: ignore[arg-type]
    for solver in ("heun", "ddpm"):
        x = sample(denoiser, solver=solver, nfe=41, seeds=range(64), dtype=torch.float64)
        assert bool(torch.isfinite(x).all())
        assert float(x.abs().max()) < 3.0
        exact = sample(
            data, solver=solver, nfe=41, shape=(1,), seeds=range(64), dtype=torch.float64
        )
        assert float((x - exact).abs().max()) < 2e-3  # the network's time is float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("under", ["vp", "rectified_flow"])
def test_states_of_every_dtype_end_finite(under: str, dtype: torch.dtype) -> None:
    for solver in ("heun", "ddim", "ddpm", "euler_maruyama"):
        x = sample(
            Point(PROCESSES[under]), solver=solver, nfe=11, shape=(2,), seeds=range(3), dtype=dtype
        )
        assert x.dtype == dtype
        assert torch.equal(x, torch.full_like(x, Point.value))


@pytest.mark.parametrize("under", ["vp", "rectified_flow", "edm"])
def test_more_steps_end_nearer(under: str) -> None:
    """Not only finite: the result of the ODE from the end of time converges as the budget grows."""
    denoiser = Mixture(PROCESSES[under])
    exact = sample(denoiser, solver="heun", nfe=801, seeds=range(32), dtype=torch.float64)
    gaps = [
        float(
            (sample(denoiser, solver="heun", nfe=nfe, seeds=range(32), dtype=torch.float64) - exact)
            .norm(dim=1)
            .median()
        )
        for nfe in (11, 21, 41, 81)
    ]
    assert all(a > 1.5 * b for a, b in itertools.pairwise(gaps)), gaps
