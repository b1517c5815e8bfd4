r"""Grids computed from a model's own trajectories.

Dynamic programming finds the grid with the least local errors of its steps.

Fine trajectories of a teacher visit `nodes` levels. From each of them, `x_j`, one step of the
student to a later level k makes the error

$$c_{jk} = \mathrm{mean}\,\lVert x_{j \to k} - x_k \rVert / u_k,$$

in units $u_k$ of the level, at no further network call, as the predictions are known. Among all
grids of `n` of the levels, the one is taken whose discounted sum of errors
$c_1 + g\,c_2 + g^2 c_3 + \dots$ is least, exactly, by dynamic programming.

Source: Chen et al., "On the trajectory regularity of ODE-based diffusion sampling" (GITS, 2024).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow._utils.checks import one_of, positive_number, whole_number
from sdeflow.denoisers import Denoiser
from sdeflow.errors import GridError
from sdeflow.grid.base import GridFunction, count, ends, falling
from sdeflow.process import Level, Process
from sdeflow.registry import grid_function, solver
from sdeflow.sampling.api import run
from sdeflow.sampling.request import Request
from sdeflow.solvers.base import Solver, check_times
from sdeflow.solvers.ode.weights import has_signal, moment


@dataclass(frozen=True, eq=False, repr=False)
class SearchedGrid:
    """A grid made of the best levels among those of a model's trajectories.

    It takes the best ones for every number of levels.

    `times` are these levels, `single[j, k]` the error of a step by itself from level j to level k,
    `double[i, j, k]` that of a step of two points whose one before came from level i, or None where
    steps have no memory. `coefficient` is the discount g. Under another process the levels of the
    same noise-to-signal ratio serve. A `t_max` or `t_min` given takes the place of the nearest
    level beyond it.
    """

    process: Process
    times: Tensor
    single: Tensor
    double: Tensor | None
    coefficient: float

    __name__ = "gits"

    def __repr__(self) -> str:
        steps = "one point" if self.double is None else "two points"
        return (
            f"SearchedGrid({len(self.times)} levels of {self.process}, steps of {steps},"
            f" coefficient={self.coefficient:g})"
        )

    def __call__(
        self, process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
    ) -> Tensor:
        low, high = ends(process, n, t_min, t_max)
        times = self.times
        if process != self.process:
            times = process.t_of_nsr(self.process.nsr(times))
        start = 0 if t_max is None else max(int((times >= high).sum()) - 1, 0)
        end = len(times) - 1 if t_min is None else min(int((times > low).sum()), len(times) - 1)
        if n > end - start + 1:
            raise GridError(
                f"{n} levels asked of {end - start + 1} at which the trajectories are known: search"
                " with more nodes="
            )
        found = times[self.levels(n, start, end)].clone()
        if t_max is not None:
            found[0] = high
        if t_min is not None and n > 1:
            found[-1] = low
        return falling(found, process)

    def levels(self, n: int, start: int = 0, end: int | None = None) -> list[int]:
        """Which of the levels make up the best grid of `n` from `start` to `end`."""
        end = len(self.times) - 1 if end is None else end
        if count(n) <= 2:
            return [start, end][:n]
        if self.double is None:
            return _shortest(self.single, start, end, n - 1, self.coefficient)
        return _shortest_of_pairs(self.single, self.double, start, end, n - 1, self.coefficient)

    def error(self, levels: Sequence[int]) -> float:
        """The discounted sum of errors of a grid of these levels, which `levels` makes least."""
        total = 0.0
        for m, (j, k) in enumerate(itertools.pairwise(levels)):
            alone = m == 0 or self.double is None
            errors = self.single if alone else self.double[levels[m - 1]]  # type: ignore[index]
            total += self.coefficient**m * float(errors[j, k])
        return total


def gits(
    denoiser: Denoiser | Callable[..., Tensor],
    process: Process | str | None = None,
    *,
    shape: Sequence[int] | None = None,
    n: int = 64,
    seeds: int | Sequence[int] | None = 0,
    x: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    order: Literal[1, 2] = 1,
    unit: Literal["spread", "signal"] = "spread",
    coefficient: float = 1.15,
    nodes: int = 61,
    fine: str | GridFunction | Tensor | Sequence[float] = "uniform_lam",
    teacher: str | Solver = "adams3",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> SearchedGrid:
    """A grid for this model, from its own trajectories.

    `grid=gits(model)` serves for every number of levels up to `nodes`.

        best = gits(model, shape=(3, 32, 32))
        sample(model, solver="ddim", nfe=6, grid=best)

    - `denoiser`, `process`, `shape`, `condition`, `batch_size`, `device`, `dtype`: as of `sample`.
    - `n`, `seeds`: how many trajectories, and their noise; or `x`, the states to start from.
    - `order`: of the steps whose errors are counted: 1, a step of DDIM, as published; 2, one of
      DPM-Solver++ 2M (exponential Adams of order 2 in x0 and lam), for the multistep methods from
      some eight calls on; below, what counts is not the local error.
    - `unit`: what errors are measured in. The `"spread"` of the states at the level: an error in
      that unit is what a Gaussian keeps to the end. Or the `"signal"` s, as published, which weighs
      errors at high noise more.
    - `coefficient`: the discount g. Above 1 later errors, nearer to the data, count more.
    - `nodes`, `fine`: how many levels to choose from, and the grid on which they lie, or their
      times.
    - `teacher`: the solver of the trajectories, deterministic, with one call a level.

    Cost: `nodes - 1` network calls for `n` samples, and memory for as many states and predictions.
    """
    if order not in (1, 2):
        raise ValueError(f"gits counts the errors of steps of order 1 or 2; got {order!r}")
    one_of("unit", unit, ("spread", "signal"))
    positive_number("coefficient", coefficient)
    method = solver(teacher)
    if method.stochastic:
        raise ValueError(
            f"the teacher of gits follows the probability flow; {teacher!r} is stochastic"
        )
    path = run(
        Request(
            score_fn=denoiser,
            process=process,
            solver=method,
            grid=_fine(fine, nodes),
            nfe=nodes - 1 if isinstance(fine, str) or callable(fine) else None,
            shape=shape,
            n=n if x is None else None,
            seeds=seeds if x is None else None,
            x=x,
            condition=condition,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            finish=False,
            trajectory=True,
            x0s=True,
        )
    )
    assert path.trajectory is not None
    assert path.x0s is not None
    levels = path.process.levels(path.times)
    if len(path.x0s) != len(levels) - 1:
        raise ValueError(
            f"the teacher of gits asks the network once a level, and {teacher!r} asked"
            f" {len(path.x0s)} times on {len(levels)}"
        )
    states, predictions = path.trajectory.flatten(2), path.x0s.flatten(2)
    if unit == "signal":
        units = [level.s for level in levels]
    else:
        centre = states.mean(1, keepdim=True) if states.shape[1] > 1 else 0.0
        units = (states - centre).square().mean((1, 2)).sqrt().tolist()
    single, double = _errors(levels, states, predictions, units, order)
    return SearchedGrid(path.process, path.times, single, double, float(coefficient))


def _fine(fine: str | GridFunction | Tensor | Sequence[float], nodes: int) -> GridFunction | Tensor:
    """The grid to choose from; `nodes` is the number of its levels."""
    if isinstance(fine, str):
        fine = grid_function(fine)
    if callable(fine):
        whole_number("nodes", nodes, 3, of="levels to choose from", error=GridError)
        return fine
    times = check_times(fine)
    if len(times) < 3 or times[0] < times[-1]:
        raise GridError("gits chooses from at least 3 times, which fall")
    return times


def _errors(
    levels: Sequence[Level], x: Tensor, x0: Tensor, units: Sequence[float], order: int
) -> tuple[Tensor, Tensor | None]:
    """The mean errors of steps of one point `[M, M]` and of two `[M, M, M]`.

    They are infinite where there is no step.

    `x` is `[M, B, D]` and `x0` `[M - 1, B, D]`.
    """
    m, root = len(levels), math.sqrt(x.shape[-1])
    single = torch.full((m, m), math.inf, dtype=torch.float64)
    double = torch.full((m, m, m), math.inf, dtype=torch.float64) if order == 2 else None
    for j, t in enumerate(levels[:-1]):
        later = [*zip(levels[j + 1 :], units[j + 1 :], strict=True)]
        keep = [to.sigma / t.sigma / unit for to, unit in later]
        gain = [(to.s - to.sigma / t.sigma * t.s) / unit for to, unit in later]
        there = _column([1.0 / unit for _, unit in later], x) * x[j + 1 :]
        miss = _column(keep, x) * x[j] + _column(gain, x) * x0[j] - there
        square = miss.square().sum(-1)
        single[j, j + 1 :] = square.sqrt().mean(-1).cpu().double() / root
        if double is None or j == 0:
            continue
        # What a level without signal, which lam cannot reach, leaves.
        double[:j, j, j + 1 :] = single[j, j + 1 :]
        first = 0 if has_signal(levels[0]) else 1
        if first >= j:
            continue
        turn = x0[j] - x0[first:j]
        # The weight of the slope: s I_1(h) h / (lam_j - lam_i), as DPM-Solver++ 2M has it, in the
        # level's unit.
        growth = [to.s * moment(1, to.lam - t.lam) * (to.lam - t.lam) / unit for to, unit in later]
        back = torch.tensor([t.lam - level.lam for level in levels[first:j]], dtype=torch.float64)
        slope = torch.tensor(growth, dtype=torch.float64) / back.unsqueeze(1)
        weight = slope.to(x.dtype).to(x.device).unsqueeze(-1)
        both = torch.einsum("ibd,kbd->ikb", turn, miss)
        total = square + 2.0 * weight * both + weight.square() * turn.square().sum(-1).unsqueeze(1)
        double[first:j, j, j + 1 :] = total.clamp_min(0.0).sqrt().mean(-1).cpu().double() / root
    return single, double


def _column(numbers: Sequence[float], x: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)


def _shortest(cost: Tensor, start: int, end: int, steps: int, g: float) -> list[int]:
    """The path of so many steps from `start` to `end` with the least discounted cost.

    `cost[j, k]` is infinite for `k <= j`.
    """
    value, choices = cost[:, end], []
    for _ in range(steps - 1):
        value, choice = (cost + g * value).min(1)
        choices.append(choice)
    path = [start]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, end]


def _shortest_of_pairs(
    single: Tensor, double: Tensor, start: int, end: int, steps: int, g: float
) -> list[int]:
    """The same where the cost of a step depends on the level before it too.

    It is a path through pairs of levels.
    """
    value, choices = double[:, :, end], []
    for _ in range(steps - 2):
        value, choice = (double + g * value.unsqueeze(0)).min(2)
        choices.append(choice)
    path = [start, int((single[start] + g * value[start]).argmin())]
    for choice in reversed(choices):
        path.append(int(choice[path[-2], path[-1]]))
    return [*path, end]
