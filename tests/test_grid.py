"""Grids: monotone, between their ends, of the size asked; a user's own honoured exactly; spacings
on the known entries.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import LINEAR_BETAS, PROCESSES, GaussianData, Mixture, law
from torch import Tensor

from sdeflow import grid
from sdeflow.denoisers import Prediction
from sdeflow.errors import BudgetError, GridError
from sdeflow.process import EDM, VE, VP, Cosine, FromBetas, Process, RectifiedFlow
from sdeflow.registry import GRIDS
from sdeflow.sampling.api import sample, solve
from sdeflow.solvers.base import check_times
from sdeflow.solvers.ode.ddim import DDIM

DISCRETE = ("quadratic", "leading", "trailing", "linspace", "ddim_uniform")
SHORT = (
    "simple",
    "sgm_uniform",
    "linear_quadratic",
    "beta",
    "beta57",
)  # their last level is one step short of the end
TABLES = ("ays_sd15", "ays_sdxl", "ays_svd", "ays_deepfloyd_if")  # and these have ends of their own
EARLY = ("auto",)  # leaves more to the step to zero noise, unless t_min is given
CONTINUOUS = tuple(name for name in GRIDS if name not in (*DISCRETE, *SHORT, *TABLES))
TABLE = PROCESSES["from_betas"]
assert isinstance(TABLE, FromBetas)


def entries(times: Tensor, table: FromBetas = TABLE) -> list[int]:
    index = table.index(times)
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-9)
    return index.round().long().tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11, 14, 20, 100])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_grid_runs_down_between_the_ends(name: str, n: int, process: Process) -> None:
    times = GRIDS[name].make(process, n)
    assert times.dtype == torch.float64
    assert times.device.type == "cpu"
    assert times.shape == (n,)
    assert float(times[0]) == process.t_max
    if name in EARLY:
        assert float(times[-1]) >= process.t_min
    elif n > 1:
        assert float(times[-1]) == process.t_min
    assert torch.equal(check_times(times), times)
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow", "from_betas"])
def test_bounds_in_time_are_met_exactly(name: str, under: str) -> None:
    process = PROCESSES[under]
    low, high = (process.t_min + f * (process.t_max - process.t_min) for f in (0.123, 0.617))
    times = GRIDS[name].make(process, 9, t_min=low, t_max=high)
    assert (float(times[0]), float(times[-1])) == (high, low)
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("n", [1, 2, 7, 10, 50, 333, 1000])
def test_a_discrete_grid_stands_on_the_table(name: str, n: int) -> None:
    times = GRIDS[name].make(TABLE, n)
    visited = entries(times)
    assert len(visited) == n == len(set(visited))
    assert visited == sorted(visited, reverse=True)
    assert all(0 <= i < 1000 for i in visited)


@pytest.mark.parametrize("name", DISCRETE)
def test_a_discrete_grid_needs_a_table(name: str) -> None:
    with pytest.raises(GridError, match="table"):
        GRIDS[name].make(VP(), 10)
    with pytest.raises(GridError, match="1000"):
        GRIDS[name].make(TABLE, 1001)


def test_spacings_are_those_of_the_literature() -> None:
    """N = 1000, ten steps, as published: DDIM's leading, Lin et al.'s trailing, improved DDPM's
    linspace, DDIM's quadratic.
    """
    assert entries(grid.leading(TABLE, 10)) == list(range(900, -1, -100))
    assert entries(grid.leading(TABLE, 10, offset=1)) == list(range(901, 0, -100))
    assert entries(grid.leading(TABLE, 9, spare=1)) == list(
        range(900, 99, -100)
    )  # DPM-Solver's, in diffusers
    assert entries(grid.trailing(TABLE, 10)) == list(range(999, 0, -100))
    assert entries(grid.linspace(TABLE, 10)) == list(range(999, -1, -111))
    # FeatureStatistics in units of the table, quadratic has squares: 999 (k/9)^2.
    assert entries(grid.quadratic(TABLE, 10)) == [
        round(999 * (k / 9) ** 2) for k in range(9, -1, -1)
    ]
    # And where N is no multiple, trailing rounds N - jN/n: 1000 at 7.
    assert entries(grid.trailing(TABLE, 7)) == [round(1000 - j * 1000 / 7) - 1 for j in range(7)]


def test_karras_counts_n_positive_levels() -> None:
    """EDM, equation 5: 18 levels from 80 to 0.002, and zero is not among them."""
    times = grid.karras(EDM(), 18)
    k = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + k / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(times, expected, rtol=1e-12, atol=0)
    assert (float(times[0]), float(times[-1])) == (80.0, 0.002)
    # The same levels of noise on any other path.
    vp = grid.karras(VP(t_max=0.9), 18, nsr_max=20.0, nsr_min=0.1)
    nsr = VP().nsr(vp) ** (1 / 7)
    torch.testing.assert_close(nsr.diff(), nsr.diff().mean().expand(17), rtol=1e-9, atol=0)


def test_uniform_grids_are_uniform_in_what_they_say() -> None:
    process = VP()

    def steps(values: Tensor) -> Tensor:
        gaps = values.diff()
        return (gaps / gaps.mean() - 1.0).abs().max()

    assert steps(grid.uniform_t(process, 12)) < 1e-12
    assert steps(grid.uniform_sqrt_t(process, 12).sqrt()) < 1e-12
    assert steps(grid.power_t(process, 12, rho=3.0) ** (1 / 3)) < 1e-12
    assert steps(process.lam(grid.uniform_lam(process, 12))) < 1e-9
    assert steps(process.angle(grid.uniform_angle(process, 12))) < 1e-9


@pytest.mark.parametrize("process", [RectifiedFlow(), Cosine(t_max=1.0)], ids=str)
@pytest.mark.parametrize("name", ["karras", "uniform_lam"])
def test_an_infinite_top_stands_in_front(name: str, process: Process) -> None:
    times = GRIDS[name].make(process, 8)
    nsr = process.nsr(times)
    assert float(times[0]) == process.t_max
    assert float(nsr[1]) == pytest.approx(grid.NSR_TOP, rel=1e-9)
    capped = GRIDS[name].make(process, 8, nsr_max=80.0, nsr_min=0.002)
    assert process.nsr(capped)[[0, -1]].tolist() == pytest.approx([80.0, 0.002], rel=1e-9)


@given(st.integers(1, 60), st.sampled_from(CONTINUOUS), st.sampled_from(sorted(PROCESSES)))
def test_every_size_of_every_grid_is_strictly_monotone(n: int, name: str, under: str) -> None:
    times = GRIDS[name].make(PROCESSES[under], n)
    assert len(times) == n
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "10"])
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_a_grid_has_a_whole_number_of_levels(name: str, n: object) -> None:
    with pytest.raises(GridError, match="levels"):
        GRIDS[name].make(TABLE, n)


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("uniform_t", {"t_min": 0.5, "t_max": 0.5}, "smaller t_min"),
        ("power_t", {"rho": 0.0}, "rho > 0"),
        ("karras", {"rho": -1.0}, "rho > 0"),
        ("karras", {"nsr_min": 3.0, "nsr_max": 2.0}, "nsr_min < nsr_max"),
        ("uniform_lam", {"nsr_min": 0.0}, "0 < nsr_min"),
        ("leading", {"offset": 500}, "offset"),
        ("leading", {"spare": -1}, "spare"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(
    name: str, wrong: dict[str, float], match: str
) -> None:
    with pytest.raises(GridError, match=match):
        GRIDS[name].make(TABLE, 10, **wrong)


def test_nothing_else_is_accepted() -> None:
    with pytest.raises(TypeError):
        grid.uniform_t(VP(), 10, sigma_max=80.0)  # type: ignore[call-arg]


# --------------------------------------------------------------------------------------- in a solve


class Recording:
    """An x0-network that writes down the times that it is given."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        assert t.shape == (len(x),)
        assert bool((t == t[0]).all())
        self.times.append(t[0].clone())
        return 0.3 * x


