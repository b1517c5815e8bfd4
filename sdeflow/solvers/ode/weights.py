r"""Weights of exponential integrators: integrals of an interpolating polynomial over a step, exact
to rounding.

Divided by the right scale $\rho$, the probability-flow ODE has a right-hand side that is one
function of the prediction:

$$d(x / \rho) = F\,dq.$$

| frame | $F$ | $\rho$ | $q$ |
|---|---|---|---|
| `x0` | $x_0$ | $\sigma$ | $e^\lambda$ |
| `eps` | $\varepsilon$ | $s$ | nsr |
| `v` | $(cs\varepsilon - \sigma x_0/c)/R$ | $R = \sqrt{c^2 s^2 + \sigma^2}$ | atan(nsr / c) |
| `flow` | $\varepsilon - x_0/c$ | $cs + \sigma$ | $\sigma/(cs + \sigma)$ |

The scale $c$ of the last two, 1 in their textbook form, is where they pass from one of the first
two to the other: they are `x0` at ratios far above $c$ and `eps` far below, in the units of the
data.

Whatever $F$ is interpolated by, over whatever nodes and in whatever monotone clock $c$, a step is
the linear combination

$$x_+ = \frac{\rho_+}{\rho}\,x + \sum_j b_j F_j, \qquad b_j = \rho_+ \int_q^{q_+} \ell_j(c)\,dq,$$

with the Lagrange polynomials $\ell_j$ of the nodes. The integrals are taken in $\lambda$ by a
Gauss-Legendre rule in float64; the weight of the newest node is what is left of the whole, so that
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
from sdeflow._utils.math import Scalar, value_of
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of

Frame = Literal["x0", "eps", "v", "flow"]
"""The function of the prediction that is interpolated."""
NodeClock = Literal["lam", "nsr", "angle", "flow", "bounded_lam", "t"]
"""The variable in which its polynomial is taken; `flow` is `sigma / (c s + sigma)`, the time of
rectified flow; `bounded_lam` is `log(s / sigma + 1 / c)`: `lam` at ratios of noise to signal far
below the scale `c`, and finite at pure noise.
"""

FRAMES: tuple[str, ...] = ("x0", "eps", "v", "flow")
CLOCKS: tuple[str, ...] = ("lam", "nsr", "angle", "flow", "bounded_lam", "t")
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


def frame_value(frame: str, x: Any, x0: Any, t: Level, scale: float = 1.0) -> Any:
    """`F` of a frame at a level, from the state and the prediction."""
    if frame == "x0":
        return x0
    if frame == "eps":
        return eps_of(x, x0, t)
    if frame == "flow":
        return x * (1.0 / t.sigma) - ((scale * t.s + t.sigma) / (scale * t.sigma)) * x0
    r = _radius(t, scale)  # (c s eps - sigma x0 / c) / R = (c s x - R^2 x0 / c) / (sigma R)
    return (scale * t.s / (t.sigma * r)) * x - (r / (scale * t.sigma)) * x0


def _radius(t: Level, scale: float) -> Scalar:
    """`R = sqrt(c^2 s^2 + sigma^2)`."""
    return _math.sqrt((scale * t.s) * (scale * t.s) + t.sigma * t.sigma)


def has_signal(*levels: Level) -> bool:
    """Whether `s` is not zero at any of the levels, so that `lam` is finite."""
    return all(value_of(level.s) != 0.0 for level in levels)


def adams(
    frame: str,
    clock: str,
    nodes: Sequence[Level],
    t: Level,
    t_next: Level,
    process: Process,
    eta: float = 0.0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[Scalar, list[Scalar]]:
    """`(a, b)` of the step `x_next = a x + sum_j b_j F_j` over `nodes`, the first of which takes
    what is left of the whole.

    `eta` adds the SDE's drift in the frame `x0`: the exponential then is of `(1 + eta^2) lam`.
    `scales` are those of the frame and of the clocks `angle`, `flow` and `bounded_lam`. Both levels
    need signal.
    """
    h = t_next.lam - t.lam
    a, total = _whole(frame, t, t_next, h, 1.0 + eta * eta, scales[0])
    if len(nodes) == 1:
        return a, [total]
    if not isinstance(h, Tensor):
        h = torch.tensor(h, dtype=torch.float64)
    u, weights = _math.gauss_legendre(_POINTS)
    lam = t.lam + u * h
    density = weights * h * _density(frame, lam, t_next, 1.0 + eta * eta, scales[0])
    c = _times(process, lam, t, t_next) if clock == "t" else _readings(clock, lam, scales[1])
    readings = [_reading(clock, node, scales[1]) for node in nodes]
    rest: list[Tensor] = []
    for j in range(1, len(nodes)):
        basis = density
        for i, other in enumerate(readings):
            if i != j:
                basis = basis * ((c - other) / (readings[j] - other))
        rest.append(basis.sum())
    tail: list[Scalar] = rest if rest[0].requires_grad else [float(b) for b in rest]
    return a, [total - sum(tail), *tail]


def _whole(
    frame: str, t: Level, t_next: Level, h: Scalar, rate: float, scale: float
) -> tuple[Scalar, Scalar]:
    """`rho_next / rho` and `rho_next (q_next - q)`, without cancellation."""
    exp, expm1 = (torch.exp, torch.expm1) if isinstance(h, Tensor) else (math.exp, math.expm1)
    if frame == "x0":
        decay = (
            (t_next.sigma / t.sigma) * exp((1.0 - rate) * h)
            if rate != 1.0
            else t_next.sigma / t.sigma
        )
        return decay, -t_next.s * expm1(-rate * h)
    if frame == "eps":
        return t_next.s / t.s, -t_next.sigma * expm1(h)
    if frame == "flow":
        rho, rho_next = scale * t.s + t.sigma, scale * t_next.s + t_next.sigma
        return rho_next / rho, -scale * t_next.sigma * t.s * expm1(h) / rho
    r, r_next = _radius(t, scale), _radius(t_next, scale)
    atan = torch.atan if isinstance(h, Tensor) else math.atan
    rise = scale * t.s * t_next.sigma * expm1(h)
    return r_next / r, -r_next * atan(
        rise / (scale * scale * t.s * t_next.s + t.sigma * t_next.sigma)
    )


def _density(frame: str, lam: Tensor, t_next: Level, rate: float, scale: float) -> Tensor:
    """`rho_next dq / dlam` at points of the step."""
    if frame == "x0":
        return t_next.s * rate * torch.exp(-rate * (t_next.lam - lam))
    nsr = torch.exp(-lam)
    if frame == "eps":
        return -t_next.s * nsr
    if frame == "flow":
        return -(scale * t_next.s + t_next.sigma) * nsr * scale / (scale + nsr) ** 2
    return -_radius(t_next, scale) * nsr * scale / (scale * scale + nsr * nsr)


def _reading(clock: str, t: Level, scale: float) -> Scalar:
    """What the clock shows at a level."""
    if clock == "t":
        return t.t
    if clock == "lam":
        return t.lam
    if clock == "nsr":
        return t.nsr
    if clock == "flow":
        return t.sigma / (scale * t.s + t.sigma)
    if clock == "bounded_lam":
        return _math.log(t.s / t.sigma + 1.0 / scale)
    if isinstance(t.s, Tensor):
        return torch.atan2(t.sigma, scale * t.s)
    return math.atan2(t.sigma, scale * t.s)


def _readings(clock: str, lam: Tensor, scale: float) -> Tensor:
    """What a clock other than the time shows where `log(s / sigma) = lam`."""
    if clock == "lam":
        return lam
    if clock == "bounded_lam":
        return torch.log(torch.exp(lam) + 1.0 / scale)
    if clock == "flow":
        return 1.0 / (1.0 + scale * torch.exp(lam))
    return torch.exp(-lam) if clock == "nsr" else torch.atan(torch.exp(-lam) / scale)


def _times(process: Process, lam: Tensor, t: Level, t_next: Level) -> Tensor:
    """The times between two levels at which `log(s / sigma) = lam`.

    Where a process has no closed form, secants from the cubic with the times and the slopes of the
    two levels: some four readings of the process, where a search over all of its time takes a
    dozen. Where they fail, that search.
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
    if isinstance(r, bool) or not isinstance(r, int | float) or not 0.0 < r <= 1.0:
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


def between_times(process: Process, times: Tensor, ratios: Sequence[float]) -> Tensor | None:
    """The times of `between`, for all steps at once."""
    inner = [r for r in ratios if r < 1.0]
    if not inner or len(times) < 2:
        return None
    lam = process.lam(times)
    a, b = lam[:-1], lam[1:]
    start = torch.where(torch.isfinite(a), a, b)  # so that no difference is of infinities
    end = torch.where(torch.isfinite(b), b, a)
    stages = [
        torch.where(
            torch.isfinite(a) & torch.isfinite(b),
            start + r * (end - start),
            torch.where(torch.isfinite(b), end + math.log(r), start + math.log1p(-r)),
        )
        for r in inner
    ]
    return process.t_of_lam(torch.stack(stages))
