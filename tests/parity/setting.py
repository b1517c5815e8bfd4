"""What the published implementations and ours are given alike: the exact denoiser of a mixture, a
start, noises and grids.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import LINEAR_BETAS, Mixture, PathNoise
from torch import Tensor

from sdeflow.noise import Noise
from sdeflow.process import EDM, VP, Process, RectifiedFlow

HERE = Path(__file__).parent
PINS: dict[str, Any] = tomllib.loads((HERE / "pins.toml").read_text())
RECORDS = HERE / "records.safetensors"


@dataclass(frozen=True)
class Sphere(Process):
    """Variance preserving, with the noise-to-signal ratio as its time, so that a level is a peer's
    to the last bit.
    """

    t_min: float = 1e-3
    t_max: float = 200.0

    def s(self, t: Tensor) -> Tensor:
        return (1.0 + t * t).rsqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return t * (1.0 + t * t).rsqrt()

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        return torch.exp(-torch.as_tensor(lam, dtype=torch.float64))


PROCESSES: dict[str, Process] = {
    "edm": EDM(),  # s = 1, and the time is sigma
    "sphere": Sphere(),  # s^2 + sigma^2 = 1, and the time is sigma / s
    "flow": RectifiedFlow(),  # s + sigma = 1, and the time is sigma
    "vp": VP(),
    "betas": Process.from_betas(
        LINEAR_BETAS
    ),  # the table itself, whose entry i is the time (i + 1) / 1000
}


def kernel(process: str, times: Tensor) -> tuple[Tensor, Tensor]:
    """`(s, sigma)` at times of a process."""
    return PROCESSES[process].kernel(times)


def uneven(
    process: str, steps: int, nsr: float | None = None, nsr_next: float | None = None
) -> Tensor:
    """A grid that is smooth and uneven in `lam`, as times of a process."""
    a, b = nsr or PINS["problem"]["nsr_first"], nsr_next or PINS["problem"]["nsr_last"]
    u = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    u = u + 0.45 * torch.sin(2 * math.pi * u) / (2 * math.pi)
    lam = -math.log(a) + u * math.log(a / b)
    return PROCESSES[process].t_of_lam(lam)


def _draws() -> tuple[Tensor, Tensor]:
    pins = PINS["problem"]
    rng = np.random.default_rng(pins["seed"])
    data = Mixture.draw(pins["batch"], pins["seed"])
    return torch.from_numpy(data), torch.from_numpy(
        rng.standard_normal((pins["noises"], pins["batch"], 2))
    )


DATA, NOISES = _draws()


def start(process: str, time: Tensor | float) -> Tensor:
    """The state at a time: the data and the first of the noises."""
    s, sigma = kernel(process, torch.as_tensor(time, dtype=torch.float64))
    return s * DATA + sigma * NOISES[0]


@dataclass
class Asked:
    """The denoiser as the peers call it, for `x = s z`; it counts its calls, and takes no level but
    those it is told.
    """

    process: str = "edm"
    calls: int = 0
    polynomial: tuple[float, ...] = ()
    drawn: int = 1
    seen: list[float] = field(default_factory=list)

    def __call__(self, z: Tensor, nsr: float | Tensor) -> Tensor:
        """The mean of the data given `z = x / s`."""
        self.calls += 1
        nsr = torch.as_tensor(nsr, dtype=torch.float64)
        self.seen.append(float(nsr))
        if self.polynomial:  # a prediction that is a polynomial in lam, whatever the state
            lam = -torch.log(nsr)
            return torch.zeros_like(z) + sum(c * lam**k for k, c in enumerate(self.polynomial))
        if bool(torch.isinf(nsr)):  # nothing is known: the mean of the data
            return torch.from_numpy(Mixture.moments()[0]).expand_as(z)
        return Mixture().denoise(z, torch.ones((), dtype=torch.float64), nsr)

    def noise(self, *_: Any, **__: Any) -> Tensor:
        """The next of the noises."""
        self.drawn += 1
        return NOISES[self.drawn - 1].clone()


class InOrder(Noise):
    """The noises that the peers got, in the same order."""

    def __init__(self) -> None:
        super().__init__(range(PINS["problem"]["batch"]), (2,), dtype=torch.float64)
        self.drawn = 1

    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        self.drawn += 1
        return NOISES[self.drawn - 1].clone()


def path(nodes: list[float]) -> PathNoise:
    """One Brownian path in nsr^2, for methods that draw for parts of a step."""
    return PathNoise(PINS["problem"]["batch"], (2,), nodes, seed=PINS["problem"]["seed"])
