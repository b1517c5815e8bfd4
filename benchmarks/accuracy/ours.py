"""The solvers of the library on the problems of `accuracy.py`: every registered one, and variants,
on every grid.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import sdeflow
from benchmarks.accuracy.problems import NSR_TOP, PROCESSES, CannotSpend, Method, Problem, betas
from sdeflow import grid, registry
from sdeflow.errors import BudgetError, UnknownNameError
from sdeflow.noise import Noise
from sdeflow.process import Process
from sdeflow.solvers.auto.grid import auto as auto_grid
from sdeflow.solvers.base import Solver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.unipc import UniPC
from sdeflow.solvers.ode.weights import CLOCKS, PREDICTS

FAMILY = "sdeflow"
SHAPED: dict[str, tuple[str, dict[str, float]]] = {
    "karras rho=3": ("karras", {"rho": 3.0}),
    "karras rho=5": ("karras", {"rho": 5.0}),
    "karras rho=10": ("karras", {"rho": 10.0}),
    "power_t rho=1.5": ("power_t", {"rho": 1.5}),
    "power_t rho=3": ("power_t", {"rho": 3.0}),
    "power_t rho=4": ("power_t", {"rho": 4.0}),
}
"""Grids beside the registered ones, by a name of their own."""
TABLED = ("leading", "trailing", "linspace", "quadratic")
OF_TABLE = " of 1000 betas"
"""Grids on the entries of a table, laid on the one that peers are given of the process."""
LATE = " from nsr=1000"
FROM_LATE = ("uniform_t", "simple", "uniform_sqrt_t", "uniform_lam", "karras rho=3")
"""Grids also laid from where the peers begin that know no infinite noise, with the exact state
there, as they have it.
"""
CORE = (
    "uniform_t",
    "uniform_sqrt_t",
    "uniform_lam",
    "dense_lam",
    "uniform_angle",
    "uniform_cosine",
    "uniform_flow",
    "sgm_uniform",
    "simple",
    "karras",
    *SHAPED,
    *(name + LATE for name in FROM_LATE),
)
"""What stochastic solvers are laid on; registered deterministic ones are on every grid."""
FEW = (
    *("auto", "uniform_t", "sgm_uniform", "uniform_sqrt_t", "uniform_lam", "dense_lam"),
    *("uniform_angle", "karras", "uniform_cosine"),
    *("leading" + OF_TABLE, "leading, one spare," + OF_TABLE, "trailing" + OF_TABLE),
)
"""What variants are laid on."""


# -------------------------------------------------------------------------------------------- grids


def grid_functions() -> dict[str, grid.GridFunction]:
    """Every registered grid with its defaults, and some with other parameters."""
    out = {entry.name: entry.make for entry in registry.GRIDS.values()}
    out["auto"] = partial(
        auto_grid, table="density"
    )  # the one that sample takes for known densities, which the targets are
    for name, (base, arguments) in SHAPED.items():
        if base in registry.GRIDS:
            out[name] = partial(registry.GRIDS[base].make, **arguments)
    for name in FROM_LATE:
        if name in out:
            out[name + LATE] = partial(_late, lay=out[name])
    for name in TABLED:
        out[name + OF_TABLE] = partial(_of_table, lay=registry.grid_function(name))
    out["leading, one spare," + OF_TABLE] = partial(_of_table, lay=partial(grid.leading, spare=1))
    return out


def _of_table(process: Process, n: int, *, lay: grid.GridFunction) -> Tensor:
    name = next(name for name in PROCESSES if registry.process(name) == process)
    table = Process.from_betas(torch.from_numpy(betas(name)))
    return process.t_of_nsr(table.nsr(lay(table, n)))


def _late(process: Process, n: int, *, lay: grid.GridFunction) -> Tensor:
    if process.level(process.t_max).nsr <= NSR_TOP:
        raise ValueError("the process begins no higher")
    return lay(process, n, t_max=float(process.t_of_nsr(NSR_TOP * (1.0 - 1e-9))))


@lru_cache
def grids_for(process: Process) -> tuple[dict[str, grid.GridFunction], dict[str, str]]:
    """The grids that can be laid on a process, each once; and why the others cannot."""
    usable: dict[str, grid.GridFunction] = {}
    refused: dict[str, str] = {}
    seen: dict[tuple[float, ...], str] = {}
    for name, lay in grid_functions().items():
        try:
            times = [*lay(process, 10).tolist(), *lay(process, 7).tolist()]
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        same = seen.setdefault(tuple(round(t, 12) for t in times), name)
        if same == name:
            usable[name] = lay
        else:
            refused[name] = f"the same as {same}"
    return usable, refused


_LAID: dict[
    tuple[str, str, int], Tensor | str
] = {}  # by process and grid; times, or why there are none


def lay_out(task: tuple[str, str, int]) -> Tensor | str:
    """The times of a grid of so many levels on a process."""
    process, name, levels = task
    try:
        times = grid_functions()[name](registry.process(process), levels)
    except Exception as error:  # too few levels for it, or too many
        return f"{type(error).__name__}: {error}"[:120]
    return (
        times
        if len(times) == levels
        else f"{name} laid {len(times)} levels where {levels} were asked for"
    )


def remember(tasks: list[tuple[str, str, int]], laid: list[Tensor | str]) -> None:
    """Keep what `lay_out` made; some grids are dear, and every solver wants them."""
    _LAID.update(zip(tasks, laid, strict=True))


def layouts(methods: dict[str, list[Method]], budgets: list[int]) -> list[tuple[str, str, int]]:
    """The grids that methods of one and of two calls a step need, by process."""
    return [
        (process, name, levels)
        for process, some in methods.items()
        for name in sorted(
            {m.grid for m in some if m.family == FAMILY and m.grid in grid_functions()}
        )
        for levels in sorted({*budgets, *((n + 1) // 2 for n in budgets)})
    ]


def _laid(process: str, name: str, levels: int) -> Tensor:
    key = process, name, levels
    if key not in _LAID:
        _LAID[key] = lay_out(key)
    times = _LAID[key]
    if isinstance(times, str):
        raise CannotSpend(times)
    return times


# ------------------------------------------------------------------------------------------ solvers


def solvers() -> dict[str, Solver]:
    """Every registered solver that takes a grid, and variants; each once, under its first name."""
    named: dict[str, Callable[[], Solver]] = {}
    more: dict[str, Any]
    for entry in registry.SOLVERS.values():
        if entry.kind.__module__.endswith(".external") or entry.name == "auto":
            continue  # other libraries' own, measured as theirs; and what chooses among these
        named[entry.name] = entry.make
    for entry in [*registry.SOLVERS.values()]:
        fields = _fields(entry.kind)
        if entry.kind is ExponentialAdams or entry.name not in named:
            continue
        if "clock" in fields:
            for clock in ("t", "lam", "nsr", "angle"):
                named[f"{entry.name} clock={clock}"] = partial(entry.make, clock=clock)
        if "to_zero" in fields:
            for clock in ("t", "nsr"):
                named[f"{entry.name} clock={clock} to zero"] = partial(
                    entry.make, clock=clock, to_zero=True
                )
    for frame, clock, p, corrector in itertools.product(
        PREDICTS, CLOCKS, (1, 2, 3, 4), (False, True)
    ):
        if p == 1 and not corrector and clock != "lam":
            continue  # one prediction: no polynomial, no clock
        label = f"adams{p} {frame} {clock}" + (" corrected" if corrector else "")
        named[label] = partial(
            ExponentialAdams, p=p, predicts=frame, clock=clock, corrector=corrector
        )
    for frame, clock, p in itertools.product(
        PREDICTS, ("lam", "nsr", "angle", "flow", "t"), (2, 3, 4)
    ):
        label = f"adams{p} {frame} {clock} by orders"
        more = {"p": p, "predicts": frame, "clock": clock, "start_up": "orders"}
        named[label] = partial(ExponentialAdams, **more)
        named[label + " lower_final"] = partial(ExponentialAdams, **more, lower_final=True)
    for p, variant, frame, lower in itertools.product(
        (1, 2, 3), ("bh1", "bh2"), ("x0", "eps"), (False, True)
    ):
        label = f"unipc_{p} {variant} {frame}" + (" lower_final" if lower else "")
        named[label] = partial(UniPC, p=p, variant=variant, predicts=frame, lower_final=lower)
    for frame, clock in (("x0", "lam"), ("v", "angle"), ("eps", "nsr"), ("eps", "t")):
        for p in (3, 4):
            more = {"p": p, "predicts": frame, "clock": clock}
            named[f"adams{p} {frame} {clock} singlestep"] = partial(
                ExponentialAdams, **more, start_up="singlestep"
            )
            named[f"adams{p} {frame} {clock} lower_final"] = partial(
                ExponentialAdams, **more, lower_final=True
            )
    out: dict[str, Solver] = {}
    seen: set[str] = set()
    for name, make in named.items():
        try:
            solver = make()
        except (ValueError, TypeError):  # this one has no such clock
            if name in registry.SOLVERS:
                raise
            continue
        if repr(solver) not in seen:
            seen.add(repr(solver))
            out[name] = solver
    return out


def _fields(kind: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


class Draws(Noise):
    """Independent noise from one generator: cheap for thousands of samples."""

    in_place = True

    def __init__(self, x: Tensor, seed: int = 11):
        self.seeds, self.shape = tuple(range(len(x))), tuple(x.shape[1:])
        self.device, self.dtype = x.device, x.dtype
        self._one = torch.Generator().manual_seed(seed)

    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(len(self.seeds), *self.shape, dtype=self.dtype)
        return out.normal_(generator=self._one)


def _run(problem: Problem, nfe: int, *, solver: Solver, lay: str) -> Tensor:
    try:
        levels = solver.levels(nfe)
    except BudgetError as error:
        raise CannotSpend from error
    times = _laid(problem.process_name, lay, levels)
    start = problem.start
    if lay.endswith(LATE):
        start = problem.ratio_start * problem.level(float(times[0])).s
    elif float(times[0]) < problem.process.t_max:
        # Spacings that begin below the top take the start as it is, of unit variance.
        first, top = problem.level(float(times[0])), problem.level(problem.process.t_max)
        start = start * (math.hypot(first.s, first.sigma) / math.hypot(top.s, top.sigma))
    noise: Any = Draws(problem.start) if solver.stochastic else "seeded"
    return sdeflow.solve(
        problem.target,
        problem.process,
        solver=solver,
        grid=times,
        x=start,
        t=float(times[0]),
        noise=noise,
    ).x


def _by_name(problem: Problem, nfe: int, *, solver: str | None) -> Tensor:
    """What the library does on its own when it is given a budget."""
    try:
        return sdeflow.solve(
            problem.target,
            problem.process,
            solver=solver,
            nfe=nfe,
            x=problem.start,
            t=problem.process.t_max,
        ).x
    except BudgetError as error:
        raise CannotSpend from error


def has_auto() -> bool:
    """Whether `solver="auto"` is known."""
    try:
        registry.solver("auto")
    except UnknownNameError:
        from sdeflow import sampling

        return '"auto"' in inspect.getsource(sampling)
    except Exception:
        return True
    return True


def catalogue(process_name: str) -> tuple[list[Method], dict[str, str]]:
    """Every solver of ours on every grid of ours, for a process; and the grids that refuse it."""
    usable, refused = grids_for(registry.process(process_name))
    out = [Method(FAMILY, "(default)", "(default)", partial(_by_name, solver=None), default=True)]
    if has_auto():
        out.append(Method(FAMILY, "auto", "auto", partial(_by_name, solver="auto"), default=True))
    for name, solver in solvers().items():
        if solver.adaptive:
            continue
        everywhere = name in registry.SOLVERS or name.endswith(" to zero")
        some = CORE if solver.stochastic else usable if everywhere else FEW
        for lay in [lay for lay in some if lay in usable]:
            out.append(
                Method(
                    FAMILY,
                    name,
                    lay,
                    partial(_run, solver=solver, lay=lay),
                    stochastic=solver.stochastic,
                )
            )
    return out, refused
