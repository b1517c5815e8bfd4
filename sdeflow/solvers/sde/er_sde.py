r"""ER-SDE: solvers of the extended reverse-time SDEs, which choose the noise by a function of the
noise-to-signal ratio.

For a function $\varphi$ such that $\varphi(n)/n$ does not fall with $n$ = nsr, the process

$$d(x/s) = \frac{\varphi'}{\varphi}\,\big(x/s - x_0\big)\,dn + \text{noise}$$

has the marginals of the probability-flow ODE if its noise fills up what the contraction takes.
$\varphi = n$ is that ODE, $\varphi = n^2$ the reverse SDE, and $\varphi = n^{1 + \eta}$ the SDE
with noise at the rate $\eta$ of `sdeflow.solvers.sde.exponential`; in its terms, $\delta$ is the
fall of $\log(\varphi/n)$ over the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow._utils import math as _math
from sdeflow._utils.checks import is_number
from sdeflow._utils.math import Scalar
from sdeflow._utils.renamed import renamed
from sdeflow.errors import unknown
from sdeflow.process import Level, Process
from sdeflow.solvers.ode.multistep import Multistep, Weights, check_p, from_differences
from sdeflow.solvers.ode.weights import step_weights
from sdeflow.solvers.sde.exponential import rate_fall

_LOG_10 = math.log(10.0)
_POINTS = 32

POWERS: dict[str, float] = {"ode": 1.0, "sde": 2.0, "sde_2": 1.5, "sde_3": 2.5}
"""Noise scales that are powers of nsr."""


def _exponential_of_inverse(n: Tensor) -> tuple[Tensor, Tensor]:
    """`n (e^{-1/n} + 10)`."""
    grown = torch.exp(-1.0 / n)
    return torch.log(grown + 10.0), grown / (n * (grown + 10.0))


def _logarithm(n: Tensor) -> tuple[Tensor, Tensor]:
    """`n^0.9 log10(1 + 100 n^1.5)`, up to `n = 1000`, beyond which it would fall behind `n`: there
    in proportion to `n`.
    """
    m = n.clamp(max=1e3)
    y = 100.0 * m**1.5
    log = torch.log1p(y)
    rate = 1.5 * y / ((1.0 + y) * log) - 0.1
    return torch.log(log / _LOG_10) - 0.1 * torch.log(m), torch.where(n < 1e3, rate, 0.0)


def _exponential_of_power(n: Tensor) -> tuple[Tensor, Tensor]:
    """`n (e^{n^0.3} + 10)`."""
    m = n**0.3
    return torch.logaddexp(m, m.new_tensor(_LOG_10)), 0.3 * m * torch.sigmoid(m - _LOG_10)


SCALES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "sde_1": _exponential_of_inverse,
    "sde_4": _logarithm,
    "sde_5": _exponential_of_power,
}
"""The other noise scales of the paper: `log(phi / n)` and its derivative in `log n`, the rate of
noise, as functions of `n`.
"""


@renamed({"exact": "exact_weights"})
@dataclass(frozen=True)
class ERSDE(Multistep):
    r"""ER-SDE-Solver-1, 2 and 3: Taylor steps in nsr, with noise after a noise scale `phi(nsr)`.

    With `r = phi_next / phi` and the differences of the predictions
    `D' = (D - D_1) / (nsr - nsr_1)` and `D'' = 2 (D' - D'_1) / (nsr - nsr_2)`:

        x_next = (s_next / s) r x + s_next ((1 - r) D + k_1 D' + k_2 D'')
                 + s_next sqrt(nsr_next^2 - r^2 nsr^2) z
        k_1    = nsr_next - nsr + phi_next int dn / phi(n)                from nsr_next to nsr
        k_2    = (nsr_next - nsr)^2 / 2 + phi_next int (n - nsr) / phi(n) dn

    - `p`: predictions that are used, 1, 2 or 3; the first steps have fewer.
    - `phi`: the noise scale: a power of nsr (1 is the ODE, 2 the reverse SDE), or a name of the
      paper: `"ode"`, `"sde"`, `"sde_1"`: `n (e^{-1/n} + 10)`, `"sde_2"`: `n^1.5`, `"sde_3"`:
      `n^2.5`, `"sde_4"`: `n^0.9 log10(1 + 100 n^1.5)`, or its choice `"sde_5"`:
      `n (e^{n^0.3} + 10)`.
    - `exact_weights`: with three predictions, take as `D'` the parabola's slope at the step's
      start, `D' + (nsr - nsr_1) D'' / 2`, in place of the published difference, which is its slope
      half a step before; `p=3` then is the exact polynomial.

    The integrals are taken by a Gauss-Legendre rule; the published code sums 100 points, to about
    one percent.

    Cost: 1 call a step. Weak order: `min(p, 2)`. Strong order: 1. Source: Cui et al.,
    "ER-SDE-Solver" (2023), algorithms 1-3.
    """

    p: int = 3
    phi: float | str = "sde_5"
    exact_weights: bool = False

    clock = "nsr"
    source: ClassVar[str] = "Cui et al. 2023"

    def __post_init__(self) -> None:
        check_p(self.p, 3, "ER-SDE")
        if isinstance(self.phi, str):
            if self.phi not in POWERS and self.phi not in SCALES:
                raise unknown("noise scale", self.phi, (*POWERS, *SCALES))
        elif not is_number(self.phi, 1.0):
            raise ValueError(
                "phi is a noise scale's name, or the power of nsr that it is, 1 (the ODE) or more;"
                f" got {self.phi!r}"
            )

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self._power != 1.0

    @property
    def _power(self) -> float | None:
        """The power of nsr that the noise scale is, if it is one."""
        return POWERS.get(self.phi) if isinstance(self.phi, str) else float(self.phi)

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        whole = step_weights(t, t_next, self.delta(t, t_next))[1]
        if len(nodes) == 1:
            return [whole]
        k_1, k_2 = self._moments(t, t_next)
        nsrs = [node.nsr for node in nodes]
        bend = 2.0 * k_2
        if self.exact_weights:
            bend = bend + k_1 * (nsrs[0] - nsrs[1])
        return from_differences(nsrs, whole, k_1, bend)

    def _log_scale(self, nsr: Scalar) -> tuple[Scalar, Scalar]:
        """`log(phi / nsr)`, and its derivative in `log nsr`."""
        if (power := self._power) is not None:
            return (power - 1.0) * _math.log(nsr), power - 1.0
        of_tensor = SCALES[str(self.phi)]
        if isinstance(nsr, Tensor):
            return of_tensor(nsr)
        value, rate = of_tensor(torch.tensor(nsr, dtype=torch.float64))
        return float(value), float(rate)

    def delta(self, t: Level, t_next: Level) -> Scalar:
        """By how much `log(phi / nsr)` falls over the step."""
        if (power := self._power) is not None:
            return rate_fall(t, t_next, power - 1.0)
        return self._log_scale(t.nsr)[0] - self._log_scale(t_next.nsr)[0]

    def _moments(self, t: Level, t_next: Level) -> tuple[Scalar, Scalar]:
        """`s_next k_1` and `s_next k_2`, as integrals over `lam` in which nothing cancels."""
        h = t_next.lam - t.lam
        u, weights = _math.gauss_legendre(_POINTS)
        lam = t.lam + u * h
        nsr = torch.exp(-lam)
        scale, rate = self._log_scale(nsr)
        fall = scale - self._log_scale(t_next.nsr)[0] + (t_next.lam - lam)  # log(phi / phi_next)
        density = weights * h * t_next.s * (1.0 + rate) * torch.exp(-fall)
        gone = t.nsr * torch.expm1(t.lam - lam)  # nsr there, less nsr at the start
        k_1, k_2 = (density * gone).sum(), 0.5 * (density * gone * gone).sum()
        return (k_1, k_2) if isinstance(h, Tensor) else (float(k_1), float(k_2))
