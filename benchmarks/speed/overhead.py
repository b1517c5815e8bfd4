"""Time per network call of sdeflow's solvers around a free model, against the leanest loop that a
hand can write.

The lean loop is these five lines, run beside the solvers on the same machine at the same minute:

    levels = [float(t) for t in times]
    for a, b in zip(levels, levels[1:]):
        x = torch.lerp(model(x), x, b / a)
    x = model(x)

(EDM's process, Euler; the model is free: it returns a tensor that is there already.) Solvers are
timed through their public path, `solver.integrate`, with the plan traced beforehand as it is from a
process's second solve on; the first solve, tracing included, is reported beside it. Stochastic
solvers are timed with their draws and without (noise that is there already).

    python -m benchmarks.speed.overhead [--device cuda] [--levels 50] [--all]
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from itertools import cycle, pairwise

import torch
from torch import Tensor

from benchmarks.report import table, write
from sdeflow import (
    DDIM,
    EDM,
    VP,
    Euler,
    Heun,
    Noise,
    Prediction,
    Process,
    Reverse,
    SeededNoise,
    registry,
)
from sdeflow.errors import BudgetError
from sdeflow.registry import grid_function
from sdeflow.solvers.base import GridSolver

CASES = (
    *(
        "auto",
        "euler",
        "ddim",
        "heun",
        "adams2",
        "adams3",
        "adams4",
        "dpmpp_2m",
        "dpmpp_3m",
        "unipc_2",
        "unipc_3",
    ),
    *(
        "deis_tab2",
        "lms",
        "ipndm",
        "dpm_solver_3",
        "dpmpp_2s",
        "ddpm",
        "euler_maruyama",
        "langevin",
        "dpmpp_2m_sde",
    ),
    *("dpmpp_3m_sde", "seeds_2", "sa_solver", "er_sde_3", "stochastic_adams2", "churn"),
)
"""The registered solvers that are timed, unless `--all` are."""


def every_grid_solver() -> list[tuple[str, GridSolver]]:
    """The registered solvers that step over a grid."""
    made = [
        (name, entry.make())
        for name, entry in registry.SOLVERS.items()
        if entry.kind.__module__.startswith("sdeflow.")
    ]
    return [
        (name, solver)
        for name, solver in made
        if isinstance(solver, GridSolver) and name != "annealed_langevin"
    ]


def levels_of(solver: GridSolver, calls: int) -> int:
    """Levels for about so many calls."""
    for nfe in range(calls, 0, -1):
        try:
            return solver.levels(nfe)
        except BudgetError:
            continue
    raise BudgetError(f"{solver} spends more than {calls} calls")


class Ready(Noise):
    """Noise that costs nothing: one tensor, over and over."""

    def __init__(self, like: Tensor):
        self.z, self.seeds = torch.randn_like(like), ()

    def start(self) -> Tensor:
        return self.z

    def draw(self, nsr: float | None = None, nsr_next: float | None = None, **_: Tensor) -> Tensor:
        return self.z


def lean(model: Callable[[Tensor], Tensor], x: Tensor, times: list[float]) -> Tensor:
    """The hand-written Euler loop."""
    for a, b in pairwise(times):
        x = torch.lerp(model(x), x, b / a)
    return model(x)


def clock(run: Callable[[], object], sync: Callable[[], None]) -> float:
    sync()
    began = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--levels", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shape", type=int, nargs="+", default=[64, 3, 32, 32])
    parser.add_argument(
        "--all",
        action="store_true",
        help="every registered solver of a grid, not the usual ones alone",
    )
    parser.add_argument("--out", default=None, help="where to write the results, .json and .md")
    options = parser.parse_args()
    device = torch.device(options.device)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.set_grad_enabled(False)

    x = torch.randn(options.shape, device=device)
    # The free model hands out tensors that are there already, one after the other as a network's
    # allocator would: no call finds its output in a cache, for anybody.
    ring = cycle([torch.randn_like(x) for _ in range(6)])

    # One step solvers under two processes, to show that the process costs nothing; the others under
    # VP.
    cases: list[tuple[str, GridSolver, Process]] = [
        ("euler", Euler(), EDM()),
        ("ddim", DDIM(), EDM()),
        ("heun", Heun(), EDM()),
        *(
            (name, solver, VP())
            for name, solver in every_grid_solver()
            if options.all or name in CASES
        ),
    ]

    def prepare(
        solver: GridSolver, process: Process, drawn: bool
    ) -> tuple[Callable[[], object], int, float]:
        times = grid_function("uniform_lam")(process, levels_of(solver, options.levels))
        denoiser = Prediction(lambda x, t: next(ring), "x0", process)
        first = clock(lambda: solver.plan(process, times), sync)
        noise = (
            SeededNoise(list(range(options.shape[0])), tuple(options.shape[1:]), device=device)
            if drawn
            else Ready(x)
        )
        return (
            (lambda: solver.integrate(Reverse(denoiser), x, times, noise)),
            solver.plan(process, times).nfe,
            first,
        )

    edm_times = grid_function("uniform_lam")(EDM(), options.levels).tolist()
    model = lambda x: next(ring)  # noqa: E731
    runs: dict[str, tuple[Callable[[], object], int, float]] = {
        "lean": (lambda: lean(model, x.clone(), edm_times), options.levels, 0.0)
    }
    for name, solver, process in cases:
        key = f"{name}, {type(process).__name__}"
        runs[key] = prepare(solver, process, False)
        if solver.stochastic:
            runs[key + ", with draws"] = prepare(solver, process, True)

    # Interleaved, so that what else the machine does falls on all alike.
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for run, _, _ in runs.values():
        clock(run, sync)
        clock(run, sync)
    for _ in range(options.repeats):
        for key, (run, calls, _) in runs.items():
            seconds[key].append(clock(run, sync) / calls * 1e6)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    best = {key: min(values) for key, values in seconds.items()}

    # Ratios of medians over rounds: each round's runs lie side by side in time.
    ratio = {
        key: statistics.median(a / b for a, b in zip(values, seconds["lean"], strict=True))
        for key, values in seconds.items()
    }
    rows = [
        [
            key,
            f"{median[key]:.1f}",
            f"{best[key]:.1f}",
            f"{ratio[key]:.2f}",
            f"{runs[key][2] * 1e3:.1f}",
        ]
        for key in runs
    ]
    markdown = table(
        [
            "solver, process",
            "us a call, median",
            "us a call, best",
            "x lean loop",
            "tracing the plan once, ms",
        ],
        rows,
    )
    markdown += f"\n\nState {list(options.shape)} float32, {options.levels} levels. The lean loop:"
    markdown += f"\n\n```python\n{inspect.getsource(lean)}```"
    results = {
        "shape": options.shape,
        "levels": options.levels,
        "us_per_call": median,
        "us_per_call_best": best,
        "ratio": ratio,
    }
    write(f"overhead_{'cpu' if device.type == 'cpu' else 'h200'}", results, markdown, options.out)


if __name__ == "__main__":
    main()
