"""What a solver is: a frozen value with a step, an order and a budget; and what a solve returns."""

from __future__ import annotations

import dataclasses
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sdeflow._utils.checks import check_choices, whole_number
from sdeflow._utils.math import value_of
from sdeflow._utils.weak_cache import WeakTable
from sdeflow.denoisers import Denoiser
from sdeflow.errors import BudgetError, GridError, SolverError
from sdeflow.grid.base import GridFunction
from sdeflow.noise import Noise
from sdeflow.plan.execute import OnCall
from sdeflow.plan.plan import Plan
from sdeflow.plan.trace import Operand, Trace, optimise
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.plot import plot_solution


@dataclass(frozen=True)
class Provenance:
    """How a solution was made: what was asked for, with the defaults filled in.

    `solver` is None for a plan. `times` are the levels of the grid, float64; `seconds` is the time
    that the solve took. `dtype` is that of the result, `computed_in` that of the states of the
    solve: float32 where the result is in half precision.
    """

    solver: Solver | None = None
    process: Process | None = None
    grid: str = ""
    times: Tensor | None = None
    seeds: tuple[int, ...] = ()
    noise: str = ""
    condition: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    computed_in: str = ""
    seconds: float = 0.0
    version: str = ""


@dataclass
class Solution:
    """The result of a solve; `provenance` says how it was made.

    `x` is the result, `[n, *shape]`. In half precision it is a float32 solve, cast at its end, and
    so are `trajectory` and `x0s` (`provenance.computed_in`). `nfe` counts denoiser calls a batch;
    `network_calls` counts the forwards of networks in all, and `network_gradients` their gradients.
    `trajectory` (`[levels, n, *shape]`, the result last) and `x0s` (`[nfe, n, *shape]`) are there
    on request, `interpolant` from solvers with a dense output.
    """

    x: Tensor
    nfe: int
    network_calls: int = 0
    network_gradients: int = 0
    plan: Plan | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    trajectory: Tensor | None = None
    x0s: Tensor | None = None
    interpolant: Callable[[float], Tensor] | None = None
    provenance: Provenance = field(default_factory=Provenance)

    solver = property(attrgetter("provenance.solver"))
    process = property(attrgetter("provenance.process"))
    grid = property(attrgetter("provenance.grid"))
    times = property(attrgetter("provenance.times"))
    seeds = property(attrgetter("provenance.seeds"))
    noise = property(attrgetter("provenance.noise"))
    condition = property(attrgetter("provenance.condition"))
    device = property(attrgetter("provenance.device"))
    dtype = property(attrgetter("provenance.dtype"))
    computed_in = property(attrgetter("provenance.computed_in"))
    seconds = property(attrgetter("provenance.seconds"))
    version = property(attrgetter("provenance.version"))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The samples as a `matplotlib` figure, with their trajectory where it was kept: images as
        images, all else as points; as PNG in `path` too if given.

        Errors: `MissingExtraError` without matplotlib (`pip install 'sdeflow[plot]'`).
        """
        return plot_solution(self, path)

    def __str__(self) -> str:
        """How it was made, in a few lines."""
        how = self.provenance
        cast = "" if how.dtype == how.computed_in else f" (computed in {how.computed_in})"
        lines = [
            f"{tuple(self.x.shape)} {how.dtype}{cast} on {how.device} in {how.seconds:.2f} s,"
            f" sdeflow {how.version}",
            f"solver   {how.solver or (self.plan and f'plan of {self.plan.solver}')}",
            f"process  {how.process}",
            f"NFE      {self.nfe} ({self.network_calls} network calls)",
        ]
        if how.times is not None and len(how.times):
            first, last = float(how.times[0]), float(how.times[-1])
            lines.append(f"times    {len(how.times)} levels, {first:g} -> {last:g} ({how.grid})")
        if how.seeds:
            shown = ", ".join(map(str, how.seeds[:4])) + (", ..." if len(how.seeds) > 4 else "")
            lines.append(f"noise    {how.noise}, seeds {shown}")
        lines += [
            f"{key:<8} {value}"
            for key, value in self.statistics.items()
            if not isinstance(value, Tensor)
        ]
        return "\n".join(lines)


class Task(NamedTuple):
    """What a solve was asked for: the arguments of `Solver.integrate`."""

    reverse: Reverse
    x: Tensor
    times: Tensor
    noise: Noise | None
    finish: bool
    record: bool
    on_call: OnCall | None


class Solver(ABC):
    """A method for the reverse SDE or the probability-flow ODE; a frozen dataclass whose fields are
    its parameters.

    `order` is its order of convergence (weak order where `stochastic`), on grids that are not
    uniform too; `source` the paper; `cost` the network calls a step, in words.
    """

    order: ClassVar[int]
    stochastic: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    default_grid: ClassVar[str | GridFunction | None] = None
    """The grid that goes with it, where that is not the process's own."""
    source: ClassVar[str]
    cost: ClassVar[str] = "1 a step"

    def __post_init__(self) -> None:
        if dataclasses.is_dataclass(self):
            check_choices(self)

    @property
    def reversible(self) -> bool:
        """Whether it also runs from small `t` to large (encoding)."""
        return not self.stochastic

    def for_denoiser(self, denoiser: Denoiser) -> Solver:
        """This solver, or the form of it that goes with a denoiser; `sample` and `solve` ask."""
        return self

    @abstractmethod
    def levels(self, nfe: int, *, finish: bool = True) -> int:
        """Grid levels with which the solver spends exactly `nfe` calls; `BudgetError` names the
        nearest budgets.
        """

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
        """Take the state `x` at `times[0]` along `times` (float64, `[levels]`), and to zero noise
        if `finish`.

        `record` keeps the state at every level in `Solution.trajectory`.
        """
        times = self.checked_times(times, finish)
        return self._solve(Task(reverse, x, times, noise, finish, record, on_call))

    def _solve(self, task: Task) -> Solution:
        """The solve of a task with checked times; a solver has this, or its own `integrate`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it solves")

    def checked_times(self, times: Tensor | Sequence[float], finish: bool) -> Tensor:
        """`check_times(times)`; a `GridError` where the solver does not run in that direction."""
        times = check_times(times)
        upward = len(times) > 1 and bool(times[-1] > times[0])
        if upward and not self.reversible:
            raise GridError(
                f"{type(self).__name__} only runs from noise to data; encode with a solver of the"
                " ODE, such as Heun, and finish=False"
            )
        if upward and finish:
            raise GridError("a solve towards noise does not end at zero noise: pass finish=False")
        return times


class GridSolver(Solver):
    """A solver that steps from level to level of a grid: one `step`, traced over the grid into a
    plan and executed.
    """

    calls_per_step: ClassVar[int] = 1

    def start(self, steps: int) -> Any:
        """The state of a fresh solve of so many steps: nested tuples of operands and numbers, or
        None.
        """
        return None

    @abstractmethod
    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        """`(x_next, state)`: the textbook's step from level `t` to `t_next`, with `+`, `-`, `*` on
        what is not a number.

        `noise(t, t_next)` is a standard normal for the interval, `noise()` an independent one.
        """

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        """The step from the last level to zero noise: the denoised prediction."""
        return reverse(x, t)

    def calls(self, levels: int, *, finish: bool = True) -> int:
        """Network calls on a grid of `levels`; override it where steps differ in cost."""
        return self.calls_of_step * (levels - 1) + int(finish)

    @property
    def calls_of_step(self) -> int:
        """Network calls a step, of this instance."""
        return self.calls_per_step

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        name, least = type(self).__name__, 1 if finish else 2
        return search_levels(name, partial(self.calls, finish=finish), nfe, least)

    # ----------------------------------------------------------------------------------------------

    @property
    def without_plan(self) -> str | None:
        """Why this solver has no plan, in words; None where it has one."""
        if type(self).integrate is GridSolver.integrate:
            return None
        return f"{type(self).__name__} looks at the state to choose its steps"

    def plan(
        self,
        process: Process,
        times: Tensor | Sequence[float],
        *,
        finish: bool = True,
        record: bool = False,
    ) -> Plan:
        """The solver traced over `times` of `process`: see `sdeflow.plan.plan.Plan`."""
        if not isinstance(process, Process):
            raise TypeError(
                f"a plan is traced over times of a Process, such as VP(); got {process!r}"
            )
        return self._planned(process, self.checked_times(times, finish), finish, record)

    def _planned(self, process: Process, times: Tensor, finish: bool, record: bool) -> Plan:
        """The plan, traced or known from before."""
        # Only plain values can be keys: others may have changed since.
        if times.requires_grad or not _plain(self):
            return self._trace(process, times, finish, record)
        if not _plain(process):
            return self._plan_of_users(process, times, finish, record)
        key = (self, process, tuple(times.tolist()), finish, record)
        with _PLANS_LOCK:
            if (known := _PLANS.get(key)) is not None:
                _PLANS.move_to_end(key)
                return known
        plan = self._trace(process, times, finish, record)
        with _PLANS_LOCK:
            _PLANS[key] = plan
            if len(_PLANS) > 128:
                _PLANS.popitem(last=False)
        return plan

    def _plan_of_users(self, process: Process, times: Tensor, finish: bool, record: bool) -> Plan:
        """The plan for a user's process, which may read anything, such as a global in a notebook: a
        plan is used again only for the same object, with the same numbers at all levels.
        """
        process.check()
        levels = process.levels(times)
        if not all(isinstance(level.s, float) for level in levels):
            return self._trace(process, times, finish, record)
        key = (self, tuple(levels), finish, record)
        try:
            plan = _USERS_PLANS.get(process, key)
            if plan is None:
                plan = self._trace(process, times, finish, record)
                _USERS_PLANS.put(process, key, plan)
        except TypeError:  # no weak references to it
            plan = self._trace(process, times, finish, record)
        return plan

    def _trace(self, process: Process, times: Tensor, finish: bool, record: bool) -> Plan:
        trace = Trace(process)
        levels = check_levels(trace.prepare(times), process)
        # The steps ask for levels between those of the grid. The first passes note them, so that
        # all are computed together. A pass on stand-ins may fail where they mislead.
        for stand_ins in (True, True, True, False):
            trace.begin(stand_ins=stand_ins)
            try:
                x = self._run(trace, levels, finish, record)
            except Exception:
                if not trace.missing:
                    raise
            if not trace.missing:
                break
            trace.compute_missing()
        instructions, registers, result = optimise(trace.instructions, trace.value(x))
        grid = tuple(
            (value_of(level.t), value_of(level.s), value_of(level.sigma)) for level in levels
        )
        return Plan(instructions, registers, result, grid, finish, repr(self), repr(process))

    def _run(self, trace: Trace, levels: list[Level], finish: bool, record: bool) -> Operand:
        """Run the steps on symbolic operands; returns the result."""
        x, state = Operand({0: 1.0}), self.start(len(levels) - 1)
        for index, (t, t_next) in enumerate(pairwise(levels)):
            if record:
                trace.record(index, x)
            x, state = self.step(trace, x, t, t_next, trace.draw, state)
            trace.materialise((x, state))
        if record:
            trace.record(len(levels) - 1, x)
        return self.finish(trace, x, levels[-1], trace.draw, state) if finish else x

    def _solve(self, task: Task) -> Solution:
        plan = self._planned(task.reverse.process, task.times, task.finish, task.record)
        return run_plan(plan, task.reverse, task.x, task.noise, task.on_call)

    def textbook(
        self,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        noise: Noise | None,
        *,
        finish: bool = True,
    ) -> Tensor:
        """The same solve with the steps run on tensors, as they are written: what a plan is tested
        against.
        """
        times = self.checked_times(times, finish)
        levels = check_levels(reverse.prepare(times), reverse.process)
        state = self.start(len(levels) - 1)

        def draw(t: Level | None = None, t_next: Level | None = None) -> Tensor:
            if noise is None:
                raise SolverError(f"{type(self).__name__} draws noise: give it a source of noise")
            between = (
                (None, None)
                if t is None or t_next is None
                else (value_of(t.nsr), value_of(t_next.nsr))
            )
            return noise.draw(*between).to(x)

        for t, t_next in pairwise(levels):
            x, state = self.step(reverse, x, t, t_next, draw, state)
        return self.finish(reverse, x, levels[-1], draw, state) if finish else x


def search_levels(name: str, calls: Callable[[int], int], nfe: int, least: int) -> int:
    """The levels, from `least` on, with which `calls(levels)` is exactly `nfe`; `BudgetError` names
    the nearest budgets.
    """
    whole_number("nfe", nfe, of="network calls", error=BudgetError)
    levels, below = least, 0
    while (cost := calls(levels)) < nfe:
        levels, below = levels + 1, cost
    if cost != nfe:
        near = f"are {below} and {cost}" if below else f"is {cost}"
        raise BudgetError(f"{name} cannot spend nfe={nfe}; the nearest it can {near}")
    return levels


def run_plan(
    plan: Plan, reverse: Reverse, x: Tensor, noise: Noise | None, on_call: OnCall | None = None
) -> Solution:
    """Execute a plan and say so in a `Solution`."""
    before = reverse.forwards
    result, recorded = plan.execute(reverse, x, noise, on_call)
    trajectory = (
        torch.stack([*recorded, result] if plan.finished else recorded) if recorded else None
    )
    return Solution(
        result,
        plan.nfe,
        reverse.forwards - before,
        plan=plan,
        trajectory=trajectory,
        statistics={"draws": plan.draws, "buffers": plan.buffers},
    )


_PLANS: OrderedDict[Any, Plan] = OrderedDict()
_PLANS_LOCK = threading.Lock()
_USERS_PLANS: WeakTable[Plan] = WeakTable(32)


def _plain(value: Any) -> bool:
    """Whether `value` never changes: numbers, strings, and tuples and sdeflow's own frozen
    dataclasses of them.

    A user's own class may read anything, such as a global in a notebook: see `_plan_of_users`.
    """
    if value is None or isinstance(value, int | float | str):
        return True
    if isinstance(value, tuple):
        return all(map(_plain, value))
    kind = type(value)
    parameters = vars(kind).get(
        "__dataclass_params__"
    )  # of the class itself: a subclass may hold more than its fields
    ours = kind.__module__.startswith("sdeflow.") and parameters is not None and parameters.frozen
    return ours and all(
        _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare
    )


def check_levels(levels: list[Level], process: Process) -> list[Level]:
    """`levels`, or a `GridError` where one lies outside of what `process` describes, or holds no
    noise.
    """
    for level in levels:
        if not (level.s >= 0.0 and level.sigma > 0.0 and level.t >= min(0.0, process.t_min)):
            what = (
                "no noise is left there"
                if level.sigma == 0.0
                else "the process does not reach there"
            )
            raise GridError(
                f"the grid has a level at t={value_of(level.t):g}, where s={value_of(level.s):g}"
                f" and sigma={value_of(level.sigma):g}: {what}. {type(process).__name__} runs from"
                f" t_min={process.t_min:g} to t_max={process.t_max:g}; the step to zero noise is"
                " taken from the last level of the grid by finish=True, and is no level itself"
            )
    return levels


def check_times(times: Tensor | Sequence[float]) -> Tensor:
    """`times` as a float64 vector on the CPU, strictly monotone and finite, or a `GridError` that
    says where it is not.
    """
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) < 1:
        raise GridError(f"a grid is a vector of at least one time; got shape {tuple(grid.shape)}")
    if not bool(torch.isfinite(grid).all()):
        raise GridError(f"a grid has only finite times; got {grid.tolist()}")
    steps = grid.diff()
    wrong = steps >= 0 if len(grid) > 1 and grid[-1] < grid[0] else steps <= 0
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise GridError(
            "a grid runs strictly one way, from noise to data (decreasing) or from data to noise"
            f" (increasing); times[{i}]={float(grid[i]):.6g} is followed by"
            f" times[{i + 1}]={float(grid[i + 1]):.6g}"
        )
    return grid
