r"""DPM-Solver-12 and DPM-Solver-23: pairs of exponential single steps in $\lambda$, with a step
size for every sample.

An attempt takes the steps of orders `p - 1` and `p` that share their calls
(`sdeflow.solvers.ode.dpm_solver`). Their difference is the error of the lower one; the state goes
on with the higher one. A rejected attempt keeps the prediction at its start.

Samples are not in step with each other: while one needs the prediction at its state, another may
need that at a stage, or try again. Every network call holds one request of each sample under way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sdeflow._utils.math import batch_invariant, gauss_legendre
from sdeflow._utils.renamed import renamed
from sdeflow.process.clock import Clock, ClockRange
from sdeflow.solvers.adaptive.step_size import PerSample, PerSampleSolve, column, first_bad
from sdeflow.solvers.base import Solution, Task
from sdeflow.solvers.ode.dpm_solver import DPMPredicts, corrections

RATIOS: dict[int, tuple[float, ...]] = {2: (0.5,), 3: (1.0 / 3.0, 2.0 / 3.0)}
"""The positions of the stages within an attempt, by its order."""


@renamed({"theta": "safety", "frame": "predicts"})
@dataclass(frozen=True)
class DPMAdaptive(PerSample):
    r"""DPM-Solver-12 (`p=2`) and -23 (`p=3`): single steps of orders `p - 1` and `p` whose
    difference sets each sample's step.

    A step is accepted where
    `E = rms((x_high - x_low) / max(atol, rtol max(|x_low|, |x_low before|)))`, over the sample's
    entries, is at most 1. The next step is `h safety E^(-1/p)`, within `shrink` and `grow` times
    the last. States are compared in units of `sqrt(s^2 + sigma^2)`, which is 1 under the paper's
    VP, so that a network costs the same number of calls under every process.

    - `p`: 2 or 3. `predicts`, `taylor`: as of `DPMSolver`.
    - `rtol`, `atol`: tolerances of a step of the *lower* order. The defaults are the published
      ones, .05 and .0078 (two levels of an 8-bit image).
    - `max_nfe`: network calls that a sample may take. `min_step`, `first_step`, `max_step`: in
      `lam`.
    - `safety`, `shrink`, `grow`, `exponent`, `beta`, `hold`: of the controller, see `StepSize`. The
      paper sets no bounds. At high noise, where predictions hardly change, the pair may agree by
      chance on a step over most of the path.

    The published method has one step for the whole batch, that of its worst sample. Here rows do
    not depend on their batch. `Solution.nfe` counts the calls of the sample that took most, which
    is the number of forwards; `Solution.statistics` has `nfe`, `accepted` and `rejected` for each
    sample. From a level without signal the first step is DDIM's, to where the signal is so small
    that its error is a hundredth of the tolerance. Levels between the first and the last time are
    read off the step's polynomial and shorten no step.

    Errors: those of `RK45`. Cost: `p` calls a step, `p - 1` a rejected one, and 1 at the end.
    Order: `p`. Source: Lu et al., "DPM-Solver" (2022), appendix C.
    """

    rtol: float = 0.05
    atol: float = 0.0078
    first_step: float | None = 0.05
    p: int = 3
    predicts: DPMPredicts = "eps"
    taylor: bool = False
    grow: float = field(default=5.0, kw_only=True)
    max_step: float = field(default=2.0, kw_only=True)

    source: ClassVar[str] = "Lu et al. 2022, app. C"
    cost: ClassVar[str] = "2 or 3 a step, adaptive"

    def __post_init__(self) -> None:
        if self.p not in RATIOS:
            raise ValueError(f"DPM-Solver-12 has p=2 and DPM-Solver-23 p=3; got p={self.p!r}")
        super().__post_init__()
        if self.grow == 1.0:
            raise ValueError("the controller of DPMAdaptive needs grow > 1; got grow=1.0")

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence."""
        return self.p

    def begin(self, task: Task) -> PerSampleSolve:
        return _Solve(self, task)


class _Points(NamedTuple):
    """A level for each of some samples, `[b]` each."""

    lam: Tensor
    s: Tensor
    sigma: Tensor


