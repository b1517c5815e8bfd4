"""DPM-Solver and DPM-Solver++: what they are equal to, the orders that a budget is spent on, and
the shape of their plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from methods import exponential_step
from problems import GRID_SOLVERS, PROCESSES, Mixture, reference, slopes, warped
from torch import Tensor

from sdeflow import grid, registry
from sdeflow.plan.instructions import Call, Combine
from sdeflow.process import EDM, VP, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import solve
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.dpm_solver import DPMSolver, DPMSolverPP, step_order


def run(solver: GridSolver, process: Process, times: Tensor, *, finish: bool = False) -> Tensor:
    level = process.level(float(times[0]))
    rng = torch.Generator().manual_seed(0)
    x0, eps = (
        torch.from_numpy(Mixture.draw(5, 0)),
        torch.randn(5, 2, generator=rng, dtype=torch.float64),
    )
    x = level.s * x0 + level.sigma * eps
    return solver.integrate(Reverse(Mixture(process)), x, times, None, finish=finish).x


def same(
    a: GridSolver, b: GridSolver, process: Process, times: Tensor, tolerance: float = 1e-12
) -> None:
    torch.testing.assert_close(
        run(a, process, times), run(b, process, times), rtol=tolerance, atol=tolerance
    )


# --------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize("frame", ["x0", "eps"])
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("lower_final", [False, True])
def test_multistep_with_exact_weights_is_exponential_adams(
    p: int, frame: str, lower_final: bool, under: str
) -> None:
    process = PROCESSES[under]
    ours = DPMSolverPP(p, "heun", 1.0, frame, lower_final)  # type: ignore[arg-type]
    theirs = ExponentialAdams(p, frame, "lam", start_up="orders", lower_final=lower_final)  # type: ignore[arg-type]
    for times in (warped(process, 9), warped(process, 4, 900.0, 0.003), grid.uniform_t(process, 8)):
        same(ours, theirs, process, times, 1e-11)


def test_published_weights_are_not_the_exact_ones() -> None:
    process, times = VP(), warped(VP(), 9)
    for published, exact in (
        (DPMSolverPP(2), DPMSolverPP(2, "heun")),
        (DPMSolverPP(3), DPMSolverPP(3, kappa=1.0)),
        (DPMSolver(2), DPMSolver(2, taylor=True)),
        (DPMSolver(3, "x0"), DPMSolver(3, "x0", taylor=True)),
    ):
        gap = (run(published, process, times) - run(exact, process, times)).abs().max()
        assert 1e-5 < float(gap) < 0.2


@pytest.mark.parametrize("frame", ["x0", "eps"])
@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_single_steps_are_the_formulas_of_the_papers(p: int, taylor: bool, frame: str) -> None:
    """`exponential_step` has them as they are written, in `F`; a step of ours has them in
    differences of predictions.
    """
    process = VP()
    times = warped(process, 3)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, generator=rng, dtype=torch.float64)
    reverse = Reverse(Mixture(process))
    ratios = {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}[p]
    written = x
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        a, b = process.level(t), process.level(t_next)
        written = exponential_step(
            reverse, written, reverse(written, a), a, b, ratios, frame, taylor, parabola=taylor
        )
    ours = DPMSolver(p, frame, taylor).integrate(
        Reverse(Mixture(process)), x, times, None, finish=False
    )  # type: ignore[arg-type]
    torch.testing.assert_close(ours.x, written, rtol=1e-11, atol=1e-12)
    assert ours.nfe == reverse.nfe == 3 * p


def test_order_one_is_ddim_in_every_form() -> None:
    process, times = RectifiedFlow(), warped(RectifiedFlow(), 6)
    for solver in (
        DPMSolver(1),
        DPMSolver(1, "x0", stages="grid"),
        DPMSolverPP(1),
        DPMSolverPP(1, predicts="eps"),
    ):
        same(solver, DDIM(), process, times)


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("frame", ["x0", "eps"])
@pytest.mark.parametrize("taylor", [False, True])
def test_stages_at_levels_are_the_stages_within_where_the_grid_is_even(
    p: int, taylor: bool, frame: str
) -> None:
    process = VP()
    lam = torch.linspace(-2.0, 2.5, 4 * p + 1, dtype=torch.float64)
    times = process.t_of_lam(lam)
    fast, inner = (DPMSolver(p, frame, taylor, stages) for stages in ("grid", "inner"))  # type: ignore[arg-type]
    torch.testing.assert_close(
        run(fast, process, times), run(inner, process, times[::p]), rtol=1e-9, atol=1e-9
    )


# -------------------------------------------------------------------------------- "DPM-Solver-fast"


def orders(p: int, steps: int) -> list[int]:
    found = []
    while steps:
        found.append(step_order(p, steps))
        steps -= found[-1]
    return found


def papers(nfe: int) -> list[int]:
    """DPM-Solver-fast, section 3.4: as many steps of order 3 as can be, and one or two of lower
    order.
    """
    k = nfe // 3 + 1
    return [3] * (k - 2) + [2, 1] if nfe % 3 == 0 else [3] * (k - 1) + [nfe % 3]


@pytest.mark.parametrize("nfe", range(1, 41))
def test_a_budget_is_spent_as_in_the_paper(nfe: int) -> None:
    """The step to zero noise is one of order 1; a budget that is 2 more than a multiple of 3 has no
    such step in the paper.
    """
    spent = [*orders(3, nfe - 1), 1]
    assert sum(spent) == nfe
    if nfe % 3 != 2:
        assert spent == papers(nfe)
    else:
        assert spent == {2: [1, 1]}.get(nfe, [3] * ((nfe - 5) // 3) + [2, 2, 1])
    assert orders(2, nfe) == [2] * (nfe // 2) + [1] * (nfe % 2)


@pytest.mark.parametrize("frame", ["eps", "x0"])
def test_the_plan_takes_the_orders_of_the_distribution(frame: str) -> None:
    """A step starts where a combination takes up the last state that is kept: as many intervals
    later as its order.
    """
    solver, process = DPMSolver(3, frame, stages="grid"), VP()  # type: ignore[arg-type]
    for steps in range(1, 15):
        times = warped(process, steps)
        parts = orders(3, steps)
        x, at = run(solver, process, times), 0
        reverse = Reverse(Mixture(process))
        rng = torch.Generator().manual_seed(0)
        level = process.level(float(times[0]))
        y = level.s * torch.from_numpy(Mixture.draw(5, 0))
        y = y + level.sigma * torch.randn(5, 2, generator=rng, dtype=torch.float64)
        for order in parts:
            single = DPMSolver(order, frame, stages="grid")  # type: ignore[arg-type]
            y = single.integrate(reverse, y, times[at : at + order + 1], None, finish=False).x
            at += order
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        assert reverse.nfe == steps


def test_a_start_without_signal_is_one_step_of_order_one() -> None:
    """From rectified flow's t = 1 the first interval is DDIM's, and the distribution starts after
    it.
    """
    process = RectifiedFlow()
    times = torch.tensor([1.0, 0.9, 0.7, 0.45, 0.2], dtype=torch.float64)
    solver = DPMSolver(3, stages="grid")
    whole = run(solver, process, times)
    first = run(DDIM(), process, times[:2])
    rest = solver.integrate(Reverse(Mixture(process)), first, times[1:], None, finish=False).x
    torch.testing.assert_close(whole, rest, rtol=1e-12, atol=1e-12)
    assert bool(torch.isfinite(run(solver, process, times.flip(0))).all())


# -------------------------------------------------------------------------------------------- plans


LEAN = {
    "dpm_solver_1": 2, "dpm_solver_2": 3, "dpm_solver_3": 4, "dpm_solver_fast": 4, "dpmpp_2s": 3, "dpmpp_3s": 3,
    "dpmpp_2s_fast": 3, "dpmpp_3s_fast": 3, "dpmpp_1m": 2, "dpmpp_2m": 3, "dpmpp_2m_heun": 3, "dpmpp_3m": 4, "dpmpp_3m_exact": 4,
}  # fmt: skip
"""The most terms of a combination."""


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("under", ["vp", "rectified_flow"])
def test_a_call_is_one_short_combination(name: str, under: str) -> None:
    process = PROCESSES[under]
    plan = GRID_SOLVERS[name].plan(process, grid.uniform_t(process, 9))
    kinds = [type(i) for i in plan.instructions]
    calls = [i for i in plan.instructions if isinstance(i, Call)]
    combinations = [i for i in plan.instructions if isinstance(i, Combine)]
    # Call, combination, call, ...: the last call is the result.
    assert kinds == [Call, Combine] * (len(calls) - 1) + [Call]
    assert max(len(i.terms) for i in combinations) == LEAN[name]


@pytest.mark.parametrize(
    "solver", [DPMSolver(3), DPMSolver(3, "x0", True), DPMSolver(3, taylor=True, stages="grid")]
)
def test_steps_across_all_noise_have_finite_weights(solver: GridSolver) -> None:
    """One step from nsr 1000 to 0.001: every weight is finite and those of a state are what they
    should be.
    """
    process = EDM()
    times = torch.tensor([1000.0, 30.0, 1.0, 1e-3], dtype=torch.float64)
    times = times if isinstance(solver, DPMSolver) and solver.stages == "grid" else times[[0, -1]]
    plan = solver.plan(process, times)
    weights = [float(c) for i in plan.instructions if isinstance(i, Combine) for _, c in i.terms]
    assert all(map(math.isfinite, weights))
    last = [i for i in plan.instructions if isinstance(i, Combine)][-1]
    assert min(abs(float(c)) for _, c in last.terms) == pytest.approx(
        1e-6, rel=1e-12
    )  # sigma_next / sigma of the state


@pytest.mark.parametrize("nfe", range(1, 31))
@pytest.mark.parametrize(
    "name",
    ["dpm_solver_fast", "dpmpp_2s_fast", "dpmpp_3s_fast", "dpmpp_2m", "dpmpp_3m", "dpm_solver_3m"],
)
def test_every_budget_is_spent_and_stable(name: str, nfe: int) -> None:
    solution = solve(
        Mixture(VP()), solver=name, nfe=nfe, grid="uniform_lam", seeds=range(8), dtype=torch.float64
    )
    assert solution.nfe == nfe
    if nfe > (6 if solution.solver.predicts == "eps" else 3):  # type: ignore[union-attr]  # eps extrapolates by e^h
        assert float(solution.x.abs().max()) < 6.0


# ------------------------------------------------------------------------------------------- orders


def errors(solver: GridSolver, counts: Sequence[int]) -> list[float]:
    """From the middle of the path, where the first step's error shows."""
    process, found = VP(), []
    for n in counts:
        lam = torch.linspace(-math.log(1.5), -math.log(0.1), n + 1, dtype=torch.float64)
        times = process.t_of_lam(lam)
        x, exact = reference(process, float(times[0]), float(times[-1]))
        y = solver.integrate(Reverse(Mixture(process)), x, times, None, finish=False).x
        found.append(float((y - exact).norm() / exact.norm()))
    return found


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (DPMSolver(3), 3),
        (DPMSolver(3, "x0"), 3),
        (DPMSolver(3, stages="grid"), 3),
        (DPMSolver(3, "x0", True, "grid"), 3),
        (DPMSolverPP(2), 2),
        (DPMSolverPP(3), 2),
        (DPMSolverPP(3, "heun", 1.0), 2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("odd", [0, 1])
def test_orders_where_the_start_shows(solver: GridSolver, order: int, odd: int) -> None:
    """`odd`: where 3 does not divide the steps, those left over keep the order."""
    if isinstance(solver, DPMSolver):
        assert solver.order == order
        assert slopes(errors(solver, (96 + odd, 192 + odd)))[-1] > order - 0.2
    else:
        assert solver.order == order
        assert abs(slopes(errors(solver, (160, 320)))[-1] - order) < 0.25


def test_kappa_bounds_the_order_whatever_the_start() -> None:
    """Given the exact predictions of the past, one step is of order 3 with kappa = 1 alone: a
    parabola is met exactly.
    """
    process = VP()
    lam = torch.tensor([-0.5, -0.2, 0.05, 0.3], dtype=torch.float64)
    levels = process.levels(process.t_of_lam(lam))
    _, _, t, t_next = levels

    def f(v: float) -> float:
        return 1.0 + 2.0 * v - 1.5 * v * v

    h = t_next.lam - t.lam
    u = torch.linspace(0.0, 1.0, 20001, dtype=torch.float64)
    v = t.lam + u * h
    exact = (
        float(torch.trapezoid(h * torch.exp(-(1 - u) * h) * (1.0 + 2.0 * v - 1.5 * v * v), u))
        * t_next.s
    )
    for kappa, meets in ((1.0, True), (0.5, False)):
        weights = DPMSolverPP(3, kappa=kappa).weights(levels[2::-1], levels[2], t_next, process)
        got = sum(w * f(level.lam) for w, level in zip(weights, levels[2::-1], strict=True))
        assert (abs(got - exact) < 1e-8) is meets


# --------------------------------------------------------------------------------- names and values


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("sample_dpm_2", "dpm_solver_2"),
        ("KDPM2DiscreteScheduler", "dpm_solver_2"),
        ("sample_dpm_fast", "dpm_solver_fast"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("sample_dpmpp_2m", "dpmpp_2m"),
        ("DPM++-2M", "dpmpp_2m"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s_fast"),
    ],
)
def test_names_that_users_know(alias: str, name: str) -> None:
    assert registry.solver(alias) == registry.solver(name)


def test_parameters_are_checked() -> None:
    for p in (0, 4, True, 2.5):
        with pytest.raises(ValueError, match="p = 1, 2 or 3"):
            DPMSolver(p)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="p = 1, 2 or 3"):
            DPMSolverPP(p)  # type: ignore[arg-type]
    for make in (
        lambda: DPMSolver(predicts="v"),  # type: ignore[arg-type]
        lambda: DPMSolver(stages="outer"),  # type: ignore[arg-type]
        lambda: DPMSolverPP(predicts="v"),  # type: ignore[arg-type]
        lambda: DPMSolverPP(solver_type="taylor"),  # type: ignore[arg-type]
        lambda: DPMSolverPP(kappa=1.5),
    ):
        with pytest.raises(ValueError, match=r"known|kappa|frame|stages|solver_type"):
            make()


def test_encoding_and_decoding_come_back() -> None:
    process, times = VP(), warped(VP(), 60)
    x = run(DDIM(), process, times[:1], finish=True)  # any states of the data's scale
    for name in ("dpmpp_2m", "dpm_solver_3", "dpmpp_3s_fast"):
        solver = registry.solver(name)
        up = solver.integrate(Reverse(Mixture(process)), x, times.flip(0), None, finish=False).x
        back = solver.integrate(Reverse(Mixture(process)), up, times, None, finish=False).x
        torch.testing.assert_close(back, x, rtol=0, atol=2e-2 if name == "dpmpp_2m" else 5e-3)
