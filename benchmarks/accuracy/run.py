"""Error of every solver of ours and of every installed peer against the exact probability-flow
solution, and the law's.

Targets with exact denoisers (`problems.py`), under VP, EDM, cosine and rectified flow, at budgets
from 4 to 100. Deterministic solvers start from 64 draws of the exact marginal at `t_max` and are
compared, sample by sample, with the solution of the probability-flow ODE by DOP853 at 1e-11, all in
float64: the median and the root mean square over samples of
|x - exact| / rms |exact|. Stochastic ones are compared as laws, by the sliced Wasserstein-2 distance of 2048 samples. Everybody
ends at zero noise, and calls are counted in the denoiser: a method that makes others than the
budget is an error.

    python -m benchmarks.accuracy.run --data train.parquet --workers 64 --out accuracy.jsonl
    python -m benchmarks.accuracy.run --out accuracy.jsonl --report

Each line of the file is one method on one target and process. A run goes on where the file ends;
`--redo REGEX` forgets what matches (the line's method, as "family name grid"). What was not
possible is in the file with its reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker
os.environ.setdefault("MKL_NUM_THREADS", "1")
import torch

from benchmarks.accuracy import ours, peers, problems
from benchmarks.accuracy.problems import CannotSpend, Cloud, Method, Problem
from benchmarks.report import provenance

NFES = (4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100)
CLOUD_NFES = (5, 10, 20, 50)
LIMIT_S = 60.0  # for one solve

Key = tuple[str, str, str, str, str]  # family, name, grid, process, target
Cells = dict[str, Any]  # nfe -> [median, rms], [w2], or why not


# --------------------------------------------------------------------------------------------- file


def read(path: Path, redo: str | None = None) -> tuple[dict[str, Any], dict[Key, Cells]]:
    """The settings and the cells of a file; of a line that was torn, nothing."""
    settings: dict[str, Any] = {}
    cells: dict[Key, Cells] = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "settings" in row:
                settings = row
                continue
            key = (*row["method"], row["process"], row["target"])
            if redo is None or not re.search(redo, " ".join(row["method"])):
                cells.setdefault(key, {}).update(row["cells"])
    return settings, cells


def _mend(path: Path) -> None:
    """Cut off a torn last line."""
    if path.exists():
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)


# -------------------------------------------------------------------------------------------- cells


class _TimeIsUp(Exception):
    pass


def _alarm(*_: Any) -> None:
    raise _TimeIsUp(f"longer than {LIMIT_S:g} s")


def cell(method: Method, problem: Problem, nfe: int) -> Any:
    """The errors of one solve, or a line that says why there are none."""
    torch.manual_seed(11)
    problem.target.calls = 0
    handler = signal.signal(signal.SIGALRM, _alarm)
    left, _ = signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        x = method.run(problem, nfe)
        if problem.calls != nfe:
            return f"error: {problem.calls} calls for nfe={nfe}"
        figures = [problem.distance(x)] if isinstance(problem, Cloud) else problem.errors(x)
        return [float(f"{figure:.4g}") for figure in figures]
    except CannotSpend as why:
        return f"skip: {why}" if str(why) else "skip: cannot spend it"
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"[:160]
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # of whoever else waits, a test's limit say
        signal.signal(signal.SIGALRM, handler)


_WORLD: dict[
    str, Any
] = {}  # what workers inherit: methods by process, problems by (process, target, stochastic)


@torch.no_grad()
def _unit(
    work: tuple[str, tuple[str, str, str], dict[str, list[int]]],
) -> tuple[list[str], int, float]:
    """Some cells of one method on one process: lines for the file, how many cells, seconds of
    CPU.
    """
    process, key, missing = work
    began = time.process_time()
    method: Method = _WORLD["methods"][process][key]
    lines, count = [], 0
    # Targets inside: one plan serves them all.
    done: dict[str, Cells] = {name: {} for name in missing}
    for nfe in sorted({nfe for nfes in missing.values() for nfe in nfes}):
        for name, nfes in missing.items():
            if nfe in nfes:
                done[name][str(nfe)] = cell(
                    method, _WORLD["problems"][process, name, method.stochastic], nfe
                )
                count += 1
    for name, cells in done.items():
        row = {"method": key, "process": process, "target": name, "cells": cells}
        if method.stochastic:
            row["law"] = 1
        if method.default:
            row["default"] = 1
        lines.append(json.dumps(row, separators=(",", ":")))
    return lines, count, time.process_time() - began


def _started() -> None:
    torch.set_num_threads(1)


# -------------------------------------------------------------------------------------------- sweep


def methods(
    process: str, only: str | None, quick: bool, with_peers: bool = True
) -> tuple[list[Method], dict[str, str]]:
    """Everybody, for a process; and the grids of ours that refuse it."""
    mine, refused = ours.catalogue(process)
    everybody = mine + (peers.catalogue(process) if with_peers else [])
    if quick:
        few = {
            "uniform_lam",
            "karras",
            "karras rho=7",
            "(default)",
            "auto",
            "uniform_sqrt_t",
            "sigmas=uniform_lam",
        }
        everybody = [
            m
            for m in everybody
            if (m.grid in few or m.default) and (m.name.count(" ") < 2 or m.family != ours.FAMILY)
        ]
    if only:
        everybody = [m for m in everybody if re.search(only, " ".join(m.key))]
    return everybody, refused


def _work(
    arguments: argparse.Namespace, known: dict[Key, Cells]
) -> list[tuple[str, tuple[str, str, str], Any]]:
    out = []
    for process, table in _WORLD["methods"].items():
        for key, method in table.items():
            budgets = (
                [n for n in arguments.nfe if n in CLOUD_NFES]
                if method.stochastic
                else arguments.nfe
            )
            missing = {}
            for name in arguments.targets:
                have = known.get((*key, process, name), {})
                left = [n for n in budgets if str(n) not in have]
                if left:
                    missing[name] = left
            # Long ones in parts, that workers may share them.
            size = 2 if method.stochastic else 6
            every = sorted({n for left in missing.values() for n in left}, reverse=True)
            for first in range(0, len(every), size):
                part = every[first : first + size]
                some = {name: [n for n in left if n in part] for name, left in missing.items()}
                out.append((process, key, {name: left for name, left in some.items() if left}))
    random.Random(0).shuffle(out)
    # The dearest first: nobody shall wait for one of them at the end.
    out.sort(key=lambda work: -max(n for left in work[2].values() for n in left) // 50)
    return out


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Methods, problems and references; what the file says of how it was made."""
    cache = Path(arguments.cache)
    _WORLD["methods"], _WORLD["problems"] = {}, {}
    refused: dict[str, dict[str, str]] = {}
    for process in arguments.processes:
        table, refused[process] = methods(process, arguments.only, arguments.quick, arguments.peers)
        _WORLD["methods"][process] = problems.methods_by_key(table)
        some = {"data": arguments.data, "cache": cache}
        for name in arguments.targets:
            _WORLD["problems"][process, name, False] = problems.problem(
                name, process, starts=arguments.starts, **some
            )
            if any(m.stochastic for m in table):
                _WORLD["problems"][process, name, True] = problems.cloud(
                    name, process, samples=arguments.samples, **some
                )
    floors = {
        name: round(problem.floor, 5)
        for (process, name, law), problem in _WORLD["problems"].items()
        if law and process == arguments.processes[0]
    }
    settings = {
        "version": problems.VERSION,
        "starts": arguments.starts,
        "samples": arguments.samples,
    }
    return {
        "settings": settings,
        "floors": floors,
        "refused": refused,
        "peers": peers.versions(),
        **provenance(),
    }


