"""Quality against the number of network calls: both judges, for solvers, grids and budgets.

Every pair of solver and grid makes the same `--n` images of the bundled checkpoint (seeds 0 to
n - 1, classes in turn) at every budget that it can spend. Their Frechet distances to the training
set are FD-CIFAR and FD-IN; neither is an FID. What is reported is the excess over the distance of
as many test images. A run goes on where the file ends, in as many processes as there are, whenever
they come: each takes a cell that no other works at, and appends it to the one file.

    torchrun --nproc-per-node 4 -m benchmarks.quality.nfe_fid --data train.parquet \\
        --test test.parquet --out nfe_fid.jsonl
    python -m benchmarks.quality.nfe_fid --out nfe_fid.jsonl --report

`--seconds` is when no new cell is begun. The cells that matter most come first. FD-IN needs the
extra `judges`; without it FD-CIFAR alone is measured. `-n 50000 --best 3 --nfe 10 20 35` measures
the three best pairs with as many images as are usual.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import re
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, provenance, table, write
from sdeflow import registry, solve
from sdeflow._utils.distributed import this_rank
from sdeflow.denoisers.fingerprint import model_sha256
from sdeflow.errors import BudgetError, SdeflowError
from sdeflow.evaluation.features import (
    CifarFeatures,
    Extractor,
    ImageNetFeatures,
    imagenet_file,
)
from sdeflow.evaluation.metrics import Statistics, frechet_distance
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
FIRST = (
    *("auto", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "ipndm", "er_sde_3"),
    *("unipc_3 uniform_lam", "sa_solver uniform_lam"),
)
"""The solvers, or pairs, whose cells are measured before those of the others."""

SUMMARY = (5, 10, 20, 35)
JUDGES = {"fd_cifar": "FD-CIFAR", "fd_in": "FD-IN"}
Cell = tuple[str, str, int, int]  # solver, grid, nfe, n
Curve = dict[int, float]


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
    """The number of images that most cells have."""
    return max((cell[3] for cell in cells), key=lambda n: sum(cell[3] == n for cell in cells))


def best(
    cells: dict[Cell, dict[str, Any]], budgets: list[int], count: int
) -> list[tuple[str, str]]:
    """The `count` pairs of least geometric mean over `budgets` and judges, among those that were
    measured at all of them.
    """
    n, means = usual(cells), {}
    for pair in (*DETERMINISTIC, *STOCHASTIC):
        if all((*pair, nfe, n) in cells for nfe in budgets):
            rows = [cells[*pair, nfe, n] for nfe in budgets]
            means[pair] = math.prod(row[j] for row in rows for j in JUDGES if j in row)
    return sorted(means, key=means.__getitem__)[:count]


def wanted(arguments: argparse.Namespace, known: dict[Cell, Any]) -> Iterator[Cell]:
    """The cells that are missing: those of `FIRST` before the others, 100 calls last of all, and of
    the rest the dearest first, so that processes end together.
    """
    pairs = (
        best(known, arguments.nfe, arguments.best)
        if arguments.best
        else (*DETERMINISTIC, *STOCHASTIC)
    )

    def later(item: tuple[int, tuple[str, str]]) -> tuple[bool, bool, int]:
        nfe, (name, grid) = item
        return nfe > 50, name not in FIRST and f"{name} {grid}" not in FIRST, -nfe

    for nfe, (name, grid) in sorted(
        ((nfe, pair) for nfe in arguments.nfe for pair in pairs), key=later
    ):
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
    """The distances of images to the training set, by each judge."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        self.extractors: list[Extractor] = [CifarFeatures(arguments.features, device)]
        if imagenet_file() is not None:
            self.extractors.append(ImageNetFeatures(device=device))
        self.device = device
        self.real = self._of(arguments.data, "train")
        found = self._of(arguments.test or arguments.data, "test", arguments.n)
        self.test_set = {"n": found[0].n, **self.distances(found)}

    def _of(self, source: str, split: str, n: int | None = None) -> list[Statistics]:
        images = load_images(source, split=split, memory_gb=1e9, progress=False)
        return self.statistics(images.pixels[:n])  # type: ignore[attr-defined]

    def statistics(self, pixels: Tensor) -> list[Statistics]:
        """What each judge sees of images uint8 [N, C, H, W], on the CPU."""
        found = [Statistics(e.dim, self.device) for e in self.extractors]
        for part in pixels.split(1000):
            for extractor, statistics in zip(self.extractors, found, strict=True):
                statistics.update(extractor(part.to(self.device)))
        return [Statistics(one.dim).merge(one) for one in found]

    def distances(self, found: list[Statistics]) -> dict[str, float]:
        """The distance by each judge, on the CPU, so that the next cell need not wait for it."""
        return {
            extractor.score: round(frechet_distance(real, fake), 5)
            for extractor, real, fake in zip(self.extractors, self.real, found, strict=True)
        }

    def __call__(self, model: Pretrained, cell: Cell, batch: int) -> tuple[list[Statistics], float]:
        """What each judge sees of a cell's images, and the seconds that it took."""
        name, grid, nfe, n = cell
        began, parts = time.perf_counter(), []
        for first in range(0, n, batch):
            # A last part too many is made and cut: one size of batch, one compilation.
            rows = torch.arange(first, first + batch)
            label = {"label": (rows % 10).to(self.device)}
            x = solve(
                model, solver=name, grid=grid, nfe=nfe, n=batch, seeds=rows.tolist(),
                condition=label,
            ).x  # fmt: skip
            parts.append(to_uint8(x[: n - first]))
        return self.statistics(torch.cat(parts)), time.perf_counter() - began


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
        "features": {e.score: e.describe() for e in scorer.extractors},
        "test_set": scorer.test_set,
        "model_sha256": model_sha256(model),
    }
    if odd := {h.get("model_sha256", "unknown") for h in read(path)[0]} - {facts["model_sha256"]}:
        raise SystemExit(
            f"{path} was begun with other weights ({min(odd)[:12]}): choose another --out"
        )

    def finish(cell: Cell, found: list[Statistics], seconds: float) -> None:
        distances = scorer.distances(found)
        row = {"solver": cell[0], "grid": cell[1], "nfe": cell[2], "n": cell[3], **distances}
        file.write(json.dumps({**row, "seconds": round(seconds, 2)}) + "\n")
        file.flush()
        values = ", ".join(f"{JUDGES[name]} {value:.4g}" for name, value in distances.items())
        print(f"{' '.join(map(str, cell))}: {values}, {seconds:.1f} s", flush=True)

    # Lines shorter than a page are appended whole, whoever else appends.
    with path.open("a") as file, path.with_suffix(".lock").open("a") as lock:
        if rank.first:
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):  # torn by a kill
                file.write("\n")
            file.write(json.dumps({**facts, "gpus": rank.world, **provenance()}) + "\n")
            file.flush()
        with ThreadPoolExecutor(1) as pool:
            pending: list[Future[None]] = []
            for cell in wanted(arguments, read(path)[1]):
                if time.monotonic() - began > arguments.seconds:
                    break
                if not claim(lock, cell) or cell in read(path)[1]:
                    continue
                try:
                    found, seconds = scorer(model, cell, min(arguments.batch_size, arguments.n))
                except SdeflowError as error:  # one cell's fault is not the others'
                    print(f"{' '.join(map(str, cell))}: {error}", flush=True)
                    continue
                pending.append(pool.submit(finish, cell, found, seconds))
            for future in pending:
                future.result()


