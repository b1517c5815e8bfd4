r"""DPM-Solver and DPM-Solver++: exponential integrators in $\lambda$ under their published
coefficients.

`DPMSolver` has the single-step methods, on the noise (`predicts="eps"`, DPM-Solver) or on the
prediction (`predicts="x0"`, 2S and 3S of DPM-Solver++). `DPMSolverPP` has the multistep methods, 2M
and 3M.
With $h = \lambda_+ - \lambda$ and $M_k$ the weight of $u^k$,

| `predicts` | $P$, the step of order 1 | $M_k$ |
|---|---|---|
| `x0` | $\frac{\sigma_+}{\sigma} x + s_+ I_0(h)\,x_0$ | $s_+ I_k(h)$ |
| `eps` | $\frac{s_+}{s} x - \sigma_+ J_0(h)\,\varepsilon$ | $-\sigma_+ J_k(h)$ |

with $I_k(h) = \int_0^1 h e^{-(1-u)h} u^k du$ and $J_k(h) = \int_0^1 h e^{(1-u)h} u^k du$. Both $P$
are DDIM's step. Between two states that DDIM links,
$\varepsilon_1 - \varepsilon = -(s_1/\sigma_1)(x_{0,1} - x_0)$. A step in eps therefore differs from
one in x0 only in the weights of differences of predictions. It is taken in that form, in which
nothing cancels at small noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sdeflow._utils.checks import is_whole
from sdeflow._utils.math import Scalar
from sdeflow._utils.renamed import renamed
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import STAGES
from sdeflow.solvers.ode.multistep import Multistep, Weights, check_p, from_differences
from sdeflow.solvers.ode.to_zero import ToZero
from sdeflow.solvers.ode.weights import between, has_signal, moment

DPMPredicts = Literal["eps", "x0"]
"""What a DPM-Solver interpolates: the noise (DPM-Solver) or the prediction (DPM-Solver++)."""
Moment = Callable[[int, Any], Any]


@renamed({"frame": "predicts"})
@dataclass(frozen=True)
class DPMSolver(GridSolver):
    r"""DPM-Solver 1, 2, 3 and DPM-Solver++ 2S, 3S: single steps over `p` calls, each a Runge-Kutta
    step in `lam` without history.

    With `F_j` the noise (`predicts="eps"`) or the prediction (`"x0"`) at the `j`-th of `p` calls, a
    fraction `r_j` of a step in `lam`:

        p = 2   x_next = P(1) + M_0/(2 r_1) (F_1 - F_0)
        p = 3   u_2 = P(r_2) + (r_2/r_1) M_1 (F_1 - F_0),   x_next = P(1) + M_1/r_2 (F_2 - F_0)

    - `p`: calls, and order, of a step: 1 (DDIM), 2 or 3.
    - `predicts`: `"eps"` for DPM-Solver, `"x0"` for DPM-Solver++.
    - `taylor`: the paper's other form: `M_1` for `M_0/2`, and where `p` is 3 the parabola through
      all three.
    - `stages`: with `"inner"` a step spans one interval of the grid and makes `p` calls; its stages
      are at 1/2, or at 1/3 and 2/3 of it in `lam`. With `"grid"` every call is at a level of the
      grid and a step spans `p` intervals, so that every budget can be spent. This is
      "DPM-Solver-fast". The states at the levels within a step are its stages.

    With `stages="grid"` and a number of intervals that `p` does not divide, the last step is of
    lower order. For `p=3`, 4 intervals are two steps of order 2. One of order 3 and one of order 1
    would bound the order of the whole by 2. The step to zero noise is the step of order 1 that ends
    the paper's distribution. Where the budget is a multiple of 3, or one more, the two agree.

    Cost: `p` calls an interval of the grid, 1 with `stages="grid"`. Order: `p`. Source: Lu et al.,
    "DPM-Solver" (2022), algorithms 1-2, 4-5 and section 3.4; "DPM-Solver++" (2022), algorithm 1.
    """

    p: int = 3
    predicts: DPMPredicts = "eps"
    taylor: bool = False
    stages: Literal["inner", "grid"] = "inner"

    source: ClassVar[str] = "Lu et al. 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.p, 1, 3):
            raise ValueError(
                f"a single step of DPM-Solver is of order p = 1, 2 or 3; got p={self.p!r}"
            )

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

    def start(self, steps: int) -> Any:
        # Intervals left; the step under way: its order, the state it started from, and (level, x0)
        # of its calls.
        return steps, None

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        if self.stages == "inner":
            ratios = STAGES[self.p]
            x0 = reverse(x, t)
            x_next = single_step(reverse, x, x0, t, t_next, ratios, self.predicts, self.taylor)
            return x_next, state
        left, under_way = state
        x0 = reverse(x, t)
        if not has_signal(t, t_next):
            return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t), (left - 1, None)
        p, start, nodes = under_way or (step_order(self.p, left), x, ())
        nodes = (*nodes, (t, x0))
        last = len(nodes) == p  # what leads to a stage is always of the Taylor form
        x_next = _over(t_next, start, nodes, self.predicts, self.taylor or not last)
        return x_next, (left - 1, None if last else (p, start, nodes))


def single_step(
    reverse: Reverse,
    x: Any,
    x0: Any,
    t: Level,
    t_next: Level,
    ratios: Sequence[float],
    predicts: str = "x0",
    taylor: bool = False,
) -> Any:
    """The step of `DPMSolver` over one interval, with stages at the fractions `ratios` of it in
    `lam`, from the prediction `x0` at `t`.

    From and to a level without signal: as many steps of DDIM.
    """
    if not has_signal(t, t_next):
        first = t
        for r in (*ratios, 1.0):
            if t is not first:
                x0 = reverse(x, t)
            level = between(reverse, first, t_next, r)
            x, t = level.s * x0 + level.sigma * eps_of(x, x0, t), level
        return x
    nodes: tuple[Any, ...] = ((t, x0),)
    for r in ratios:
        stage = between(reverse, t, t_next, r)
        nodes = (*nodes, (stage, reverse(_over(stage, x, nodes, predicts, True), stage)))
    return _over(t_next, x, nodes, predicts, taylor)


def _over(t_next: Level, x: Any, nodes: Any, predicts: str, taylor: bool) -> Any:
    """The state at `t_next`, from `x` at the first of `nodes` and the predictions at all nodes."""
    (t, x0), *stages = nodes
    c = corrections(predicts, taylor, t, [level for level, _ in stages], t_next)
    whole = t_next.s * moment(0, t_next.lam - t.lam) - sum(c)
    x_next = (t_next.sigma / t.sigma) * x + whole * x0
    for weight, (_, x0_stage) in zip(c, stages, strict=True):
        x_next = x_next + weight * x0_stage
    return x_next


def step_order(p: int, left: int) -> int:
    """The order of the next step of "DPM-Solver-fast" of order `p`, with so many intervals left."""
    return 2 if p == 3 and left == 4 else min(p, left)


def corrections(
    predicts: str, taylor: bool, t: Any, stages: Sequence[Any], t_next: Any, moment: Moment = moment
) -> list[Scalar]:
    """Weights of `x0_j - x0`, the changes of the prediction at `stages` since `t`, in a step from
    `t` to `t_next`.

    Added to DDIM's step, they make it a step of order `1 + len(stages)`. Levels are anything with
    `lam`, `s` and `sigma`; where these are tensors, `moment` must take tensors.
    """
    if not stages:
        return []
    h = t_next.lam - t.lam
    r = [(level.lam - t.lam) / h for level in stages]

    def weight(k: int, level: Level, length: Any) -> Any:
        return level.s * moment(k, length) if predicts == "x0" else level.sigma * moment(k, -length)

    def change(level: Level) -> Any:  # F_j - F_0 by x0_j - x0, of a state that DDIM's step led to
        return 1.0 if predicts == "x0" else -(level.s / level.sigma)

    line = weight(1, t_next, h)
    if len(stages) == 1:
        full = line if taylor else 0.5 * weight(0, t_next, h)
        return [full / r[0] * change(stages[0])]
    (r1, r2), (first, second) = r, stages
    # The second stage's state is DDIM's and `moved` times the first change, which shows in its eps.
    moved: Any = 0.0
    if predicts == "eps":
        moved = weight(1, second, r2 * h) * (r2 / r1) * change(first) / second.sigma
    if not taylor:
        return [line / r2 * moved, line / r2 * change(second)]
    # The parabola: its slope at the start is (r2 d1 - r1 d2) / (r2 - r1), its curve (d2 - d1) / (r2
    # - r1), with d = change / r.
    curve = weight(2, t_next, h)
    b1, b2 = (r2 * line - curve) / (r1 * (r2 - r1)), (curve - r1 * line) / (r2 * (r2 - r1))
    return [b1 * change(first) + b2 * moved, b2 * change(second)]


@renamed({"frame": "predicts"})
@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    r"""DPM-Solver++ multistep, 2M and 3M: exponential Adams-Bashforth in `lam` over the last `p`
    predictions, as published.

    With `r0 = (lam - lam_1)/h` and `r1 = (lam_1 - lam_2)/h` of the nodes before,
    `a = (F - F_1)/r0`, `b = (F_1 - F_2)/r1`:

        2M   x_next = P + M_0/2 a    (or M_1 a: "heun")
        3M   x_next = P + M_1 (a + r0 c) + kappa M_2 c,    c = (a - b)/(r0 + r1)

    - `p`: predictions, 1 (DDIM), 2 or 3.
    - `solver_type`: of steps over two predictions, `"midpoint"` or `"heun"`.
    - `kappa`: of steps over three. The parabola's is 1. The authors' code and its descendants have
      1/2, with which 3M is of order 2 however it starts.
    - `predicts`: `"x0"`, the prediction; or `"eps"`, which is DPM-Solver's own multistep form.
    - `lower_final`: the last steps use fewer predictions, `min(p, steps left + 1)`. Published code
    - `to_zero`: the step to zero noise, see `sdeflow.solvers.ode.to_zero`.
      does so only below 10 or 15 steps, so that more steps may end farther away. Here there is one
      rule for all.

    With `"heun"` and `kappa=1` the weights are exact: it is
    `ExponentialAdams(p, predicts, "lam", start_up="orders")`.

    Cost: 1 call a step. Order: `min(p, 2)`, as it starts by a step of order 1. Source: Lu et al.,
    "DPM-Solver++" (2022), algorithm 2 and section 4.2; its 3M is in the authors' code.
    """

    p: int = 2
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    kappa: float = 0.5
    predicts: DPMPredicts = "x0"
    lower_final: bool = True
    to_zero: ToZero = field(default="prediction", kw_only=True)

    source: ClassVar[str] = "Lu et al. 2022, alg. 2"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_p(self.p, 3, "DPM-Solver++ multistep")
        if not 0.0 <= self.kappa <= 1.0:
            raise ValueError(
                f"kappa is 1 for the exact parabola, 1/2 as published; got {self.kappa}"
            )

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        midpoint = self.solver_type == "midpoint"
        return taylor_weights(self.predicts, nodes, t_next, midpoint, self.kappa)


def taylor_weights(
    predicts: str,
    nodes: Sequence[Level],
    t_next: Level,
    midpoint: bool,
    kappa: float,
    rate: float = 0.0,
) -> list[Scalar]:
    """The weights of `F` at 1 to 3 nodes, newest first, in the step of `DPMSolverPP` or, with noise
    at a `rate`, of `SDEDPMSolverPP`; the first node is the start of the step.

    `midpoint` takes `M_0/2` for `M_1` where there are two nodes; `kappa` multiplies `M_2`.
    """
    lams = [node.lam for node in nodes]
    h = t_next.lam - lams[0]

    def weight(k: int) -> Any:
        if predicts == "x0":
            return t_next.s * moment(k, (1.0 + rate) * h)
        return t_next.sigma * moment(k, -h)

    whole = weight(0)
    if len(nodes) == 1:
        return [whole]
    line = h * (0.5 * whole if midpoint and len(nodes) == 2 else weight(1))
    bend = 0.0 if len(nodes) == 2 else (lams[0] - lams[1]) * line + kappa * h * h * weight(2)
    return from_differences(lams, whole, line, bend)
