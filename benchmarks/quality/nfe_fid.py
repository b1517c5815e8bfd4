"""Quality against the number of network calls: FD-CIFAR of the bundled checkpoint for solvers,
grids and budgets.

Every pair of solver and grid draws the same `--n` pictures (seeds 0 to n - 1, classes in turn) at
every budget that it can spend; their Frechet distance to the training set is in the features of the
bundled network, so it is FD-CIFAR and no FID. A run goes on where the file ends, in as many
processes as there are, whenever they come: each takes a cell that no other works at, and appends it
to the one file.

    torchrun --nproc-per-node 4 -m benchmarks.quality.nfe_fid --data train.parquet --test test.parquet --out nfe_fid.jsonl
    python -m benchmarks.quality.nfe_fid --out nfe_fid.jsonl --report

`--seconds` is when no new cell is begun. `-n 50000 --best 3 --nfe 10 20 35` measures the three
pairs that are best there in full.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, provenance, table, write
from sdeflow import registry, solve
from sdeflow._utils.distributed import this_rank
from sdeflow.denoisers.fingerprint import model_sha256
from sdeflow.errors import BudgetError, SdeflowError
from sdeflow.evaluation.features.base import CifarFeatures
from sdeflow.evaluation.metrics.base import Statistics, frechet_distance
from sdeflow.images.datasets import load_images
from sdeflow.images.render import to_uint8
from sdeflow.models.checkpoint import Pretrained, load

BUDGETS = (3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 35, 50, 100)
DETERMINISTIC = (
    *(("auto", "auto"), ("ddim", "karras"), ("heun", "karras"), ("dpmpp_2m", "karras")),
    *(
        ("dpmpp_3m", "karras"),
        ("unipc_3", "karras"),
        ("unipc_3", "uniform_lam"),
        ("adams3", "karras"),
    ),
    *(("ipndm", "karras"), ("deis_tab3", "karras"), ("dpm_solver_3", "karras")),
)
STOCHASTIC = (
    *(("dpmpp_2m_sde", "karras"), ("stochastic_adams2", "karras"), ("stochastic_adams3", "karras")),
    *(("sa_solver", "karras"), ("sa_solver", "uniform_lam"), ("er_sde_3", "karras")),
    *(("euler_maruyama", "karras"), ("ddpm", "karras"), ("churn", "karras")),
)
Cell = tuple[str, str, int, int]  # solver, grid, nfe, n


def read(path: Path) -> tuple[list[dict[str, Any]], dict[Cell, dict[str, Any]]]:
    """The headers of all runs and the cells of a file; of a line that was torn, nothing."""
    headers: list[dict[str, Any]] = []
    cells: dict[Cell, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "solver" in row:
            cells[row["solver"], row["grid"], row["nfe"], row["n"]] = row
        else:
            headers.append(row)
    return headers, cells


def usual(cells: dict[Cell, Any]) -> int:
    """The number of pictures that most cells have."""
    return max((cell[3] for cell in cells), key=lambda n: sum(cell[3] == n for cell in cells))


def best(
    cells: dict[Cell, dict[str, Any]], budgets: list[int], count: int
) -> list[tuple[str, str]]:
    """The `count` pairs of least geometric mean over `budgets`, among those that were measured at
    all of them.
    """
    n, means = usual(cells), {}
    for pair in (*DETERMINISTIC, *STOCHASTIC):
        if all((*pair, nfe, n) in cells for nfe in budgets):
            means[pair] = math.prod(cells[*pair, nfe, n]["fd_cifar"] for nfe in budgets)
    return sorted(means, key=means.__getitem__)[:count]


def wanted(arguments: argparse.Namespace, known: dict[Cell, Any]) -> Iterator[Cell]:
    """The cells that are missing, the dearest first, so that processes end together."""
    pairs = (
        best(known, arguments.nfe, arguments.best)
        if arguments.best
        else (*DETERMINISTIC, *STOCHASTIC)
    )
    for nfe in sorted(arguments.nfe, reverse=True):
        for name, grid in pairs:
            if arguments.only and not re.search(arguments.only, f"{name} {grid}"):
                continue
            spent = spendable(name, nfe)
            if spent is not None and (name, grid, spent, arguments.n) not in known:
                yield name, grid, spent, arguments.n


def spendable(name: str, nfe: int) -> int | None:
    """The budget `nfe`, or the nearest of the two below it that the solver can spend and that is no
    budget itself.
    """
    for spent in range(nfe, max(nfe - 3, min(BUDGETS) - 1), -1):
        with suppress(BudgetError):
            registry.solver(name).levels(spent)
            return spent if spent == nfe or spent not in BUDGETS else None
    return None


def claim(lock: Any, cell: Cell) -> bool:
    """Whether no other process works at `cell`; then it is this one's until it ends, however it
    ends.
    """
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(repr(cell).encode()))
    except OSError:
        return False
    return True


class Scorer:
    """The distance of pictures to the training set."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        self.extractor = (
            CifarFeatures(arguments.features, device)
            if arguments.features
            else CifarFeatures(device=device)
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
            x = solve(
                model,
                solver=name,
                grid=grid,
                nfe=nfe,
                n=batch,
                seeds=rows.tolist(),
                condition=label,
            ).x
            statistics.update(self.extractor(to_uint8(x[: n - first])))
        return frechet_distance(self.real, statistics), time.perf_counter() - began


