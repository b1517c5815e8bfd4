"""Quality against the number of network calls: FD-CIFAR of the bundled checkpoint for solvers, grids and budgets.

Every pair of solver and grid draws the same `--n` pictures (seeds 0 to n - 1, classes in turn) at every budget that it can spend;
their Frechet distance to the training set is in the features of the bundled network, so it is FD-CIFAR and no FID. A run goes
on where the file ends, on as many GPUs as torchrun is given: each takes pairs of its own and appends to the one file.

    torchrun --nproc-per-node 4 -m benchmarks.nfe_fid --data train.parquet --test test.parquet --out nfe_fid.jsonl
    python -m benchmarks.nfe_fid --out nfe_fid.jsonl --report

`--seconds` is when no new cell is begun. `--n 50000 --only "adams3 karras" --nfe 10 20 35` measures a few in full.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _report import RESULTS, provenance, table, write

from sdeflow import registry, solve
from sdeflow.data import load_images
from sdeflow.distributed import this_rank
from sdeflow.errors import BudgetError
from sdeflow.evaluation.features import CifarFeatures
from sdeflow.evaluation.metrics import Statistics, frechet_distance
from sdeflow.images import to_uint8
from sdeflow.models.checkpoint import Pretrained, load

BUDGETS = (3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 35, 50, 70, 100)
DETERMINISTIC = (
    *(("auto", "auto"), ("ddim", "karras"), ("heun", "karras"), ("dpmpp_2m", "karras"), ("dpmpp_2m", "uniform_lam")),
    *(("dpmpp_3m", "karras"), ("unipc_3", "karras"), ("unipc_3", "uniform_lam"), ("adams3", "karras")),
    *(("ipndm", "karras"), ("deis_tab3", "karras"), ("dpm_solver_3", "karras")),
)
STOCHASTIC = (
    *(("dpmpp_2m_sde", "karras"), ("dpmpp_3m_sde", "karras"), ("stochastic_adams3", "karras")),
    *(
        ("sa_solver", "karras"),
        ("er_sde_3", "karras"),
        ("euler_maruyama", "karras"),
        ("ddpm", "karras"),
        ("churn", "karras"),
    ),
)
Cell = tuple[str, str, int, int]  # solver, grid, nfe, n


def read(path: Path) -> tuple[dict[str, Any], dict[Cell, dict[str, Any]]]:
    """The last header and the cells of a file; of a line that was torn, nothing."""
    header: dict[str, Any] = {}
    cells: dict[Cell, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "solver" in row:
            cells[row["solver"], row["grid"], row["nfe"], row["n"]] = row
        else:
            header = row
    return header, cells


def wanted(arguments: argparse.Namespace, known: dict[Cell, Any]) -> Iterator[Cell]:
    """The cells that are missing, the dearest first, so that processes end together."""
    for nfe in sorted(arguments.nfe, reverse=True):
        for name, grid in (*DETERMINISTIC, *STOCHASTIC):
            if arguments.only and not re.search(arguments.only, f"{name} {grid}"):
                continue
            try:
                registry.solver(name).levels(nfe)
            except BudgetError:
                continue
            if (name, grid, nfe, arguments.n) not in known:
                yield name, grid, nfe, arguments.n


class Scorer:
    """The distance of pictures to the training set."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        self.extractor = (
            CifarFeatures(arguments.features, device) if arguments.features else CifarFeatures(device=device)
        )
        self.device = device
        self.real = self._of(arguments.data, "train")
        self.floor = frechet_distance(self.real, self._of(arguments.test or arguments.data, "test"))

    def _of(self, source: str, split: str) -> Statistics:
        images = load_images(source, split=split, memory_gb=1e9, progress=False)
        statistics = Statistics(self.extractor.dim, self.device)
        for part in images.pixels.split(1000):  # type: ignore[attr-defined]
            statistics.update(self.extractor(part.to(self.device)))
        return statistics

    def __call__(self, model: Pretrained, cell: Cell, batch: int) -> tuple[float, float]:
        """The distance, and the seconds that it took."""
        name, grid, nfe, n = cell
        statistics, began = Statistics(self.extractor.dim, self.device), time.perf_counter()
        for first in range(0, n, batch):
            rows = torch.arange(
                first, first + batch
            )  # a last part too many is drawn and cut: one size of batch, one compilation
            label = {"label": (rows % 10).to(self.device)}
            x = solve(model, solver=name, grid=grid, nfe=nfe, n=batch, seeds=rows.tolist(), condition=label).x
            statistics.update(self.extractor(to_uint8(x[: n - first])))
        return frechet_distance(self.real, statistics), time.perf_counter() - began


