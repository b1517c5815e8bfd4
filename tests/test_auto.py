"""`solver="auto"`: the table is what the search found, and the choice is near the best that there
is.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from problems import PROCESSES, Mixture, ends, law

from sdeflow import registry
from sdeflow.denoisers import Prediction, as_denoiser
from sdeflow.denoisers.thresholding import Clip, Projected
from sdeflow.process import EDM, VP, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import encode, sample, solve
from sdeflow.solvers.auto.grid import auto as auto_grid
from sdeflow.solvers.auto.recipes import TABLES, recipe
from sdeflow.solvers.auto.solver import Auto
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.targets import Gaussian

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
NAMED = [
    (solver, grid)
    for solver in ("ddim", "dpmpp_2m", "dpm_solver_2m", "unipc_2", "unipc_3", "ipndm2", "ipndm3")
    for grid in ("uniform_lam", "karras", "uniform_sqrt_t", "trailing")
]


@pytest.mark.parametrize(("table", "nfe"), [(name, n) for name in TABLES for n in TABLES[name]])
def test_the_tables_are_what_the_search_found(table: str, nfe: int) -> None:
    searched = json.loads((RESULTS / "search_tables.json").read_text())
    if str(nfe) in searched.get(table, {}):
        found = searched[table][str(nfe)]
    else:
        results = json.loads((RESULTS / "tune_auto.json").read_text())
        row = 10 if (table, nfe) == ("network", 11) else nfe
        which, key = results["rows"]["exact" if table == "density" else "network"][str(row)]
        found = results[which][key]["recipe"]
    for name, value in found.items():
        mine = getattr(TABLES[table][nfe], name)
        assert mine == (float(f"{value:.3g}") if isinstance(value, float) else value), name


def test_the_denoiser_chooses_the_table() -> None:
    target = Gaussian(torch.zeros(2), std=0.5).under(VP())
    network = Prediction(lambda x, t: 0.1 * x, "velocity", VP(), shape=(2,))
    noise = Prediction(lambda x, t: 0.1 * x, "eps", VP(), shape=(2,))
    score = as_denoiser(lambda x, t: -x, VP())
    score.shape = (2,)
    for denoiser, table in (
        *((target, "density"), (target.under(EDM()), "density")),
        *((network, "network"), (network.under(EDM()), "network")),
        *((noise, "noise"), (noise.under(EDM()), "noise"), (score, "noise")),
        (Projected(noise, Clip()), "noise"),
    ):
        solution = solve(denoiser, nfe=12, n=2, seeds=0)
        assert solution.solver == Auto(table=table)
        assert solution.grid == "auto"
        named = solve(denoiser, solver="auto", grid="auto", nfe=12, n=2, seeds=0)
        assert torch.equal(named.x, solution.x)
        assert solution.times is not None
        assert torch.equal(solution.times, auto_grid(denoiser.process, 12, table=table))
        other = "network" if table == "density" else "density"
        asked = solve(denoiser, solver=Auto(table=other), nfe=12, n=2, seeds=0)
        assert asked.solver == Auto(table=other)


@pytest.mark.parametrize("nfe", [1, 2, 5, 6, 11, 33, 100, 400])
def test_it_is_the_member_that_it_names(nfe: int) -> None:
    process, solver = VP(), Auto()
    times = auto_grid(process, solver.levels(nfe))
    plan, member = solver.plan(process, times), solver.member(len(times))
    assert isinstance(member, ExponentialAdams)
    assert plan.nfe == nfe
    assert plan.compare(member.plan(process, times)).close()


@pytest.mark.parametrize("table", TABLES)
def test_between_two_rows_the_numbers_lie_between_theirs(table: str) -> None:
    rows = TABLES[table]
    assert recipe(1000, table=table) == rows[max(rows)]
    assert recipe(1, table=table) == rows[min(rows)]
    for low, high in pairwise(rows):
        assert recipe(low, table=table) == rows[low]
        a, b = rows[low], rows[high]
        same = (a.p, a.frame, a.clock, a.corrector) == (b.p, b.frame, b.clock, b.corrector)
        for n in range(low + 1, high):
            here = recipe(n, table=table)
            if not same or a.to_zero != b.to_zero:
                assert here == a
                continue
            for name in ("frame_scale", "clock_scale", "center", "nsr_end", "nsr_top"):
                ends = sorted((getattr(a, name), getattr(b, name)))
                assert ends[0] * (1 - 1e-12) <= getattr(here, name) <= ends[1] * (1 + 1e-12) or (
                    name == "center" and ends[0] <= here.center <= ends[1]
                )


class Eps:
    """The noise of `Mixture` with a small smooth error, as a network's is, at every level."""

    def __init__(self, process: Process, error: float, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.exact, self.process, self.error = Mixture(process), process, error
        self.w = torch.randn(2, 16, generator=draw, dtype=torch.float64)
        self.b = 6.28 * torch.rand(16, generator=draw, dtype=torch.float64)
        self.c = 3 * torch.randn(16, generator=draw, dtype=torch.float64)
        self.out = torch.randn(16, 2, generator=draw, dtype=torch.float64) / 16**0.5

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s, sigma = (c.reshape(-1, 1) for c in self.process.kernel(t.double()))
        eps = (x - s * self.exact(x, t.double())) / sigma
        features = torch.sin(x.double() @ self.w + self.b + self.c * t.double().reshape(-1, 1))
        return (eps + self.error * 2**0.5 * features @ self.out).to(x)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("predicts", ["eps", "score"])
@pytest.mark.parametrize("under", ["vp", "from_betas"])
def test_few_calls_of_a_network_that_predicts_the_noise(
    under: str, predicts: str, seed: int
) -> None:
    # Its x0 is off by `nsr` times the error: 150 * 0.05 at the start, where the data's spread is 1.
    process = PROCESSES[under]
    eps = Eps(process, 0.05, seed)

    def score(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -eps(x, t) / process.sigma(t.double()).reshape(-1, 1).to(x)

    function = eps if predicts == "eps" else score
    network = Prediction(function, predicts, process, time="continuous", shape=(2,))
    level = process.level(process.t_max)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    start = {"x": x * math.hypot(level.s, level.sigma), "t": process.t_max}
    exact = solve(network, solver="adams2", grid="uniform_lam", nfe=400, **start).x
    for nfe in (3, 4, 5, 6, 8):

        def error(solver: str, name: str | None, nfe: int = nfe) -> float:
            end = solve(network, solver=solver, grid=name, nfe=nfe, **start).x
            return float((end - exact).square().mean().sqrt())

        pairs = [pair for pair in NAMED if under == "from_betas" or pair[1] != "trailing"]
        best, which = min((error(*pair), pair) for pair in pairs)
        # The seeds of the error were in no search. The figures on trained networks are below.
        assert error("auto", None) <= (1.1 if nfe < 8 else 1.5) * best, (nfe, which)


def test_few_calls_of_trained_networks() -> None:
    networks = json.loads((RESULTS / "few_calls.json").read_text())["networks"]
    assert sum(net["held_out"] for net in networks.values()) >= 2
    assert {net["predicts"] for net in networks.values()} >= {"eps", "score"}
    for name, net in networks.items():
        if net["predicts"] in ("eps", "score"):
            for nfe in ("3", "4", "5", "6", "8"):
                row = dict(net["errors"][nfe])
                assert row.pop("auto") <= 1.1 * min(row.values()), (name, nfe)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.7, 8.0])
