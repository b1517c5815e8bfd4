"""Butcher tableaus of explicit Runge-Kutta methods, shared by fixed-step and adaptive solvers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i stands at `c[i]` and combines earlier slopes by
    `a[i]`; `b` combines all.

    `b_low` is the embedded method of lower order, whose difference to `b` estimates the error of a
    step. `dense` weighs the slopes in the quartic term of the step's interpolant
    (`sdeflow.solvers.adaptive.runge_kutta`); without it, that is a cubic.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    b_low: tuple[float, ...] | None = None
    dense: tuple[float, ...] | None = None

    @property
    def stages(self) -> int:
        """Slopes a step."""
        return len(self.b)


EULER = Tableau((0.0,), ((),), (1.0,), 1)
HEUN = Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5), 2)
MIDPOINT = Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0), 2)
RALSTON = Tableau((0.0, 2 / 3), ((), (2 / 3,)), (0.25, 0.75), 2)
RK4 = Tableau(
    (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4
)

DORMAND_PRINCE = Tableau(
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    order=5,
    b_low=(5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
    dense=(
        -12715105075 / 11282082432,
        0.0,
        87487479700 / 32700410799,
        -10690763975 / 1880347072,
        701980252875 / 199316789632,
        -1453857185 / 822651844,
        69997945 / 29380423,
    ),
)
"""Dormand & Prince (1980), order 5 with an embedded 4; the last slope is the first of the next
step. Its interpolant of order 4 is Shampine's (1986; Hairer, Norsett & Wanner, "Solving ordinary
differential equations I", II.6).
"""

BOGACKI_SHAMPINE = Tableau(
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    order=3,
    b_low=(7 / 24, 1 / 4, 1 / 3, 1 / 8),
)
"""Bogacki & Shampine (1989), order 3 with an embedded 2; the last slope is the first of the next
step.
"""
