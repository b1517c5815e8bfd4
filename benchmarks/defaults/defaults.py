"""How the processes' defaults were chosen: Heun at 35 calls on Gaussians, over grids, clocks and
ends of time.

A linear denoiser makes the solve linear: the start's standard deviation times one number, which a
run on a single float64 state gives exactly. The error is that of the returned standard deviation,
for data of 0.1, 0.2, 0.5, 1 and 2.

    python -m benchmarks.defaults.defaults
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

import sdeflow
from benchmarks.report import table, write
from sdeflow import (
    EDM,
    RK4,
    RK45,
    VE,
    VP,
    Auto,
    Cosine,
    Gaussian,
    Heun,
    Process,
    RectifiedFlow,
    Solver,
    SubVP,
    grid,
)

STDS = (0.1, 0.2, 0.5, 1.0, 2.0)


def errors(
    process: Process, solver: Solver, times: Any, nfe: int | None = None
) -> tuple[int, list[float]]:
    """The calls spent, and relative errors of the returned standard deviation, exact: one state,
    propagated linearly.
    """
    spent, out = 0, []
    for std in STDS:
        target = Gaussian(torch.zeros(1, dtype=torch.float64), std=std)
        t_max = process.t_max if not isinstance(times, torch.Tensor) else float(times[0])
        start = torch.full((1, 1), float(process.level(t_max).sigma), dtype=torch.float64)
        solution = sdeflow.solve(
            target, process, solver=solver, nfe=nfe, grid=times, x=start, t=t_max
        )
        out.append(float(solution.x) / std - 1.0)
        spent = max(spent, solution.nfe)
    return spent, out


def main() -> None:
    grids = {
        "uniform_t": grid.uniform_t, "uniform_sqrt_t": grid.uniform_sqrt_t,
        "power_t rho=3": lambda p, n, **k: grid.power_t(p, n, rho=3.0, **k), "uniform_lam": grid.uniform_lam, "karras": grid.karras,
        "uniform_angle": grid.uniform_angle,
    }  # fmt: skip
    ends: dict[type[Process], tuple[float, ...]] = {
        VP: (1e-4, 1e-3, 1e-2),
        SubVP: (1e-3, 1e-2),
        Cosine: (1e-4, 1e-3, 1e-2),
        RectifiedFlow: (1e-4, 1e-3, 1e-2),
        EDM: (0.002, 0.01),
        VE: (0.0,),
    }
    rows: list[list[Any]] = []
    results: list[dict[str, Any]] = []
    for kind, mins in ends.items():
        default = kind()
        for t_min, (name, laid), clock in itertools.product(
            mins, grids.items(), ("t", "nsr", "lam")
        ):
            process = kind(t_min=t_min)
            if clock != "t" and float(process.level(process.t_max).s) == 0.0:
                continue
            _, got = errors(process, Heun(clock=clock), laid(process, 18))
            chosen = (
                t_min == default.t_min
                and name == default.default_grid
                and clock == default.default_clock
            )
            results.append(
                {
                    "process": kind.__name__,
                    "t_min": t_min,
                    "grid": name,
                    "clock": clock,
                    "errors": got,
                    "default": chosen,
                }
            )
        mine = [r for r in results if r["process"] == kind.__name__]
        mine.sort(key=lambda r: max(abs(e) for e in r["errors"][1:4]))
        shown = mine[:3] + [r for r in mine[3:] if r["default"]]
        for r in shown:
            rows.append([
                ("**default** " if r["default"] else "") + r["process"], f"{r['t_min']:g}", r["grid"], r["clock"],
                *(f"{100 * e:+.2f}" for e in r["errors"]),
            ])  # fmt: skip
    head = ["process", "t_min", "grid", "clock", *(f"std {std:g}" for std in STDS)]
    markdown = (
        "Error of the returned standard deviation, percent; Heun, NFE 35; the three best settings"
        " and the default.\n\n"
    )
    markdown += table(head, rows)

    others: list[tuple[str, Solver, int | None, str | None]] = [
        ("auto", Auto(), 35, "auto"),
        ("auto", Auto(), 20, "auto"),
        ("Heun", Heun(), 35, None),
        ("Heun, uniform_angle", Heun(), 35, "uniform_angle"),
        ("RK4", RK4(), 33, None),
        ("RK45, rtol = atol = 1e-3", RK45(rtol=1e-3, atol=1e-3), None, None),
    ]
    better: list[list[Any]] = []
    for kind in (VP, RectifiedFlow, EDM):
        process = kind()
        for name, solver, nfe, times in others:
            spent, got = errors(process, solver, times, nfe)
            better.append([kind.__name__, name, spent, *(f"{100 * e:+.3f}" for e in got)])
    markdown += "\n\nWhat other solvers of the library reach at about the same budget, percent:\n\n"
    markdown += table(["process", "solver", "NFE", *(f"std {std:g}" for std in STDS)], better)
    write("defaults", {"stds": STDS, "settings": results}, markdown)


if __name__ == "__main__":
    main()
