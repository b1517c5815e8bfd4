"""Whether more calls are ever worse: `auto` at every budget on the targets of the benchmark.

The error is that against the exact flow at zero noise, relative to the rms of the exact results:
root mean square and median over 64 starts, in float64. The exact flow is solved by the corrected
exponential Adams method of order 4 at 400 levels. A budget is worse where its rms error is above
1.2 times the least at fewer calls, and above 1e-6. No search of `auto` has seen these targets, the
cosine process or rectified flow.

    python -m benchmarks.accuracy.more_calls --data test.parquet
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import problems
from benchmarks.report import RESULTS, table, write
from sdeflow import EDM, registry
from sdeflow.reverse import Reverse
from sdeflow.solvers.auto.grid import auto
from sdeflow.solvers.auto.solver import Auto
from sdeflow.solvers.ode.adams import ExponentialAdams

BUDGETS = (*range(3, 41), 45, 50, 60, 80, 100)
SHOWN = (5, 6, 8, 10, 15, 20, 35, 50, 100)
STARTS = 64


def against_peers(results: dict[str, Any]) -> str:
    """A table of the ratio to the best peer setting of each cell, from `results/accuracy.json`.

    The peers' errors there are against the denoised prediction at `t_min` of the exact flow, where
    their solves end; those of `auto` against the flow at zero noise, where its solves end.
    """
    cells = json.loads((RESULTS / "accuracy.json").read_text())["cells"]
    ratios: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        mine = results.get(f"{cell['target']} {cell['process']}")
        if mine is not None and cell["nfe"] in BUDGETS and cell["nfe"] >= 5:
            found = mine["errors"].get(cell["nfe"], mine["errors"].get(str(cell["nfe"])))
            pair = dict(zip(("rms", "median"), found, strict=True))
            ratio = pair[cell["measure"]] / cell["peer"][0]
            ratios.setdefault((cell["measure"], cell["nfe"]), []).append(ratio)
    rows = []
    for (measure, nfe), some in sorted(ratios.items()):
        mean = math.exp(sum(map(math.log, some)) / len(some))
        three = f"{sum(r <= 3 for r in some)} of {len(some)}"
        rows.append([measure, nfe, f"{mean:.2f}", three, f"{max(some):.1f}"])
    return table(["error", "NFE", "geometric mean", "at most 3 times", "worst"], rows)


def errors(x: Tensor, end: Tensor) -> tuple[float, float]:
    each = (x - end).flatten(1).square().mean(1)
    size = end.square().mean()
    return float((each.mean() / size).sqrt()), float((each.median() / size).sqrt())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a parquet file of images, for the target of images")
    parser.add_argument("--cache", default="/tmp/sdeflow-accuracy")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    results: dict[str, Any] = {}
    worse = 0
    for name in problems.TARGETS:
        if name == "images" and arguments.data is None:
            continue
        exact = problems.target(name, arguments.data, Path(arguments.cache))
        draw = torch.Generator().manual_seed(1)
        unit = torch.randn(STARTS, *(exact.shape or ()), generator=draw, dtype=torch.float64)
        for process_name in problems.PROCESSES:
            process = registry.process(process_name)
            top = process.level(process.t_max)
            # The reference goes to a ratio of 0.001 and integrates from there, on EDM's path.
            high = min(top.nsr, 1e5)
            fine = ExponentialAdams(4, "v", "lam", True, predicts_scale=0.5, to_zero="smooth")
            times = torch.exp(torch.linspace(math.log(high), math.log(1e-3), 400).double())
            path = EDM(t_min=1e-3, t_max=high)
            times[0], times[-1] = high, 1e-3
            start = unit * math.hypot(1.0, high)
            end = fine.integrate(Reverse(exact.under(path)), start, times, None).x
            denoiser, x = exact.under(process), unit * math.hypot(top.s, top.sigma)
            found: dict[int, tuple[float, float]] = {}
            least = math.inf
            bad = []
            for nfe in BUDGETS:
                times = auto(process, nfe, table="density")
                got = Auto(table="density").integrate(Reverse(denoiser), x, times, None).x
                found[nfe] = errors(got, end)
                if found[nfe][0] > max(1.2 * least, 1e-6):
                    bad.append(nfe)
                least = min(least, found[nfe][0])
            worse += len(bad)
            results[f"{name} {process_name}"] = {"errors": found, "worse": bad}
            shown = [f"{found[n][0]:.2g}, {found[n][1]:.2g}" for n in SHOWN]
            rows.append([name, process_name, *shown, len(bad)])
            print(*rows[-1], flush=True)
    head = ["target", "process", *(f"NFE {n}" for n in SHOWN), "worse"]
    text = (
        "Error of `auto` against the exact flow at zero noise, root mean square and median over"
        f" {STARTS} starts. Worse: of {len(BUDGETS)} budgets from 3 to 100 calls, those whose rms"
        f" error is more than 1.2 times the least at fewer calls; {worse} in all.\n\n"
    )
    text += table(head, rows)
    text += (
        "\n\nIts ratio to the best peer setting of each cell, chosen in hindsight for every target,"
        " process and budget:\n\n"
    )
    write("more_calls", {"targets": results}, text + against_peers(results), arguments.out)


if __name__ == "__main__":
    main()
