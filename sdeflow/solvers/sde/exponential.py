r"""The reverse SDE with its linear part solved exactly: what the exponential integrators of the SDE
share.

Every member of the family of reverse SDEs

$$dx = \Big[f x - \tfrac{1 + \eta}{2} g^2\, \mathrm{score}\Big] dt + \sqrt{\eta}\, g\, dw$$

has the marginals of the process: $\eta = 0$ is the probability-flow ODE, $\eta = 1$ Anderson's
reverse SDE. With $h$ the length of a step in $\lambda = \log(s/\sigma)$ and a standard normal $z$,
its solution over the step is, with nothing left out,

$$x_+ = \frac{\sigma_+}{\sigma} e^{-\eta h}\, x
+ s_+ (1 + \eta) \int_\lambda^{\lambda_+} e^{-(1 + \eta)(\lambda_+ - l)}\, x_0(l)\, dl
+ \sigma_+ \sqrt{1 - e^{-2 \eta h}}\; z.$$

The prediction $x_0$ is then interpolated: held (`SDEDPMSolverPP(p=1)`), over the last predictions
(`SDEDPMSolverPP`, `StochasticAdams`, `SASolver`, `ERSDE`), or over stages within the step
(`SDEDPMSolverPPSingle`, `SEEDS`).

**One noise, four names.** What a step adds is $e^{-\delta}$ in place of $e^{-\eta h}$ for some
$\delta \ge 0$, and all that the literature's parameters differ in is $\delta$:

| parameter | of | $\delta$ |
|---|---|---|
| `eta`, a rate | SDE-DPM-Solver++, SEEDS; k-diffusion's `dpmpp_2m_sde`, `dpmpp_3m_sde` | $\eta h$ |
| `tau` | SA-Solver | $\tau^2 h$ |
| `eta`, a ratio | DDIM; k-diffusion's ancestral ones and `dpmpp_sde` | $-\tfrac12 \log(1 - \eta^2 (1 - e^{-2h}))$ |
| `phi` | ER-SDE | $\log(\varphi/\mathrm{nsr}) - \log(\varphi_+/\mathrm{nsr}_+)$ |

They agree at 0 and at 1 (`phi` = nsr and nsr^2). Between, DDIM's `eta` is about the root of the
rate in short steps, and adds less than it in long ones, where any rate replaces all of the noise.

**How far the order goes.** The noise of the past steps is in the predictions that a multistep
method interpolates, and that of a stage in its own: beyond weak order 2 the interpolation no longer
helps. Paths converge strongly at order 1.

**Where no signal is left** (rectified flow at t = 1: $\lambda = -\infty$) every method steps to
fresh noise around its prediction, or with $\eta = 0$ as DDIM; polynomials in $\lambda$ then do
without that node.

Source: Lu et al., "DPM-Solver++" (2022), equation 16; Gonzalez et al., "SEEDS" (2023); Xue et al.,
"SA-Solver" (2023), proposition 4.2; Cui et al., "ER-SDE-Solver" (2023).
"""

from __future__ import annotations

import math
from typing import Any

from sdeflow._utils import math as _math
from sdeflow._utils.math import Scalar
from sdeflow.process import Level
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.weights import has_signal

StepWeights = tuple[Scalar, Scalar, Scalar]
"""`kept`, `whole` and `spread`: what a step multiplies the state, the prediction and the noise
by.
"""


class RateSolver(GridSolver):
    """A solver of the reverse SDE whose field `eta` says how much noise it adds; at 0 it solves the
    ODE, both ways.
    """

    eta: float

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.eta > 0.0

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        """Whether it also encodes."""
        return self.eta == 0.0


def check_rate(name: str, rate: Any, most: float = math.inf) -> None:
    """A `ValueError` unless `rate` is a finite number from 0 to `most`."""
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not (number and math.isfinite(rate) and 0.0 <= rate <= most):
        upper = "" if most == math.inf else f" to {most:g}"
        raise ValueError(
            f"{name} says how much noise is added: a number from 0 (the ODE){upper}, 1 for the"
            f" reverse SDE; got {rate!r}"
        )


def step_weights(t: Level, t_next: Level, delta: Scalar) -> StepWeights:
    r"""`x_next = kept x + whole x0 + spread z` for a step that damps the state by `e^{-delta}` more
    than the ODE's.

    `kept = sigma_next/sigma e^{-delta}`, `whole = s_next (1 - e^{-(h + delta)})`,
    `spread = sigma_next sqrt(1 - e^{-2 delta})`: a state that is `s x0 + sigma eps` becomes one at
    `t_next`, exactly so, for every `delta`.
    """
    spread = t_next.sigma * _math.sqrt(-_math.expm1(-2.0 * delta))
    kept = t_next.sigma / t.sigma * _math.exp(-delta)
    if not has_signal(t):
        return kept, t_next.s, spread
    if not has_signal(t_next):  # only the ODE goes there
        return kept, t_next.s - kept * t.s, spread
    return kept, -t_next.s * _math.expm1(-(t_next.lam - t.lam + delta)), spread


def rate_weights(t: Level, t_next: Level, rate: float) -> StepWeights:
    """`step_weights` of noise at a rate: `delta = rate h`."""
    if rate == 0.0:
        return step_weights(t, t_next, 0.0)
    return step_weights(t, t_next, rate * (t_next.lam - t.lam) if has_signal(t) else math.inf)


def ratio_weights(t: Level, t_next: Level, eta: float) -> StepWeights:
    """`step_weights` of DDIM's `eta`: noise of the standard deviation
    `eta sigma_next sqrt(1 - nsr_next^2 / nsr^2)`.
    """
    if eta in (0.0, 1.0):
        return rate_weights(t, t_next, eta)
    lost = -_math.expm1(-2.0 * (t_next.lam - t.lam)) if has_signal(t) else 1.0
    return step_weights(t, t_next, -0.5 * _math.log1p(-eta * eta * lost))