@pytest.mark.parametrize(("nfe", "percent"), [(50, 0.02), (70, 0.02), (100, 0.001), (200, 0.001)])
def test_many_calls_have_no_floor(nfe: int, percent: float, std: float) -> None:
    if std == 0.05:
        percent = 0.1 if nfe < 100 else 0.05
    process = VP()
    solver = Auto(table="density")
    plan = solver.plan(process, auto_grid(process, nfe, table="density"))
    assert plan.finish == "integrated"
    assert law(plan, 0.0, std)[1] == pytest.approx(std, rel=percent / 100)


@pytest.mark.parametrize("nfe", [3, 5, 7, 12, 24, 60])
def test_data_of_another_scale_are_the_same_problem(nfe: int) -> None:
    # EDM's path scaled by the data: the same error, relative to the data.
    errors = []
    for scale in (0.5, 2.0):
        process = EDM(t_min=0.004 * scale, t_max=160.0 * scale)
        data = Gaussian(torch.zeros(1, dtype=torch.float64), std=0.6 * scale).under(process)
        x = torch.full((1, 1), math.hypot(process.t_max, 0.6 * scale), dtype=torch.float64)
        solution = solve(data, process, solver=Auto(data_std=scale), nfe=nfe, x=x, t=process.t_max)
        errors.append(float(solution.x) / scale)
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