@pytest.mark.parametrize("given_as", ["tensor", "list", "float32", "function"])
def test_a_users_grid_is_honoured_exactly(given_as: str) -> None:
    times = torch.tensor([0.987654321, 0.7, 0.41, 0.4, 0.0123], dtype=torch.float64)
    given = {
        "tensor": times,
        "list": times.tolist(),
        "float32": times.float(),
        "function": lambda process, n, **ends: times[:n],
    }[given_as]
    network = Recording()
    nfe = 5 if given_as == "function" else None
    solution = solve(
        Prediction(network, "x0", VP()),
        solver="ddim",
        grid=given,
        nfe=nfe,
        shape=(2,),
        n=3,
        seeds=0,
    )
    assert torch.equal(torch.stack(network.times), times.float())
    assert solution.times is not None
    assert torch.equal(solution.times, times.float().double() if given_as == "float32" else times)
    assert solution.nfe == 5


def test_solvers_ask_at_their_stages() -> None:
    network = Recording()
    sample(
        Prediction(network, "x0", VP()),
        solver="midpoint",
        grid=[1.0, 0.5, 0.1],
        shape=(2,),
        seeds=0,
    )
    torch.testing.assert_close(torch.stack(network.times), torch.tensor([1.0, 0.75, 0.5, 0.3, 0.1]))


def test_an_indexed_network_sees_the_entries() -> None:
    seen: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        seen.append(int(t[0]))
        return 0.1 * x

    denoiser = Prediction(network, "eps", TABLE, time="index")
    sample(denoiser, solver="ddim", nfe=10, grid="trailing", shape=(2,), seeds=0)
    assert seen == list(range(999, 0, -100))


