"""Methods that the library does not ship yet, as its users would write them: do they fit the
protocol of a step?

UniPC redoes the last step with the newest prediction: it is linear, so that it traces into plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.runge_kutta import RK4


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

    def extra_times(self, process: Process, times: Tensor) -> Tensor | None:
        return RK4("lam").extra_times(process, times[: self.p]) if self.warm_up == "rk4" else None

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
