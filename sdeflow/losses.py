r"""Training losses: what a network is asked to predict, at which noise, with which weight.

With $n$ = nsr, $d$ = `sigma_data` and $x = x_0 + n\,\epsilon$, the EDM-weighted denoising loss is

$$\frac{n^2 + d^2}{(n d)^2}\,\lVert D(x; n) - x_0 \rVert^2
= \lVert F - (x_0 - c_{skip}\,x)/c_{out} \rVert^2,$$

so the network F sees inputs and targets of unit variance at every noise level. The right-hand side
is what is computed: it has no small differences of large numbers.

Source. Karras et al. 2022, equation 8 and table 1; Kingma et al. 2021, appendix I.1 (stratified
noise levels); Ho and Salimans 2021 (label dropout).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow._utils.checks import fraction, positive_number


@dataclass(frozen=True)
class EDMLoss:
    """The EDM-weighted denoising loss of a network behind `Preconditioned`.

    `log(nsr)` is normal with `mean` and `std`, stratified over the batch: each of B equally likely
    slices is drawn from once, which leaves each draw's distribution as it is and the batch's
    average less noisy. A label becomes `null_label` ("no label") with probability `label_dropout`,
    so that the same network also learns the unconditional score; `null_label=None` leaves labels
    alone. Raises `ValueError` for numbers out of range.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5
    label_dropout: float = 0.1
    null_label: int | None = None

    def __post_init__(self) -> None:
        positive_number("std of EDMLoss", self.std)
        positive_number("sigma_data of EDMLoss", self.sigma_data)
        fraction("label_dropout of EDMLoss", self.label_dropout)

    def nsr(self, batch: int, generator: torch.Generator) -> Tensor:
        """Noise-to-signal ratios [B], float32, one from each of B equally likely slices."""
        device = generator.device
        start = torch.rand((), device=device, generator=generator)
        uniform = (torch.arange(batch, device=device) / batch + start) % 1
        # An ulp from 0 or 1 the inverse of the normal distribution is infinite; 1e-6 is 4.75
        # standard deviations out.
        normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)
        return (self.mean + self.std * normal).exp()

    def labels(self, label: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """`label` [B] with some of its entries replaced by the null label."""
        if label is None or self.null_label is None or self.label_dropout == 0:
            return label
        drop = (
            torch.rand(label.shape[0], device=label.device, generator=generator)
            < self.label_dropout
        )
        return torch.where(drop, self.null_label, label)

    def at(
        self,
        network: Callable[..., Tensor],
        x0: Tensor,
        nsr: Tensor,
        eps: Tensor,
        label: Tensor | None = None,
    ) -> Tensor:
        """The loss [B] of each sample at the noise levels `nsr` [B] with the noise `eps`; the mean
        over an image's values.
        """
        n = nsr.view(-1, *[1] * (x0.ndim - 1))
        d = self.sigma_data
        root = torch.sqrt(n * n + d * d)
        x = x0 + n * eps
        # (x0 - c_skip x) / c_out, with x0 - c_skip x = n (n x0 - d^2 eps) / root^2
        target = (n * x0 - d * d * eps) / (root * d)
        output = (
            network(x / root, nsr.log() / 4)
            if label is None
            else network(x / root, nsr.log() / 4, label)
        )
        return (output.float() - target).square().flatten(1).mean(1)

    def __call__(
        self,
        network: Callable[..., Tensor],
        x0: Tensor,
        label: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """The loss [B] of each sample of `x0` [B, ...] in [-1, 1], with all that is random drawn
        from `generator`.
        """
        nsr = self.nsr(x0.shape[0], generator)
        eps = torch.randn(x0.shape, device=x0.device, generator=generator)
        return self.at(network, x0, nsr, eps, self.labels(label, generator))

    def describe(self) -> str:
        """The loss in a line, for a model card."""
        return (
            f"EDM-weighted denoising loss, log(nsr) ~ N({self.mean:g}, {self.std:g}^2) stratified"
            f" over the batch, sigma_data {self.sigma_data:g}, label dropout {self.label_dropout:g}"
        )
