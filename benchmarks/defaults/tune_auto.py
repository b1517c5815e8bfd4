r"""Search of the table behind `solver="auto"`: a member of the exponential Adams family and a grid
for each budget.

For every budget and family (frame, clock, order, corrector) the numbers of
`sdeflow.solvers.auto.recipes.Recipe` are searched by mutation of the best: centre, powers, end and
top of the grid, and the scales of frame and clock. A candidate is judged by its error against the
exact probability-flow solution, median and root mean square over samples, on six targets under two
processes, each relative to the best of some forty ordinary methods there, so that no cell counts
more than another; the mean of these ratios is the score, so that a lucky cancellation in one cell
pays for nothing in another. With `--network` the bundled network counts as much as all of these:
its paths are less smooth than any mixture's, and high orders that are best there can fail on it.

The targets are of the kinds of `accuracy.py`, but not those: other modes, other images, another
spectrum, and photographs in full; and EDM and the cosine process are left out, so that their
figures there are a test.

    python -m benchmarks.defaults.tune_auto --data test.parquet --seconds 60 --network 2 \
        --out benchmarks/results/tune_auto.json

A run begins from the results in the file, if it is there, and only betters them; `--begin` takes
recipes of an earlier file, of another checkpoint say, and not their scores. `--judge 192` searches
nothing: it measures the network's error of all that a file has, and of the table, on samples that
no search saw. `rows` in the file says which recipe, of this search or of those that are kept from
others, serves which budget of the two tables: chosen by hand, those for networks by the network's
error and those for known densities by the others'. On a GPU the network ran with TF32, too coarse
to judge it above 25 calls.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import time
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
import torch
from torch import Tensor

import sdeflow
from benchmarks.accuracy import problems
from benchmarks.accuracy.problems import STD, Mixture, Spectrum
from benchmarks.report import provenance
from sdeflow import registry
from sdeflow.process import Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.auto import recipes
from sdeflow.solvers.auto.grid import lay
from sdeflow.solvers.auto.recipes import Recipe
from sdeflow.solvers.auto.solver import member
from sdeflow.solvers.ode.adams import ExponentialAdams

PROCESSES = ("vp", "rectified_flow")
SIZE = 32  # of the photographs
BUDGETS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70)
FAMILIES = {  # p, frame, clock, corrector, and the budgets that they are tried at
    "v2": (2, "v", "bounded_lam", False, (2, 7)),
    "v3": (3, "v", "bounded_lam", False, (4, 8)),
    "flow3": (3, "flow", "bounded_lam", False, (5, 10)),
    "flow2c": (2, "flow", "bounded_lam", True, (6, 15)),
    "flow3c": (3, "flow", "bounded_lam", True, (7, 70)),
    "angle3c": (3, "flow", "angle", True, (8, 20)),
    "angle4": (4, "flow", "angle", False, (8, 30)),
    "angle4c": (4, "flow", "angle", True, (8, 70)),
    "angle5c": (5, "flow", "angle", True, (15, 70)),
}
NUMBERS = ("frame_scale", "clock_scale", "center", "high", "low", "nsr_end", "nsr_top")
KEPT = 8
SHARE = 0.35  # of the root mean square in the score; the rest is the median's


# ------------------------------------------------------------------------------------------ targets


def _modes() -> Mixture:
    draw = torch.Generator().manual_seed(12)
    means = torch.randn(12, 2, generator=draw, dtype=torch.float64)
    means = means - means.mean(0)
    std, ones = 0.1, torch.ones(12, dtype=torch.float64)
    means = means * math.sqrt((STD**2 - std**2) / float(means.square().mean()))
    return Mixture(ones, means, std**2 * ones)


def _wide() -> Mixture:
    draw = torch.Generator().manual_seed(32)
    modes, dim, wide = 30, 32, 4
    means = torch.randn(modes, dim, generator=draw, dtype=torch.float64)
    basis = torch.linalg.qr(
        torch.randn(modes, dim, wide, generator=draw, dtype=torch.float64)
    ).Q.mT.contiguous()
    diag = (
        torch.exp(
            math.log(0.1) + math.log(6.0) * torch.rand(modes, generator=draw, dtype=torch.float64)
        )
        ** 2
    )
    extra = (
        torch.exp(
            math.log(0.4)
            + math.log(5.0) * torch.rand(modes, wide, generator=draw, dtype=torch.float64)
        )
        ** 2
    )
    weights = 0.2 + torch.rand(modes, generator=draw, dtype=torch.float64)
    size = STD / math.sqrt(Mixture(weights, means, diag, basis, extra).covariance_mean())
    return Mixture(weights, size * means, size**2 * diag, basis, size**2 * extra)


def _images(data: str | None, cache: Path) -> Mixture:
    pixels = (
        problems.images(data, cache, count=600, size=12).double().mean(1, keepdim=True) / 127.5
        - 1.0
    )
    bandwidth = 0.08
    pixels = (pixels - pixels.mean()) * math.sqrt(
        (STD**2 - bandwidth**2) / float(pixels.var(0, correction=0).mean())
    )
    ones = torch.ones(len(pixels), dtype=torch.float64)
    return Mixture(ones, pixels, bandwidth**2 * ones)


def _spectrum() -> Mixture:
    k = torch.fft.fftfreq(16, 1 / 16, dtype=torch.float64)
    variance = ((k[:, None] ** 2 + k[None, :] ** 2).clamp_min(1.0) ** -0.8).reshape(1, 16, 16)
    return Spectrum(STD * (variance / variance.mean()).sqrt())


def _photographs(data: str | None, cache: Path) -> Mixture:
    """Few of them, in full: what is sharp, in as many dimensions as real models have."""
    pixels = problems.images(data, cache, count=300, size=SIZE).double() / 127.5 - 1.0
    bandwidth = 0.05
    pixels = (pixels - pixels.mean()) * math.sqrt(
        (STD**2 - bandwidth**2) / float(pixels.var(0, correction=0).mean())
    )
    ones = torch.ones(len(pixels), dtype=torch.float64)
    return Mixture(ones, pixels, bandwidth**2 * ones)


def _principal(data: str | None, cache: Path) -> Mixture:
    """A Gaussian with the principal components of photographs: the widest has thirty times the mean
    standard deviation.

    In as many dimensions, structure begins at ratios of noise to signal far above the data's
    standard deviation.
    """
    pixels = problems.images(data, cache, count=2000, size=SIZE).double().flatten(1) / 127.5 - 1.0
    gram = (pixels - pixels.mean(0)) @ (pixels - pixels.mean(0)).T / len(pixels)
    variance = torch.zeros(pixels.shape[1], dtype=torch.float64)
    variance[: len(pixels)] = torch.linalg.eigvalsh(gram).clamp_min(0.0).flip(0)
    variance = variance + 0.02**2
    return Spectrum((STD * (variance / variance.mean()).sqrt()).reshape(3, SIZE, SIZE))


# -------------------------------------------------------------------------------------------- score

_CELLS: list[tuple[Mixture, Tensor, Tensor]] = []  # target under a process, starts, exact ends


def prepare(data: str | None, cache: Path, starts: int) -> None:
    """Targets, starts and references; workers inherit them."""
    stops = [math.inf]
    for name in PROCESSES:
        process = registry.process(name)
        stops += [process.level(process.t_max).nsr, process.level(process.t_min).nsr]
    stops = sorted(set(stops), reverse=True)
    targets = (
        _modes(),
        _wide(),
        _images(data, cache),
        _spectrum(),
        _photographs(data, cache),
        _principal(data, cache),
    )
    for number, exact in enumerate(targets):
        draw = torch.Generator().manual_seed(100 + number)
        z = torch.randn(starts, *(exact.shape or ()), generator=draw, dtype=torch.float64)
        path = problems.follow(exact, z, stops, 1e-10)
        for name in PROCESSES:
            process = registry.process(name)
            top, bottom = process.level(process.t_max), process.level(process.t_min)
            start = path[top.nsr] * math.hypot(top.s, top.sigma)
            last = path[bottom.nsr] * math.hypot(1.0, bottom.nsr)
            _CELLS.append((exact.under(process), start, exact.at_level(last, 1.0, bottom.nsr)))


@torch.no_grad()
def errors(solver: Any, times: Any) -> list[tuple[float, float]]:
    """Median and root mean square of the relative error, a pair a cell."""
    out = []
    for exact, start, end in _CELLS:
        try:
            x = solver.integrate(Reverse(exact), start, times(exact.process), None).x
        except Exception:  # a grid that such a process cannot have
            x = torch.full_like(end, math.nan)
        each = (x - end).flatten(1).square().sum(1) / end.flatten(1).square().sum(1).mean()
        each = each.nan_to_num(1e6, 1e6).sqrt()
        out.append((float(each.median()), float(each.square().mean().sqrt())))
    return out


def _laid(name: str, nfe: int, process: Process) -> Tensor:
    return registry.grid_function(name)(process, nfe)


ORDINARY = [
    (method, grid)
    for method in (
        *(registry.solver("dpmpp_2m"), registry.solver("unipc_3"), ExponentialAdams(2, "v", "lam")),
        *(ExponentialAdams(3, "v", "lam"), ExponentialAdams(3, "v", "angle")),
        *(ExponentialAdams(3, "flow", "angle", True), ExponentialAdams(4, "flow", "angle", True)),
    )
    for grid in (
        "uniform_lam",
        "uniform_sqrt_t",
        "karras",
        "uniform_angle",
        "dense_lam",
        "uniform_vp",
    )
]
_BEST: dict[int, list[tuple[float, float]]] = {}
"""By budget, the best median and root mean square that ordinary methods on ordinary grids reach, a
pair a cell.
"""


def _ordinary(task: tuple[int, int]) -> tuple[int, list[tuple[float, float]]]:
    nfe, number = task
    method, grid = ORDINARY[number]
    return nfe, errors(method, partial(_laid, grid, nfe))


def ordinary(budgets: list[int], pool: Any) -> dict[int, list[tuple[float, float]]]:
    found: dict[int, list[list[tuple[float, float]]]] = {}
    for nfe, each in pool.imap_unordered(
        _ordinary, [(n, k) for n in budgets for k in range(len(ORDINARY))]
    ):
        found.setdefault(nfe, []).append(each)
    cells = range(len(_CELLS))
    return {
        n: [(min(e[c][0] for e in every), min(e[c][1] for e in every)) for c in cells]
        for n, every in found.items()
    }


class Network:
    """A network as one more cell, the bundled one by default: its own solution at 200 calls is the
    reference.
    """

    def __init__(self, samples: int, device: str, seed: int = 0, model: str = "cifar10"):
        from sdeflow.models.checkpoint import load

        self.denoiser = load(model, device=device)
        label = {"label": torch.arange(samples) % 10}
        self.how: dict[str, Any] = {
            "n": samples,
            "seeds": range(seed, seed + samples),
            "condition": label,
        }
        self.end = self.solve("adams3", "karras", 200)

    @torch.no_grad()
    def solve(self, solver: Any, grid: Any, nfe: int) -> Tensor:
        return sdeflow.solve(self.denoiser, solver=solver, grid=grid, nfe=nfe, **self.how).x

    def error(self, solver: Any, grid: Any, nfe: int) -> float:
        return float((self.solve(solver, grid, nfe) - self.end).norm() / self.end.norm())

    @lru_cache  # noqa: B019 - there is one
    def ordinary(self, nfe: int) -> float:
        return min(self.error(name, "karras", nfe) for name in ("dpmpp_2m", "adams3"))


_NETWORK = {"samples": 0}


def _begin(cells: Any, samples: int) -> None:
    """Give a new worker what `main` has prepared."""
    torch.set_num_threads(1)
    _CELLS[:] = cells
    _NETWORK["samples"] = samples


@lru_cache
def network() -> Network | None:
    """The network of this worker, on a device of its turn."""
    if not _NETWORK["samples"]:
        return None
    number = (multiprocessing.current_process()._identity or (0,))[0]
    devices = torch.cuda.device_count()
    return Network(_NETWORK["samples"], f"cuda:{number % devices}" if devices else "cpu")


def score(candidate: Recipe, nfe: int, worst: float = math.inf) -> tuple[float, list[float]]:
    """The mean ratio to the ordinary best, and the median errors; with a network, the geometric
    mean with its ratio.

    The network is not asked where it could not bring the score below `worst` by being three times
    as good as the ordinary best.
    """
    value, medians = _score(candidate, nfe)
    if (net := network()) is not None:
        if math.sqrt(value / 3.0) > worst:
            return math.inf, medians
        ratio = net.error(
            member(candidate), lay(net.denoiser.process, nfe, candidate), nfe
        ) / net.ordinary(nfe)
        value, medians = math.sqrt(value * ratio), [*medians, ratio]
    return value, medians


def _score(candidate: Recipe, nfe: int) -> tuple[float, list[float]]:
    found = errors(member(candidate), lambda process: lay(process, nfe, candidate))
    ratios = [
        (1.0 - SHARE) * a / c + SHARE * b / d
        for (a, b), (c, d) in zip(found, _BEST[nfe], strict=True)
    ]
    return sum(ratios) / len(ratios), [a for a, _ in found]


# ------------------------------------------------------------------------------------------- search


def mutated(candidate: Recipe, draw: random.Random) -> Recipe:
    numbers = {name: getattr(candidate, name) for name in NUMBERS}
    for name in draw.sample(NUMBERS, draw.choice((1, 1, 2, 3))):
        numbers[name] = (
            numbers[name] + draw.gauss(0.0, 0.3)
            if name == "center"
            else numbers[name] * math.exp(draw.gauss(0.0, 0.3))
        )
    numbers["nsr_end"] = min(max(numbers["nsr_end"], 1.1e-3), 1.0)
    numbers["nsr_top"] = min(max(numbers["nsr_top"], 2.0), 1e3)
    for name in ("high", "low"):
        numbers[name] = min(max(numbers[name], 0.05), 3.0)
    for name in ("frame_scale", "clock_scale"):
        numbers[name] = min(max(numbers[name], 0.05), 500.0)
    return Recipe(candidate.p, candidate.frame, candidate.clock, candidate.corrector, **numbers)


def beginnings(family: str, nfe: int, known: Mapping[str, Any]) -> list[Recipe]:
    p, frame, clock, corrector, _ = FAMILIES[family]
    now = recipes.recipe(nfe)
    out = []
    for name in (family, *FAMILIES):
        for n in sorted(
            {int(key.split()[0]) for key in known}, key=lambda n: abs(math.log(n / nfe))
        )[:3]:
            if f"{n} {name}" in known:
                out.append({k: known[f"{n} {name}"]["recipe"][k] for k in NUMBERS})
    out.append({k: getattr(now, k) for k in NUMBERS})
    base = {
        "frame_scale": 0.333,
        "clock_scale": 20.0 if clock != "angle" else 1.0,
        "nsr_end": 0.0154,
        "nsr_top": 32.0,
    }
    out.insert(0, {**base, "center": -0.55, "high": 0.457, "low": 0.3})
    near_x0 = {"frame_scale": 0.05, "clock_scale": 100.0 if clock != "angle" else 0.3}
    karras = {"center": -8.0, "high": 1.0, "low": 1.0 / 7.0, "nsr_end": 0.002, "nsr_top": 200.0}
    out[1:1] = [
        {**base, **near_x0, "center": -0.55, "high": 0.457, "low": 0.3},
        {**near_x0, **karras},
    ]
    for clock_scale in (1.0, 3.0) if clock == "angle" else (10.0, 50.0):
        for frame_scale in (0.15, 1.0):
            grid = {
                "center": 0.5,
                "high": 0.8,
                "low": 0.5,
                "nsr_end": max(0.6 / nfe**1.5, 2e-3),
                "nsr_top": 9.0,
            }
            out.append({"frame_scale": frame_scale, "clock_scale": clock_scale, **grid})
    return [Recipe(p, frame, clock, corrector, **numbers) for numbers in out[:10]]


def search(
    task: tuple[str, int, float, Mapping[str, Any], int, Any],
) -> tuple[str, float, Recipe, list[float], int]:
    family, nfe, seconds, known, seed, _BEST[nfe] = task
    network()
    draw = random.Random(f"{family} {nfe} {seed}")
    first = beginnings(family, nfe, known)
    best: list[tuple[float, Recipe, list[float]]] = []
    began, tried = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or tried < 4:
        candidate = first[tried] if tried < len(first) else mutated(draw.choice(best[:5])[1], draw)
        tried += 1
        value, medians = score(candidate, nfe, best[-1][0] if len(best) == KEPT else math.inf)
        best = sorted([*best, (value, candidate, medians)], key=lambda b: b[0])[:KEPT]
    return f"{nfe} {family}", *best[0], tried


def judge(found: dict[str, Any], samples: int, model: str) -> dict[str, dict[str, float]]:
    """By budget, a network's error of the recipes found and of the table's, on seeds from 5000."""
    if not found:
        raise SystemExit("the file of --out has no recipes to judge: search first, with --data")
    torch.set_num_threads(os.cpu_count() or 1)
    net = Network(samples, "cuda" if torch.cuda.is_available() else "cpu", 5000, model)
    out: dict[str, dict[str, float]] = {}
    for nfe in sorted({int(key.split()[0]) for key in found}):
        tried = {
            key: Recipe(**of["recipe"]) for key, of in found.items() if int(key.split()[0]) == nfe
        }
        tried["the table"] = recipes.recipe(nfe)
        errors = {
            key: net.error(member(r), lay(net.denoiser.process, nfe, r), nfe)
            for key, r in tried.items()
        }
        out[str(nfe)] = {key: round(error, 4) for key, error in errors.items()}
        print(nfe, out[str(nfe)], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a parquet file of images")
    parser.add_argument(
        "--judge",
        type=int,
        default=0,
        metavar="SAMPLES",
        help="measure what the file has, and no search",
    )
    parser.add_argument(
        "--model", default="cifar10", help="the network that judges, a bundled checkpoint or a file"
    )
    parser.add_argument("--out", default="benchmarks/results/tune_auto.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of search, a family and budget"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="searches of each family and budget, side by side"
    )
    parser.add_argument("--nfe", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument(
        "--network", type=int, default=0, metavar="SAMPLES", help="judge by the bundled network too"
    )
    parser.add_argument(
        "--begin", default=None, metavar="FILE", help="results to begin with, where --out has none"
    )
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--cache", default="/tmp/sdeflow-accuracy")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(arguments.out)
    before = json.loads(out.read_text()) if out.exists() else {"found": {}}
    known = before["found"]
    if arguments.judge:
        errors = judge(known, arguments.judge, arguments.model)
        judged = before.get("judged", {}) | {
            arguments.model: {"samples": arguments.judge, **provenance(), "errors": errors}
        }
        out.write_text(json.dumps({**before, "judged": judged}, indent=1) + "\n")
        return
    before.pop("judged", None)  # of recipes that may not stay
    if arguments.data is None:
        raise SystemExit(
            "--data names a parquet file of images, of which some of the targets are made"
        )
    first = json.loads(Path(arguments.begin).read_text())["found"] if arguments.begin else {}
    begin = ChainMap(known, first)  # a view: later tasks begin with what earlier ones have found
    began = time.perf_counter()
    prepare(arguments.data, Path(arguments.cache), arguments.starts)
    print(f"prepared in {time.perf_counter() - began:.0f} s", flush=True)
    # Spawned: a process that knows of CUDA, as this one may, cannot be forked into one that uses
    # it.
    given = (_CELLS, arguments.network)
    with multiprocessing.get_context("spawn").Pool(arguments.workers, _begin, given) as pool:
        best = ordinary(sorted(set(arguments.nfe)), pool)
        print(f"measured the ordinary after {time.perf_counter() - began:.0f} s", flush=True)
        tasks = [
            (family, nfe, arguments.seconds, begin, seed, best[nfe])
            for nfe in sorted(arguments.nfe, reverse=True)
            for family in arguments.families
            if FAMILIES[family][4][0] <= nfe <= FAMILIES[family][4][1]
            for seed in range(arguments.seeds)
        ]
        for key, value, candidate, medians, tried in pool.imap_unordered(
            search, tasks, chunksize=1
        ):
            if key not in known or value < known[key]["score"]:
                known[key] = {"score": value, "recipe": asdict(candidate), "medians": medians}
            numbers = " ".join(f"{getattr(candidate, name):.3g}" for name in NUMBERS)
            print(f"{key:14} {value:.3f} after {tried}: {numbers}", flush=True)
    found = dict(
        sorted(known.items(), key=lambda item: (int(item[0].split()[0]), item[1]["score"]))
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**before, **provenance(), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
