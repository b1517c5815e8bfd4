"""Search of the tables of `solver="auto"` for known densities (from 8 calls) and for networks that
predict the noise.

A row (`sdeflow.solvers.auto.recipes.Recipe`) is judged on cells: targets under processes, and for
the second table the small networks of `few_calls.py`. Each cell gives the ratio of the row's error
(median and root mean square over starts) to the least error of the named settings in hindsight.
The score weighs the mean of the logarithms of the ratios and the worst of them, and adds what is
worse than at fewer calls. Rows are mutated at random, in the order of the budgets.

    python -m benchmarks.defaults.search_tables density --nfe 8 12 16 --seconds 300
    python -m benchmarks.defaults.search_tables noise --nfe 3 4 5 6 8 --cache /tmp/few_calls
    python -m benchmarks.defaults.search_tables density --judge

`benchmarks/results/search_tables.json` holds the rows of the tables. They were chosen among the
results of several searches by the worst ratio, on two contended cores; from 16 calls on all numbers
of the table for densities are those of the row for 16, but for the second level and the last.
Not in any search: the cosine process and rectified flow, the targets of the accuracy benchmark,
and the networks that `few_calls.py` marks as held out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdeflow
from benchmarks.defaults import few_calls
from benchmarks.report import RESULTS
from sdeflow import GaussianMixture
from sdeflow.denoisers import Denoiser
from sdeflow.process import EDM, VP, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.auto.grid import lay
from sdeflow.solvers.auto.recipes import TABLES, Recipe, recipe
from sdeflow.solvers.auto.solver import Auto, member, table_for
from sdeflow.solvers.ode.adams import ExponentialAdams

NAMED = [
    *(("dpmpp_2m", grid) for grid in ("karras", "uniform_lam", "uniform_sqrt_t")),
    *(("unipc_3", grid) for grid in ("uniform_lam", "uniform_sqrt_t")),
    *(("ipndm3", grid) for grid in ("uniform_lam", "karras", "uniform_sqrt_t")),
    *(("ipndm2", "uniform_sqrt_t"), ("dpm_solver_2m", "uniform_sqrt_t")),
    *(("deis_tab2", "uniform_sqrt_t"), ("deis_tab3", "uniform_sqrt_t")),
]
FAMILIES = {  # p, frame, clock, corrector
    "density": [(4, "flow", "angle", True), (3, "flow", "bounded_lam", True)],
    "noise": [(2, "flow", "bounded_lam", True), (3, "flow", "bounded_lam", True)],
}
NUMBERS = ("frame_scale", "clock_scale", "center", "high", "low", "nsr_end", "nsr_top", "nsr_asked")
BOUNDS = {
    **dict.fromkeys(("frame_scale", "clock_scale"), (0.05, 500.0)),
    **dict.fromkeys(("high", "low"), (0.05, 3.0)),
    **{"nsr_end": (1e-3, 1.0), "nsr_top": (0.5, 1e3), "nsr_asked": (5.0, 500.0)},
}


class Cell:
    """A denoiser under a process, starts, and where its exact ODE takes them."""

    def __init__(self, name: str, denoiser: Denoiser, starts: int):
        self.name, self.denoiser, process = name, denoiser, denoiser.process
        top = process.level(process.t_max)
        draw = torch.Generator().manual_seed(11)
        shape = denoiser.shape or ()
        known = table_for(denoiser) == "density"
        dtype = torch.float64 if known else torch.float32
        unit = torch.randn(starts, *shape, generator=draw, dtype=torch.float64).to(dtype)
        self.x = unit * math.hypot(top.s, top.sigma)
        fine = ExponentialAdams(
            4 if known else 2,
            "v",
            "lam",
            known,
            predicts_scale=0.5,
            to_zero="smooth" if known else "linear",
        )
        self.end = self.solve(fine, "uniform_lam", 400)
        self._best: dict[int, tuple[float, float]] = {}

    def solve(self, solver: Any, grid: Any, nfe: int) -> Tensor:
        start: Any = {"x": self.x, "t": self.denoiser.process.t_max}
        return sdeflow.solve(self.denoiser, solver=solver, grid=grid, nfe=nfe, **start).x

    def errors(self, x: Tensor) -> tuple[float, float]:
        """Median and root mean square over samples, relative to the exact ends."""
        each = (x - self.end).flatten(1).square().mean(1) / self.end.square().mean()
        each = each.nan_to_num(1e12, 1e12).sqrt()
        return float(each.median()), float(each.square().mean().sqrt())

    def best(self, nfe: int) -> tuple[float, float]:
        """The least errors of the named settings."""
        if nfe not in self._best:
            found = [self.errors(self.solve(solver, grid, nfe)) for solver, grid in NAMED]
            self._best[nfe] = min(a for a, _ in found), min(b for _, b in found)
        return self._best[nfe]

    @torch.no_grad()
    def row(self, row: Recipe, nfe: int) -> tuple[float, float]:
        """The errors of a row."""
        process = self.denoiser.process
        try:
            times, solver = lay(process, nfe, row), _Given(row)
            return self.errors(solver.integrate(Reverse(self.denoiser), self.x, times, None).x)
        except ValueError:  # a grid that the process cannot have
            return 1e6, 1e6


class _Given(Auto):
    """`auto` with a row in place of the table's."""

    def __init__(self, row: Recipe):
        super().__init__()
        object.__setattr__(self, "row", row)

    def recipe(self, levels: int) -> Recipe:
        return self.row  # type: ignore[attr-defined]

    def member(self, levels: int) -> ExponentialAdams:
        return member(self.recipe(levels))