class _Solve(PerSampleSolve):
    """One solve under way.

    `stage` says where a sample needs the next prediction: 0 at its state, 1 and 2 at the stages, -1
    not known before it tries a step, -2 nowhere.
    """

    carried = ("x", "x0", "low", "first", "query", "query_at", "target", "stage")
    results = ("x", "x0")
    solver: DPMAdaptive

    def __init__(self, solver: DPMAdaptive, task: Task):
        clock = ClockRange(Clock("lam"), task.reverse.process, task.times)
        levels, steps = clock.levels, len(task.times) > 1
        # At s / sigma = q, DDIM's step from no signal is off by about q^2 / 2 of the data's scale.
        little = 0.5 * math.log(0.02 * solver.atol)
        first, last = float(levels[0]), float(levels[-1])
        self.no_signal_first, self.no_signal_last = first == -math.inf, last == -math.inf
        inside = min([little, *levels[torch.isfinite(levels)].tolist()])
        span = (
            inside if self.no_signal_first else first,
            inside if self.no_signal_last else last,
        )
        super().__init__(solver, task, clock, 0.05, span)
        # The last prediction: the result, or what leads to a level without signal.
        self.last = self.finish or (self.no_signal_last and steps)
        self.FINAL, self.JUMP = solver.p, solver.p + 1
        self.x = self.x0 = self.first = self.query = self.start
        kernel = clock.process.kernel(self.times[0])
        self.low = self.x * (1.0 / math.hypot(*(float(c) for c in kernel)))
        self.query_at = levels[:1].repeat(self.n)
        self.target = self.a
        stage = 0
        if not steps:
            stage = self.FINAL if self.finish else -2
        elif self.no_signal_first:
            stage = self.JUMP
        self.stage = torch.full((self.n,), stage)

    def read(self, lam: Tensor) -> tuple[Tensor, _Points]:
        """`t` and the levels where the clock is at `lam` (of any shape)."""
        t, s, sigma = self.clock.read(lam, lambda _, *numbers: numbers)
        return t, _Points(lam, s, sigma)

    def run(self) -> Solution:
        self.retire(self.stage == -2)
        while len(self.rows):
            self.tick()
        x, x0 = self.gather("x"), self.gather("x0")
        if self.no_signal_last and len(self.times) > 1:  # DDIM's step to no signal: sigma_next eps
            _, end = self.read(torch.tensor([self.end], dtype=torch.float64))
            after = float(self.clock.process.sigma(self.times[-1]))
            x = (x - float(end.s) * x0) * (after / float(end.sigma))
        return self.solution(x, x0)

    def tick(self) -> None:
        """One network call, and what each sample does with its prediction."""
        t, _ = self.read(self.query_at)
        x0 = self.predict(self.query, t)
        stage, p = self.stage, self.solver.p
        at_state = ((stage == 0) | (stage >= self.FINAL)).nonzero().flatten()
        if len(at_state):
            answer = _rows(x0, at_state)
            if (bad := first_bad(answer)) is not None:
                self.fail_nonfinite(int(at_state[bad]), self.a, 0.0)
            self.x0 = _put(self.x0, at_state, answer)
        if p == 3:
            self.second_stage((stage == 1).nonzero().flatten(), x0)
        self.conclude((stage == p - 1).nonzero().flatten(), x0)
        self.jump((stage == self.JUMP).nonzero().flatten())
        self.stage = torch.where(stage == 0, -1, torch.where(stage == self.FINAL, -2, self.stage))
        self.begin((self.stage == -1).nonzero().flatten())
        self.retire(self.stage == -2)

    def begin(self, some: Tensor) -> None:
        """The samples `some` try a step: to their first stage."""
        if not len(some):
            return
        self.target = _put(self.target, some, self.propose()[some])
        here, stage, _ = self.levels(some)
        x = self.combine(some, here, stage[0], [])
        self.request(some, 1, stage[0].lam, x)

    def second_stage(self, some: Tensor, x0: Tensor) -> None:
        """The samples `some` know the prediction `x0` at their first stage: to their second."""
        if not len(some):
            return
        self.first = _put(self.first, some, _rows(x0, some))
        here, (one, two), _ = self.levels(some)
        x = self.combine(some, here, two, [one], [_rows(x0, some)])
        self.request(some, 2, two.lam, x)

    def conclude(self, some: Tensor, x0: Tensor) -> None:
        """The samples `some` know all of their step: they accept or reject it."""
        if not len(some):
            return
        here, stages, end = self.levels(some)
        values = (
            [_rows(x0, some)] if self.solver.p == 2 else [_rows(self.first, some), _rows(x0, some)]
        )
        high = self.combine(some, here, end, stages, values, self.solver.taylor)
        low = self.combine(some, here, end, stages[:-1], values[:-1], self.solver.taylor)
        scale = column(
            1.0 / torch.sqrt(end.s**2 + end.sigma**2), high
        )  # not hypot: see `batch_invariant`
        low = low * scale
        ratios = self.error_ratios(high * scale - low, low, _rows(self.low, some))
        yes = self.judge(ratios, self.target, x0, some)
        stage = torch.where(yes, 0, -1)
        if bool(yes.any()):
            if self.trajectory is not None:
                self.interpolate(some, yes, here, stages, values)
            taken = yes.nonzero().flatten()
            rows, x = some[taken], _rows(high, taken)
            self.x, self.low = _put(self.x, rows, x), _put(self.low, rows, _rows(low, taken))
            self.a = _put(self.a, rows, self.target[rows])
            self.request(rows, 0, self.target[rows], x)
            stage[yes & (self.target[some] == self.end)] = self.FINAL if self.last else -2
        self.stage = _put(self.stage, some, stage)

    def jump(self, some: Tensor) -> None:
        """DDIM's step of the samples `some` from no signal."""
        if not len(some):
            return
        _, here = self.read(self.a[some])
        sigma = column(self.clock.process.sigma(self.times[:1]), self.x)
        x = (
            column(here.s, self.x) * self.x0[some]
            + (column(here.sigma, self.x) / sigma) * self.x[some]
        )
        self.x = _put(self.x, some, x)
        self.request(some, 0, self.a[some], x)
        if bool((self.a[some] == self.end).all()):
            self.stage = _put(
                self.stage, some, torch.full_like(some, self.FINAL if self.last else -2)
            )

    # ----------------------------------------------------------------------------------- arithmetic

    def request(self, some: Tensor, stage: int, lam: Tensor, x: Tensor) -> None:
        """Where the samples `some` need the next prediction."""
        self.query, self.query_at = _put(self.query, some, x), _put(self.query_at, some, lam)
        self.stage = _put(self.stage, some, torch.full_like(some, stage))

    def levels(self, some: Tensor) -> tuple[_Points, list[_Points], _Points]:
        """Where a step of the samples `some` starts, its stages, and where it ends."""
        a, target = self.a[some], self.target[some]
        nodes = torch.stack([a, *(a + r * (target - a) for r in RATIOS[self.solver.p]), target])
        _, (lam, s, sigma) = self.read(nodes)
        here, *stages, end = (_Points(*row) for row in zip(lam, s, sigma, strict=True))
        return here, stages, end

    def combine(
        self,
        some: Tensor,
        here: _Points,
        there: _Points,
        stages: list[_Points],
        values: list[Tensor] | None = None,
        taylor: bool = True,
    ) -> Tensor:
        """The states of the samples `some` at `there`, by the predictions at their state and
        `values` at `stages`.
        """
        points = torch.stack([torch.stack(tuple(point)) for point in (here, there, *stages)])

        def numbers(index: Tensor) -> Tensor:
            here, there, *stages = (_Points(*rows) for rows in points[:, :, index.long()])
            c = corrections(self.solver.predicts, taylor, here, stages, there, _moment)
            first = there.s * _moment(0, there.lam - here.lam) - sum(c)
            return torch.stack(torch.broadcast_tensors(there.sigma / here.sigma, first, *c))

        a, first, *c = column(
            batch_invariant(numbers, torch.arange(len(some), dtype=torch.float64)), self.x
        )
        x = a * _rows(self.x, some) + first * _rows(self.x0, some)
        for weight, value in zip(c, values or [], strict=True):
            x = x + weight * value
        return x

    def interpolate(
        self, some: Tensor, yes: Tensor, here: _Points, stages: list[_Points], values: list[Tensor]
    ) -> None:
        """The levels of the grid that accepted steps of the samples `some` pass, by their
        polynomials.
        """
        assert self.trajectory is not None
        a, target = self.a[some], self.target[some]
        for j, level in enumerate(self.clock.levels.tolist()[1:-1], 1):
            inside = yes & (self.sign * (level - a) > 0) & (self.sign * (level - target) <= 0)
            index = inside.nonzero().flatten()
            if len(index):
                rows = some[index]
                _, there = self.read(torch.full((len(index),), level, dtype=torch.float64))
                at, *nodes = (_Points(*(c[index] for c in point)) for point in (here, *stages))
                x = self.combine(rows, at, there, nodes, [_rows(value, index) for value in values])
                self.trajectory[j] = _put(self.trajectory[j], self.rows[rows], x)


def _moment(k: int, h: Tensor) -> Tensor:
    """`weights.moment` of a vector of steps, whose entries do not depend on each other to the last
    bit.
    """
    if k == 0:
        return -torch.expm1(-h)
    u, weights = (v.reshape(-1, *[1] * h.ndim) for v in gauss_legendre(16))
    terms = weights * u**k * torch.exp(-(1.0 - u) * h)
    while len(terms) > 1:
        terms = terms[: len(terms) // 2] + terms[len(terms) // 2 :]
    return torch.where(h.abs() < 1.0, terms[0] * h, 1.0 - (k / h) * _moment(k - 1, h))


def _rows(values: Tensor, some: Tensor) -> Tensor:
    """The rows `some` of `values`, wherever they are."""
    return values if len(some) == len(values) else values.index_select(0, some.to(values.device))


def _put(values: Tensor, some: Tensor, new: Any) -> Tensor:
    """`values` with the rows `some`, in ascending order, replaced."""
    return new if len(some) == len(values) else values.index_copy(0, some.to(values.device), new)
