"""`auto` on a network, beside published methods: error of a solve against the network's own
solution at 100 calls.

    python -m benchmarks.defaults.auto_network [--samples 6] [--model FILE --out benchmarks/results/auto_network-FILE]

`auto`'s table was searched on the checkpoint before the bundled one; `--model` measures another.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.report import table, write
from sdeflow import solve
from sdeflow.models.checkpoint import load

METHODS = (
    *(("auto", "auto"), ("dpmpp_2m", "karras"), ("ipndm", "karras")),
    *(("unipc_3", "uniform_lam"), ("adams3", "karras")),
)
BUDGETS = (4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 35)
SEED = 6000
"""Of the first sample; the searches had 0 to 31, and `tune_auto.py --judge` has 5000 and on."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--model", default="cifar10", help="a bundled checkpoint or a file")
    parser.add_argument(
        "--out", default=None, help="another name than benchmarks/results/auto_network"
    )
    options = parser.parse_args()
    denoiser = load(options.model)
    label = {"label": torch.arange(options.samples) % 10}

    def end(solver: str, grid: str, nfe: int) -> torch.Tensor:
        seeds = range(SEED, SEED + options.samples)
        return solve(
            denoiser,
            solver=solver,
            grid=grid,
            nfe=nfe,
            n=options.samples,
            seeds=seeds,
            condition=label,
        ).x

    exact = end("adams3", "karras", 100)
    errors = {
        f"{solver}, {grid}": [
            float((end(solver, grid, nfe) - exact).norm() / exact.norm()) for nfe in BUDGETS
        ]
        for solver, grid in METHODS
    }
    rows = [[name, *(f"{error:.3f}" for error in found)] for name, found in errors.items()]
    markdown = table(["solver, grid", *(f"NFE {nfe}" for nfe in BUDGETS)], rows)
    markdown += (
        f"\n\nRelative error of {options.samples} samples, of other seeds than those that chose the"
        " recipes."
    )
    write("auto_network", {"budgets": BUDGETS, "errors": errors}, markdown, options.out)


if __name__ == "__main__":
    main()
