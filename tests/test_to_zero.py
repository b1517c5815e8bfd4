"""The step to zero noise of multistep solvers: what it is exact for, its floor, and who has it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import PROCESSES, GaussianData, Mixture, ends, law

from sdeflow import registry
from sdeflow.process import VP
from sdeflow.reverse import Reverse
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.multistep import Multistep

NAMES = [
    name
    for name, entry in registry.SOLVERS.items()
    if isinstance(entry.kind, type) and issubclass(entry.kind, Multistep)
]
OFFERED = [
    name
    for name in NAMES
    if any(f.name == "to_zero" for f in dataclasses.fields(registry.SOLVERS[name].kind))
]


def with_step(name: str, to_zero: str) -> Multistep:
    return dataclasses.replace(registry.solver(name), to_zero=to_zero)


def test_every_deterministic_multistep_solver_offers_it() -> None:
    assert {name for name in NAMES if not registry.solver(name).stochastic} == set(OFFERED)
    assert {"adams3", "unipc_3", "dpmpp_2m", "deis_tab2", "ipndm", "ipndm_v", "lms"} < set(OFFERED)


@pytest.mark.parametrize("name", NAMES)
def test_published_names_keep_the_prediction(name: str) -> None:
    solver = registry.solver(name)
    assert solver.to_zero == "prediction"
    times = registry.grid_function("uniform_lam")(VP(), solver.levels(25))
    plan = solver.plan(VP(), times)
    assert plan.finish == "prediction"
    assert solver.plan(VP(), times, finish=False).finish == "none"


@pytest.mark.parametrize("to_zero", ["linear", "smooth"])
@pytest.mark.parametrize("name", OFFERED)
def test_it_makes_no_call_and_is_exact_for_a_point(name: str, to_zero: str) -> None:
    solver = with_step(name, to_zero)
    nfe = 25
    times = registry.grid_function("uniform_lam")(VP(), solver.levels(nfe))
    plan = solver.plan(VP(), times)
    assert (plan.nfe, plan.finish) == (nfe, "integrated")
    assert "integrated" in str(plan)
    assert plan.consistency()["result"] < 1e-12


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
def test_the_prediction_has_a_floor_and_the_integral_has_none(under: str) -> None:
    process = PROCESSES[under]
    std = 10.0 * process.level(process.t_min).nsr  # ten times the last ratio
    errors = {}
    for to_zero in ("prediction", "linear", "smooth"):
        solver = ExponentialAdams(4, "v", "lam", True, to_zero=to_zero)
        times = registry.grid_function("uniform_lam")(process, 400)
        errors[to_zero] = abs(law(solver.plan(process, times), 0.0, std)[1] / std - 1.0)
    assert errors["prediction"] == pytest.approx(0.5e-2, rel=0.02)  # n^2 / (2 std^2)
    assert errors["linear"] < 1e-4
    assert errors["smooth"] < 5e-6


def test_fewer_predictions_than_it_wants() -> None:
    process = VP()
    solver = ExponentialAdams(3, "v", "lam", to_zero="smooth")
    for levels, finish in ((1, "prediction"), (2, "integrated"), (30, "integrated")):
        times = registry.grid_function("uniform_lam")(process, levels)
        assert solver.plan(process, times).finish == finish, levels


@pytest.mark.parametrize("to_zero", ["linear", "smooth"])
def test_a_plan_does_what_the_steps_do(to_zero: str) -> None:
    process = VP()
    solver = ExponentialAdams(3, "flow", "angle", True, to_zero=to_zero)
    times = registry.grid_function("uniform_lam")(process, 25)
    x, end = ends(process, process.t_max, n=16, seed=2)
    by_plan = solver.integrate(Reverse(Mixture(process)), x, times, None).x
    by_steps = solver.textbook(Reverse(Mixture(process)), x, times, None)
    torch.testing.assert_close(by_plan, by_steps, rtol=0, atol=1e-9)
    assert float((by_plan - end).square().mean().sqrt()) < 5e-3


def test_gradients_flow_through_its_weights() -> None:
    process = VP()
    times = registry.grid_function("uniform_lam")(process, 12).requires_grad_()
    solver = ExponentialAdams(3, "v", "lam", True, to_zero="smooth")
    x = torch.full((1, 1), 1.0, dtype=torch.float64)
    denoiser = GaussianData(process, std=0.1)

    def end(times: torch.Tensor) -> torch.Tensor:
        return solver.integrate(Reverse(denoiser), x, times, None).x.sum()

    (slope,) = torch.autograd.grad(end(times), times)
    step = 1e-6
    moved = [times.detach().clone() for _ in range(2)]
    for sign, where in zip((1, -1), moved, strict=True):
        where[-2] += sign * step
    with torch.no_grad():
        numeric = (end(moved[0]) - end(moved[1])) / (2 * step)
    assert float(slope[-2]) == pytest.approx(float(numeric), rel=1e-4)
    assert math.isfinite(float(slope.abs().sum()))


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ValueError, match="to_zero"):
        ExponentialAdams(3, to_zero="extrapolate")  # type: ignore[arg-type]
