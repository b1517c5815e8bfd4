"""`solver="auto"`: the table is what the search found, and the choice is near the best that there
is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from problems import PROCESSES, Mixture, reference

from sdeflow import registry
from sdeflow.denoisers import Prediction
from sdeflow.process import EDM, VP, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import encode, sample, solve
from sdeflow.solvers.auto.grid import auto as auto_grid
from sdeflow.solvers.auto.recipes import EXACT, NETWORK, recipe
from sdeflow.solvers.auto.solver import Auto
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.targets import Gaussian

FOUND = Path(__file__).parent.parent / "benchmarks" / "results" / "tune_auto.json"


@pytest.mark.parametrize(
    ("kind", "nfe"), [*(("network", n) for n in NETWORK), *(("exact", n) for n in EXACT)]
)
def test_the_tables_are_what_the_search_found(kind: str, nfe: int) -> None:
    results = json.loads(FOUND.read_text())
    which, key = results["rows"][kind][str(nfe)]
    for name, value in results[which][key]["recipe"].items():
        mine = getattr((EXACT if kind == "exact" else NETWORK)[nfe], name)
        assert mine == (float(f"{value:.3g}") if isinstance(value, float) else value), name


def test_the_denoiser_chooses_the_table() -> None:
    target = Gaussian(torch.zeros(2), std=0.5).under(VP())
    network = Prediction(lambda x, t: 0.1 * x, "eps", VP(), shape=(2,))
    for denoiser, exact in (
        (target, True),
        (target.under(EDM()), True),
        (network, False),
        (network.under(EDM()), False),
    ):
        solution = solve(denoiser, nfe=12, n=2, seeds=0)
        assert solution.solver == Auto(exact=exact)
        assert solution.grid == "auto"
        named = solve(denoiser, solver="auto", grid="auto", nfe=12, n=2, seeds=0)
        assert torch.equal(named.x, solution.x)
        assert solution.times is not None
        assert torch.equal(solution.times, auto_grid(denoiser.process, 12, exact=exact))
        asked = solve(denoiser, solver=Auto(exact=not exact), nfe=12, n=2, seeds=0)
        assert asked.solver == Auto(exact=not exact)


@pytest.mark.parametrize("nfe", [1, 2, 5, 6, 11, 33, 100, 400])
def test_it_is_the_member_that_it_names(nfe: int) -> None:
    process, solver = VP(), Auto()
    times = auto_grid(process, solver.levels(nfe))
    plan, member = solver.plan(process, times), solver.member(len(times))
    assert isinstance(member, ExponentialAdams)
    assert plan.nfe == nfe
    assert plan.compare(member.plan(process, times)).close()


def test_a_row_serves_up_to_the_next() -> None:
    for exact, table in ((False, NETWORK), (True, EXACT)):
        assert recipe(14, exact=exact) == recipe(12, exact=exact) == table[12]
        assert recipe(1000, exact=exact) == table[max(table)]
        assert recipe(1, exact=exact) == table[min(table)]


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
    x, exact = reference(process, float(top), process.t_min, n=64, seed=3)
    end = Reverse(Mixture(process))(exact, process.level(process.t_min))

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
