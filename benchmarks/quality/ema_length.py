"""Quality against the length of the average of a training's weights, chosen after the training.

Of the averages that `sdeflow train --snapshot-images` stored, one of each length in `--stds` is
made (`sdeflow ema`), and `--n` samples of it are scored by both judges. Beside them stands the
exponential average that the training tracked (`model.safetensors`). Under torchrun each process
takes lengths of its own.

    torchrun --nproc-per-node 2 -m benchmarks.quality.ema_length runs/train \\
        --data train.parquet --test test.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.quality.nfe_fid import JUDGES, Scorer
from benchmarks.report import table, write
from sdeflow._utils.distributed import all_gather, joined, this_rank
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
    # std (0: the one that was tracked), how far the profile is off, and a distance of each judge
    mine: list[list[float]] = []
    judges = [e.score for e in scorer.extractors]
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
        seen, _ = scorer(model, cell, min(arguments.batch_size, arguments.n))
        distances = scorer.distances(seen)
        mine.append([std, error, *distances.values()])
        print(std or "exponential", distances, flush=True)
    with joined(rank, torch.device("cpu")):
        found = all_gather(torch.tensor(mine, dtype=torch.float64).reshape(-1, 2 + len(judges)))
    if rank.first:
        report(arguments, sorted(found.tolist()), scorer.test_set, judges)


def report(
    arguments: argparse.Namespace,
    found: list[list[float]],
    test_set: dict[str, float],
    judges: list[str],
) -> None:
    """The table, the tracked average first."""
    stored = find_snapshots(arguments.folder)
    rows = [
        [f"{std:g}" if std else "exponential, tracked", f"{error:.1e}" if std else ""]
        + [f"{value:.4f}" for value in values]
        for std, error, *values in found
    ]
    floors = ", ".join(f"{test_set[judge]:.4g} ({JUDGES[judge]})" for judge in judges)
    head = ["std of the average", "its profile is off by", *(JUDGES[judge] for judge in judges)]
    text = (
        f"{arguments.n} images, {arguments.solver} on the {arguments.grid} grid, {arguments.nfe}"
        f" calls, after {stored[-1].images} images of training; made of {len(stored)} stored"
        f" averages; {int(test_set['n'])} test images score {floors}:\n\n" + table(head, rows)
    )
    averages = [
        {"std": std or None, "profile_error": error, **dict(zip(judges, values, strict=True))}
        for std, error, *values in found
    ]
    write(
        "ema_length",
        {"test_set": test_set, "images": stored[-1].images, "averages": averages},
        text,
        arguments.out,
    )


if __name__ == "__main__":
    main()
