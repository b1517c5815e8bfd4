"""UniPC: what it is equal to, where B(h) matters, its orders, and the shape of its plans."""

from __future__ import annotations

import math
from typing import Any

import methods
import pytest
import torch
from problems import PROCESSES, Mixture, reference, slopes, warped
from test_dpm_solver import run, same
from torch import Tensor

from sdeflow import grid, registry
from sdeflow.plan.instructions import Call, Combine
from sdeflow.process import EDM, VP
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import solve
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.dpm_solver import DPMSolverPP
from sdeflow.solvers.ode.unipc import UniPC
from sdeflow.solvers.ode.weights import adams
from sdeflow.solvers.ode.weights import predicted as value_of

VARIANTS = ("bh1", "bh2")
FRAMES = ("x0", "eps")


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("lower_final", [False, True])
def test_unip_of_orders_one_and_three_is_exponential_adams(
    frame: Any, lower_final: bool, under: str
) -> None:
    """From the third step on; the second is UniP-2, whose coefficient is 1/2."""
    process, times = PROCESSES[under], warped(PROCESSES[under], 9)
    one = ExponentialAdams(1, frame, "lam", start_up="orders")
    same(UniPC(1, predicts=frame, corrector=False, lower_final=lower_final), one, process, times)
    # One step of order 3, given three predictions: the same weights.
    nodes, t_next = process.levels(times[:3].flip(0)), process.level(float(times[3]))

    _, exact = adams(frame, "lam", nodes, nodes[0], t_next, process)
    for variant in VARIANTS:
        found = UniPC(3, variant, frame).weights(nodes, nodes[0], t_next, process)  # type: ignore[arg-type]
        assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("under", ["vp", "edm"])
def test_unip_two_with_bh2_is_dpmpp_2m(under: str) -> None:
    process = PROCESSES[under]
    for times in (warped(process, 9), warped(process, 4, 900.0, 0.003)):
        same(UniPC(2, "bh2", corrector=False), DPMSolverPP(2), process, times)
    same(
        UniPC(2, "bh2", "eps", corrector=False),
        DPMSolverPP(2, predicts="eps"),
        process,
        warped(process, 9),
    )


def test_b_matters_in_unip_two_and_unic_one_alone() -> None:
    process, levels = VP(), VP().levels(warped(VP(), 4))
    for nodes, t, t_next in (
        (levels[2::-1], levels[2], levels[3]),  # UniP-3
        (levels[3:0:-1], levels[2], levels[3]),  # UniC-2
        (levels[3::-1], levels[2], levels[3]),  # UniC-3
    ):
        one, two = (UniPC(3, v).weights(nodes, t, t_next, process) for v in VARIANTS)  # type: ignore[arg-type]
        assert one == two
    for nodes, t, t_next in (
        (levels[1::-1], levels[1], levels[2]),
        (levels[2:0:-1], levels[1], levels[2]),
    ):
        one, two = (UniPC(3, v).weights(nodes, t, t_next, process) for v in VARIANTS)  # type: ignore[arg-type]
        assert one != pytest.approx(two, rel=1e-3)
        assert sum(one) == pytest.approx(sum(two), rel=1e-13)


def test_the_weights_are_those_of_the_papers_system() -> None:
    """Order 3 and its corrector by the paper's own linear system in B(h), solved here."""
    process = VP()
    levels = process.levels(warped(process, 4))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    history = [(level, f[i]) for i, level in enumerate(levels[:3])]
    for variant in VARIANTS:
        solver = UniPC(3, variant)  # type: ignore[arg-type]
        for nodes, newest in ((history, None), (history, (levels[3], f[3]))):
            expected = methods._update(x, levels[2], levels[3], nodes, newest)
            shown = [*([newest] if newest else []), *nodes[::-1]]
            b = solver.weights([level for level, _ in shown], levels[2], levels[3], process)
            found = levels[3].sigma / levels[2].sigma * x
            for weight, (_, value) in zip(b, shown, strict=True):
                found = found + weight * value
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frame", FRAMES)
def test_the_free_corrector_is_the_step_done_again(p: int, variant: Any, frame: Any) -> None:
    """The corrected state of a plan, which has one state, is that of the loop as the paper writes
    it, which has two.
    """
    process, times = VP(), warped(VP(), 7)
    solver = UniPC(p, variant, frame)
    levels, den = process.levels(times), Reverse(Mixture(process))

    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, predicted, values = x, x, []
    for i, t in enumerate(levels[:-1]):
        values.append(value_of(frame, predicted, den(predicted, t), t))
        at = levels[: i + 1][::-1]
        if i:
            used = min(p, i, len(levels) - i + 1) if solver.lower_final else min(p, i)
            state = _step(solver, state, [t, *at[1 : used + 1]], values[::-1][: used + 1], at[1], t)
        used = min(p, i + 1, len(levels) - 1 - i + 1)
        predicted = _step(solver, state, at[:used], values[::-1][:used], t, levels[i + 1])
    ours = solver.integrate(Reverse(Mixture(process)), x, times, None, finish=False).x
    torch.testing.assert_close(ours, predicted, rtol=1e-11, atol=1e-11)