@torch.no_grad()
def sweep(arguments: argparse.Namespace) -> None:
    began, rank, path = time.monotonic(), this_rank(), Path(arguments.out)
    device = rank.device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    gpu = device.type == "cuda"
    model = load(arguments.model, device, torch.bfloat16 if gpu else torch.float32, compile=gpu)
    scorer = Scorer(arguments, device)
    facts = {
        "features": scorer.extractor.describe(),
        "floor": scorer.floor,
        "model_sha256": model_sha256(model),
    }
    if odd := {h.get("model_sha256", "unknown") for h in read(path)[0]} - {facts["model_sha256"]}:
        raise SystemExit(
            f"{path} was begun with other weights ({min(odd)[:12]}): choose another --out"
        )
    # Lines shorter than a page are appended whole, whoever else appends.
    with path.open("a") as file, path.with_suffix(".lock").open("a") as lock:
        if rank.first:
            if path.stat().st_size and not path.read_bytes().endswith(
                b"\n"
            ):  # a line that a kill tore
                file.write("\n")
            file.write(json.dumps({**facts, "gpus": rank.world, **provenance()}) + "\n")
            file.flush()
        for cell in wanted(arguments, read(path)[1]):
            if time.monotonic() - began > arguments.seconds:
                break
            if not claim(lock, cell) or cell in read(path)[1]:
                continue
            try:
                distance, seconds = scorer(model, cell, min(arguments.batch_size, arguments.n))
            except SdeflowError as error:  # one cell's fault is not the others'
                print(f"{' '.join(map(str, cell))}: {error}", flush=True)
                continue
            row = {"solver": cell[0], "grid": cell[1], "nfe": cell[2], "n": cell[3]}
            file.write(
                json.dumps({**row, "fd_cifar": round(distance, 5), "seconds": round(seconds, 2)})
                + "\n"
            )
            file.flush()
            print(f"{' '.join(map(str, cell))}: {distance:.4f}, {seconds:.1f} s", flush=True)


def settled(curve: dict[int, float]) -> int | None:
    """The least budget from which on a curve stays within five per cent above its end; None if only
    its end does.
    """
    near = min(
        nfe for nfe in curve if all(curve[m] <= 1.05 * curve[max(curve)] for m in curve if m >= nfe)
    )
    return None if near == max(curve) else near