def _modes() -> GaussianMixture:
    draw = torch.Generator().manual_seed(12)
    means = torch.randn(12, 2, generator=draw, dtype=torch.float64)
    means = means - means.mean(0)
    means = means * math.sqrt((0.25 - 0.01) / float(means.square().mean()))
    return GaussianMixture(torch.ones(12), means, std=0.1)


def _widths() -> GaussianMixture:
    draw = torch.Generator().manual_seed(32)
    means = 0.4 * torch.randn(30, 24, generator=draw, dtype=torch.float64)
    stds = 0.05 * torch.exp(math.log(10) * torch.rand(30, generator=draw, dtype=torch.float64))
    return GaussianMixture(torch.ones(30), means, std=stds)


def _spectrum(stds: Tensor) -> GaussianMixture:
    zero = torch.zeros(1, len(stds), dtype=torch.float64)
    return GaussianMixture(torch.ones(1), zero, diag=stds[None] ** 2)


def _targets() -> dict[str, Callable[[], GaussianMixture]]:
    k = torch.arange(1, 65, dtype=torch.float64)
    pink = 0.5 / k / (1 / k).square().mean().sqrt()
    scales = torch.exp(torch.linspace(math.log(0.01), math.log(100.0), 25, dtype=torch.float64))
    single = {f"std {c:g}": torch.tensor([c], dtype=torch.float64) for c in (0.05, 0.1, 0.7, 8.0)}
    spectra = {"pink": pink, "scales": scales, **single}
    made = {name: (lambda stds=stds: _spectrum(stds)) for name, stds in spectra.items()}
    return {"modes": _modes, "widths": _widths, **made}


def cells(table: str, cache: Path, starts: int) -> list[Cell]:
    processes: list[Process] = [VP(), EDM()] if table == "density" else [VP()]
    out = [
        Cell(f"{name}, {type(process).__name__}", make().under(process), starts)
        for name, make in _targets().items()
        for process in processes
    ]
    if table == "noise":
        for name, spec in few_calls.SPECS.items():
            if spec.predicts in ("eps", "score") and not spec.held_out:
                if (cache / f"net_{name}.pt").exists():
                    out.append(Cell(name, few_calls.denoiser(name, cache, 110.0), starts))
                else:
                    print(f"{name} is left out: few_calls.py has not trained it", flush=True)
    return out


def judged(row: Recipe, nfe: int, some: list[Cell]) -> list[tuple[float, float]]:
    """A pair a cell: the logarithm of the ratio to the named settings, and the error."""
    out = []
    for cell in some:
        (a, b), (c, d) = cell.row(row, nfe), cell.best(nfe)
        least = 1e-2 * (8 / nfe) ** 4 if "std" in cell.name else 1e-5
        ratio = 0.5 * (
            math.log(max(a, least) / max(c, least)) + math.log(max(b, least) / max(d, least))
        )
        out.append((ratio, b))
    return out


def score(found: list[tuple[float, float]], before: list[float]) -> float:
    ratios = [ratio for ratio, _ in found]
    mean = sum(ratios) / len(ratios)
    worst = math.log(sum(math.exp(3 * ratio) for ratio in ratios) / len(ratios)) / 3
    worse = sum(max(0.0, math.log(b / (1.1 * a))) for (_, b), a in zip(found, before, strict=True))
    return 0.5 * mean + 0.5 * worst + 0.15 * worse


def mutated(row: Recipe, draw: random.Random) -> Recipe:
    names = NUMBERS if math.isfinite(row.nsr_asked) else NUMBERS[:-1]
    numbers: Any = {}
    for name in draw.sample(names, draw.choice((1, 1, 2, 3))):
        if name == "center":
            numbers[name] = row.center + draw.gauss(0.0, 0.2)
        else:
            low, high = BOUNDS[name]
            value = getattr(row, name) * math.exp(draw.gauss(0.0, 0.2))
            numbers[name] = min(max(value, low), high)
    return replace(row, **numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=("density", "noise"))
    parser.add_argument(
        "--judge", action="store_true", help="measure the table, and search nothing"
    )
    parser.add_argument("--nfe", type=int, nargs="+", default=[8, 12, 16, 40, 80])
    parser.add_argument("--seconds", type=float, default=300.0, help="of search, a budget")
    parser.add_argument("--cache", default="/tmp/sdeflow-few-calls", help="of few_calls.py")
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--out", default=str(RESULTS / "search_tables-found.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    some = cells(arguments.table, Path(arguments.cache), arguments.starts)
    before = [math.inf] * len(some)
    rows: dict[str, Any] = {}
    for nfe in sorted(arguments.nfe):
        now = recipe(nfe, table=arguments.table)
        pool = [(score(found := judged(now, nfe, some), before), now, found)]
        began, draw = time.perf_counter(), random.Random(nfe)
        if not arguments.judge:
            for p, frame, clock, corrector in FAMILIES[arguments.table]:
                for known in TABLES[arguments.table].values():
                    row = replace(known, p=p, frame=frame, clock=clock, corrector=corrector)
                    pool.append((score(found := judged(row, nfe, some), before), row, found))
            while time.perf_counter() - began < arguments.seconds:
                pool = sorted(pool, key=lambda entry: entry[0])[:12]
                row = mutated(draw.choice(pool[:5])[1], draw)
                pool.append((score(found := judged(row, nfe, some), before), row, found))
        value, row, found = min(pool, key=lambda entry: entry[0])
        before = [min(a, max(b, 1e-6)) for a, (_, b) in zip(before, found, strict=True)]
        rows[str(nfe)] = {"score": value, "recipe": asdict(row)}
        shown = (f"{cell.name} {math.exp(a):.2f}" for cell, (a, _) in zip(some, found, strict=True))
        print(nfe, f"{value:.3f}", "; ".join(shown), flush=True)
    if not arguments.judge:
        Path(arguments.out).write_text(json.dumps({arguments.table: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
