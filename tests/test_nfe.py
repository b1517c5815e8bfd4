"""Budgets: planned == counted == asked for every solver from one call up; what cannot be spent
names its neighbours.
"""

from __future__ import annotations

import pytest
import torch
from problems import CLOCKED, GRID_SOLVERS, PROCESSES, Mixture, from_the_start
from torch import Tensor

from sdeflow.denoisers import Prediction
from sdeflow.errors import BudgetError
from sdeflow.process import VP, Process
from sdeflow.sampling.api import sample, solve
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.runge_kutta import RK4, Heun

BUDGETS = (*range(1, 18), 20, 25, 30, 35, 40)


class Counting:
    """An x0-network that counts its calls and the rows it saw."""

    def __init__(self) -> None:
        self.calls = 0
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.rows.append(len(x))
        return 0.5 * x


def reachable(solver: GridSolver, nfe: int, *, finish: bool = True) -> bool:
    return nfe in {solver.calls(levels, finish=finish) for levels in range(1 if finish else 2, 60)}


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize(
    "name", [name for name in GRID_SOLVERS if name not in CLOCKED]
)  # a clock costs no calls
def test_planned_is_counted_is_asked(name: str, finish: bool) -> None:
    solver, process = GRID_SOLVERS[name], VP()
    for nfe in BUDGETS:
        if not reachable(solver, nfe, finish=finish):
            continue
        network = Counting()
        solution = solve(
            Prediction(network, "x0", process),
            solver=solver,
            nfe=nfe,
            finish=finish,
            shape=(2,),
            n=3,
            seeds=0,
        )
        assert solution.plan is not None
        assert solution.nfe == solution.plan.nfe == network.calls == solution.network_calls == nfe


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("name", [name for name in GRID_SOLVERS if name not in CLOCKED])
def test_what_cannot_be_spent_names_its_neighbours(name: str, finish: bool) -> None:
    solver = GRID_SOLVERS[name]
    costs = [solver.calls(levels, finish=finish) for levels in range(1 if finish else 2, 60)]
    for nfe in BUDGETS:
        if nfe in costs:
            assert solver.calls(solver.levels(nfe, finish=finish), finish=finish) == nfe
            continue
        below, above = (
            max((c for c in costs if c < nfe), default=None),
            min(c for c in costs if c > nfe),
        )
        with pytest.raises(BudgetError, match=rf"cannot spend nfe={nfe}\b") as caught:
            solver.levels(nfe, finish=finish)
        assert type(solver).__name__ in str(caught.value)
        assert str(above) in str(caught.value)
        assert below is None or str(below) in str(caught.value)


def test_the_message_is_the_one_promised() -> None:
    with pytest.raises(
        BudgetError, match="Heun cannot spend nfe=36; the nearest it can are 35 and 37"
    ):
        sample(Mixture(), solver="heun", nfe=36)


@pytest.mark.parametrize("nfe", [0, -3, 2.5, "35", True, None])
def test_a_budget_is_a_whole_number(nfe: object) -> None:
    with pytest.raises((BudgetError, TypeError), match="at least 1"):
        Heun().levels(nfe)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GRID_SOLVERS)
def test_the_default_budget_is_never_exceeded(name: str) -> None:
    solver = GRID_SOLVERS[name]
    solution = solve(Mixture(VP()), solver=solver, n=1, seeds=0)
    assert 30 <= solution.nfe <= 35


@pytest.mark.parametrize(
    ("batch_size", "rows"),
    [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (64, [5]), (None, [5])],
)
def test_batches_bound_what_the_network_sees(batch_size: int | None, rows: list[int]) -> None:
    network = Counting()
    solution = solve(
        Prediction(network, "x0", VP()),
        solver="ddim",
        nfe=3,
        shape=(2,),
        n=5,
        seeds=0,
        batch_size=batch_size,
    )
    assert solution.nfe == 3
    assert network.rows == [r for r in rows for _ in range(3)]
    assert solution.network_calls == 3 * len(rows) == network.calls


@pytest.mark.parametrize("under", sorted(PROCESSES))
@pytest.mark.parametrize(
    "name",
    ["euler", "heun", "rk4", "ddim", "euler_maruyama", "ddpm", "annealed_langevin", "langevin"],
)
def test_budgets_do_not_depend_on_the_process(name: str, under: str) -> None:
    process: Process = PROCESSES[under]
    solver = GRID_SOLVERS[name]
    nfe = solver.calls(4)
    assert from_the_start(solver, process)
    assert solve(Mixture(process), solver=solver, nfe=nfe, n=2, seeds=0).nfe == nfe


def test_a_plan_is_its_own_budget() -> None:
    process = VP()
    plan = RK4().plan(process, torch.linspace(1.0, 1e-3, 4, dtype=torch.float64))
    assert plan.nfe == 13
    assert solve(Mixture(process), solver=plan, n=2, seeds=0).nfe == 13
    assert solve(Mixture(process), solver=plan, nfe=13, n=2, seeds=0).nfe == 13
    with pytest.raises(ValueError, match="NFE 13"):
        solve(Mixture(process), solver=plan, nfe=12, n=2, seeds=0)