@pytest.mark.parametrize(("nfe", "levels"), [(3, 5), (9, 4)])
def test_a_budget_that_contradicts_the_grid_is_refused(nfe: int, levels: int) -> None:
    with pytest.raises(BudgetError, match=f"{levels} levels"):
        sample(
            Mixture(VP()), solver="ddim", grid=torch.linspace(1.0, 0.1, levels), nfe=nfe, seeds=0
        )
    assert (
        solve(Mixture(VP()), solver="heun", grid=torch.linspace(1.0, 0.1, 4), nfe=7, seeds=0).nfe
        == 7
    )


# ------------------------------------------------------------------------- starting from the middle


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.25])
@pytest.mark.parametrize("under", sorted(PROCESSES))
def test_a_start_in_the_middle_keeps_the_budget_and_the_marginal(
    under: str, strength: float
) -> None:
    process = PROCESSES[under]
    t = (
        process.t_max
        if strength == 1.0
        else float(process.t_of_nsr(min(strength * 4, 0.9 * process.level(process.t_max).nsr)))
    )
    data = GaussianData(process, mean=0.4, std=0.5)
    x0 = 0.4 + 0.5 * torch.randn(50_000, generator=torch.Generator().manual_seed(0)).unsqueeze(0)
    starts: list[Tensor] = []
    solution = solve(
        data,
        solver="heun",
        nfe=21,
        x0=x0,
        t=t,
        seeds=[5],
        callback=lambda step: starts.append(step.x.clone()),
    )
    assert solution.nfe == 21
    assert solution.times is not None
    assert float(solution.times[0]) == t
    assert len(solution.times) == 11
    s, sigma = (float(c) for c in process.kernel(t))
    start = starts[0].double()
    error = 4.5 / math.sqrt(x0.numel())
    marginal = math.hypot(0.5 * s, sigma)
    assert abs(float(start.mean()) - 0.4 * s) < error * marginal
    assert abs(float(start.std()) / marginal - 1.0) < error
    # And the noise in it is the seed's own.
    assert torch.allclose(
        (start - s * x0) / sigma,
        torch.randn(1, 50_000, generator=torch.Generator().manual_seed(5)).double(),
        atol=1e-3,
    )
    assert abs(float(solution.x.mean()) - 0.4) < 0.1


def test_strength_means_noise_level() -> None:
    """The lower the start, the more of the picture is left."""
    x0 = torch.tensor([[0.9, 0.4]]).expand(64, 2)
    left = []
    for t in (0.8, 0.4, 0.2, 0.05):
        x = sample(Mixture(VP()), solver="heun", nfe=21, x0=x0, t=t, seeds=0)
        left.append(float((x - x0).norm(dim=1).mean()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.3 < left[0]


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace", "quadratic"])
def test_a_start_in_the_middle_of_a_table(name: str) -> None:
    network = Recording()
    t = float(TABLE.time(499))
    solution = solve(
        Prediction(network, "x0", TABLE, time="continuous"),
        solver="ddim",
        nfe=10,
        grid=name,
        x0=torch.zeros(2, 3),
        t=t,
        seeds=0,
    )
    assert solution.nfe == 10
    assert solution.times is not None
    assert float(solution.times[0]) == t
    assert max(entries(solution.times)) == 499


def test_a_start_where_the_grid_starts() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(GridError, match="starts at t"):
        sample(Prediction(Recording(), "x0", VP()), solver="ddim", grid=[0.9, 0.5], x=x, t=0.8)
    solution = solve(
        Prediction(Recording(), "x0", VP()), solver="ddim", grid=[0.9, 0.5], x=x, t=0.9
    )
    assert solution.nfe == 2
    solution = solve(Prediction(Recording(), "x0", VP()), solver="ddim", grid=[0.9, 0.5], x=x)
    assert solution.nfe == 2


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan, math.inf])
def test_a_start_outside_of_time_is_refused(t: float) -> None:
    with pytest.raises(GridError, match=r"runs from t=0.001 to t=1"):
        sample(Mixture(VP()), x=torch.zeros(1, 2), t=t)


def test_a_start_at_t_min_is_one_level() -> None:
    solution = solve(Mixture(VP()), solver="ddim", nfe=1, x=torch.zeros(1, 2), t=VP().t_min)
    assert solution.nfe == 1
    with pytest.raises((BudgetError, GridError)):
        solve(Mixture(VP()), solver="ddim", nfe=10, x=torch.zeros(1, 2), t=VP().t_min)


def test_default_grids_are_good_enough_to_be_defaults() -> None:
    """At 20 calls, DDIM on a process's default grid keeps a Gaussian's spread within 15 %."""
    for process in (VP(), EDM(), VE(), RectifiedFlow(), Cosine(), TABLE):
        times = GRIDS[process.default_grid].make(process, 20)
        for std in (0.5, 1.0):
            assert law(DDIM().plan(process, times), 0.0, std)[1] == pytest.approx(std, rel=0.15), (
                process
            )
    assert len(LINEAR_BETAS) == 1000
