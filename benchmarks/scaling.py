"""Pictures per second of `generate` on one and on more GPUs, in one run, and how far their pictures differ.

Each process first makes a few pictures in a folder of its own, which compiles the network; what is timed is whole: noise, solves,
conversion, files, verification. The pictures of all counts of processes are then compared, level by level.

    python -m benchmarks.scaling [--gpus 1 2] [--pictures 40000] [--nfe 18]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from _report import table, write


def worker(arguments: argparse.Namespace) -> None:
    """One process of torchrun: warm up, then the timed pictures."""
    from sdeflow import load
    from sdeflow.distributed import this_rank
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
    few = arguments.shard * rank.world
    generate(model, Path(arguments.worker) / f"warm{rank.world}", n=few, **how)
    made = generate(model, Path(arguments.worker) / f"gpus{rank.world}", n=arguments.pictures, **how)
    if rank.first:
        seen = {"images_per_second": made.images_per_second, "seconds": made.seconds, "compiled": made.compiled}
        (Path(arguments.worker) / f"gpus{rank.world}.json").write_text(json.dumps(seen))


def pictures(folder: Path) -> np.ndarray:
    """All pictures of a folder of npz shards, in order."""
    return np.concatenate([np.load(path)["images"] for path in sorted(folder.rglob("*.npz"))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
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
    found: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.gpus:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={count}",
                __file__,
            ]
            subprocess.run([*command, *sys.argv[1:], "--worker", folder], check=True)
            found[str(count)] = json.loads((Path(folder) / f"gpus{count}.json").read_text())
        first = pictures(Path(folder) / f"gpus{arguments.gpus[0]}").astype(np.int16)
        base = found[str(arguments.gpus[0])]["images_per_second"]
        for count in arguments.gpus:
            gap = np.abs(pictures(Path(folder) / f"gpus{count}").astype(np.int16) - first)
            one = found[str(count)]
            one |= {"largest_difference": int(gap.max()), "share_equal": float((gap == 0).mean())}
            rows.append(
                [count, f"{one['images_per_second']:,.0f}", f"{one['images_per_second'] / base:.2f}", f"{one['seconds']:.1f}",
                 one["largest_difference"], f"{100 * one['share_equal']:.3f} %"]
            )  # fmt: skip
    text = f"{arguments.pictures} pictures, {arguments.solver}, {arguments.nfe} calls each:\n\n" + table(
        [
            "GPUs",
            "images/s",
            "times the first",
            "seconds",
            "largest difference, levels of 255",
            "values that are equal",
        ],
        rows,
    )
    write("scaling", found, text, arguments.out)


if __name__ == "__main__":
    main()
