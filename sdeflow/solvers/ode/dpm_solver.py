r"""DPM-Solver and DPM-Solver++: exponential integrators in $\lambda$ under their published
coefficients.

`DPMSolver` has the single-step methods, on the noise (`frame="eps"`, DPM-Solver) or on the
prediction (`frame="x0"`, 2S and 3S of DPM-Solver++); `DPMSolverPP` the multistep ones, 2M and 3M.
With $h = \lambda_+ - \lambda$ and $M_k$ the weight of $u^k$,

| frame | $P$, the step of order 1 | $M_k$ |
|---|---|---|
| `x0` | $\frac{\sigma_+}{\sigma} x + s_+ I_0(h)\,x_0$ | $s_+ I_k(h)$ |
| `eps` | $\frac{s_+}{s} x - \sigma_+ J_0(h)\,\varepsilon$ | $-\sigma_+ J_k(h)$ |

with $I_k(h) = \int_0^1 h e^{-(1-u)h} u^k du$ and $J_k(h) = \int_0^1 h e^{(1-u)h} u^k du$. Both $P$
are DDIM's step, and between two states that DDIM links
$\varepsilon_1 - \varepsilon = -(s_1/\sigma_1)(x_{0,1} - x_0)$, so that a step in eps differs from
one in x0 only in the weights of differences of predictions: it is taken in that form, in which
nothing cancels at small noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from sdeflow._utils.math import Scalar
from sdeflow.errors import unknown
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import STAGES
from sdeflow.solvers.ode.weights import between, between_times, frame_value, has_signal, moment

DPMFrame = Literal["eps", "x0"]
"""What a DPM-Solver interpolates: the noise (DPM-Solver) or the prediction (DPM-Solver++)."""
Moment = Callable[[int, Any], Any]


@dataclass(frozen=True)
class DPMSolver(GridSolver):
    r"""DPM-Solver 1, 2, 3 and DPM-Solver++ 2S, 3S: single steps over `p` calls, each a Runge-Kutta
    step in `lam` without history.

    With `F_j` the noise (`frame="eps"`) or the prediction (`"x0"`) at the `j`-th of `p` calls, a
    fraction `r_j` of a step in `lam`:

        p = 2   x_next = P(1) + M_0/(2 r_1) (F_1 - F_0)
        p = 3   u_2 = P(r_2) + (r_2/r_1) M_1 (F_1 - F_0),   x_next = P(1) + M_1/r_2 (F_2 - F_0)

    - `p`: calls, and order, of a step: 1 (DDIM), 2 or 3.
    - `frame`: `"eps"` for DPM-Solver, `"x0"` for DPM-Solver++.
    - `taylor`: the paper's other form: `M_1` for `M_0/2`, and where `p` is 3 the parabola through
      all three.
    - `stages`: `"inner"`: a step spans one interval of the grid, its stages at 1/2, or at 1/3 and
      2/3 of it in `lam`, at `p` calls. `"grid"`: every call is at a level of the grid, and a step
      spans `p` intervals, so that every budget can be spent: this is "DPM-Solver-fast". The states
      at the levels within a step are its stages.

    With `stages="grid"`, `p` divides the intervals or a step of lower order is left over. For
    `p=3`, 4 intervals are two steps of order 2, not one of order 3 and one of order 1, which would
    bound the order of the whole by 2. The step to zero noise is the step of order 1 with which the
    paper's distribution closes; where the budget is a multiple of 3, or one more, the two agree.

    Cost: `p` calls an interval of the grid, 1 with `stages="grid"`. Order: `p`. Source: Lu et al.,
    "DPM-Solver" (2022), algorithms 1-2, 4-5 and section 3.4; "DPM-Solver++" (2022), algorithm 1.
    """

    p: int = 3
    frame: DPMFrame = "eps"
    taylor: bool = False
    stages: Literal["inner", "grid"] = "inner"

    source: ClassVar[str] = "Lu et al. 2022"

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or self.p not in STAGES:
            raise ValueError(
                f"a single step of DPM-Solver is of order p = 1, 2 or 3; got p={self.p!r}"
            )
        for kind, value, known in (
            ("frame", self.frame, ("eps", "x0")),
            ("stages", self.stages, ("inner", "grid")),
        ):
            if value not in known:
                raise unknown(kind, value, known)

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence."""
        return self.p

    @property
    def cost(self) -> str:  # type: ignore[override]
        """Network calls a step, in words."""
        return f"{self.p} a step" if self.stages == "inner" else "1 a level"

    @property
    def calls_of_step(self) -> int:
        return self.p if self.stages == "inner" else 1

    def extra_times(self, process: Process, times: Tensor) -> Tensor | None:
        return between_times(process, times, STAGES[self.p]) if self.stages == "inner" else None

    def start(self, steps: int) -> Any:
        # Intervals left; the step under way: its order, the state it started from, and (level, x0)
        # of its calls.
        return steps, None

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        if self.stages == "inner":
            return self._inner(reverse, x, t, t_next), state
        left, under_way = state
        x0 = reverse(x, t)
        if not has_signal(t, t_next):
            return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t), (left - 1, None)
        p, start, nodes = under_way or (step_order(self.p, left), x, ())
        nodes = (*nodes, (t, x0))
        x_next = self._to(t_next, start, nodes, len(nodes) == p)
        return x_next, (left - 1, None if len(nodes) == p else (p, start, nodes))

    def _inner(self, reverse: Reverse, x: Any, t: Level, t_next: Level) -> Any:
        if not has_signal(t, t_next):  # as many steps of DDIM
            first = t
            for r in (*STAGES[self.p], 1.0):
                level, x0 = between(reverse, first, t_next, r), reverse(x, t)
                x, t = level.s * x0 + level.sigma * eps_of(x, x0, t), level
            return x
        nodes: tuple[Any, ...] = ((t, reverse(x, t)),)
        for r in STAGES[self.p]:
            stage = reverse.level_of_lam(t.lam + r * (t_next.lam - t.lam))
            nodes = (*nodes, (stage, reverse(self._to(stage, x, nodes, False), stage)))
        return self._to(t_next, x, nodes, True)

    def _to(self, t_next: Level, x: Any, nodes: Any, last: bool) -> Any:
        """The state at `t_next`, from `x` at the first of `nodes` and the predictions at all of
        them.
        """
        (t, x0), *stages = nodes
        # What leads to a stage is always of the Taylor form.
        c = corrections(
            self.frame, self.taylor or not last, t, [level for level, _ in stages], t_next
        )
        x_next = (t_next.sigma / t.sigma) * x + (
            t_next.s * moment(0, t_next.lam - t.lam) - sum(c)
        ) * x0
        for weight, (_, x0_stage) in zip(c, stages, strict=True):
            x_next = x_next + weight * x0_stage
        return x_next


