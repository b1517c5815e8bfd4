r"""The optimal variance of a reverse step, and its estimate from data.

The reverse step from $t$ to $t'$ has the mean of the posterior with the prediction in the place of
$x_0$, and a variance that is free. Among all variances $v$ the bound is best at

$$v = u^2 + b^2\,e(\mathrm{nsr}), \qquad u^2 = \sigma'^2 (1 - r^2), \quad b = s' (1 - r^2), \quad
r = \mathrm{nsr}'/\mathrm{nsr},$$

the posterior's own variance and the part of the prediction's mean squared error
$e = E|x_0 - \hat x_0|^2 / d$ that reaches $x'$. For an exact prediction
$e = \mathrm{nsr}^2 (1 - m)$ with the moment $m = E|\hat\varepsilon|^2 / d$.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdeflow._utils.checks import whole_number
from sdeflow.denoisers import Denoiser, as_denoiser
from sdeflow.noise import SeededNoise
from sdeflow.process import Process

TOP = 1e4
"""The noise-to-signal ratio at which a moment is asked where no signal is left."""


@dataclass(frozen=True)
class Optimal:
    r"""The variance that makes the variational bound best, for `DDPM(variance=Optimal(...))` and
    `variational_bound`.

    - `moment`: $E|\hat\varepsilon|^2$ per dimension, a function of the noise-to-signal ratio, from
      0 to 1. For data $N(0, c^2 I)$ it is `nsr^2 / (nsr^2 + c^2)`.
    - or a table: the prediction's mean squared error `error` per dimension at the ratios `nsr`,
      which `Optimal.estimate(model, x0)` measures. Between them its logarithm is interpolated
      linearly in log nsr, and beyond the ends the nearest entry holds.

    Errors: `ValueError` for neither or both, or a table that does not increase in `nsr`. Source:
    Bao et al., "Analytic-DPM" (2022), theorem 1; the error measured against data is the
    non-perfect-mean form of "Estimating the optimal covariance" (Bao et al. 2022).
    """

    moment: Callable[[float], float] | None = None
    nsr: tuple[float, ...] = field(default=(), kw_only=True)
    error: tuple[float, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        table = (tuple(map(float, self.nsr)), tuple(map(float, self.error)))
        object.__setattr__(self, "nsr", table[0])
        object.__setattr__(self, "error", table[1])
        if (self.moment is None) == (not table[0]):
            raise ValueError(
                "Optimal takes a moment, a function of nsr, or a table nsr=, error=:"
                " Optimal.estimate(model, x0) measures one"
            )
        rising = all(a < b for a, b in zip(table[0], table[0][1:], strict=False))
        if len(table[0]) != len(table[1]) or not rising or any(e <= 0.0 for e in table[1]):
            raise ValueError(
                "the table of Optimal has one positive error for each nsr, and nsr rises; got"
                f" {len(table[0])} and {len(table[1])} entries"
            )

    def mean_squared_error(self, nsr: float) -> float:
        """`E|x0 - x0_hat|^2` per dimension at a noise-to-signal ratio; above 10^4, where a moment
        says nothing of it any more, as there.
        """
        if self.moment is not None:
            nsr = min(nsr, TOP)
            return nsr**2 * min(max(1.0 - float(self.moment(nsr)), 0.0), 1.0)
        i = bisect_left(self.nsr, nsr)
        if i == 0 or i == len(self.nsr):
            return self.error[max(i - 1, 0)]
        low, high = self.nsr[i - 1], self.nsr[i]
        share = math.log(nsr / low) / math.log(high / low)
        return self.error[i - 1] ** (1.0 - share) * self.error[i] ** share

    @classmethod
    @torch.no_grad()
    def estimate(
        cls,
        model: Denoiser | Callable[..., Tensor],
        x0: Tensor,
        process: Process | None = None,
        *,
        nsr: Sequence[float] | None = None,
        points: int = 32,
        seeds: int | Sequence[int] = 0,
        condition: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> Optimal:
        """The table measured on data `x0` `[B, *shape]`, with one draw of noise for each level and
        sample.

        `nsr`: the ratios, by default `points` of them, equally spaced in the logarithm over the
        process's time. `seeds`: one a sample, or the first of consecutive ones. Cost: one call of
        the denoiser for each ratio (and batch).
        """
        denoiser = as_denoiser(model, process)
        path = denoiser.process
        if nsr is None:
            ends = path.nsr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
            low, high = float(ends[0]), min(float(ends[1]), TOP)
            whole_number("points", points, 2, of="noise levels")
            span = torch.linspace(math.log(low), math.log(high), points, dtype=torch.float64)
            nsr = span.exp().tolist()
        keys = list(range(seeds, seeds + len(x0)) if isinstance(seeds, int) else seeds)
        size = batch_size or len(x0)
        total = [0.0] * len(nsr)
        for first in range(0, len(x0), size):
            rows = slice(first, first + size)
            part, source = x0[rows], SeededNoise(keys[rows], x0.shape[1:], x0.device, x0.dtype)
            given = {
                k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == len(x0) else v
                for k, v in (condition or {}).items()
            }
            for k, ratio in enumerate(nsr):
                t = path.t_of_nsr(ratio)
                x = path.perturb(part, t, source.draw(ratio, 0.0))
                wrong = (denoiser(x, t, **given) - part).double() ** 2
                total[k] += float(wrong.flatten(1).mean(1).sum())
        return cls(nsr=tuple(nsr), error=tuple(max(e / len(x0), 1e-30) for e in total))
