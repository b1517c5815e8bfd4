"""The process of a DDPM table of betas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow._utils.math import as_time
from sdeflow.process.base import Process


@dataclass(frozen=True)
class FromBetas(Process):
    r"""The process of a DDPM table $\beta_1 \dots \beta_N$, exact at its own nodes:
    $s(i/N)^2 = \prod_{j \le i}(1 - \beta_j)$.

    Between the nodes $-\log s$ is the monotone piecewise cubic through them (and through
    $s(0) = 1$), with a continuous derivative. The index of time `t` in the table is `t N - 1`. A
    table may have any length.

    Errors: `ValueError` where a beta is outside (0, 1). A last beta of 1 (zero-terminal SNR) has no
    logarithm.

    Source: Ho et al., "Denoising diffusion probabilistic models" (2020); Fritsch & Carlson (1980)
    for the curve.
    """

    betas: tuple[float, ...]
    _nodes: Tensor = field(init=False, repr=False, compare=False)
    _slopes: Tensor = field(init=False, repr=False, compare=False)
    t_min: float = field(init=False)
    t_max: float = field(init=False, default=1.0)
    default_grid: ClassVar[str] = "quadratic"

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        betas = torch.tensor(self.betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 1 or not bool(((betas > 0) & (betas < 1)).all()):
            hint = ""
            if len(betas) and float(betas.max()) >= 1:
                hint = (
                    "; a last beta of 1 means zero-terminal SNR: drop it, or use a continuous"
                    " process"
                )
            raise ValueError(f"a table of betas is a vector with every entry inside (0, 1){hint}")
        n = len(betas)
        nodes = torch.cat(
            [torch.zeros(1, dtype=torch.float64), -0.5 * torch.log1p(-betas).cumsum(0)]
        )
        object.__setattr__(self, "t_min", 1.0 / n if n > 1 else 0.5)
        object.__setattr__(self, "_nodes", nodes)
        object.__setattr__(self, "_slopes", _monotone_slopes(nodes, 1.0 / n))

    def __repr__(self) -> str:
        return f"FromBetas({len(self.betas)} betas, {self.betas[0]:g} .. {self.betas[-1]:g})"

    def index(self, t: float | Tensor) -> Tensor:
        """The position of `t` in the table, counted from 0, as a real number."""
        return as_time(t) * len(self.betas) - 1.0

    def time(self, index: int | float | Tensor) -> Tensor:
        """The time of an entry of the table, counted from 0."""
        return (as_time(index) + 1.0) / len(self.betas)

    def _decay(self, t: Tensor) -> Tensor:
        """`-log s(t)`: the cubic Hermite curve through the table."""
        n = len(self.betas)
        nodes, slopes = self._nodes.to(t.device, t.dtype), self._slopes.to(t.device, t.dtype)
        i = (t.detach() * n * (1 + 1e-15)).floor().long().clamp(0, n - 1)
        u, h = t * n - i, 1.0 / n
        return (
            nodes[i] * (1 + 2 * u) * (1 - u) ** 2
            + nodes[i + 1] * u**2 * (3 - 2 * u)
            + h * u * (1 - u) * (slopes[i] * (1 - u) - slopes[i + 1] * u)
        )

    def s(self, t: Tensor) -> Tensor:
        """Square root of the cumulative product of `1 - beta`."""
        return torch.exp(-self._decay(t))

    def variance(self, t: Tensor) -> Tensor:
        """`1 - s^2`, without cancellation."""
        return -torch.expm1(-2.0 * self._decay(t))

    def sigma(self, t: Tensor) -> Tensor:
        """`sqrt(1 - s^2)`."""
        return self.variance(t).sqrt()


def _monotone_slopes(y: Tensor, h: float) -> Tensor:
    """Slopes that make the cubic Hermite curve through equally spaced `y` monotone (harmonic means
    of the secants).
    """
    secants = y.diff() / h
    inner = 2.0 * secants[:-1] * secants[1:] / (secants[:-1] + secants[1:])
    if len(secants) == 1:
        return secants.repeat(2)
    # One-sided three-point slopes at the ends, kept within [0, 3 secant], where the curve stays
    # monotone.
    first = (1.5 * secants[0] - 0.5 * secants[1]).clamp(min=0.0).minimum(3 * secants[0])
    last = (1.5 * secants[-1] - 0.5 * secants[-2]).clamp(min=0.0).minimum(3 * secants[-1])
    return torch.cat([first.reshape(1), inner, last.reshape(1)])
