"""A few-call plan fitted to a Frechet distance: an example of what a judge has to see through.

    python -m benchmarks.quality.fitted_plan --data train.parquet --out plan.json --calls 5

The plan starts from that of `auto`. Adam changes its noise levels, its weights and the network's
time labels so that the Frechet distance of fresh samples in the features of the network for fitting
becomes small. That distance falls far below that of a converged solver, and the images become no
better than its images. `--free` gives up consistency too: then rows need not sum to one. Do not use
such a plan; `benchmarks.quality.judges` scores it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.report import provenance
from sdeflow import solve
from sdeflow.images.datasets import load_images
from sdeflow.models.checkpoint import Pretrained, load
from sdeflow.models.fitting_network import load_fitting_network

Table = tuple[Tensor, Tensor, Tensor]
"""Levels `[K]` (nsr), the unrolled matrix `[K + 1, K + 1]`, multiples of the time label `[K]`."""

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def network_of(model: Pretrained) -> Network:
    """The network as a function of a scaled state, its time and labels."""
    network: Any = model.network
    return lambda x, t, label: network(x, t.expand(len(x)), label=label)


def predict(
    network: Network, dtype: torch.dtype, x: Tensor, nsr: Tensor, multiple: Tensor, label: Tensor
) -> Tensor:
    """EDM's preconditioning at `nsr`, with the time label of `nsr * multiple`: x0."""
    square = nsr**2 + 0.25
    numbers = (0.25 / square, 0.5 * nsr / square.sqrt(), square.rsqrt(), (nsr * multiple).log() / 4)
    skip, out, scale, label_time = (number.float() for number in numbers)
    return skip * x + out * network((x * scale).to(dtype), label_time, label).float()


def execute(
    network: Network,
    dtype: torch.dtype,
    table: Table,
    noise: Tensor,
    label: Tensor,
    gradients: bool = False,
) -> Tensor:
    """The samples that a table makes of `noise`, whose standard deviation is the first level."""
    levels, matrix, multiples = table
    weights, found = matrix.float(), []

    def call(x: Tensor, nsr: Tensor, multiple: Tensor) -> Tensor:
        return predict(network, dtype, x, nsr, multiple, label)

    def row(i: int) -> Tensor:
        parts = (weights[i, j + 1] * x0 for j, x0 in enumerate(found))
        return sum(parts, weights[i, 0] * noise)

    for i, (nsr, multiple) in enumerate(zip(levels, multiples, strict=True)):
        if gradients:
            x0 = checkpoint(call, row(i), nsr, multiple, use_reentrant=False)
        else:
            x0 = call(row(i), nsr, multiple)
        found.append(x0)
    return row(len(levels))


