r"""Tables of betas for `Process.from_betas`, of any length: the variances of a chain's steps.

A chain adds noise in $T$ steps, $x_t = \sqrt{1 - \beta_t}\,x_{t-1} + \sqrt{\beta_t}\,z$, so that
$\bar\alpha_t = s(t/T)^2 = \prod_{i \le t} (1 - \beta_i)$. Every function returns
$\beta_1 \dots \beta_T$, float64 `[T]`, each inside (0, 1).

A table that was made for 1000 steps leaves too much of the data in fewer steps. `reference=1000`
multiplies its entries by $1000/T$, as published, which keeps $\sum \beta$ and so, nearly, the noise
at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow._utils.checks import positive_number, whole_number


def linear(
    T: int = 1000, first: float = 1e-4, last: float = 0.02, *, reference: int | None = None
) -> Tensor:
    r"""Betas with equal steps from `first` to `last`, `[T]`.

    `reference` is the length for which `first` and `last` are meant: both are multiplied by
    `reference / T`. Errors: `ValueError` for a table with an entry outside (0, 1).

    Source: Ho et al. 2020, section 4; `reference=1000` is Nichol & Dhariwal's table of other
    lengths (2021).
    """
    return _checked(
        _spaced(T, first, last) * _scale(T, reference), "linear", (first, last), reference
    )


def scaled_linear(
    T: int = 1000, first: float = 0.00085, last: float = 0.012, *, reference: int | None = None
) -> Tensor:
    r"""Betas whose square roots have equal steps, `[T]`, from `first` to `last`: the formula of
    `quadratic` with the ends of latent diffusion.

    `reference` as in `linear`. Source: Rombach et al. 2022 (the name is that of diffusers).
    """
    root = _spaced(T, math.sqrt(first), math.sqrt(last))
    return _checked(root**2 * _scale(T, reference), "scaled_linear", (first, last), reference)


def quadratic(
    T: int = 1000, first: float = 1e-4, last: float = 0.02, *, reference: int | None = None
) -> Tensor:
    r"""Betas whose square roots have equal steps, `[T]`, from `first` to `last`.

    `reference` as in `linear`. Source: the code of Ho et al. 2020 (`quad`).
    """
    return _checked(
        _spaced(T, math.sqrt(first), math.sqrt(last)) ** 2 * _scale(T, reference),
        "quadratic",
        (first, last),
        reference,
    )


def cosine(T: int = 1000, *, offset: float = 0.008, cap: float = 0.999) -> Tensor:
    r"""Betas of a squared cosine, `[T]`, capped:

    $$\beta_t = \min\Big(1 - \frac{h(t/T)}{h((t-1)/T)},\ \mathrm{cap}\Big), \qquad
    h(u) = \cos^2\Big(\frac{u + \mathrm{offset}}{1 + \mathrm{offset}}\,\frac\pi2\Big).$$

    Without the cap the last beta would be 1: no signal left. Where the cap does not act,
    $\bar\alpha_t = h(t/T)/h(0)$. Errors: `ValueError` for an offset or a cap outside (0, 1).

    Source: Nichol & Dhariwal 2021, equation 17.
    """
    whole_number("T", T, of="steps")
    if not (0.0 < offset < 1.0 and 0.0 < cap < 1.0):
        raise ValueError(f"cosine needs 0 < offset < 1 and 0 < cap < 1; got {offset} and {cap}")
    # 1 - cos^2 b / cos^2 a = sin(b - a) sin(b + a) / cos^2 a, without cancellation.
    turn = math.pi / 2 / (1.0 + offset)
    a = (torch.arange(T, dtype=torch.float64) / T + offset) * turn
    b = a + turn / T
    return (torch.sin(b - a) * torch.sin(b + a) / torch.cos(a) ** 2).clamp(max=cap)


def sigmoid(
    T: int = 1000, first: float = 1e-4, last: float = 0.02, *, reference: int | None = None
) -> Tensor:
    r"""Betas along a logistic curve, `[T]`: $\beta = \mathrm{first} + (\mathrm{last} -
    \mathrm{first}) / (1 + e^{-u})$ with `u` in equal steps from -6 to 6.

    `reference` as in `linear`. Source: Xu et al., GeoDiff (2022).
    """
    betas = first + (last - first) * torch.sigmoid(_spaced(T, -6.0, 6.0))
    return _checked(betas * _scale(T, reference), "sigmoid", (first, last), reference)


def constant(T: int = 1000, beta: float = 0.01, *, reference: int | None = None) -> Tensor:
    """Equal betas, `[T]`. `reference` as in `linear`. Source: the code of Ho et al. 2020."""
    return _checked(
        _spaced(T, beta, beta) * _scale(T, reference), "constant", (beta, beta), reference
    )


def _spaced(T: int, first: float, last: float) -> Tensor:
    whole_number("T", T, of="steps")
    return torch.linspace(first, last, T, dtype=torch.float64)


def _scale(T: int, reference: int | None) -> float:
    return 1.0 if reference is None else positive_number("reference", reference) / T


def _checked(betas: Tensor, name: str, ends: tuple[float, float], reference: int | None) -> Tensor:
    if not bool(((betas > 0.0) & (betas < 1.0)).all()):
        least = "" if reference is None else f", or T above {reference * max(ends):.0f}"
        raise ValueError(
            f"betas lie inside (0, 1); {name} from {ends[0]:g} to {ends[1]:g} in {len(betas)}"
            f" steps has {float(betas.min()):g} to {float(betas.max()):g}: choose other ends{least}"
        )
    return betas