@torch.no_grad()
def sweep(arguments: argparse.Namespace) -> None:
    began, rank, path = time.monotonic(), this_rank(), Path(arguments.out)
    device = rank.device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    _, known = read(path)
    cells = list(wanted(arguments, known))[rank.index :: rank.world]
    gpu = device.type == "cuda"
    model = load(arguments.model, device, torch.bfloat16 if gpu else torch.float32, compile=gpu)
    scorer = Scorer(arguments, device)
    facts = {"features": scorer.extractor.describe(), "floor": scorer.floor, "model": arguments.model}
    with path.open("a") as file:  # lines shorter than a page are appended whole, whoever else appends
        if rank.first:
            file.write(json.dumps({**facts, "gpus": rank.world, **provenance()}) + "\n")
            file.flush()
        for k, cell in enumerate(cells):
            if time.monotonic() - began > arguments.seconds:
                break
            distance, seconds = scorer(model, cell, min(arguments.batch_size, arguments.n))
            row = {"solver": cell[0], "grid": cell[1], "nfe": cell[2], "n": cell[3]}
            file.write(json.dumps({**row, "fd_cifar": round(distance, 5), "seconds": round(seconds, 2)}) + "\n")
            file.flush()
            if rank.first:
                print(
                    f"{k + 1} of {len(cells)}: {' '.join(map(str, cell))} {distance:.4f}, {seconds:.1f} s", flush=True
                )


def report(arguments: argparse.Namespace) -> None:
    """A table of each kind, where each pair is within five per cent of its own limit, and the figure."""
    header, cells = read(Path(arguments.out))
    n = max((cell[3] for cell in cells), key=lambda n: sum(cell[3] == n for cell in cells))
    curves: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for (name, grid, nfe, count), row in cells.items():
        if count == n:
            curves[name, grid][nfe] = row["fd_cifar"]
    budgets = sorted({nfe for curve in curves.values() for nfe in curve})
    parts = [f"FD-CIFAR of {n} pictures; the floor, test against training set, is {header['floor']:.3f}."]
    for kind, pairs in (("Deterministic", DETERMINISTIC), ("Stochastic", STOCHASTIC)):
        rows = []
        for pair in pairs:
            if curve := curves.get(pair):
                limit = curve[max(curve)]
                near = min(
                    (nfe for nfe in curve if all(curve[m] <= 1.05 * limit for m in curve if m >= nfe)), default="-"
                )
                rows.append(
                    [f"{pair[0]}, {pair[1]}", *(f"{curve[b]:.2f}" if b in curve else "" for b in budgets), near]
                )
        parts.append(f"{kind}:\n\n" + table(["solver, grid", *map(str, budgets), "within 5 % of its limit from"], rows))
    full = [(*cell[:3], f"{row['fd_cifar']:.3f}") for cell, row in sorted(cells.items()) if cell[3] > n]
    if full:
        parts.append(
            f"{max(cell[3] for cell in cells)} pictures:\n\n" + table(["solver", "grid", "NFE", "FD-CIFAR"], full)
        )  # type: ignore[arg-type]
    run = (
        f"*`{header['command']}` on {header['gpus']} x {header['machine']}, torch {header['torch']}, {header['date']}*"
    )
    write("nfe_fid", {"run": header, "cells": list(cells.values())}, "\n\n".join([*parts, "Measured by", run]))
    plot(curves, header["floor"], n, RESULTS / "nfe_fid.png")


def plot(curves: dict[tuple[str, str], dict[int, float]], floor: float, n: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, kind, pairs in zip(axes, ("deterministic", "stochastic"), (DETERMINISTIC, STOCHASTIC), strict=True):
        for pair in pairs:
            if curve := curves.get(pair):
                style = {"lw": 2.2, "color": "black"} if pair[0] == "auto" else {"lw": 1}
                axis.plot(*zip(*sorted(curve.items()), strict=True), marker=".", ms=4, label=", ".join(pair), **style)  # type: ignore[arg-type]
        axis.axhline(floor, color="#888888", ls=":", label="floor: test against training set")
        axis.set(xscale="log", yscale="log", xlabel="NFE", title=f"{kind}, {n} pictures")
        axis.set_xticks([3, 5, 10, 20, 50, 100], ["3", "5", "10", "20", "50", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both", lw=0.3)
        axis.legend(fontsize=6)
    axes[0].set_ylabel("FD-CIFAR")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the file of results, JSON lines; continued where it exists")
    parser.add_argument("--data", help="the training set, parquet")
    parser.add_argument("--test", help="the test set, parquet")
    parser.add_argument("--model", default="cifar10", help="a bundled checkpoint or a file")
    parser.add_argument("--features", default=None, help="another feature network than the bundled one")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--nfe", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--only", default=None, metavar="REGEX", help='pairs, as "solver grid"')
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments)
    elif arguments.data is None:
        raise SystemExit("--data names the training set, to which pictures are compared")
    else:
        sweep(arguments)


if __name__ == "__main__":
    main()
