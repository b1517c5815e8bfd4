r"""DPM-Solver-12 and DPM-Solver-23: pairs of exponential single steps in $\lambda$, with a step
size for every sample.

An attempt takes the steps of orders `p - 1` and `p` that share their calls
(`sdeflow.solvers.ode.dpm_solver`); their difference is the error of the lower, the state goes on
with the higher. What a rejected attempt knows of the prediction at its start is kept.

Samples are not in step with each other: while one asks for the prediction at its state, another may
ask for that at a stage, or try again. Every network call holds one question of each sample under
way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sdeflow._utils.math import batch_invariant, gauss_legendre
from sdeflow.errors import GridError, NonFiniteError, unknown
from sdeflow.noise import Noise
from sdeflow.process import Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.adaptive.step_size import PerSample, PerSampleSolve, column, first_bad, row_rms
from sdeflow.solvers.base import OnCall, Solution, check_levels, check_times
from sdeflow.solvers.ode.dpm_solver import DPMFrame, corrections

RATIOS: dict[int, tuple[float, ...]] = {2: (0.5,), 3: (1.0 / 3.0, 2.0 / 3.0)}
"""Where the stages of an attempt stand, by its order."""


@dataclass(frozen=True)
class DPMAdaptive(PerSample):
    r"""DPM-Solver-12 (`p=2`) and -23 (`p=3`): single steps of orders `p - 1` and `p` whose
    difference sets each sample's step.

    A step is accepted where
    `E = rms((x_high - x_low) / max(atol, rtol max(|x_low|, |x_low before|)))`, over the sample's
    entries, is at most 1, and the next is `h theta E^(-1/p)`, within `shrink` and `grow` times the
    last. States are compared in units of `sqrt(s^2 + sigma^2)`, which is 1 under the paper's VP, so
    that a network costs the same number of calls under every process.

    - `p`: 2 or 3. `frame`, `taylor`: as of `DPMSolver`.
    - `rtol`, `atol`: tolerances of a step of the *lower* order; the published ones, .05 and .0078
      (two levels of an 8-bit picture).
    - `max_nfe`: network calls that a sample may take. `min_step`, `first_step`: in `lam`.
    - `theta`, `shrink`, `grow`, `max_step` (in `lam`): of the controller. An error of zero grows
      the step by `grow`. The paper sets no bounds; at high noise, where predictions hardly change,
      the pair may agree by chance on a step over most of the path.

    The published method has one step for the whole batch, that of its worst sample; here rows do
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
    frame: DPMFrame = "eps"
    taylor: bool = False
    theta: float = 0.9
    shrink: float = 0.1
    grow: float = 5.0
    max_step: float = 2.0

    source: ClassVar[str] = "Lu et al. 2022, app. C"
    cost: ClassVar[str] = "2 or 3 a step, adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in RATIOS:
            raise ValueError(f"DPM-Solver-12 has p=2 and DPM-Solver-23 p=3; got p={self.p!r}")
        if self.frame not in ("eps", "x0"):
            raise unknown("frame", self.frame, ("eps", "x0"))
        if not (0 < self.theta <= 1 and 0 < self.shrink < 1 < self.grow and self.max_step > 0):
            raise ValueError(
                "the controller needs 0 < theta <= 1, 0 < shrink < 1 < grow and max_step > 0"
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence."""
        return self.p

    def factor(self, ratio: float, before: float, after_rejection: bool) -> float:
        if not math.isfinite(ratio):
            return self.shrink
        wish = self.theta * ratio ** (-1.0 / self.p) if ratio > 0.0 else math.inf
        return min(max(wish, self.shrink), self.grow)

    def integrate(
        self,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        noise: Noise | None,
        *,
        finish: bool = True,
        record: bool = False,
        on_call: OnCall | None = None,
    ) -> Solution:
        times = check_times(times)
        if finish and len(times) > 1 and times[-1] > times[0]:
            raise GridError("a solve towards noise does not end at zero noise: pass finish=False")
        check_levels(reverse.prepare(times), reverse.process)
        return _Solve(self, reverse, x, times, finish, record, on_call).run()


class _Points(NamedTuple):
    """A level for each of some samples, `[b]` each."""

    lam: Tensor
    s: Tensor
    sigma: Tensor


class _Clock:
    """`lam` over the given times of a process, float64 on the CPU; a level without signal has a
    stand-in with a little.
    """

    def __init__(self, process: Process, times: Tensor, little: float):
        self.process, self.times = process, times
        self.levels = process.lam(times)
        s = torch.broadcast_to(process.s(times), times.shape)
        self.silent = [
            bool(s[0] == 0.0),
            bool(s[-1] == 0.0),
        ]  # without signal at the start, at the end
        self.levels = torch.where(s == 0.0, -math.inf, self.levels)
        steps = self.levels.diff()
        if len(times) > 1 and not bool((steps * torch.sign(steps[0]) > 0).all()):
            raise GridError(
                f"sigma / s of {process!r} is not monotone between the times of the grid"
            )
        finite = self.levels[torch.isfinite(self.levels)]
        inside = min(little, float(finite.min())) if len(finite) else little
        self.start, self.end = (
            inside if silent else float(self.levels[i])
            for silent, i in zip(self.silent, (0, -1), strict=True)
        )

    def time(self, lam: Tensor) -> Tensor:
        """The time where the clock shows `lam`; the first and the last are met exactly."""
        t = self.process.t_of_lam(lam).clamp(
            min=float(self.times.min()), max=float(self.times.max())
        )
        t = torch.where(lam == self.levels[0], self.times[0], t)
        return torch.where(lam == self.levels[-1], self.times[-1], t)

    def read(self, lam: Tensor) -> tuple[Tensor, _Points]:
        """`t` and the levels where it shows `lam` (of any shape)."""

        def numbers(lam: Tensor) -> Tensor:
            t = self.time(lam)
            return torch.stack(
                [t, *(torch.broadcast_to(c, t.shape) for c in self.process.kernel(t))]
            )

        t, s, sigma = batch_invariant(numbers, lam)
        return t, _Points(lam, s, sigma)


class _Solve(PerSampleSolve):
    """One solve under way. `stage` says what a sample asks for: -2 none more, -1 has yet to try, 0
    its state, 1, 2 stages.
    """

    carried = ("x", "x0", "low", "first", "query", "query_at", "target", "stage")
    results = ("x", "x0")
    clock_name = "lam"
    solver: DPMAdaptive

    def __init__(
        self,
        solver: DPMAdaptive,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        finish: bool,
        record: bool,
        on_call: OnCall | None,
    ):
        # At s / sigma = q, DDIM's step from no signal is off by about q^2 / 2 of the data's scale.
        self.clock = _Clock(reverse.process, times, 0.5 * math.log(0.02 * solver.atol))
        first = 0.05 if solver.first_step is None else solver.first_step
        super().__init__(solver, reverse, len(x), self.clock.start, self.clock.end, first, on_call)
        self.finish, self.dtype, n = finish, x.dtype, len(x)
        # The last prediction: the result, or what leads to a level without signal.
        self.last = finish or (self.clock.silent[1] and len(times) > 1)
        self.FINAL, self.JUMP = solver.p, solver.p + 1
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.x = self.x0 = self.first = self.query = x
        self.low = x * (1.0 / math.hypot(*(float(c) for c in reverse.process.kernel(times[0]))))
        self.query_at = self.clock.levels[:1].repeat(n)
        self.target = self.a
        stage = 0
        if len(times) == 1:
            stage = self.FINAL if finish else -2
        elif self.clock.silent[0]:
            stage = self.JUMP
        self.stage = torch.full((n,), stage)
        self.trajectory = [x] + [torch.zeros_like(x) for _ in times[1:]] if record else None

    def time(self, a: Tensor) -> Tensor:
        return self.clock.time(a)

    def reached(self) -> Tensor:
        return self.gather("x").to(self.dtype)

    def run(self) -> Solution:
        if (bad := first_bad(self.x)) is not None:
            raise NonFiniteError(f"the state of sample {bad} to start from holds NaN or infinity")
        self.depart(self.stage == -2)
        while len(self.rows):
            self.tick()
        return self.solution()

    def tick(self) -> None:
        """One network call, and what each sample makes of its answer."""
        t, _ = self.clock.read(self.query_at)
        x0 = self.ask(self.query, t)
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
        self.depart(self.stage == -2)

    def begin(self, some: Tensor) -> None:
        """The samples `some` try a step: to their first stage."""
        if not len(some):
            return
        self.h = self.h.clamp(max=self.solver.max_step)
        self.target = _put(self.target, some, self.propose()[some])
        here, stage, _ = self.levels(some)
        x = self.combine(some, here, stage[0], [])
        self.ask_next(some, 1, stage[0].lam, x)

    def second_stage(self, some: Tensor, x0: Tensor) -> None:
        """The samples `some` know the prediction `x0` at their first stage: to their second."""
        if not len(some):
            return
        self.first = _put(self.first, some, _rows(x0, some))
        here, (one, two), _ = self.levels(some)
        x = self.combine(some, here, two, [one], [_rows(x0, some)])
        self.ask_next(some, 2, two.lam, x)

    def conclude(self, some: Tensor, x0: Tensor) -> None:
        """The samples `some` know all of their step: they accept or refuse it."""
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
        with torch.no_grad():
            size = torch.maximum(low.abs(), _rows(self.low, some).abs())
            ratios = row_rms(
                (high * scale - low) / (self.solver.rtol * size).clamp(min=self.solver.atol)
            )
        yes = self.judge(ratios, self.target, x0, some)
        stage = torch.where(yes, 0, -1)
        if bool(yes.any()):
            if self.trajectory is not None:
                self.interpolate(some, yes, here, stages, values)
            taken = yes.nonzero().flatten()
            rows, x = some[taken], _rows(high, taken)
            self.x, self.low = _put(self.x, rows, x), _put(self.low, rows, _rows(low, taken))
            self.a = _put(self.a, rows, self.target[rows])
            self.ask_next(rows, 0, self.target[rows], x)
            stage[yes & (self.target[some] == self.end)] = self.FINAL if self.last else -2
        self.stage = _put(self.stage, some, stage)

    def jump(self, some: Tensor) -> None:
        """DDIM's step of the samples `some` from no signal."""
        if not len(some):
            return
        _, here = self.clock.read(self.a[some])
        sigma = column(self.clock.process.sigma(self.clock.times[:1]), self.x)
        x = (
            column(here.s, self.x) * self.x0[some]
            + (column(here.sigma, self.x) / sigma) * self.x[some]
        )
        self.x = _put(self.x, some, x)
        self.ask_next(some, 0, self.a[some], x)
        if self.clock.start == self.end:
            self.stage = _put(
                self.stage, some, torch.full_like(some, self.FINAL if self.last else -2)
            )

    # ----------------------------------------------------------------------------------- arithmetic

    def ask_next(self, some: Tensor, stage: int, lam: Tensor, x: Tensor) -> None:
        """The next question of the samples `some`."""
        self.query, self.query_at = _put(self.query, some, x), _put(self.query_at, some, lam)
        self.stage = _put(self.stage, some, torch.full_like(some, stage))

    def levels(self, some: Tensor) -> tuple[_Points, list[_Points], _Points]:
        """Where a step of the samples `some` starts, its stages, and where it ends."""
        a, target = self.a[some], self.target[some]
        nodes = torch.stack([a, *(a + r * (target - a) for r in RATIOS[self.solver.p]), target])
        _, (lam, s, sigma) = self.clock.read(nodes)
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
            c = corrections(self.solver.frame, taylor, here, stages, there, _moment)
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
                _, there = self.clock.read(torch.full((len(index),), level, dtype=torch.float64))
                at, *nodes = (_Points(*(c[index] for c in point)) for point in (here, *stages))
                x = self.combine(rows, at, there, nodes, [_rows(value, index) for value in values])
                self.trajectory[j] = _put(self.trajectory[j], self.rows[rows], x)

    def solution(self) -> Solution:
        x, x0 = self.gather("x"), self.gather("x0")
        if (
            self.clock.silent[1] and len(self.clock.times) > 1
        ):  # DDIM's step to no signal: sigma_next eps
            _, end = self.clock.read(torch.tensor([self.end], dtype=torch.float64))
            s, sigma, after = (
                float(c) for c in (end.s, end.sigma, self.clock.process.sigma(self.clock.times[-1]))
            )
            x = (x - s * x0) * (after / sigma)
        trajectory = None
        if self.trajectory is not None:
            if len(self.clock.times) > 1:
                self.trajectory[-1] = x
            trajectory = torch.stack([*self.trajectory, x0] if self.finish else self.trajectory).to(
                self.dtype
            )
        result = (x0 if self.finish else x).to(self.dtype)
        return Solution(
            result, self.calls, self.forwards, statistics=self.statistics(), trajectory=trajectory
        )


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