def step_order(p: int, left: int) -> int:
    """The order of the next step of "DPM-Solver-fast" of order `p`, with so many intervals left."""
    return 2 if p == 3 and left == 4 else min(p, left)


def corrections(
    frame: str, taylor: bool, t: Any, stages: Sequence[Any], t_next: Any, moment: Moment = moment
) -> list[Scalar]:
    """Weights of `x0_j - x0`, the changes of the prediction at `stages` since `t`, in a step from
    `t` to `t_next`.

    Added to DDIM's step, they make it one of order `1 + len(stages)`. Levels are anything with
    `lam`, `s` and `sigma`, tensors too, for which `moment` then is one.
    """
    if not stages:
        return []
    h = t_next.lam - t.lam
    r = [(level.lam - t.lam) / h for level in stages]

    def weight(k: int, level: Level, length: Any) -> Any:
        return level.s * moment(k, length) if frame == "x0" else level.sigma * moment(k, -length)

    def change(level: Level) -> Any:  # F_j - F_0 by x0_j - x0, of a state that DDIM's step led to
        return 1.0 if frame == "x0" else -(level.s / level.sigma)

    line = weight(1, t_next, h)
    if len(stages) == 1:
        full = line if taylor else 0.5 * weight(0, t_next, h)
        return [full / r[0] * change(stages[0])]
    (r1, r2), (first, second) = r, stages
    # The second stage's state is DDIM's and `moved` times the first change, which shows in its eps.
    moved: Any = 0.0
    if frame == "eps":
        moved = weight(1, second, r2 * h) * (r2 / r1) * change(first) / second.sigma
    if not taylor:
        return [line / r2 * moved, line / r2 * change(second)]
    # The parabola: its slope at the start is (r2 d1 - r1 d2) / (r2 - r1), its curve (d2 - d1) / (r2
    # - r1), with d = change / r.
    curve = weight(2, t_next, h)
    b1, b2 = (r2 * line - curve) / (r1 * (r2 - r1)), (curve - r1 * line) / (r2 * (r2 - r1))
    return [b1 * change(first) + b2 * moved, b2 * change(second)]


