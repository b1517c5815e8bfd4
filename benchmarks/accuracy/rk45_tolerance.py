"""RK45's error against its tolerance, and its calls against those of torchdiffeq's dopri5 at equal
error.

The problem is the probability-flow ODE of a 64-d mixture of 50 anisotropic Gaussians (exact scores,
float64), from the process's true end of time to its start. The reference is torchdiffeq's dopri8 in
the clock asinh(s / sigma) at a tolerance of 1e-12, in batches of 32. Errors are root mean squares
over the 64 entries, in units of the data's standard deviation; calls are the mean over the samples
of the calls that a sample took. dopri5 steps all samples at once, in the process's own time `t` and
in log SNR (which cannot start where no signal is left), and is told to stop at the last time
instead of stepping over it, which spares it calls.

    python -m benchmarks.accuracy.rk45_tolerance [--n 128] [--process vp edm rectified_flow]
"""

from __future__ import annotations

import argparse
import math
import os
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import table, write
from sdeflow import registry
from sdeflow.errors import SdeflowError
from sdeflow.process import Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.adaptive.runge_kutta import RK45
from sdeflow.solvers.base import Solver
from sdeflow.solvers.external.torchdiffeq import TorchDiffEq
from sdeflow.targets import GaussianMixture

TOLERANCES = [10.0 ** (-k / 2) for k in range(4, 17)]
ERRORS = (1e-3, 1e-5, 1e-7)


def mixture(process: Process, dim: int = 64, k: int = 50, seed: int = 0) -> GaussianMixture:
    """Components with standard deviations from 0.03 to 0.9 along random axes, and means of standard
    deviation 0.8.
    """
    generator = torch.Generator().manual_seed(seed)
    std = (
        torch.empty(k, dim, dtype=torch.float64)
        .uniform_(math.log(0.03), math.log(0.9), generator=generator)
        .exp()
    )
    basis = torch.linalg.qr(torch.randn(k, dim, dim, dtype=torch.float64, generator=generator))[0]
    means = 0.8 * torch.randn(k, dim, dtype=torch.float64, generator=generator)
    return GaussianMixture(
        None, means, cov=(basis * std.unsqueeze(1) ** 2) @ basis.mT, process=process
    )


def solve(solver: Solver, target: GaussianMixture, x: Tensor) -> tuple[Tensor, float, int]:
    """States at the end of time, mean calls a sample, and forwards."""
    process = target.process
    times = torch.tensor([process.t_max, process.t_min], dtype=torch.float64)
    solution = solver.integrate(Reverse(target), x, times, None, finish=False)
    calls = solution.statistics.get("nfe")
    return (
        solution.x,
        float(calls.double().mean()) if calls is not None else float(solution.nfe),
        solution.nfe,
    )


def curve(
    solvers: list[Solver], target: GaussianMixture, x: Tensor, exact: Tensor, std: float
) -> list[dict[str, Any]]:
    """Error and calls at each tolerance."""
    rows = []
    for solver in solvers:
        try:
            end, calls, forwards = solve(solver, target, x)
        except SdeflowError as error:
            return [{"error": str(error)}]
        errors = (end - exact).pow(2).mean(1).sqrt() / std
        rows.append(
            {
                "tolerance": solver.rtol,  # type: ignore[attr-defined]
                "median": float(errors.median()),
                "p99": float(errors.quantile(0.99)),
                "max": float(errors.max()),
                "calls": calls,
                "forwards": forwards,
            }
        )
    return rows


def calls_at(rows: list[dict[str, Any]], error: float) -> float | None:
    """Calls at a median error, log-log between the tolerances that bracket it."""
    if "median" not in rows[0]:
        return None
    for a, b in pairwise(rows):
        if a["median"] >= error >= b["median"]:
            w = math.log(a["median"] / error) / math.log(a["median"] / b["median"])
            return math.exp((1 - w) * math.log(a["calls"]) + w * math.log(b["calls"]))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=128, help="samples")
    parser.add_argument(
        "--process", nargs="+", default=["vp", "edm", "rectified_flow"], help="names of processes"
    )
    parser.add_argument(
        "--out",
        default=None,
        help="where to write, by default benchmarks/results/rk45_tolerance.json",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    torch.set_grad_enabled(False)
    tolerance_rows: list[list[Any]] = []
    calls_rows: list[list[Any]] = []
    results: dict[str, Any] = {
        "samples": arguments.n,
        "torchdiffeq": version("torchdiffeq"),
        "processes": {},
    }
    for name in arguments.process:
        process = registry.process(name)
        target = mixture(process)
        std = float((target.covariance().trace() / 64).sqrt())
        generator = torch.Generator().manual_seed(1)
        x = (
            torch.randn(arguments.n, 64, dtype=torch.float64, generator=generator)
            * process.prior_std
        )
        reference = TorchDiffEq("dopri8", rtol=1e-12, atol=1e-12, clock="asinh", max_nfe=100_000)
        exact = torch.cat([solve(reference, target, part)[0] for part in x.split(32)])
        families: dict[str, list[Solver]] = {
            "RK45": [RK45(rtol=tol, atol=tol) for tol in TOLERANCES],
            "dopri5 in t": [TorchDiffEq("dopri5", rtol=tol, atol=tol) for tol in TOLERANCES],
            "dopri5 in lam": [
                TorchDiffEq("dopri5", rtol=tol, atol=tol, clock="lam") for tol in TOLERANCES
            ],
        }
        curves = {
            family: curve(solvers, target, x, exact, std) for family, solvers in families.items()
        }
        results["processes"][name] = {"data std": std, **curves}
        for row in curves["RK45"]:
            tolerance = row["tolerance"]
            if any(math.isclose(tolerance, asked) for asked in ERRORS):
                ratios = [f"{row[key] / tolerance:.2g}" for key in ("median", "p99", "max")]
                tolerance_rows.append(
                    [name, f"{tolerance:.0e}", *ratios, f"{row['calls']:.1f}", row["forwards"]]
                )
        for error in ERRORS:
            counts = [calls_at(rows, error) for rows in curves.values()]
            calls_rows.append(
                [name, f"{error:.0e}", *("-" if c is None else f"{c:.0f}" for c in counts)]
            )
        print(table(["process", "error", *families], calls_rows[-3:]), flush=True)
    markdown = "\n\n".join(
        [
            "RK45 at rtol = atol: error over tolerance, in units of the data's standard deviation.",
            table(
                [
                    "process",
                    "tolerance",
                    "median",
                    "99th percentile",
                    "max",
                    "calls a sample",
                    "forwards",
                ],
                tolerance_rows,
            ),
            "Calls a sample at equal median error (interpolated between tolerances).",
            table(["process", "median error", "RK45", "dopri5 in t", "dopri5 in lam"], calls_rows),
        ]
    )
    write("rk45_tolerance", results, markdown, arguments.out)


if __name__ == "__main__":
    main()
