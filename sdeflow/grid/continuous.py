"""Grids that are uniform in some function of the level: a power of time, a power or the logarithm
of nsr, an angle, another process's time.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sdeflow.errors import GridError
from sdeflow.grid.base import ends, in_nsr, pin, positive, ramp
from sdeflow.process import VP, Cosine, Process

_FINE = 4097  # points at which a density is added up


def power_t(
    process: Process,
    n: int,
    *,
    rho: float = 2.0,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `t^(1/rho)`: `rho=1` is uniform in `t`, 2 in the square root.

    Source: the power schedules of DDIM, DEIS and EDM in one.
    """
    low, high = ends(process, n, t_min, t_max)
    if not (rho > 0 and math.isfinite(rho)) or low < 0:
        raise GridError(f"a power grid needs rho > 0 and t_min >= 0; got rho={rho}, t_min={low}")
    a, b = high ** (1 / rho), low ** (1 / rho)
    return pin((a + ramp(n) * (b - a)) ** rho, low, high)


def uniform_t(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Uniform in the process's own time. Source: Song et al. (2021)."""
    return power_t(process, n, rho=1.0, t_min=t_min, t_max=t_max)


def uniform_sqrt_t(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Uniform in the square root of time: finer near the data.

    Source: DDIM's "quadratic" grid (Song et al., 2020).
    """
    return power_t(process, n, rho=2.0, t_min=t_min, t_max=t_max)


def cosine_t(
    process: Process,
    n: int,
    *,
    both: bool = True,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Half a cosine in time, fine at both ends (Chebyshev's nodes).

    Without `both` a quarter, fine at the data only.

    Source: the Chebyshev-Lobatto points of numerical quadrature.
    """
    low, high = ends(process, n, t_min, t_max)
    u = ramp(n)
    height = 0.5 * (1.0 + torch.cos(math.pi * u)) if both else 1.0 - torch.sin(0.5 * math.pi * u)
    return pin(low + (high - low) * height, low, high)


def karras(
    process: Process,
    n: int,
    *,
    rho: float = 7.0,
    last: bool = True,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `nsr^(1/rho)`; `n` positive levels, as EDM counts them.

    EDM and k-diffusion take `k/(n - 1)`, `k < n`, and step from the last level to zero: the
    default. Others take `k/n`, `k <= n`, and end at `nsr_min`: here `n + 1` levels with
    `finish=False`. Where their last step goes to zero instead: `n` levels with `last=False`.
    `rho = 1` is uniform in nsr, a large `rho` in its logarithm.

    Source: Karras et al. (2022), equation 5.
    """
    positive("karras", "rho", rho)

    def place(top: float, bottom: float, n: int) -> Tensor:
        a, b = top ** (1 / rho), bottom ** (1 / rho)
        return (a + ramp(n) * (b - a)) ** rho

    return in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, place, last=last)


def uniform_lam(
    process: Process,
    n: int,
    *,
    last: bool = True,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `log(s / sigma)`: every scale of the data gets the same share of steps.

    Without `last`, the first `n` of `n + 1` levels. Source: Lu et al., DPM-Solver (2022).
    """

    def place(top: float, bottom: float, n: int) -> Tensor:
        return torch.exp(math.log(top) + ramp(n) * (math.log(bottom) - math.log(top)))

    return in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, place, last=last)


def polyexponential(
    process: Process,
    n: int,
    *,
    rho: float = 1.0,
    last: bool = True,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `(lam_end - lam)^(1/rho)`, a power of lam: the larger `rho`, the finer near the
    data.

    `rho = 1` is uniform in lam. Without `last`, the first `n` of `n + 1` levels.

    Source: k-diffusion (Crowson, 2022); SA-Solver's "logSNR order" (Xue et al., 2023).
    """
    positive("polyexponential", "rho", rho)

    def place(top: float, bottom: float, n: int) -> Tensor:
        return torch.exp(
            (1.0 - ramp(n)) ** rho * (math.log(top) - math.log(bottom)) + math.log(bottom)
        )

    return in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, place, last=last)


def dense_lam(
    process: Process,
    n: int,
    *,
    center: float = 0.0,
    width: float = 2.0,
    last: bool = True,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `asinh((lam - center) / width)`: dense within `width` of `lam = center`, geometric
    gaps away from it.

    The gap at `lam` is proportional to `sqrt(width^2 + (lam - center)^2)`; with a large `width` the
    grid is uniform in lam. Data of standard deviation c has its structure about `lam = -log c`.
    Without `last`, the first `n` of `n + 1` levels.

    Source: the stretched (sinh) grids of numerical quadrature.
    """
    if not (width > 0 and math.isfinite(width) and math.isfinite(center)):
        raise GridError(
            f"dense_lam needs a finite center and a width > 0, both in lam; got {center} and"
            f" {width}"
        )

    def place(top: float, bottom: float, n: int) -> Tensor:
        a, b = (math.asinh((-math.log(nsr) - center) / width) for nsr in (top, bottom))
        return torch.exp(-center - width * torch.sinh(a + ramp(n) * (b - a)))

    return in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, place, last=last)


def two_powers(
    process: Process,
    n: int,
    *,
    center: float = 0.5,
    high: float = 1.0,
    low: float = 0.5,
    last: bool = True,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `nsr^low` at low noise and in `nsr^-high` at high noise, densest where
    `lam = center`.

    The density in lam is `1 / (exp(-high (lam - center)) + exp(low (lam - center)))`. With both
    powers 1 it is `uniform_angle` about the ratio `exp(-center)`; `low = 1 / rho` is the low-noise
    end of `karras`. Without `last`, the first `n` of `n + 1` levels.

    Source: the grid that `benchmarks/defaults/tune_auto.py` fits.
    """
    positive("two_powers", "high", high)
    positive("two_powers", "low", low)
    if not math.isfinite(center):
        raise GridError(f"two_powers needs a finite center, in lam; got {center}")

    return in_nsr(
        process,
        n,
        t_min,
        t_max,
        nsr_min,
        nsr_max,
        partial(place_two_powers, center, high, low),
        last=last,
    )


def place_two_powers(
    center: float, high: float, low: float, top: float, bottom: float, n: int
) -> Tensor:
    """The noise-to-signal ratios of `two_powers`."""
    lam = -math.log(top) + math.log(top / bottom) * ramp(_FINE)
    density = 1.0 / (torch.exp(-high * (lam - center)) + torch.exp(low * (lam - center)))
    share = torch.cat([density.new_zeros(1), torch.cumsum(density[1:] + density[:-1], 0)])
    wanted = share[-1] * ramp(n)
    right = torch.searchsorted(share, wanted).clamp(1, _FINE - 1)
    part = (wanted - share[right - 1]) / (share[right] - share[right - 1])
    return torch.exp(-(lam[right - 1] + part * (lam[right] - lam[right - 1])))


def uniform_angle(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Uniform in `atan(sigma / s)`: finite where no signal is left, coarse at small noise.

    Source: the angle of Salimans & Ho, "Progressive distillation" (2022), appendix D; ComfyUI's
    "kl_optimal" is the same.
    """
    low, high = ends(process, n, t_min, t_max)
    b, a = process.angle(torch.tensor([low, high], dtype=torch.float64)).tolist()
    return pin(process.t_of_nsr(torch.tan(a + ramp(n) * (b - a))), low, high)


# ------------------------------------------------------------------- in the time of another process


def uniform_vp(
    process: Process,
    n: int,
    *,
    rho: float = 1.0,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    last: bool = True,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `t^(1/rho)` with `t` the time of a `VP` at the same noise-to-signal ratio,
    whatever the process.

    `rho = 2` is uniform in the square root of that time. Without `last`, the first `n` of `n + 1`
    levels.

    Source: Song et al. (2021); on EDM's path between its ends of nsr, 152 and 0.0105, k-diffusion's
    `get_sigmas_vp`.
    """
    positive("uniform_vp", "rho", rho)
    clock = VP(beta_min, beta_max)

    def place(top: float, bottom: float, n: int) -> Tensor:
        a, b = (float(clock.t_of_nsr(nsr)) ** (1 / rho) for nsr in (top, bottom))
        # nsr^2 = 1/s^2 - 1, without cancellation
        t = (a + ramp(n) * (b - a)) ** rho
        return torch.expm1(
            t * (clock.beta_min + 0.5 * (clock.beta_max - clock.beta_min) * t)
        ).sqrt()

    return in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, place, last=last)


def uniform_cosine(
    process: Process,
    n: int,
    *,
    offset: float = 0.008,
    last: bool = True,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in the time of a `Cosine` at the same noise-to-signal ratio, whatever the process.

    It can begin at infinity. Without `last`, the first `n` of `n + 1` levels.

    Source: Nichol & Dhariwal, "Improved DDPM" (2021), equation 17.
    """
    clock = Cosine(offset=offset)

    def place(top: float, bottom: float, n: int) -> Tensor:
        a, b = (float(clock.t_of_nsr(nsr)) for nsr in (top, bottom))
        return clock.nsr(a + ramp(n) * (b - a))

    return in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, place, last=last, endless=True)


def flow_shift(
    process: Process,
    n: int,
    *,
    shift: float = 3.0,
    last: bool = True,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in the flow's time `u = sigma/(s + sigma)`, with every nsr times `shift`:
    `u' = a u / (1 + (a - 1) u)`.

    `shift = 1` is uniform in the flow's time on any path; a larger one spends more steps at high
    noise, as large images need. `shift_of_tokens` and `shift_of_pixels` say how much. The ends are
    those asked: the levels are those of a flow that ends at `t_min` after the shift. Without
    `last`, the first `n` of `n + 1` levels.

    Source: Esser et al., "Scaling rectified flow transformers" (SD3, 2024), equation 23.
    """
    positive("flow_shift", "shift", shift)

    def place(top: float, bottom: float, n: int) -> Tensor:
        a, b = (1.0 / (1.0 + shift / nsr) for nsr in (top, bottom))
        u = a + ramp(n) * (b - a)
        return shift * u / (1.0 - u)

    return in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, place, last=last, endless=True)
