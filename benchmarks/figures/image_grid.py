"""Which grid suits the bundled model: Heun at 35 calls against the exact solution of its
probability-flow ODE.

The same starts are solved by RK45 to a tolerance that is tight beside the differences shown; the
error is the root mean square over pixels, in the data's units of [-1, 1].

    python -m benchmarks.figures.image_grid [--device cuda]
"""

from __future__ import annotations

import argparse

import torch

import sdeflow
from benchmarks.report import table, write
from sdeflow import RK45


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=3e-4)
    options = parser.parse_args()
    model = sdeflow.load("cifar10", device=options.device)
    common = {"n": options.n, "seeds": 0, "condition": {"label": torch.arange(options.n) % 10}}

    reference = sdeflow.solve(
        model, solver=RK45(rtol=options.tolerance, atol=options.tolerance), **common
    )
    rows = []
    for name in ("karras", "uniform_lam", "uniform_angle"):
        got = sdeflow.solve(model, grid=name, **common)
        rms = (got.x - reference.x).square().flatten(1).mean(1).sqrt()
        rows.append([name, got.nfe, f"{float(rms.mean()):.4f}", f"{float(rms.max()):.4f}"])
        print(rows[-1], flush=True)
    markdown = table(["grid", "NFE", "rms error, mean", "rms error, worst"], rows)
    markdown += (
        f"\n\n{options.n} samples; the reference is RK45 at {options.tolerance:g}, NFE"
        f" {reference.nfe}."
    )
    write("image_grid", {"rows": rows, "reference_nfe": reference.nfe}, markdown)


if __name__ == "__main__":
    main()