@torch.no_grad()
def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing from the file, and append it."""
    _started()
    path = Path(arguments.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    before, known = read(path, arguments.redo)
    began = time.perf_counter()
    header = prepare(arguments)
    work = _work(arguments, known)
    asked = {
        process: [table[key] for p, key, _ in work if p == process]
        for process, table in _WORLD["methods"].items()
    }
    tasks = ours.layouts(asked, arguments.nfe)
    ours.remember(tasks, list(_each(ours.lay_out, tasks, arguments.workers)))
    if before and before["settings"] != header["settings"]:
        raise SystemExit(
            f"{path} was made with {before['settings']}, not with {header['settings']}: choose"
            " another file"
        )
    cells = sum(len(left) for _, _, missing in work for left in missing.values())
    print(
        f"{len(work)} pieces, {cells} cells, prepared in {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    began, done, spent, told = time.perf_counter(), 0, 0.0, 0.0
    with path.open("a") as file:
        file.write(json.dumps(header) + "\n")
        for lines, count, seconds in _each(_unit, work, arguments.workers):
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            done, spent = done + count, spent + seconds
            now = time.perf_counter() - began
            if now - told > 10:
                told = now
                left = now * (cells - done) / done
                print(f"{done} of {cells} cells, {now:.0f} s, {left:.0f} s left", flush=True)
    print(
        f"{done} cells in {time.perf_counter() - began:.0f} s, {1e3 * spent / max(done, 1):.1f} ms"
        " of CPU each",
        flush=True,
    )
    return {"cells": done, "seconds": spent}


def _each(function: Callable[[Any], Any], work: Sequence[Any], workers: int) -> Iterator[Any]:
    """The results of `function`, in the order of `work` or as they come."""
    if workers <= 1:
        yield from map(function, work)
        return
    # Forked, so that problems and libraries are there at once; nothing here has begun a thread
    # before.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _started) as pool:
        futures = [pool.submit(function, one) for one in work]
        for future in as_completed(futures) if function is _unit else futures:
            yield future.result()


# --------------------------------------------------------------------------------------------- main


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="the file of results, JSON lines; continued where it exists"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each"
    )
    parser.add_argument(
        "--data", default=None, help="a parquet file of images, for the target images"
    )
    parser.add_argument(
        "--cache", default="/tmp/sdeflow-accuracy", help="where references and images are kept"
    )
    parser.add_argument(
        "--targets", nargs="+", default=[*problems.TARGETS], choices=[*problems.TARGETS]
    )
    parser.add_argument(
        "--processes", nargs="+", default=[*problems.PROCESSES], choices=[*problems.PROCESSES]
    )
    parser.add_argument("--nfe", nargs="+", type=int, default=[*NFES], help="budgets")
    parser.add_argument("--starts", type=int, default=64, help="samples of a deterministic solve")
    parser.add_argument("--samples", type=int, default=2048, help="samples of a stochastic solve")
    parser.add_argument(
        "--only", default=None, metavar="REGEX", help='methods, as "family name grid"'
    )
    parser.add_argument(
        "--redo",
        default=None,
        metavar="REGEX",
        help="forget these methods' results and run them again",
    )
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false", help="the solvers of the library alone"
    )
    parser.add_argument("--quick", action="store_true", help="few grids, few variants: a minute")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write tables and plots of the file instead of running",
    )
    parser.add_argument(
        "--into", default=None, help="where the report goes, by default benchmarks/results"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    if arguments.report:
        from benchmarks.accuracy import tables

        tables.write(Path(arguments.out), None if arguments.into is None else Path(arguments.into))
    else:
        sweep(arguments)


if __name__ == "__main__":
    main()
