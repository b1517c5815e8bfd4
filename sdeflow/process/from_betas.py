"""The process of a DDPM table of betas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow.process.from_table import Tabulated, cubic, monotone_slopes


@dataclass(frozen=True)
class FromBetas(Tabulated):
    r"""The process of a DDPM table $\beta_1 \dots \beta_N$, exact at its own nodes:
    $s(i/N)^2 = \prod_{j \le i}(1 - \beta_j)$.

    Between the nodes $-\log s$ is the monotone piecewise cubic through them (and through
    $s(0) = 1$), with a continuous derivative. The index of time `t` in the table is `t N - 1`. A
    table may have any length. A last beta of 1 (zero-terminal SNR) leaves no signal at `t = 1`; in
    the last interval `s` itself is then the monotone cubic. Networks that predict `x0`, `v` or the
    velocity run from there.

    Errors: `ValueError` where a beta is outside (0, 1), but for a last one of 1.

    Source: Ho et al., "Denoising diffusion probabilistic models" (2020); Lin et al., "Common
    diffusion noise schedules and sample steps are flawed" (2023) for zero-terminal SNR; Fritsch &
    Carlson (1980) for the curve.
    """

    betas: tuple[float, ...]
    _nodes: Tensor = field(init=False, repr=False, compare=False)
    _slopes: Tensor = field(init=False, repr=False, compare=False)
    t_min: float = field(init=False)
    t_max: float = field(init=False, default=1.0)
    _end: tuple[float, float, float] | None = field(
        init=False, default=None, repr=False, compare=False
    )
    """Where no signal is left at `t = 1`: `s` at the last node before, and how fast it falls there
    and at the end.
    """
    _one_law: ClassVar[bool] = True  # sigma comes from the same function as s
    default_grid: ClassVar[str] = "quadratic"

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        betas = torch.tensor(self.betas, dtype=torch.float64)
        inside = (betas > 0) & (betas < 1)
        inside[-1:] |= betas[-1:] == 1
        if betas.ndim != 1 or len(betas) < 1 or not bool(inside.all()):
            where = ""
            if betas.ndim == 1 and len(betas):
                k = int((~inside).nonzero()[0])
                where = f"; entry {k} is {float(betas[k]):g}"
            raise ValueError(
                "a table of betas is a vector with every entry inside (0, 1); the last may be 1"
                f" (zero-terminal SNR){where}"
            )
        n, h = len(betas), 1.0 / len(betas)
        zero = torch.zeros(1, dtype=torch.float64)
        terminal = float(betas[-1]) == 1.0
        nodes = torch.cat(
            [zero, -0.5 * torch.log1p(-(betas[:-1] if terminal else betas)).cumsum(0)]
        )
        if float(nodes[-1]) > 350.0:
            k = int((nodes > 350.0).nonzero()[0]) - 1
            raise ValueError(
                f"no signal is left after entry {k} of {n} betas: are these alphas, 1 - beta?"
                " Process.from_betas(1 - alphas), or Process.from_alphas_cumprod for their products"
            )
        slopes = monotone_slopes(nodes, h) if len(nodes) > 1 else zero + 1.0
        if terminal:
            # s itself runs to zero in the last interval. Its slope is continuous, and small enough
            # for both curves to be monotone.
            s = torch.exp(-nodes[-2:])
            falls = -torch.cat([s, zero]).diff() / h
            slope, end = falls[-1], falls[-1]
            if len(falls) > 1:
                slope = 2.0 * falls[0] * falls[1] / (falls[0] + falls[1])
                slope = slope.minimum(3.0 * (nodes[-1] - nodes[-2]) / h * s[-1])
                end = (1.5 * falls[1] - 0.5 * falls[0]).clamp(0.1 * falls[1], 3.0 * falls[1])
            slopes[-1] = slope / s[-1]
            object.__setattr__(self, "_end", (float(s[-1]), float(slope), float(end)))
        object.__setattr__(self, "t_min", h if n > 1 else 0.5)
        object.__setattr__(self, "_nodes", nodes)
        object.__setattr__(self, "_slopes", slopes)

    def __repr__(self) -> str:
        return f"FromBetas({len(self.betas)} betas, {self.betas[0]:g} .. {self.betas[-1]:g})"

    @property
    def size(self) -> int:  # type: ignore[override]
        """The number of entries."""
        return len(self.betas)

    def _decay(self, t: Tensor) -> Tensor:
        """`-log s(t)`: the cubic Hermite curve through the table."""
        n = len(self.betas)
        nodes, slopes = self._nodes.to(t.device, t.dtype), self._slopes.to(t.device, t.dtype)
        i = (t.detach() * n * (1 + 1e-15)).floor().long().clamp(0, len(nodes) - 2)
        return cubic(t * n - i, nodes[i], nodes[i + 1], slopes[i], slopes[i + 1], 1.0 / n)

    def _terminal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether times are in the last interval of a table that ends without signal, `s` there,
        and the times of the others.
        """
        assert self._end is not None
        n = len(self.betas)
        start, slope, end = (t.new_tensor(c) for c in self._end)
        u = t * n - (n - 1)
        last = u.detach() > 0
        inside = torch.where(last, u, torch.ones_like(u))
        s = cubic(inside, start, torch.zeros_like(start), -slope, -end, 1.0 / n)
        return last, s.clamp_min(0.0), torch.where(last, torch.zeros_like(t), t)

    def s(self, t: Tensor) -> Tensor:
        """Square root of the cumulative product of `1 - beta`."""
        if self._end is None:
            return torch.exp(-self._decay(t))
        last, s, others = self._terminal(t)
        return s if len(self.betas) == 1 else torch.where(last, s, torch.exp(-self._decay(others)))

    def variance(self, t: Tensor) -> Tensor:
        """`1 - s^2`, without cancellation."""
        if self._end is None:
            return -torch.expm1(-2.0 * self._decay(t))
        last, s, others = self._terminal(t)
        near = (1.0 - s) * (1.0 + s)
        if len(self.betas) == 1:
            return near
        return torch.where(last, near, -torch.expm1(-2.0 * self._decay(others)))

    def sigma(self, t: Tensor) -> Tensor:
        """`sqrt(1 - s^2)`."""
        return self.variance(t).sqrt()


def betas_of(alphas_cumprod: Tensor) -> Tensor:
    """The betas of a table of `alphas_cumprod`, the products of `1 - beta`."""
    a = alphas_cumprod
    if a.ndim != 1 or len(a) < 1:
        raise ValueError(f"a table of alphas_cumprod is a vector; got shape {tuple(a.shape)}")
    ratios = a / torch.cat([a.new_ones(1), a[:-1]])
    sound = (a > 0) & (ratios < 1)
    sound[-1] = (a[-1] >= 0) & (ratios[-1] < 1)
    if not bool(sound.all()):
        i = int((~sound).nonzero()[0])
        raise ValueError(
            "alphas_cumprod fall from below 1 to above 0, from data to noise (the last may be 0);"
            f" entry {i} is {float(a[i]):g} after {float(a[i - 1]) if i else 1.0:g}"
        )
    return 1.0 - ratios