@pytest.mark.parametrize("under", ["vp", "edm", "cosine", "rectified_flow", "ve", "from_betas"])
def test_a_given_end_is_honoured(under: str) -> None:
    process = PROCESSES[under]
    for n in (2, 5, 20):
        assert float(auto_grid(process, n, t_min=process.t_min)[-1]) == process.t_min
        assert float(auto_grid(process, n)[-1]) >= process.t_min
    solution = solve(Mixture(process), solver="auto", nfe=6, n=2, seeds=0, finish=False)
    assert solution.times is not None
    assert float(solution.times[-1]) == process.t_min


def test_there_and_back() -> None:
    process = VP()
    denoiser = Mixture(process)
    x0 = sample(denoiser, nfe=100, n=8, seeds=0, dtype=torch.float64)
    z = encode(denoiser, x0, nfe=100)
    back = sample(denoiser, nfe=100, x=z, t=process.t_max, finish=False)
    torch.testing.assert_close(back, x0, rtol=0, atol=2e-3)


@pytest.mark.parametrize("process", [VP(), EDM(), RectifiedFlow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("nfe", [5, 8, 12, 20, 40])
def test_it_is_more_accurate_than_the_published_ones(process: VP, nfe: int) -> None:
    top = (
        process.t_max
        if math.isfinite(process.level(process.t_max).nsr)
        else process.t_of_lam(-math.log(1e3))
    )
    x, end = ends(process, float(top), n=64, seed=3)

    def error(name: str, laid: str) -> float:
        solver = registry.solver(name).for_denoiser(Mixture(process))
        function = registry.grid_function(
            laid if solver.default_grid is None else solver.default_grid
        )
        x0 = solver.integrate(
            Reverse(Mixture(process)), x, function(process, nfe, t_max=float(top)), None
        ).x
        return float((x0 - end).norm(dim=1).median() / end.norm(dim=1).square().mean().sqrt())

    best = min(
        error(name, laid)
        for name in ("ddim", "dpmpp_2m", "unipc_3")
        for laid in ("karras", "uniform_lam")
    )
    assert error("auto", "auto") < best


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="data_std"):
        Auto(data_std=0.0)
    with pytest.raises(ValueError, match="t_max down to a smaller t_min"):
        auto_grid(VP(), 5, t_min=0.5, t_max=0.2)


@pytest.mark.parametrize("under", ["vp", "edm", "cosine", "rectified_flow"])
def test_more_calls_are_never_worse(under: str) -> None:
    process = PROCESSES[under]
    top = process.t_max
    if not math.isfinite(process.level(top).nsr):
        top = float(process.t_of_lam(-math.log(1e3)))
    x, end = ends(process, top, n=64, seed=3)
    least = math.inf
    for nfe in (*range(3, 26), 30, 40, 60, 100):
        solver = Auto(table="density")
        times = auto_grid(process, nfe, table="density", t_max=top)
        got = solver.integrate(Reverse(Mixture(process)), x, times, None).x
        error = float((got - end).square().mean().sqrt() / end.square().mean().sqrt())
        assert error <= max(1.2 * least, 1e-6), nfe
        least = min(least, error)