NEAR = 0.1
"""Nearer than other seeds change a value: up to 9 % (`results/judges.md`)."""


def settled(curve: Curve) -> int | None:
    """The least budget from which on a curve stays at most `NEAR` above its end; None if only its
    end does.
    """
    most = (1 + NEAR) * curve[max(curve)]
    near = min(nfe for nfe in curve if all(curve[m] <= most for m in curve if m >= nfe))
    return None if near == max(curve) else near


def curves_of(
    cells: dict[Cell, dict[str, Any]], n: int, judge: str, below: float
) -> dict[tuple[str, str], Curve]:
    """The excess of each pair at each budget, by one judge."""
    curves: dict[tuple[str, str], Curve] = {}
    for (name, grid, nfe, count), row in sorted(cells.items()):
        if count == n and judge in row:
            curves.setdefault((name, grid), {})[nfe] = row[judge] - below
    return curves


def digits(value: float) -> str:
    """Two decimals, or fewer where a value has three digits and more before the point."""
    return (
        f"{value:.2f}"
        if abs(value) < 10
        else f"{value:.1f}"
        if abs(value) < 100
        else f"{value:.0f}"
    )


def report(arguments: argparse.Namespace) -> None:
    """Tables of each judge and kind, from which budget on each pair is near its end, a figure."""
    headers, cells = read(Path(arguments.out))
    if not cells:
        raise SystemExit(f"{arguments.out} holds no measurement: make some first, with --data")
    n = usual(cells)
    below = next(h["test_set"] for h in headers if h["test_set"]["n"] == n)
    judges = {key: name for key, name in JUDGES.items() if key in below}
    floors = " and ".join(f"{below[key]:.4g} ({name})" for key, name in judges.items())
    parts = [
        f"The excess over the test set of {n} images of the bundled checkpoint. {n} test images"
        f" score {floors} against the training set, and that is taken off. An empty cell was not"
        " measured, or the solver cannot spend the budget; where it can spend one or two calls less"
        " (9 for 10), that value stands there."
    ]
    found = {key: curves_of(cells, n, key, below[key]) for key in judges}
    both = " / ".join(judges.values())
    parts.append(f"Excess {both} at so many calls:\n\n" + summary(found))
    budgets = [b for b in BUDGETS if any(at(c, b) is not None for c in found["fd_cifar"].values())]
    for kind, pairs in (("Deterministic", DETERMINISTIC), ("Stochastic", STOCHASTIC)):
        for key, name in judges.items():
            rows = []
            for pair in pairs:
                if curve := found[key].get(pair):
                    values = [at(curve, b) for b in budgets]
                    rows.append(
                        [", ".join(pair), *("" if v is None else digits(v) for v in values)]
                    )
            head = ["solver, grid", *map(str, budgets)]
            parts.append(f"{kind}, excess {name} at so many calls:\n\n" + table(head, rows))
    parts.append(
        f"Calls from which on the excess stays within {NEAR:.0%} of that at the most calls:"
        "\n\n" + table(["solver, grid", "most calls", *judges.values()], list(_settled(found)))
    )
    full = [
        [*cell[:3], *(digits(row[key]) if key in row else "" for key in judges)]
        for cell, row in sorted(cells.items())
        if cell[3] > n
    ]
    if full:
        count = max(cell[3] for cell in cells)
        head = ["solver", "grid", "NFE", *judges.values()]
        parts.append(f"{count} images, the distances as they are:\n\n" + table(head, full))
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
        {"test_set": below, "runs": headers},
        "\n\n".join(parts),
        arguments.into,
        about=about,
    )
    try:
        plot(found, below, n, Path(arguments.into or RESULTS / "nfe_fid").with_suffix(".png"))
    except ImportError:
        print("The table is written; the figure needs matplotlib: pip install 'sdeflow[plot]'")