def _step(
    solver: UniPC, x: Tensor, nodes: list[Any], values: list[Tensor], t: Any, t_next: Any
) -> Tensor:
    x = x * (t_next.sigma / t.sigma if solver.predicts == "x0" else t_next.s / t.s)
    for weight, value in zip(solver.weights(nodes, t, t_next, VP()), values, strict=True):
        x = x + weight * value
    return x


# -------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("under", ["vp", "rectified_flow"])
@pytest.mark.parametrize(("p", "terms"), [(1, 3), (2, 4), (3, 5)])
def test_a_call_is_one_combination_with_the_corrector_in_it(p: int, terms: int, under: str) -> None:
    process = PROCESSES[under]
    for corrector in (False, True):
        plan = UniPC(p, corrector=corrector).plan(process, grid.uniform_t(process, 10))
        assert [type(i) for i in plan.instructions] == [Call, Combine] * 9 + [Call]
        combinations = [i for i in plan.instructions if isinstance(i, Combine)]
        assert max(len(i.terms) for i in combinations) == terms - (not corrector)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frame", FRAMES)
def test_weights_stay_finite_over_any_step(variant: Any, frame: Any) -> None:
    process = EDM()
    times = torch.tensor([1000.0, 2.0, 1.9999, 1e-3], dtype=torch.float64)
    for p in (1, 2, 3):
        plan = UniPC(p, variant, frame).plan(process, times, finish=False)
        assert all(
            math.isfinite(float(c))
            for i in plan.instructions
            if isinstance(i, Combine)
            for _, c in i.terms
        )


@pytest.mark.parametrize("nfe", [*range(1, 21), 35])
@pytest.mark.parametrize("name", ["unipc_1", "unipc_2", "unipc_3", "unipc_3_bh1"])
def test_every_budget_is_spent_and_stable(name: str, nfe: int) -> None:
    solution = solve(
        Mixture(VP()), solver=name, nfe=nfe, grid="uniform_lam", seeds=range(8), dtype=torch.float64
    )
    assert solution.nfe == nfe
    assert float(solution.x.abs().max()) < 6.0


# ------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (UniPC(1), 2),
        (UniPC(1, "bh1", "eps"), 2),
        (UniPC(2), 3),
        (UniPC(2, "bh1"), 3),
        (UniPC(2, "bh1", "eps"), 3),
        (UniPC(3), 3),
        (UniPC(2, corrector=False), 2),
        (UniPC(3, corrector=False), 2),
    ],
    ids=repr,
)
def test_orders_where_the_start_shows(solver: GridSolver, order: int) -> None:
    process, errors = VP(), []
    for n in (160, 320):
        times = process.t_of_lam(
            torch.linspace(-math.log(1.5), -math.log(0.1), n + 1, dtype=torch.float64)
        )
        x, exact = reference(process, float(times[0]), float(times[-1]))
        y = solver.integrate(Reverse(Mixture(process)), x, times, None, finish=False).x
        errors.append(float((y - exact).norm() / exact.norm()))
    assert solver.order == order
    assert abs(slopes(errors)[-1] - order) < 0.25


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_corrector_pays(p: int) -> None:
    process, times = VP(), warped(VP(), 30)
    x, exact = reference(process, float(times[0]), float(times[-1]))
    error = [
        float(
            (
                UniPC(p, corrector=c)
                .integrate(Reverse(Mixture(process)), x, times, None, finish=False)
                .x
                - exact
            ).norm()
        )
        for c in (False, True)
    ]
    assert error[1] < 0.6 * error[0]


# --------------------------------------------------------------------------------- names and values


def test_names_that_users_know() -> None:
    assert registry.solver("unipc") == registry.solver("UniPCMultistepScheduler") == UniPC()
    assert registry.solver("uni_pc") == UniPC(3, "bh1")
    assert registry.solver("uni_pc_bh2") == UniPC(3, "bh2")


def test_parameters_are_checked() -> None:
    for p in (0, 4, True):
        with pytest.raises(ValueError, match="ExponentialAdams"):
            UniPC(p)
    with pytest.raises(ValueError, match="bh1"):
        UniPC(variant="vary_coeff")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps"):
        UniPC(predicts="v")  # type: ignore[arg-type]


def test_encoding_from_the_data() -> None:
    process, times = VP(), warped(VP(), 60)
    x = run(UniPC(), process, times[:1], finish=True)
    up = UniPC(3).integrate(Reverse(Mixture(process)), x, times.flip(0), None, finish=False).x
    back = UniPC(3).integrate(Reverse(Mixture(process)), up, times, None, finish=False).x
    torch.testing.assert_close(back, x, rtol=0, atol=2e-3)
