"""The controller of step sizes: its rule, its ranges, and one set of names for all solvers."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from sdeflow.solvers.adaptive import RK23, RK45, AdaptiveSDE, DPMAdaptive
from sdeflow.solvers.adaptive.step_size import StepSize

SOLVERS = (RK23(), RK45(), DPMAdaptive(p=2), DPMAdaptive(), AdaptiveSDE())
STEPS = StepSize(exponent=0.25, safety=0.8, shrink=0.2, grow=4.0)


def test_all_adaptive_solvers_have_its_names_and_its_rule() -> None:
    names = {field.name for field in fields(StepSize)}
    assert names >= {"rtol", "atol", "max_nfe", "min_step", "first_step", "max_step", "safety"}
    for solver in SOLVERS:
        assert names <= {field.name for field in fields(solver)}
        own = StepSize(**{n: getattr(solver, n) for n in names} | {"exponent": solver.rate})
        for ratio in (0.0, 1e-3, 0.5, 1.0, 1.5, 1e9, math.nan):
            for before, after_rejection in ((1e-4, False), (0.7, True)):
                assert solver.factor(ratio, before, after_rejection) == own.factor(
                    ratio, before, after_rejection
                )


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_the_exponent_is_that_of_the_order_unless_given(solver: StepSize) -> None:
    expected = 0.9 if isinstance(solver, AdaptiveSDE) else 1 / solver.order
    assert solver.rate == expected


def test_the_rule() -> None:
    assert STEPS.factor(0.5) == pytest.approx(0.8 * 0.5**-0.25)
    assert STEPS.factor(2.0) == pytest.approx(0.8 * 2.0**-0.25)
    assert STEPS.factor(0.0) == 4.0
    assert STEPS.factor(1e9) == 0.2
    assert STEPS.factor(math.inf) == STEPS.factor(math.nan) == 0.1
    with_memory = StepSize(exponent=0.25, beta=0.1)
    expected = 0.9 * 0.5 ** (0.075 - 0.25) * 0.3**0.1
    assert with_memory.factor(0.5, before=0.3) == pytest.approx(expected)
    assert with_memory.factor(2.0, before=0.3) == pytest.approx(0.9 * 2.0**-0.25)


def test_a_rejected_step_becomes_shorter_and_the_next_may_be_held() -> None:
    assert StepSize(exponent=0.01, safety=1.0).factor(1.0 + 1e-9) == 0.9
    held = StepSize(exponent=0.5, hold=True)
    assert held.factor(0.01, after_rejection=True) == 1.0
    assert held.factor(0.01, after_rejection=False) > 1.0
    assert StepSize(exponent=0.5).factor(0.01, after_rejection=True) > 1.0


def test_it_is_a_value() -> None:
    assert STEPS == StepSize(exponent=0.25, safety=0.8, shrink=0.2, grow=4.0) != StepSize()
    assert hash(STEPS) == hash(StepSize(exponent=0.25, safety=0.8, shrink=0.2, grow=4.0))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rtol": -1.0}, "tolerances"),
        ({"rtol": math.inf}, "tolerances"),
        ({"atol": 0.0}, "tolerances"),
        ({"max_nfe": 0}, "max_nfe"),
        ({"max_nfe": True}, "max_nfe"),
        ({"min_step": 0.0}, "steps are positive"),
        ({"first_step": 0.0}, "steps are positive"),
        ({"max_step": -1.0}, "steps are positive"),
        ({"safety": 1.1}, "safety"),
        ({"shrink": 0.0}, "shrink"),
        ({"grow": 0.9}, "grow"),
        ({"exponent": 0.0}, "exponent"),
        ({"exponent": 1.5}, "exponent"),
        ({"beta": 0.3, "exponent": 0.25}, "beta"),
        ({"beta": -0.1}, "beta"),
    ],
)
def test_ranges(wrong, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        StepSize(**wrong)


def test_old_names_work_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"theta=.*safety="):
        assert DPMAdaptive(theta=0.8) == DPMAdaptive(safety=0.8)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match=r"frame=.*predicts="):
        assert DPMAdaptive(frame="x0") == DPMAdaptive(predicts="x0")  # type: ignore[call-arg]
