"""A solver, a grid and a process of a user's own: one file and one registration each, as the
contributing guide shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from problems import Mixture, reference
from torch import Tensor

from sdeflow import registry, sample
from sdeflow.process import VP, Level, Process
from sdeflow.registry import register_grid, register_process, register_solver
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams

# --8<-- [start:solver]


@dataclass(frozen=True)
class TwoStep(GridSolver):
    """Adams-Bashforth of two steps on `d(x/s) = eps dnsr`.

    Cost: 1 call a step. Order: 2. Source: Bashforth & Adams (1883).
    """

    order: ClassVar[int] = 2
    source: ClassVar[str] = "Bashforth & Adams 1883"

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        eps, h = reverse.eps(x, t), t_next.nsr - t.nsr
        slope = eps
        if state is not None:
            eps_before, h_before = state
            slope = eps + (h / h_before / 2) * (eps - eps_before)
        return (t_next.s / t.s) * x + (t_next.s * h) * slope, (eps, h)


# --8<-- [end:solver]


def every_nsr(process: Process, n: int) -> Tensor:
    """`n` levels evenly spaced in the square root of nsr, from 8 to 0.05."""
    return process.t_of_nsr(torch.linspace(8.0**0.5, 0.05**0.5, n, dtype=torch.float64) ** 2)


class Trigonometric(Process):
    """`s = cos(pi t / 2)`, `sigma = sin(pi t / 2)`."""

    def s(self, t: Tensor) -> Tensor:
        return torch.cos(t * torch.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * torch.pi / 2)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The three names, for one test."""
    tables = (registry.SOLVERS, registry.GRIDS, registry.PROCESSES)
    before = [dict(table) for table in tables]
    register_solver("two_step", TwoStep, aliases=("ab2",))
    register_grid("every_nsr", every_nsr)
    register_process("trigonometric", Trigonometric)
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_a_solver_of_ten_lines_is_found_by_name_and_is_of_its_order() -> None:
    assert registry.solver("AB2") == TwoStep()
    process = VP()
    errors = []
    for n in (65, 129):
        times = every_nsr(process, n)
        x, exact = reference(process, float(times[0]), float(times[-1]))
        got = TwoStep().integrate(Reverse(Mixture(process)), x, times, None, finish=False).x
        errors.append(float((got - exact).norm()))
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_it_is_the_member_of_the_family() -> None:
    times = every_nsr(VP(), 9)
    member = ExponentialAdams(2, "eps", "nsr", start_up="orders")
    assert TwoStep().plan(VP(), times).compare(member.plan(VP(), times)).close()


def test_names_work_together() -> None:
    process = registry.process("trigonometric")
    solution = sample(Mixture(process), solver="two_step", grid="every_nsr", nfe=8, n=4, seeds=0)
    assert solution.shape[0] == 4
    assert bool(torch.isfinite(solution).all())
    inner = registry.solver("churn:two_step")
    assert inner.solver == TwoStep()  # type: ignore[attr-defined]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register_solver("heun", TwoStep)
    with pytest.raises(ValueError, match="registered already"):
        register_solver("mine", TwoStep, aliases=("Euler-A",))
    assert "mine" not in registry.SOLVERS