class Parameters(nn.Module):
    """A table's free numbers: gaps in log nsr, weights, and logarithms of the label multiples.

    With `free=False` the newest weight of each row is what consistency leaves, and the weight of
    the noise follows from the level.
    """

    def __init__(self, table: Table, free: bool) -> None:
        super().__init__()
        levels, matrix, multiples = table
        self.free, self.first = free, float(levels[0])
        self.gaps = nn.Parameter((levels[:-1] / levels[1:]).log().log())
        self.change = nn.Parameter(torch.zeros_like(matrix))
        self.label = nn.Parameter(multiples.log())
        self.start = matrix.clone()
        ends = torch.cat([levels, levels.new_zeros(1)])
        self.mask = torch.ones_like(matrix).tril()
        self.mask[0] = 0.0
        # The noise's weight acts on values of the order of `first`, so it moves in proportion.
        self.mask[:, 0] *= ends / self.first if free else 0.0
        self.mask[-1, 1:] = 1.0

    def table(self) -> Table:
        """The table at the present numbers."""
        ratios = torch.cat([self.gaps.new_ones(1), (-self.gaps.exp().cumsum(0)).exp()])
        levels, matrix = self.first * ratios, self.start + self.change * self.mask
        if not self.free:
            rows, count = [matrix[0]], len(levels)
            for i in range(1, count + 1):
                noise = ratios[i] if i < count else ratios.new_zeros(())
                rest = 1.0 - noise - matrix[i, 1:i].sum()
                parts = [noise[None], matrix[i, 1:i], rest[None], matrix[i, i + 1 :] * 0.0]
                rows.append(torch.cat(parts))
            matrix = torch.stack(rows)
        return levels, matrix, self.label.exp()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, float64."""
    centred = features.double() - (mean := features.double().mean(0))
    return mean, centred.T @ centred / (len(features) - 1)


def root_of(covariance: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T


def distance(features: Tensor, mean: Tensor, covariance: Tensor, root: Tensor) -> Tensor:
    """The Frechet distance to a reference, with gradients."""
    own, scatter = moments(features)
    product = root @ scatter @ root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(1e-9).sqrt().sum()
    return (own - mean).square().sum() + covariance.trace() + scatter.trace() - 2.0 * roots


def fit(options: argparse.Namespace) -> dict[str, Any]:
    """Fit, and return the table with its history."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load("cifar10", device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    dtype, network = model.dtype or torch.float32, network_of(model)
    judge = load_fitting_network(options.features, device)
    images = load_images(options.data, memory_gb=1e9, progress=False)
    with torch.no_grad():
        pixels = images.pixels  # type: ignore[attr-defined]
        parts = (p.to(device).float() / 127.5 - 1.0 for p in pixels.split(1000))
        mean, covariance = moments(torch.cat([judge.embed(part) for part in parts]))
    root = root_of(covariance)
    if options.start:
        stored = json.loads(Path(options.start).read_text())
        start = [
            torch.tensor(stored[k], dtype=torch.float64) for k in ("levels", "matrix", "labels")
        ]
    else:
        plan = solve(
            model, solver="auto", nfe=options.calls, n=1, seeds=0,
            condition={"label": torch.zeros(1, dtype=torch.long, device=device)},
        ).plan  # fmt: skip
        levels = plan.times[: plan.nfe].double().cpu()
        start = [levels, plan.unrolled().matrix.double().cpu(), torch.ones_like(levels)]
    parameters = Parameters((start[0], start[1], start[2]), options.free)
    adam = torch.optim.Adam(parameters.parameters(), lr=options.lr)
    generator = torch.Generator(device).manual_seed(options.seed)
    label = torch.arange(options.batch_size, device=device) % 10
    history: list[float] = []
    began = time.monotonic()
    while not history or (
        time.monotonic() - began < options.seconds and len(history) < options.steps
    ):
        table = parameters.table()
        placed = tuple(part.to(device) for part in table)
        shape = (options.samples, *(model.shape or ()))
        noise = torch.randn(shape, device=device, generator=generator) * parameters.first
        # The gradient to the features of all samples first, then through one part at a time.
        with torch.no_grad():
            made = [
                execute(network, dtype, placed, part, label[: len(part)])  # type: ignore[arg-type]
                for part in noise.split(options.batch_size)
            ]
            features = torch.cat([judge.embed(x.clamp(-1.0, 1.0)) for x in made])
        leaf = features.double().requires_grad_(True)
        loss = distance(leaf, mean, covariance, root)
        (slope,) = torch.autograd.grad(loss, leaf)
        leaves = [part.detach().requires_grad_(True) for part in placed]
        for part, down in zip(
            noise.split(options.batch_size), slope.split(options.batch_size), strict=True
        ):
            now: Any = tuple(leaves)
            x = execute(network, dtype, now, part, label[: len(part)], gradients=True)
            judge.embed(x.clamp(-1.0, 1.0)).backward(down.float())
        adam.zero_grad()
        torch.autograd.backward(placed, [part.grad for part in leaves])  # type: ignore[misc]
        nn.utils.clip_grad_norm_(parameters.parameters(), 10.0)
        done = min(1.0, (time.monotonic() - began) / options.seconds)
        for group in adam.param_groups:
            group["lr"] = options.lr * max(0.02, 0.5 + 0.5 * math.cos(math.pi * done))
        adam.step()
        history.append(float(loss.detach()))
        if len(history) % 10 == 1:
            print(
                f"{len(history)}: {history[-1]:.4f}, {time.monotonic() - began:.0f} s", flush=True
            )
    levels, matrix, labels = (part.detach().tolist() for part in parameters.table())
    return {"levels": levels, "matrix": matrix, "labels": labels, "history": history}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="the training set, parquet or a folder")
    parser.add_argument("--out", type=Path, required=True, help="the plan, JSON")
    parser.add_argument("--features", type=Path, default=None, help="another network for fitting")
    parser.add_argument("--start", type=Path, default=None, help="a plan that was fitted before")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--free", action="store_true", help="give up consistency")
    parser.add_argument("--samples", type=int, default=1000, help="of each step")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args(words)
    found = fit(options)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    options.out.write_text(
        json.dumps({**found, "settings": settings, "provenance": provenance()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
