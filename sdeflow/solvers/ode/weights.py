r"""Weights of exponential integrators: integrals of an interpolating polynomial over a step, exact
to rounding.

Divided by a scale $\rho$, the probability-flow ODE depends on one function $F$ of the prediction:

$$d(x / \rho) = F\,dq.$$

| `predicts` | $F$ | $\rho$ | $q$ |
|---|---|---|---|
| `x0` | $x_0$ | $\sigma$ | $e^\lambda$ |
| `eps` | $\varepsilon$ | $s$ | nsr |
| `v` | $(cs\varepsilon - \sigma x_0/c)/R$ | $R = \sqrt{c^2 s^2 + \sigma^2}$ | atan(nsr / c) |
| `flow` | $\varepsilon - x_0/c$ | $cs + \sigma$ | $\sigma/(cs + \sigma)$ |

`v` and `flow` behave as `x0` where nsr is far above the scale $c$, and as `eps` where it is far
below. In their textbook form $c = 1$; in general $c$ has the units of the data.

Let $F$ be interpolated over some nodes by a polynomial in a monotone variable $u$, the clock. Then
a step is the linear combination

$$x_+ = \frac{\rho_+}{\rho}\,x + \sum_j b_j F_j, \qquad b_j = \rho_+ \int_q^{q_+} \ell_j(u)\,dq,$$

with the Lagrange polynomials $\ell_j$ of the nodes. The integrals are taken in $\lambda$ by a
Gauss-Legendre rule in float64. The weight of the newest node is the total minus the others, so that
$\sum_j b_j = \rho_+ (q_+ - q)$ holds to the last bit.

Source: Hochbruck & Ostermann, "Exponential integrators" (2010); Zhang & Chen, "DEIS" (2022); Lu et
al., "DPM-Solver++" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow._utils import math as _math
from sdeflow._utils.checks import is_number
from sdeflow._utils.math import Scalar, value_of
from sdeflow.process import Level, Process
from sdeflow.process.clock import Clock
from sdeflow.reverse import Reverse, eps_of

Predicts = Literal["x0", "eps", "v", "flow"]
"""The function of the prediction that is interpolated."""
NodeClock = Literal["lam", "nsr", "angle", "flow", "bounded_lam", "t"]
"""The variable of the interpolating polynomial. `flow` is `sigma / (c s + sigma)`, the time of
rectified flow. `bounded_lam` is `log(s / sigma + 1 / c)`: close to `lam` where nsr is far below the
scale `c`, and finite at pure noise.
"""

PREDICTS: tuple[str, ...] = ("x0", "eps", "v", "flow")
CLOCKS: tuple[str, ...] = ("lam", "nsr", "angle", "flow", "bounded_lam", "t")
StepWeights = tuple[Scalar, Scalar, Scalar]
"""`kept`, `whole` and `spread`: what a step multiplies the state, the prediction and the noise by.
"""
_POINTS = 32


def moment(k: int, h: Scalar) -> Scalar:
    r"""`I_k(h) = int_0^1 h e^{-(1-u) h} u^k du = k! h phi_{k+1}(-h)`, the weight of `u^k` over a
    step of length `h` in `lam`.

    `I_0 = 1 - e^{-h}`, `I_k = 1 - (k / h) I_{k-1}`; exact to rounding for small `h` too, where the
    recursion is not used. `-I_k(-h)` is the same integral over `e^{+(1-u) h}`, for methods in eps.
    """
    if k == 0:
        return -torch.expm1(-h) if isinstance(h, Tensor) else -math.expm1(-h)
    if abs(value_of(h)) >= 1.0:
        return 1.0 - (k / h) * moment(k - 1, h)
    u, weights = _math.gauss_legendre(16)
    integral = (weights * u**k * torch.exp(-(1.0 - u) * h)).sum() * h
    return integral if isinstance(h, Tensor) else float(integral)


def predicted(predicts: str, x: Any, x0: Any, t: Level, scale: float = 1.0) -> Any:
    """`F` at a level, from the state and the prediction of `x0`."""
    if predicts == "x0":
        return x0
    if predicts == "eps":
        return eps_of(x, x0, t)
    r = rho(predicts, t, scale)
    if predicts == "flow":
        return x * (1.0 / t.sigma) - (r / (scale * t.sigma)) * x0
    # (c s eps - sigma x0 / c) / R = (c s x - R^2 x0 / c) / (sigma R)
    return (scale * t.s / (t.sigma * r)) * x - (r / (scale * t.sigma)) * x0


def rho(predicts: str, t: Level, scale: float = 1.0) -> Scalar:
    """The scale `rho` by which the state is divided."""
    if predicts == "x0":
        return t.sigma
    if predicts == "eps":
        return t.s
    if predicts == "flow":
        return scale * t.s + t.sigma
    return _math.sqrt((scale * t.s) * (scale * t.s) + t.sigma * t.sigma)


def step_weights(t: Level, t_next: Level, delta: Scalar = 0.0) -> StepWeights:
    r"""`x_next = kept x + whole x0 + spread z`: a step with the prediction held, which damps the
    state by `e^{-delta}` more than the ODE does.

    `kept = sigma_next/sigma e^{-delta}`, `whole = s_next (1 - e^{-(h + delta)})`,
    `spread = sigma_next sqrt(1 - e^{-2 delta})`. A state that is `s x0 + sigma eps` becomes exactly
    one at `t_next`, for every `delta`. `delta=0` is DDIM.
    """
    spread = t_next.sigma * _math.sqrt(-_math.expm1(-2.0 * delta))
    kept = t_next.sigma / t.sigma * _math.exp(-delta)
    if not has_signal(t):
        return kept, t_next.s, spread
    if not has_signal(t_next):  # only the ODE goes there
        return kept, t_next.s - kept * t.s, spread
    return kept, -t_next.s * _math.expm1(-(t_next.lam - t.lam + delta)), spread


def has_signal(*levels: Level) -> bool:
    """Whether `s` is not zero at any of the levels, so that `lam` is finite."""
    return all(value_of(level.s) != 0.0 for level in levels)


def adams(
    predicts: str,
    clock: str,
    nodes: Sequence[Level],
    t: Level,
    t_next: Level,
    process: Process,
    eta: float = 0.0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[Scalar, list[Scalar]]:
    """`(a, b)` of the step `x_next = a x + sum_j b_j F_j` over `nodes`.

    The weight of the first node is the total minus the others.
    `eta` adds the SDE's drift where `x0` is interpolated: the exponential is then of
    `(1 + eta^2) lam`. `scales` are that of the function `F` and that of the clocks `angle`, `flow`
    and `bounded_lam`. Both levels need signal.
    """
    h = t_next.lam - t.lam
    a = rho(predicts, t_next, scales[0]) / rho(predicts, t, scales[0])
    if eta:
        a = a * _math.exp(-eta * eta * h)
    total = _total(predicts, t, t_next, h, 1.0 + eta * eta, scales[0])
    if len(nodes) == 1:
        return a, [total]
    if not isinstance(h, Tensor):
        h = torch.tensor(h, dtype=torch.float64)
    u, weights = _math.gauss_legendre(_POINTS)
    lam = t.lam + u * h
    density = weights * h * _density(predicts, lam, t_next, 1.0 + eta * eta, scales[0])
    variable = Clock(clock, scales[1])
    c = _times(process, lam, t, t_next) if clock == "t" else variable.of_lam(lam)
    readings = [variable.reading(node) for node in nodes]
    rest: list[Tensor] = []
    for j in range(1, len(nodes)):
        basis = density
        for i, other in enumerate(readings):
            if i != j:
                basis = basis * ((c - other) / (readings[j] - other))
        rest.append(basis.sum())
    tail: list[Scalar] = rest if rest[0].requires_grad else [float(b) for b in rest]
    return a, [total - sum(tail), *tail]


def _total(predicts: str, t: Level, t_next: Level, h: Scalar, rate: float, scale: float) -> Scalar:
    """`rho_next (q_next - q)`, without cancellation."""
    if predicts == "x0":
        return -t_next.s * _math.expm1(-rate * h)
    rise = _math.expm1(h)
    if predicts == "eps":
        return -t_next.sigma * rise
    if predicts == "flow":
        return -scale * t_next.sigma * t.s * rise / rho("flow", t, scale)
    angle = scale * t.s * t_next.sigma * rise
    angle = angle / (scale * scale * t.s * t_next.s + t.sigma * t_next.sigma)
    atan = torch.atan if isinstance(h, Tensor) else math.atan
    return -rho("v", t_next, scale) * atan(angle)


def _density(predicts: str, lam: Tensor, t_next: Level, rate: float, scale: float) -> Tensor:
    """`rho_next dq / dlam` at points of the step."""
    if predicts == "x0":
        return t_next.s * rate * torch.exp(-rate * (t_next.lam - lam))
    nsr = torch.exp(-lam)
    r = rho(predicts, t_next, scale)
    if predicts == "eps":
        return -r * nsr
    if predicts == "flow":
        return -r * nsr * scale / (scale + nsr) ** 2
    return -r * nsr * scale / (scale * scale + nsr * nsr)


def _times(process: Process, lam: Tensor, t: Level, t_next: Level) -> Tensor:
    """The times between two levels at which `log(s / sigma) = lam`.

    A process with a closed form is asked. For others the search starts from the cubic through the
    times and slopes of the two levels and goes on by secants, which takes about four evaluations of
    the process. Where the secants fail, all of the process's time is searched.
    """
    if (
        type(process).t_of_lam is not Process.t_of_lam
        or _math.is_tensor(t.t, t_next.t)
        or lam.requires_grad
    ):
        return process.t_of_lam(lam)
    h, low, high = t_next.lam - t.lam, min(t.t, t_next.t), max(t.t, t_next.t)
    m, m_next = (h / (level.ds / level.s - level.dsigma / level.sigma) for level in (t, t_next))
    u = (lam - t.lam) / h
    v = 1.0 - u
    x = (
        t.t * (1.0 + 2.0 * u) * v * v
        + t_next.t * u * u * (3.0 - 2.0 * u)
        + u * v * (m * v - m_next * u)
    )
    rise = 6.0 * (t_next.t - t.t) * u * v + m * v * (1.0 - 3.0 * u) + m_next * u * (3.0 * u - 2.0)
    with torch.no_grad():
        off = process.lam(x.clamp_(low, high)) - lam
        slope = h / rise
        for _ in range(12):
            step = off / slope
            moved = x - step
            if bool((step.abs() <= 1e-12 * moved.abs()).all()):
                return moved
            if not bool(((moved >= low) & (moved <= high)).all()):  # also of NaN
                break
            off, before = process.lam(moved) - lam, off
            slope = torch.where(step.abs() > 1e-9 * moved.abs(), (before - off) / step, slope)
            x = moved
    return process.t_of_lam(lam)


def check_ratio(r: Any) -> None:
    """A `ValueError` unless `r` is a place for a stage."""
    if not is_number(r, 0.0, 1.0) or r == 0.0:
        raise ValueError(
            f"r is the fraction of the step at which its stage stands: above 0, up to 1; got {r!r}"
        )


def between(reverse: Reverse, t: Level, t_next: Level, r: float) -> Level:
    """The level a fraction `r` of the way in `lam`; in `e^lam` where one of the ends has no
    signal.
    """
    if r == 1.0:
        return t_next
    if has_signal(t, t_next):
        return reverse.level_of_lam(t.lam + r * (t_next.lam - t.lam))
    return reverse.level_of_lam(
        t_next.lam + math.log(r) if has_signal(t_next) else t.lam + math.log1p(-r)
    )