def report(arguments: argparse.Namespace) -> None:
    """From which budget on each pair is near its limit, a table of each kind, and the figure."""
    headers, cells = read(Path(arguments.out))
    if not cells:
        raise SystemExit(f"{arguments.out} holds no measurement: make some first, with --data")
    floor, n = headers[-1]["floor"], usual(cells)
    curves: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for (name, grid, nfe, count), row in cells.items():
        if count == n:
            curves[name, grid][nfe] = row["fd_cifar"]
    most = max(nfe for curve in curves.values() for nfe in curve)
    near: dict[int, list[str]] = defaultdict(list)
    tables = []
    for kind, pairs in (("Deterministic", DETERMINISTIC), ("Stochastic", STOCHASTIC)):
        found = {pair: curves[pair] for pair in pairs if pair in curves}
        for (name, grid), curve in found.items():
            notes = [grid] * (grid != name) + [f"up to {max(curve)}"] * (max(curve) < most)
            near[settled(curve) or most + 1].append(
                f"`{name}`" + f" ({', '.join(notes)})" * bool(notes)
            )
        rows = [
            [
                ", ".join(pair),
                *(
                    f"{at(curve, b):.2f}" if at(curve, b) is not None else ""
                    for b in BUDGETS
                    if b <= most
                ),
            ]
            for pair, curve in found.items()
        ]
        head = ["solver, grid", *(str(b) for b in BUDGETS if b <= most)]
        tables.append(
            f"{kind}, FD-CIFAR at so many calls (where a solver cannot spend them, one or two"
            " fewer):\n\n" + table(head, rows)
        )
    rows = [
        [nfe if nfe <= most else "only there", ", ".join(names)]
        for nfe, names in sorted(near.items())
    ]
    parts = [
        (
            f"FD-CIFAR of {n} pictures of the bundled checkpoint; the floor, test against training"
            f" set, is {floor:.3f}."
        ),
        table(
            [
                (
                    f"calls from which on FD-CIFAR is within 5 % of that at the most calls, {most}"
                    " or as told"
                ),
                "solver (grid)",
            ],
            rows,
        ),
        *tables,
    ]
    full = [
        [*cell[:3], f"{row['fd_cifar']:.3f}"] for cell, row in sorted(cells.items()) if cell[3] > n
    ]
    if full:
        count = max(cell[3] for cell in cells)
        parts.append(f"{count} pictures:\n\n" + table(["solver", "grid", "NFE", "FD-CIFAR"], full))
    about = headers[0]
    if len(headers) > 1:
        about = about | {
            "date": f"{about['date']}, and {len(headers) - 1} runs more until {headers[-1]['date']}"
        }
        runs = dict.fromkeys(
            f"- `{h['command']}` on {h['gpus']} x {h['machine']}, {h['date']}" for h in headers
        )
        parts.append("The runs:\n\n" + "\n".join(runs))
    write(
        "nfe_fid",
        {"floor": floor, "runs": headers},
        "\n\n".join(parts),
        arguments.into,
        about=about,
    )
    try:
        plot(curves, floor, n, Path(arguments.into or RESULTS / "nfe_fid").with_suffix(".png"))
    except ImportError:
        print("The table is written; the figure needs matplotlib: pip install 'sdeflow[plot]'")


def at(curve: dict[int, float], nfe: int) -> float | None:
    """The value of a curve at a budget, or at what the solver can spend of it."""
    return next(
        (
            curve[m]
            for m in (nfe, nfe - 1, nfe - 2)
            if m in curve and (m == nfe or m not in BUDGETS)
        ),
        None,
    )


def plot(curves: dict[tuple[str, str], dict[int, float]], floor: float, n: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True)
    for axis, kind, pairs in zip(
        axes, ("deterministic", "stochastic"), (DETERMINISTIC, STOCHASTIC), strict=True
    ):
        for pair in pairs:
            if curve := curves.get(pair):
                style = {"lw": 2.2, "color": "black"} if pair[0] == "auto" else {"lw": 1}
                axis.plot(
                    *zip(*sorted(curve.items()), strict=True),
                    marker=".",
                    ms=4,
                    label=", ".join(pair),
                    **style,
                )  # type: ignore[arg-type]
        axis.axhline(floor, color="#888888", ls=":", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="NFE", title=f"{kind}, {n} pictures")
        ticks = [
            nfe
            for nfe in (3, 5, 10, 20, 50, 100)
            if nfe <= max(max(curve) for curve in curves.values())
        ]
        axis.set_xticks(ticks, [str(nfe) for nfe in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both", lw=0.3)
        below = {
            "loc": "upper center",
            "bbox_to_anchor": (0.5, -0.13),
        }  # inside it would cover lines
        axis.legend(fontsize=7, ncol=3, columnspacing=1, frameon=False, **below)
    axes[0].set_ylabel("FD-CIFAR")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="the file of results, JSON lines; continued where it exists"
    )
    parser.add_argument("--data", help="the training set, parquet")
    parser.add_argument("--test", help="the test set, parquet")
    parser.add_argument("--model", default="cifar10", help="a bundled checkpoint or a file")
    parser.add_argument(
        "--features", default=None, help="another feature network than the bundled one"
    )
    parser.add_argument("-n", "--n", type=int, default=10_000)
    parser.add_argument("--nfe", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--only", default=None, metavar="REGEX", help='pairs, as "solver grid"')
    parser.add_argument(
        "--best",
        type=int,
        default=None,
        metavar="K",
        help="the K pairs of least geometric mean at --nfe",
    )
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--report", action="store_true", help="write the table and the figure of what is measured"
    )
    parser.add_argument("--into", default=None, help="another name than benchmarks/results/nfe_fid")
    arguments = parser.parse_args(words)
    if arguments.report:
        report(arguments)
    elif arguments.data is None:
        raise SystemExit("--data names the training set, to which pictures are compared")
    else:
        sweep(arguments)


if __name__ == "__main__":
    main()
