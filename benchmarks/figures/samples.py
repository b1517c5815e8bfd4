"""The bundled model's samples at NFE 35, by Heun and by Euler-Maruyama, the same seeds side by
side.

Upper rows: Heun on the probability-flow ODE. Lower rows: Euler-Maruyama on the reverse SDE of the
same process. How far each is from its own limit is measured too: the root mean square change of the
samples when the budget is raised, on the same noise (the Brownian path for the SDE), in the data's
units of [-1, 1].

    python -m benchmarks.figures.samples [--device cuda]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import sdeflow
from benchmarks.report import table, write
from sdeflow import VP, EulerMaruyama, Heun, images
from sdeflow.solvers.base import GridSolver

FIGURE = Path(__file__).parents[2] / "docs" / "assets" / "heun-euler-maruyama-nfe35.png"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=2, help="rows of ten classes a solver")
    parser.add_argument("--more", type=int, default=4, help="the larger budget, in multiples of 35")
    options = parser.parse_args()

    model = sdeflow.load("cifar10", device=options.device)
    label = torch.arange(10).repeat(options.rows)
    rows, pictures = [], []
    cases: list[tuple[str, GridSolver]] = [("Heun", Heun()), ("Euler-Maruyama", EulerMaruyama())]
    for name, solver in cases:
        runs = {}
        for nfe in (35, 35 * options.more + (options.more % 2 == 0)):  # Heun spends odd budgets
            began = time.perf_counter()
            runs[nfe] = sdeflow.sample(
                model,
                VP(),
                solver=solver,
                nfe=nfe,
                n=len(label),
                seeds=0,
                condition={"label": label},
                noise="brownian",
                progress=True,
            )
            seconds = time.perf_counter() - began
        (low, few), (high, many) = runs.items()
        rms = float((few - many).square().mean().sqrt())
        rows.append([name, low, high, f"{rms:.3f}", f"{seconds:.0f}"])
        pictures.append(few.cpu())
    names = [model.class_names[i] for i in label.tolist()]
    picture = images.grid(
        torch.cat(pictures),
        10,
        labels=names * len(cases),
        row_labels=[name for name, _ in cases for _ in range(options.rows)],
        caption="bundled CIFAR-10 model under VP, NFE 35, the same seeds",
    )
    images.save_png(FIGURE, picture)
    head = ["solver", "NFE", "against NFE", "rms change of the samples", "seconds of the larger"]
    write("samples", {"rows": rows}, table(head, rows))


if __name__ == "__main__":
    main()
