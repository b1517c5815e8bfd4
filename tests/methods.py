"""Methods that the library does not ship yet, as its users would write them: do they fit the
protocol of a step?

UniPC redoes the last step with the newest prediction: it is linear, so that it traces into plans.
`exponential_step` has the single steps of DPM-Solver as its papers write them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdeflow._utils.math import Scalar
from sdeflow.process import Level
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.runge_kutta import RK4
from sdeflow.solvers.ode.weights import has_signal, moment, predicted


def phi(k: int, z: float) -> float:
    """`phi_k(z) = sum_j z^j / (j + k)!`; by the series, which is exact enough for the steps of a
    grid that resolves anything.
    """
    if abs(z) > 2.0:
        return (phi(k - 1, z) - 1.0 / math.factorial(k - 1)) / z if k else math.exp(z)
    return sum(z**j / math.factorial(j + k) for j in range(30))


@dataclass(frozen=True)
class UniPC(GridSolver):
    r"""UniPC in x0: predictor UniP-`p` over `p - 1` old predictions, corrector UniC that redoes the
    last step with the newest one.

    `warm_up="orders"` starts with orders 1, 2, ... (and so converges at order 2); `"rk4"` takes its
    first `p - 1` steps by RK4.

    Source: Zhao et al., "UniPC" (2023), algorithms 5 and 7, with B(h) = h.
    """

    p: int = 3
    warm_up: str = "orders"

    order: ClassVar[int] = 3
    reversible: ClassVar[bool] = False
    source: ClassVar[str] = "Zhao et al. 2023"

    def calls(self, levels: int, *, finish: bool = True) -> int:
        steps = levels - 1
        first = min(self.p - 1, steps) if self.warm_up == "rk4" else 0
        return 4 * first + (steps - first) + int(finish)

    def start(self, steps: int) -> Any:
        return (
            None,
            (),
        )  # (the step to correct, or None; the history of (level, prediction), newest last)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        pending, history = state
        if self.warm_up == "rk4" and len(history) < self.p - 1:
            recorder = _First(reverse)
            x, _ = RK4("lam").step(recorder, x, t, t_next, noise, None)  # type: ignore[arg-type]
            return x, (None, (*history, (t, recorder.first)))
        x0 = reverse(x, t)
        if pending is not None:
            x_last, last, used = pending
            x = _update(x_last, last, t, used, (t, x0))
        history = (*history, (t, x0))[-self.p :]
        return _update(x, t, t_next, history, None), ((x, t, history), history)


class _First:
    """A reverse process that keeps the first prediction it made."""

    def __init__(self, reverse: Reverse):
        self.reverse, self.first = reverse, None

    def eps(self, x: Any, t: Level) -> Any:
        x0 = self.reverse(x, t)
        self.first = x0 if self.first is None else self.first
        return eps_of(x, x0, t)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reverse, name)


def _update(x: Any, t: Level, t_next: Level, history: Any, newest: Any) -> Any:
    """`x_next` from `x` at `t`; the history's last entry stands at `t`; `newest` is the corrector's
    prediction at `t_next`.
    """
    h = t_next.lam - t.lam
    (_, x0), old = history[-1], list(history[:-1][::-1])
    nodes = [((level.lam - t.lam) / h, f) for level, f in old]
    if newest is not None:
        nodes.append((1.0, newest[1]))
    x_next = x * (t_next.sigma / t.sigma) - x0 * (t_next.s * math.expm1(-h))
    if nodes:
        r = np.array([r for r, _ in nodes])
        m = np.arange(1, len(r) + 1)
        b = np.array([math.factorial(k) * phi(k + 1, -h) for k in m])
        rho = np.linalg.solve(r[None, :] ** (m[:, None] - 1), b)
        for weight, (ratio, f) in zip(rho.tolist(), nodes, strict=True):
            x_next = x_next + (t_next.s * h * weight / ratio) * (f - x0)
    return x_next


def exponential_step(
    reverse: Reverse,
    x: Any,
    x0: Any,
    t: Level,
    t_next: Level,
    ratios: tuple[float, ...],
    frame: str = "x0",
    taylor: bool = True,
    parabola: bool = False,
) -> Any:
    r"""An exponential Runge-Kutta step in `lam` of order 1, 2 or 3, with `len(ratios)` stages
    besides the prediction `x0` at `t`.

    With $P(r)$ the first-order step to $\lambda + r h$, $M_k(r)$ the weight of $u^k$ on the way
    there (`moment`) and $F_j$ the prediction at the $j$-th stage, in the frame x0 or eps:

        u_1 = P(r_1)
        x_next = P(1) + M_1(1)/r_1 (F_1 - F_0)                                                      one stage
        u_2 = P(r_2) + (r_2/r_1) M_1(r_2) (F_1 - F_0),  x_next = P(1) + M_1(1)/r_2 (F_2 - F_0)      two stages

    `taylor=False` takes $M_0/2$ for $M_1$ where there is one stage; `parabola` takes, where there
    are two, the polynomial of degree 2 through all three predictions instead of a line through two.
    From and to a level without signal the step is of order 1.

    Source: Lu et al., "DPM-Solver" (2022), algorithms 1-2 and 4-5; Hochbruck & Ostermann (2005).
    """
    if not ratios or not has_signal(t, t_next):
        return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t)
    h = t_next.lam - t.lam
    value = predicted(frame, x, x0, t)

    def weight(k: int, level: Level, r: float) -> Scalar:
        return level.s * moment(k, r * h) if frame == "x0" else level.sigma * moment(k, -r * h)

    def first_order(level: Level, r: float) -> Any:
        kept = level.sigma / t.sigma if frame == "x0" else level.s / t.s
        return kept * x + weight(0, level, r) * value

    def slope(u: Any, level: Level) -> Any:
        return predicted(frame, u, reverse(u, level), level) - value

    stages = [reverse.level_of_lam(t.lam + r * h) for r in ratios]
    u = first_order(stages[0], ratios[0])
    change = slope(u, stages[0])
    if len(ratios) == 1:
        full = weight(1, t_next, 1.0) if taylor else 0.5 * weight(0, t_next, 1.0)
        return first_order(t_next, 1.0) + (full / ratios[0]) * change
    r1, r2 = ratios
    u = first_order(stages[1], r2) + (r2 / r1 * weight(1, stages[1], r2)) * change
    second = slope(u, stages[1])
    x_next = first_order(t_next, 1.0)
    if not parabola:
        return x_next + (weight(1, t_next, 1.0) / r2) * second
    # Its slope at the start is (r2 d1 - r1 d2) / (r2 - r1) and its curve (d2 - d1) / (r2 - r1),
    # with d = change / r.
    line, curve = weight(1, t_next, 1.0), weight(2, t_next, 1.0)
    return (
        x_next
        + ((r2 * line - curve) / (r1 * (r2 - r1))) * change
        + ((curve - r1 * line) / (r2 * (r2 - r1))) * second
    )
