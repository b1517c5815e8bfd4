"""Images per second of `generate` on one and on more GPUs, in one run, and how far their
pictures differ.

Each process first makes a few pictures in a folder of its own, which compiles the network; what is
timed is whole: noise, solves, conversion, files, verification. The pictures of all runs are then
compared, level by level, with the first's, those of each process apart; a count that is named twice
tells what two runs of the same command differ by.

    python -m benchmarks.speed.scaling [--gpus 1 1 2] [--pictures 40000] [--nfe 18]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import table, write


def worker(arguments: argparse.Namespace) -> None:
    """One process of torchrun: warm up, then the timed pictures."""
    from sdeflow import load
    from sdeflow._utils.distributed import this_rank
    from sdeflow.generate import generate

    rank = this_rank()
    device = rank.device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    model = load(arguments.model, device, torch.bfloat16 if gpu else torch.float32, compile=gpu)
    how: dict[str, Any] = {
        "nfe": arguments.nfe, "format": "npz", "compile": gpu, "solver": arguments.solver, "shard_size": arguments.shard,
    }  # fmt: skip
    few, folder = arguments.shard * rank.world, Path(arguments.worker)
    generate(model, folder / "warm", n=few, **how)
    made = generate(model, folder / "made", n=arguments.pictures, **how)
    if rank.first:
        seen = {
            "images_per_second": made.images_per_second,
            "seconds": made.seconds,
            "compiled": made.compiled,
        }
        (folder / "seen.json").write_text(json.dumps(seen))


def pictures(folder: Path) -> np.ndarray:
    """All pictures of a folder of npz shards, in order."""
    return np.concatenate([np.load(path)["images"] for path in sorted(folder.rglob("*.npz"))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 1, 2])
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--nfe", type=int, default=18)
    parser.add_argument("--solver", default="dpmpp_2m")
    parser.add_argument("--shard", type=int, default=512)
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--out", default=None)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / f"{k}-of-{count}" for k, count in enumerate(arguments.gpus)]
        for count, run in zip(arguments.gpus, runs, strict=True):
            run.mkdir()
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={count}",
                "-m",
                "benchmarks.speed.scaling",
            ]
            subprocess.run([*command, *sys.argv[1:], "--worker", str(run)], check=True)
            found.append({"gpus": count, **json.loads((run / "seen.json").read_text())})
        first = pictures(runs[0] / "made").astype(np.int16)
        for one, run in zip(found, runs, strict=True):
            gap = np.abs(pictures(run / "made").astype(np.int16) - first)
            one |= {"largest_difference": int(gap.max()), "share_equal": float((gap == 0).mean())}
            maker = np.arange(len(gap)) // arguments.shard % one["gpus"]  # shards are dealt in turn
            one["share_equal_by_process"] = [
                float((gap[maker == k] == 0).mean()) for k in np.unique(maker)
            ]
    base = found[0]["images_per_second"]
    rows = [
        [one["gpus"], f"{one['images_per_second']:,.0f}", f"{one['images_per_second'] / base:.2f}", f"{one['seconds']:.1f}",
         one["largest_difference"], f"{100 * one['share_equal']:.3f} %",
         ", ".join(f"{100 * share:.3f} %" for share in one["share_equal_by_process"])]
        for one in found
    ]  # fmt: skip
    text = (
        f"{arguments.pictures} pictures, {arguments.solver}, {arguments.nfe} calls each:\n\n"
        + table(
            [
                "GPUs",
                "images/s",
                "times the first",
                "seconds",
                "largest difference, levels of 255",
                "values that are equal",
                "by process",
            ],
            rows,
        )
    )
    write("scaling", {"runs": found}, text, arguments.out)


if __name__ == "__main__":
    main()
