"""`auto` on the bundled network, beside published methods: error of a solve against the network's own solution at 100 calls.

python benchmarks/auto_network.py [--samples 2]
"""

from __future__ import annotations

import argparse

import torch
from _report import table, write

from sdeflow import solve
from sdeflow.models.checkpoint import load

METHODS = (("auto", "auto"), ("dpmpp_2m", "karras"), ("dpmpp_2m", "uniform_lam"), ("adams3", "karras"))
BUDGETS = (5, 6, 7, 8, 10, 12, 14, 16, 20, 25, 35)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2)
    options = parser.parse_args()
    denoiser = load("cifar10")
    label = {"label": torch.arange(options.samples) % 10}

    def end(solver: str, grid: str, nfe: int) -> torch.Tensor:
        seeds = range(50, 50 + options.samples)
        return solve(denoiser, solver=solver, grid=grid, nfe=nfe, n=options.samples, seeds=seeds, condition=label).x

    exact = end("adams3", "karras", 100)
    errors = {
        f"{solver}, {grid}": [float((end(solver, grid, nfe) - exact).norm() / exact.norm()) for nfe in BUDGETS]
        for solver, grid in METHODS
    }
    rows = [[name, *(f"{error:.3f}" for error in found)] for name, found in errors.items()]
    markdown = table(["solver, grid", *(f"NFE {nfe}" for nfe in BUDGETS)], rows)
    markdown += f"\n\nRelative error of {options.samples} samples, of other seeds than those that chose the recipes."
    write("auto_network", {"budgets": BUDGETS, "errors": errors}, markdown)


if __name__ == "__main__":
    main()
