"""Whether a solve towards noise can be trusted: asked of data whose encoding is known, before any
network call.
"""

from __future__ import annotations

import math
from itertools import pairwise

from sdeflow._utils.math import value_of
from sdeflow.errors import SolverError
from sdeflow.plan.instructions import Call, Combine, Draw, Record
from sdeflow.plan.plan import Plan

STDS = (0.25, 0.5, 1.0)
"""Standard deviations of the Gaussian data that a plan is tried on."""

MOST = 0.25
"""The relative error of an encoding that is let pass; where one exact step after the other (DDIM)
errs more, three times that.
"""


def check_encoding(plan: Plan, solver: str) -> None:
    """`SolverError` for a plan towards noise that is off by more than `MOST` on Gaussian data.

    Multistep methods extrapolate past predictions over the next step. Towards noise the steps grow,
    and an extrapolation in `nsr` then multiplies its errors from step to step.
    """
    for std in STDS:
        exact = _exact(plan, std)
        error, simple = (abs(gain / exact - 1.0) for gain in (_gain(plan, std), _ddim(plan, std)))
        if not error <= max(MOST, 3.0 * simple):
            raise SolverError(
                f"{solver} does not encode on this grid of {len(plan.grid)} levels: on Gaussian"
                f" data of standard deviation {std:g} its result is off by {error:.2g} of its size,"
                f" and one-step methods (DDIM) by {simple:.2g}. Its steps towards noise grow, and"
                " it extrapolates over them. Take 'auto', 'heun', 'ddim' or 'adams3', or more"
                " calls"
            )


def _variance(level: tuple[float, float, float], std: float) -> float:
    _, s, sigma = map(value_of, level)
    return s**2 * std**2 + sigma**2


def _exact(plan: Plan, std: float) -> float:
    """How the probability-flow ODE scales a state, from the first level to the last."""
    return math.sqrt(_variance(plan.grid[-1], std) / _variance(plan.grid[0], std))


def _gain(plan: Plan, std: float) -> float:
    """How the plan does."""
    held = [0.0] * plan.registers
    held[0] = 1.0
    for i in plan.instructions:
        if isinstance(i, Combine):
            held[i.out] = sum(value_of(c) * held[r] for r, c in i.terms)
        elif isinstance(i, Call):
            s, sigma = value_of(i.s), value_of(i.sigma)
            held[i.out] = held[i.input] * s * std**2 / (s**2 * std**2 + sigma**2)
        elif isinstance(i, Draw):
            held[i.out] = 0.0
        else:
            assert isinstance(i, Record)
    return held[plan.result]


def _ddim(plan: Plan, std: float) -> float:
    """How DDIM does on the levels of the plan."""
    x = 1.0
    for level, level_next in pairwise(plan.grid):
        (_, s, sigma), (_, s_next, sigma_next) = map(value_of, level), map(value_of, level_next)
        x0 = x * s * std**2 / (s**2 * std**2 + sigma**2)
        x = s_next * x0 + (x - s * x0) * (sigma_next / sigma)
    return x