def summary(found: dict[str, dict[tuple[str, str], Curve]]) -> str:
    """A row for each pair: every judge's value at a few budgets."""
    rows = []
    for pair in (*DETERMINISTIC, *STOCHASTIC):
        if pair in found["fd_cifar"]:
            values = [[at(curves.get(pair, {}), b) for curves in found.values()] for b in SUMMARY]
            cells = [
                "" if None in some else " / ".join(digits(v) for v in some if v is not None)
                for some in values
            ]
            rows.append([", ".join(pair), *cells])
    return table(["solver, grid", *map(str, SUMMARY)], rows)


def _settled(found: dict[str, dict[tuple[str, str], Curve]]) -> Iterator[list[Any]]:
    """Of each pair, where its curve settles by each judge."""
    for pair in (*DETERMINISTIC, *STOCHASTIC):
        curves = [curves[pair] for curves in found.values() if pair in curves]
        if curves and max(curves[0]) >= 20:
            near = [settled(curve) for curve in curves]
            yield [
                ", ".join(pair),
                max(curves[0]),
                *("not before" if x is None else x for x in near),
            ]


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


def plot(
    found: dict[str, dict[tuple[str, str], Curve]], below: dict[str, float], n: int, path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(found), 2, figsize=(10, 4.2 * len(found)), sharey="row", squeeze=False
    )
    for row, (judge, curves) in zip(axes, found.items(), strict=True):
        for axis, kind, pairs in zip(
            row, ("deterministic", "stochastic"), (DETERMINISTIC, STOCHASTIC), strict=True
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
            axis.axhline(below[judge], color="#888888", ls=":", label="value of the test set")
            axis.set(xscale="log", yscale="log", title=f"{kind}, {n} images")
            most = max(max(curve) for curve in curves.values())
            ticks = [nfe for nfe in (3, 5, 10, 20, 50, 100) if nfe <= most]
            axis.set_xticks(ticks, [str(nfe) for nfe in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3, which="both", lw=0.3)
        row[0].set_ylabel(f"excess {JUDGES[judge]}")
    for axis in axes[-1]:
        axis.set_xlabel("NFE")
        below_axis = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
        axis.legend(fontsize=7, ncol=3, columnspacing=1, frameon=False, **below_axis)
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
        raise SystemExit("--data names the training set, to which images are compared")
    else:
        sweep(arguments)


if __name__ == "__main__":
    main()
