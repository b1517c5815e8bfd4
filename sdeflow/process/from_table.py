r"""The process of a table of pairs $(s, \sigma)$."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow._utils.math import as_time
from sdeflow.process.base import Process


class Tabulated(Process):
    """A process of a table with one entry for each of `size` times, `t = (index + 1) / size`."""

    size: int

    def index(self, t: float | Tensor) -> Tensor:
        """The position of `t` in the table, counted from 0, as a real number."""
        return as_time(t) * self.size - 1.0

    def time(self, index: int | float | Tensor) -> Tensor:
        """The time of an entry of the table, counted from 0."""
        return (as_time(index) + 1.0) / self.size


@dataclass(frozen=True)
class FromTable(Tabulated):
    r"""The process of a table of pairs $(s_i, \sigma_i)$, from data to noise, exact at its own
    entries $t = i/N$, $i = 1 \dots N$.

    Between the entries $\operatorname{asinh}(s/\sigma)$ is the monotone piecewise cubic through
    them, and $\log s$ a piecewise cubic; both have continuous derivatives. Below the first entry
    both go on as straight lines. The last `s` may be 0 (zero-terminal SNR);
    $\log\sqrt{s^2 + \sigma^2}$ then takes the place of $\log s$. The index of time `t` in the
    table is `t N - 1`.

    Errors: `ValueError` for tables of different lengths or fewer than two entries, for values that
    are not positive and finite, and where `sigma / s` does not rise.

    Source: Fritsch & Carlson (1980) for the curve.
    """

    s_table: tuple[float, ...]
    sigma_table: tuple[float, ...]
    _nodes: Tensor = field(init=False, repr=False, compare=False)
    _slopes: Tensor = field(init=False, repr=False, compare=False)
    t_min: float = field(init=False)
    t_max: float = field(init=False, default=1.0)
    default_grid: ClassVar[str] = "quadratic"

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        s, sigma = (torch.tensor(c, dtype=torch.float64) for c in (self.s_table, self.sigma_table))
        if s.ndim != 1 or s.shape != sigma.shape or len(s) < 2:
            raise ValueError(
                "a table has two vectors of one length, s and sigma, of at least two entries; got"
                f" shapes {tuple(s.shape)} and {tuple(sigma.shape)}"
            )
        bad = ~(torch.isfinite(s) & torch.isfinite(sigma) & (sigma > 0) & (s >= 0))
        bad[:-1] |= s[:-1] == 0
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                "the entries of a table are positive and finite (the last s may be 0); entry"
                f" {i} is s={float(s[i]):g}, sigma={float(sigma[i]):g}"
            )
        clock = torch.asinh(s / sigma)
        stays = clock.diff() >= 0
        if bool(stays.any()):
            i = int(stays.nonzero()[0])
            turned = (
                ". It goes from noise to data: flip both, s.flip(0) and sigma.flip(0)"
                if bool(stays.all())
                else ""
            )
            raise ValueError(
                f"sigma / s of a table rises from entry to entry; it is"
                f" {float(sigma[i] / s[i]):.6g} at entry {i} and"
                f" {float(sigma[i + 1] / s[i + 1]):.6g} at entry {i + 1}{turned}"
            )
        size = s if float(s[-1]) > 0.0 else torch.hypot(s, sigma)
        nodes = torch.stack([clock, size.log()])
        object.__setattr__(self, "t_min", 1.0 / len(s))
        object.__setattr__(self, "_nodes", nodes)
        object.__setattr__(
            self,
            "_slopes",
            torch.stack([-monotone_slopes(-clock, 1.0 / len(s)), _slopes(nodes[1], 1.0 / len(s))]),
        )

    def __repr__(self) -> str:
        ends = " .. ".join(f"({self.s_table[i]:g}, {self.sigma_table[i]:g})" for i in (0, -1))
        return f"FromTable({self.size} pairs, {ends})"

    @property
    def size(self) -> int:  # type: ignore[override]
        """The number of entries."""
        return len(self.s_table)

    def _curves(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`asinh(s / sigma)`, and `log s` (or `log hypot(s, sigma)`)."""
        position = t * self.size - 1.0
        i = (position.detach() * (1 + 1e-15)).floor().long().clamp(0, self.size - 2)
        u = position - i
        nodes, slopes = self._nodes.to(t.device, t.dtype), self._slopes.to(t.device, t.dtype)
        inside = cubic(
            u, nodes[:, i], nodes[:, i + 1], slopes[:, i], slopes[:, i + 1], 1.0 / self.size
        )
        first, slope = (c[:, :1].reshape(2, *[1] * t.ndim) for c in (nodes, slopes))
        clock, log_size = torch.where(position < 0, first + u / self.size * slope, inside)
        return clock, log_size

    def s(self, t: Tensor) -> Tensor:
        """`s`, or `hypot(s, sigma) tanh(clock)`."""
        clock, log_size = self._curves(t)
        size = torch.exp(log_size)
        return size if self.s_table[-1] > 0.0 else size * torch.tanh(clock)

    def sigma(self, t: Tensor) -> Tensor:
        """`s / sinh(clock)`, or `hypot(s, sigma) / cosh(clock)`."""
        clock, log_size = self._curves(t)
        size = torch.exp(log_size)
        return size / (torch.sinh(clock) if self.s_table[-1] > 0.0 else torch.cosh(clock))


def cubic(u: Tensor, y0: Tensor, y1: Tensor, d0: Tensor, d1: Tensor, h: float) -> Tensor:
    """The cubic with values `y0`, `y1` and slopes `d0`, `d1` at the ends of an interval of length
    `h`, at the fraction `u` of it.
    """
    return (
        y0 * (1 + 2 * u) * (1 - u) ** 2
        + y1 * u**2 * (3 - 2 * u)
        + h * u * (1 - u) * (d0 * (1 - u) - d1 * u)
    )


def monotone_slopes(y: Tensor, h: float) -> Tensor:
    """Slopes that make the cubic Hermite curve through equally spaced, rising `y` monotone
    (harmonic means of the secants).
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


def _slopes(y: Tensor, h: float) -> Tensor:
    """Slopes of the cubic Hermite curve through equally spaced `y`: means of the secants."""
    secants = y.diff() / h
    return torch.cat([secants[:1], 0.5 * (secants[:-1] + secants[1:]), secants[-1:]])
