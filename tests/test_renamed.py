"""Arguments that were renamed in 0.6 keep working, with a warning that names the new one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.deis import DEIS
from sdeflow.solvers.ode.dpm_solver import DPMSolver, DPMSolverPP
from sdeflow.solvers.ode.pndm import IPNDMv
from sdeflow.solvers.ode.unipc import UniPC
from sdeflow.solvers.sde.dpm_solver import SDEDPMSolverPP
from sdeflow.solvers.sde.er_sde import ERSDE


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (lambda: ExponentialAdams(2, frame="eps"), ExponentialAdams(2, "eps"), "predicts"),  # type: ignore[call-arg]
        (lambda: ExponentialAdams(frame_scale=0.5), ExponentialAdams(predicts_scale=0.5), "predicts_scale"),  # type: ignore[call-arg]
        (lambda: UniPC(3, frame="eps"), UniPC(3, predicts="eps"), "predicts"),  # type: ignore[call-arg]
        (lambda: DPMSolver(2, frame="x0"), DPMSolver(2, "x0"), "predicts"),  # type: ignore[call-arg]
        (lambda: DPMSolverPP(frame="eps"), DPMSolverPP(predicts="eps"), "predicts"),  # type: ignore[call-arg]
        (lambda: DEIS(2, variable="rho"), DEIS(2, "nsr"), "clock"),  # type: ignore[call-arg]
        (lambda: DEIS(2, "logrho"), DEIS(2, "lam"), "clock='lam'"),  # type: ignore[arg-type]
        (lambda: IPNDMv(3, exact=True), IPNDMv(3, True), "exact_weights"),  # type: ignore[call-arg]
        (lambda: SDEDPMSolverPP(exact=True), SDEDPMSolverPP(exact_weights=True), "exact_weights"),  # type: ignore[call-arg]
        (lambda: ERSDE(exact=True), ERSDE(exact_weights=True), "exact_weights"),  # type: ignore[call-arg]
    ],
)  # fmt: skip
def test_old_names_warn_and_work(old: Callable[[], Any], new: Any, says: str) -> None:
    with pytest.warns(DeprecationWarning, match=says):
        assert old() == new


def test_what_a_constructor_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="steps"):
        DEIS(steps=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="clock twice"):
        DEIS(3, "t", clock="t")  # type: ignore[misc]
    with pytest.raises(TypeError, match="up to 2 arguments"):
        DEIS(3, "t", 4)  # type: ignore[call-arg]
    assert list(inspect.signature(DEIS).parameters) == ["p", "clock", "to_zero"]
    assert dataclasses.replace(DEIS(2), clock="nsr") == DEIS(2, "nsr")
