"""FD-CIFAR against the length of the average of a training's weights, chosen after the training.

Of the averages that `sdeflow train --snapshot-images` stored, one of each length in `--stds` is
made (`sdeflow ema`), and `--n` pictures are drawn from it; beside them the exponential average that
the training tracked (`model.safetensors`). Under torchrun each process takes lengths of its own.

    torchrun --nproc-per-node 2 -m benchmarks.quality.ema_length runs/train --data train.parquet --test test.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.quality.nfe_fid import Scorer
from benchmarks.report import table, write
from sdeflow._utils.distributed import gather, joined, this_rank
from sdeflow.models.checkpoint import load, read_tensors
from sdeflow.models.ema.posthoc import find_snapshots, reconstruct
from sdeflow.training.api import MODEL


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a training that stored averages")
    parser.add_argument("--data", required=True, help="the training set, parquet")
    parser.add_argument("--test", help="the test set, parquet")
    parser.add_argument(
        "--features", default=None, help="another feature network than the bundled one"
    )
    parser.add_argument(
        "--stds", type=float, nargs="+", default=[0.03, 0.05, 0.075, 0.1, 0.15, 0.2]
    )
    parser.add_argument("-n", "--n", type=int, default=10_000)
    parser.add_argument("--nfe", type=int, default=35)
    parser.add_argument("--solver", default="unipc_3")
    parser.add_argument("--grid", default="karras")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args(words)
    rank = this_rank()
    device = rank.device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    model = load(
        arguments.folder / MODEL, device, torch.bfloat16 if gpu else torch.float32, compile=gpu
    )
    scorer = Scorer(arguments, device)
    cell = (arguments.solver, arguments.grid, arguments.nfe, arguments.n)
    mine: list[
        list[float]
    ] = []  # std (0: the one that was tracked), FD-CIFAR, how far the profile is off
    for std in [0.0, *arguments.stds][rank.index :: rank.world]:
        error = 0.0
        if std:
            made = reconstruct(arguments.folder, std)
            parameters, error = dict(made.parameters), made.error
        else:
            parameters = {
                n: p.float() for n, p in read_tensors(arguments.folder / MODEL)[0].items()
            }
        model.network.load_state_dict(parameters)  # type: ignore[attr-defined]  # in place: what is compiled stays
        distance, _ = scorer(model, cell, min(arguments.batch_size, arguments.n))
        mine.append([std, distance, error])
        print(std or "exponential", f"{distance:.4f}", flush=True)
    with joined(rank, torch.device("cpu")):
        found = gather(torch.tensor(mine, dtype=torch.float64).reshape(-1, 3))
    if rank.first:
        report(arguments, sorted(found.tolist()), scorer.floor)


def report(arguments: argparse.Namespace, found: list[list[float]], floor: float) -> None:
    """The table, the tracked average first."""
    stored = find_snapshots(arguments.folder)
    rows = [
        (
            [f"{std:g}", f"{error:.1e}", f"{distance:.4f}"]
            if std
            else ["exponential, tracked", "", f"{distance:.4f}"]
        )
        for std, distance, error in found
    ]
    text = (
        f"FD-CIFAR of {arguments.n} pictures, {arguments.solver} on the {arguments.grid} grid,"
        f" {arguments.nfe} calls, after {stored[-1].images} images; made of {len(stored)} stored"
        f" averages; the floor is {floor:.3f}:\n\n"
        + table(["std of the average", "its profile is off by", "FD-CIFAR"], rows)
    )
    averages = [
        {"std": std or None, "fd_cifar": distance, "profile_error": error}
        for std, distance, error in found
    ]
    write(
        "ema_length",
        {"floor": floor, "images": stored[-1].images, "averages": averages},
        text,
        arguments.out,
    )


if __name__ == "__main__":
    main()
