r"""Weights of exponential integrators: integrals of an interpolating polynomial over a step, exact to rounding.

Divided by the right scale $\rho$, the probability-flow ODE has a right-hand side that is one function of the prediction:

$$d(x / \rho) = F\,dq.$$

| frame | $F$ | $\rho$ | $q$ |
|---|---|---|---|
| `x0` | $x_0$ | $\sigma$ | $e^\lambda$ |
| `eps` | $\varepsilon$ | $s$ | nsr |
| `v` | $(s\varepsilon - \sigma x_0)/R$ | $R = \sqrt{s^2 + \sigma^2}$ | atan nsr |
| `flow` | $\varepsilon - x_0$ | $s + \sigma$ | $\sigma/(s + \sigma)$ |

Whatever $F$ is interpolated by, over whatever nodes and in whatever monotone clock $c$, a step is the linear combination

$$x_+ = \frac{\rho_+}{\rho}\,x + \sum_j b_j F_j, \qquad b_j = \rho_+ \int_q^{q_+} \ell_j(c)\,dq,$$

with the Lagrange polynomials $\ell_j$ of the nodes. The integrals are taken in $\lambda$ by a Gauss-Legendre rule in float64; the
weight of the newest node is what is left of the whole, so that $\sum_j b_j = \rho_+ (q_+ - q)$ holds to the last bit.

Source: Hochbruck & Ostermann, "Exponential integrators" (2010); Zhang & Chen, "DEIS" (2022); Lu et al., "DPM-Solver++" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow import _math
from sdeflow._math import Scalar, value_of
from sdeflow.process import Level, Process
from sdeflow.reverse import eps_of

Frame = Literal["x0", "eps", "v", "flow"]
"""The function of the prediction that is interpolated."""
NodeClock = Literal["lam", "nsr", "angle", "t"]
"""The variable in which its polynomial is taken."""

FRAMES: tuple[str, ...] = ("x0", "eps", "v", "flow")
CLOCKS: tuple[str, ...] = ("lam", "nsr", "angle", "t")
_POINTS = 32


def moment(k: int, h: Scalar) -> Scalar:
    r"""`I_k(h) = int_0^1 h e^{-(1-u) h} u^k du = k! h phi_{k+1}(-h)`, the weight of `u^k` over a step of length `h` in `lam`.

    `I_0 = 1 - e^{-h}`, `I_k = 1 - (k / h) I_{k-1}`; exact to rounding for small `h` too, where the recursion is not used.
    `-I_k(-h)` is the same integral over `e^{+(1-u) h}`, for methods in eps.
    """
    if k == 0:
        return -torch.expm1(-h) if isinstance(h, Tensor) else -math.expm1(-h)
    if abs(value_of(h)) >= 1.0:
        return 1.0 - (k / h) * moment(k - 1, h)
    u, weights = _math.gauss_legendre(16)
    integral = (weights * u**k * torch.exp(-(1.0 - u) * h)).sum() * h
    return integral if isinstance(h, Tensor) else float(integral)


def frame_value(frame: str, x: Any, x0: Any, t: Level) -> Any:
    """`F` of a frame at a level, from the state and the prediction."""
    if frame == "x0":
        return x0
    if frame == "eps":
        return eps_of(x, x0, t)
    if frame == "flow":
        return x * (1.0 / t.sigma) - ((t.s + t.sigma) / t.sigma) * x0
    r2 = t.s * t.s + t.sigma * t.sigma  # (s eps - sigma x0) / R = (s x - R^2 x0) / (sigma R)
    return (t.s / (t.sigma * _math.sqrt(r2))) * x - (_math.sqrt(r2) / t.sigma) * x0


def has_signal(*levels: Level) -> bool:
    """Whether `s` is not zero at any of the levels, so that `lam` is finite."""
    return all(value_of(level.s) != 0.0 for level in levels)


def adams(
    frame: str, clock: str, nodes: Sequence[Level], t: Level, t_next: Level, process: Process, eta: float = 0.0
) -> tuple[Scalar, list[Scalar]]:
    """`(a, b)` of the step `x_next = a x + sum_j b_j F_j` over `nodes`, the first of which takes what is left of the whole.

    `eta` adds the SDE's drift in the frame `x0`: the exponential then is of `(1 + eta^2) lam`. Both levels need signal.
    """
    h = t_next.lam - t.lam
    a, total = _whole(frame, t, t_next, h, 1.0 + eta * eta)
    if len(nodes) == 1:
        return a, [total]
    if not isinstance(h, Tensor):
        h = torch.tensor(h, dtype=torch.float64)
    u, weights = _math.gauss_legendre(_POINTS)
    lam = t.lam + u * h
    density = weights * h * _density(frame, lam, t_next, 1.0 + eta * eta)
    c, readings = _readings(clock, lam, process), [_reading(clock, node) for node in nodes]
    rest: list[Tensor] = []
    for j in range(1, len(nodes)):
        basis = density
        for i, other in enumerate(readings):
            if i != j:
                basis = basis * ((c - other) / (readings[j] - other))
        rest.append(basis.sum())
    tail: list[Scalar] = rest if rest[0].requires_grad else [float(b) for b in rest]
    return a, [total - sum(tail), *tail]


def _whole(frame: str, t: Level, t_next: Level, h: Scalar, rate: float) -> tuple[Scalar, Scalar]:
    """`rho_next / rho` and `rho_next (q_next - q)`, without cancellation."""
    exp, expm1 = (torch.exp, torch.expm1) if isinstance(h, Tensor) else (math.exp, math.expm1)
    if frame == "x0":
        decay = (t_next.sigma / t.sigma) * exp((1.0 - rate) * h) if rate != 1.0 else t_next.sigma / t.sigma
        return decay, -t_next.s * expm1(-rate * h)
    if frame == "eps":
        return t_next.s / t.s, -t_next.sigma * expm1(h)
    if frame == "flow":
        rho, rho_next = t.s + t.sigma, t_next.s + t_next.sigma
        return rho_next / rho, -t_next.sigma * t.s * expm1(h) / rho
    r, r_next = _math.sqrt(t.s * t.s + t.sigma * t.sigma), _math.sqrt(t_next.s * t_next.s + t_next.sigma * t_next.sigma)
    atan = torch.atan if isinstance(h, Tensor) else math.atan
    return r_next / r, -r_next * atan(t.s * t_next.sigma * expm1(h) / (t.s * t_next.s + t.sigma * t_next.sigma))


def _density(frame: str, lam: Tensor, t_next: Level, rate: float) -> Tensor:
    """`rho_next dq / dlam` at points of the step."""
    if frame == "x0":
        return t_next.s * rate * torch.exp(-rate * (t_next.lam - lam))
    nsr = torch.exp(-lam)
    if frame == "eps":
        return -t_next.s * nsr
    if frame == "flow":
        return -(t_next.s + t_next.sigma) * nsr / (1.0 + nsr) ** 2
    return -_math.sqrt(t_next.s * t_next.s + t_next.sigma * t_next.sigma) * nsr / (1.0 + nsr * nsr)


def _reading(clock: str, t: Level) -> Scalar:
    """What the clock shows at a level."""
    if clock == "t":
        return t.t
    if clock == "lam":
        return t.lam
    if clock == "nsr":
        return t.nsr
    return torch.atan2(t.sigma, t.s) if isinstance(t.s, Tensor) else math.atan2(t.sigma, t.s)


def _readings(clock: str, lam: Tensor, process: Process) -> Tensor:
    """What the clock shows where `log(s / sigma) = lam`."""
    if clock == "t":
        return process.t_of_lam(lam)
    if clock == "lam":
        return lam
    return torch.exp(-lam) if clock == "nsr" else torch.atan(torch.exp(-lam))
