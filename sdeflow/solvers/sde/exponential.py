r"""The reverse SDE with its linear part solved exactly: what the exponential integrators of the SDE
share.

Every member of the family of reverse SDEs

$$dx = \Big[f x - \tfrac{1 + \eta}{2} g^2\, \mathrm{score}\Big] dt + \sqrt{\eta}\, g\, dw$$

has the marginals of the process: $\eta = 0$ is the probability-flow ODE, $\eta = 1$ Anderson's
reverse SDE. With $h$ the length of a step in $\lambda = \log(s/\sigma)$ and a standard normal $z$,
its exact solution over the step is

$$x_+ = \frac{\sigma_+}{\sigma} e^{-\eta h}\, x
+ s_+ (1 + \eta) \int_\lambda^{\lambda_+} e^{-(1 + \eta)(\lambda_+ - l)}\, x_0(l)\, dl
+ \sigma_+ \sqrt{1 - e^{-2 \eta h}}\; z.$$

The methods differ in how they interpolate the prediction $x_0$: held (`SDEDPMSolverPP(p=1)`), over
the last predictions (`SDEDPMSolverPP`, `StochasticAdams`, `SASolver`, `ERSDE`), or over stages
within the step (`SDEDPMSolverPPSingle`, `SEEDS`).

**One noise, four names.** A step has $e^{-\delta}$ in place of $e^{-\eta h}$ for some
$\delta \ge 0$. The parameters of the literature differ only in $\delta$:

| parameter | of | $\delta$ |
|---|---|---|
| `eta`, a rate | SDE-DPM-Solver++, SEEDS; k-diffusion's `dpmpp_2m_sde`, `dpmpp_3m_sde` | $\eta h$ |
| `tau` | SA-Solver | $\tau^2 h$ |
| `eta`, a ratio | DDIM; k-diffusion's ancestral ones and `dpmpp_sde` | $-\tfrac12 \log(1 - \eta^2 (1 - e^{-2h}))$ |
| `phi` | ER-SDE | $\log(\varphi/\mathrm{nsr}) - \log(\varphi_+/\mathrm{nsr}_+)$ |

They agree at 0 and at 1 (`phi` = nsr and nsr^2). Between these, DDIM's `eta` is about the root of
the rate in short steps. In long steps it adds less noise than the rate, which replaces all of the
noise there.

**How far the order goes.** A multistep method interpolates predictions that hold the noise of past
steps; a stage holds its own noise. Therefore the interpolation does not help beyond weak order 2.
Paths converge strongly at order 1.

**Where no signal is left** (rectified flow at t = 1: $\lambda = -\infty$) every method steps to
fresh noise around its prediction, or with $\eta = 0$ as DDIM. Polynomials in $\lambda$ then leave
that node out.

Source: Lu et al., "DPM-Solver++" (2022), equation 16; Gonzalez et al., "SEEDS" (2023); Xue et al.,
"SA-Solver" (2023), proposition 4.2; Cui et al., "ER-SDE-Solver" (2023).
"""

from __future__ import annotations

import math
from typing import Any

from sdeflow._utils import math as _math
from sdeflow._utils.checks import is_number
from sdeflow._utils.math import Scalar
from sdeflow.process import Level
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.weights import StepWeights, has_signal, step_weights


class RateSolver(GridSolver):
    """A solver of the reverse SDE whose field `eta` says how much noise it adds; at 0 it solves the
    ODE, both ways.
    """

    eta: float

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.eta > 0.0

    def delta(self, t: Level, t_next: Level) -> Scalar:
        """By how much more than in the ODE the logarithm of the state falls over a step."""
        return rate_fall(t, t_next, self.eta)


def check_rate(name: str, rate: Any, most: float = math.inf) -> None:
    """A `ValueError` unless `rate` is a finite number from 0 to `most`."""
    if not is_number(rate, 0.0, most):
        upper = "" if most == math.inf else f" to {most:g}"
        raise ValueError(
            f"{name} says how much noise is added: a number from 0 (the ODE){upper}, 1 for the"
            f" reverse SDE; got {rate!r}"
        )


def rate_fall(t: Level, t_next: Level, rate: float) -> Scalar:
    """`delta = rate h` of noise at a rate; infinite where no signal is left at `t`."""
    if rate == 0.0:
        return 0.0
    return rate * (t_next.lam - t.lam) if has_signal(t) else math.inf


def rate_weights(t: Level, t_next: Level, rate: float) -> StepWeights:
    """`step_weights` of noise at a rate."""
    return step_weights(t, t_next, rate_fall(t, t_next, rate))


def ratio_weights(t: Level, t_next: Level, eta: float) -> StepWeights:
    """`step_weights` of DDIM's `eta`: noise of the standard deviation
    `eta sigma_next sqrt(1 - nsr_next^2 / nsr^2)`.
    """
    if eta in (0.0, 1.0):
        return rate_weights(t, t_next, eta)
    lost = -_math.expm1(-2.0 * (t_next.lam - t.lam)) if has_signal(t) else 1.0
    return step_weights(t, t_next, -0.5 * _math.log1p(-eta * eta * lost))
