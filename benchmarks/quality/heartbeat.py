"""Binomial diffusion of the heartbeat sequences: the bound in bits of a small trained network, on
the paper's chain of 2000 steps, and the samples that it draws.

python -m benchmarks.quality.heartbeat

Two processes of one thread, one for each rate.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import provenance, table, write
from sdeflow import BinomialProcess, harmonic_betas

HEARTBEATS = torch.stack([(torch.arange(20) % 5 == phase).float() for phase in range(5)])

RATES = 0.5, 0.2


class Network(nn.Module):
    """P(x0 = 1 | x_t) of every bit: three layers on the bits and two functions of the time."""

    shape = (20,)

    def __init__(self, steps: int, width: int = 128):
        super().__init__()
        self.steps = steps
        self.layers = nn.Sequential(
            nn.Linear(22, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 20),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        share = (t / self.steps).unsqueeze(1)
        return torch.sigmoid(self.layers(torch.cat([2 * x - 1, share, -share.log() / 4], 1)))


def train(process: BinomialProcess, iterations: int, batch: int = 256, seed: int = 0) -> Network:
    """A network trained by the bound, with Adam and a rate that falls to zero."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network(process.steps)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for _ in range(iterations):
        x0 = HEARTBEATS[torch.randint(5, (batch,), generator=generator)]
        optimiser.zero_grad()
        process.loss(network, x0, generator=generator).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        falling.step()
    return network.requires_grad_(False)


def judge(process: BinomialProcess, denoiser: Any, n: int, samples: int) -> dict[str, float]:
    """The bound over `n` heartbeats, and the share of `samples` that are heartbeats, by phase."""
    bound = process.bound(denoiser, HEARTBEATS.repeat(n // 5, 1))
    x = process.sample(denoiser, n=samples)
    phases = (x[:, None] == HEARTBEATS).all(-1).double().mean(0)
    return {
        "bits": bound.mean,
        "standard_error": bound.standard_error,
        "heartbeats": float(phases.sum()),
        "rarest_phase": float(phases.min()),
        "commonest_phase": float(phases.max()),
    }


def run(rate: float, args: argparse.Namespace) -> dict[str, float]:
    """A network trained and judged at one rate, on one thread."""
    torch.set_num_threads(1)
    process = BinomialProcess(harmonic_betas(args.steps), rate)
    began = time.process_time()
    network = train(process, args.iterations)
    seconds = round(time.process_time() - began, 1)
    result = judge(process, network, args.bound, args.samples)
    return {"rate": rate, **result, "cpu_seconds_of_training": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--bound", type=int, default=700, help="samples of the bound")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--out", help="where to write, without it benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = list(pool.map(run, RATES, [args] * len(RATES)))
    rows = [
        [
            f"{result['rate']:g}",
            f"{result['bits']:.4f} ± {result['standard_error']:.4f}",
            f"{100 * result['heartbeats']:.1f} %",
            f"{100 * result['rarest_phase']:.1f} to {100 * result['commonest_phase']:.1f} %",
            f"{result['cpu_seconds_of_training']:.0f}",
        ]
        for result in results
    ]
    head = ["rate", "bound in bits", "heartbeats", "share of a phase", "CPU seconds of training"]
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    command = " ".join(["python -m benchmarks.quality.heartbeat", *sys.argv[1:]])
    about = {**provenance(), "command": command}
    content = {"settings": {**settings, "entropy": math.log2(5)}, "results": results}
    write("heartbeat", content, table(head, rows), args.out, about)


if __name__ == "__main__":
    main()