@dataclass(frozen=True)
class DPMSolverPP(GridSolver):
    r"""DPM-Solver++ multistep, 2M and 3M: exponential Adams-Bashforth in `lam` over the last `p`
    predictions, as published.

    With `r0 = (lam - lam_1)/h` and `r1 = (lam_1 - lam_2)/h` of the nodes before,
    `a = (F - F_1)/r0`, `b = (F_1 - F_2)/r1`:

        2M   x_next = P + M_0/2 a                                                                    (or M_1 a: "heun")
        3M   x_next = P + M_1 (a + r0 c) + kappa M_2 c,    c = (a - b)/(r0 + r1)

    - `p`: predictions, 1 (DDIM), 2 or 3.
    - `solver_type`: of steps over two predictions, `"midpoint"` or `"heun"`.
    - `kappa`: of steps over three. The parabola's is 1; the authors' code and those that follow it
      have 1/2, with which 3M is of order 2 whatever its start.
    - `frame`: `"x0"`, the prediction; or `"eps"`, which is DPM-Solver's own multistep form.
    - `lower_final`: the last steps use fewer predictions, `min(p, steps left + 1)`. Published code
      does so below 10 or 15 steps, whence more steps may end farther away; here it is one rule for
      all.

    With `"heun"` and `kappa=1` the weights are exact: it is
    `ExponentialAdams(p, frame, "lam", start_up="orders")`.

    Cost: 1 call a step. Order: `min(p, 2)`, as it starts by a step of order 1. Source: Lu et al.,
    "DPM-Solver++" (2022), algorithm 2 and section 4.2; its 3M is in the authors' code.
    """

    p: int = 2
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    kappa: float = 0.5
    frame: DPMFrame = "x0"
    lower_final: bool = True

    source: ClassVar[str] = "Lu et al. 2022, alg. 2"

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or self.p not in (1, 2, 3):
            raise ValueError(
                f"DPM-Solver++ multistep uses p = 1, 2 or 3 predictions; got p={self.p!r}"
            )
        for kind, value, known in (
            ("solver_type", self.solver_type, ("midpoint", "heun")),
            ("frame", self.frame, ("x0", "eps")),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        if not 0.0 <= self.kappa <= 1.0:
            raise ValueError(
                f"kappa is 1 for the exact parabola, 1/2 as published; got {self.kappa}"
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence, the start included."""
        return min(self.p, 2)

    def start(self, steps: int) -> Any:
        return steps, ()  # steps left; (level, F) of the last predictions, newest first

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        left, history = state
        x0 = reverse(x, t)
        history = ((t, frame_value(self.frame, x, x0, t)), *history)[: self.p]
        if not has_signal(t, t_next):
            return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t), (left - 1, history)
        p = min(self.p, left + 1) if self.lower_final else self.p
        used = [node for node in history if has_signal(node[0])][:p]
        x_next = (t_next.sigma / t.sigma if self.frame == "x0" else t_next.s / t.s) * x
        for weight, (_, value) in zip(
            self._weights([level for level, _ in used], t_next), used, strict=True
        ):
            x_next = x_next + weight * value
        return x_next, (left - 1, history)

    def _weights(self, nodes: list[Level], t_next: Level) -> list[Scalar]:
        """Those of `F` at `nodes`, newest first; their sum is `M_0`."""
        h = t_next.lam - nodes[0].lam

        def weight(k: int) -> Any:
            return t_next.s * moment(k, h) if self.frame == "x0" else t_next.sigma * moment(k, -h)

        whole = weight(0)
        if len(nodes) == 1:
            return [whole]
        r0 = (nodes[0].lam - nodes[1].lam) / h
        if len(nodes) == 2:
            line = (weight(1) if self.solver_type == "heun" else 0.5 * whole) / r0
            return [whole + line, -line]
        r1 = (nodes[1].lam - nodes[2].lam) / h
        line = weight(1)
        curve = (r0 * line + self.kappa * weight(2)) / (r0 + r1)
        a, b = (line + curve) / r0, curve / r1  # of a and b, divided by their steps
        return [whole + a, -a - b, b]
