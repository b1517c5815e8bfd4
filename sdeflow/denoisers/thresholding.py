"""Predictions put back where the data lie, before a solver sees them: clipping, dynamic
thresholding, any function of yours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.denoisers.base import Denoiser, what_came
from sdeflow.denoisers.wrapper import Prepared, Wrapper

Projection = Callable[[Tensor], Tensor]
"""A function of `x0` `[B, *shape]` that returns the same shape; row by row, if rows are not to
depend on their batch.
"""


@dataclass(frozen=True)
class Clip:
    """Static thresholding: every entry is clipped to `[low, high]`.

    Source: Ho et al. (2020), as their code clips; Saharia et al., "Imagen" (2022), section 2.3.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Clip needs low < high; got {self.low} and {self.high}")

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding, for data in `[-bound, bound]`: a sample whose entries go beyond is
    clipped and shrunk to fit.

    With `q` the `quantile` of the sample's `|x0|` and `r = max(q, bound)`:
    `x0 := clip(x0, -r, r) bound / r`. `limit` bounds `r`. Each sample has its own. Source: Saharia
    et al., "Imagen" (2022), section 2.3.
    """

    quantile: float = 0.995
    bound: float = 1.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if not (
            0.0 < self.quantile <= 1.0
            and self.bound > 0.0
            and (self.limit is None or self.limit >= self.bound)
        ):
            raise ValueError(
                "DynamicThreshold needs 0 < quantile <= 1, bound > 0 and limit >= bound; got "
                f"quantile={self.quantile}, bound={self.bound}, limit={self.limit}"
            )

    def __call__(self, x0: Tensor) -> Tensor:
        size = x0[0].numel()
        flat = x0.detach().reshape(len(x0), size).abs().float()
        # Linear between order statistics; torch.quantile refuses more than 16 million entries.
        place = self.quantile * (size - 1)
        low = min(int(place), size - 1)
        r = flat.kthvalue(low + 1, dim=1).values
        if low + 1 < size and place > low:
            r = r + (place - low) * (flat.kthvalue(low + 2, dim=1).values - r)
        r = r.clamp(min=self.bound, max=self.limit).to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, r), -r) * (self.bound / r)


class Projected(Wrapper):
    """A denoiser whose prediction is projected, before a solver sees it: `x0 := projection(x0)`.

        sample(Projected(model, DynamicThreshold(0.995)), solver="adams3", nfe=20)

    `projection` is `Clip()`, `DynamicThreshold()` or any function of `x0` that returns the same
    shape. eps, score and velocity are those of the projected prediction. It is nonlinear, and
    stands on the network's side: plans and their budgets stay as they are. It is a bias, unless
    predictions leave the data's range only by the network's error: the posterior mean of a sample
    lies inside of any convex set that holds the data, such as `[-1, 1]`. It is meant for strong
    guidance.

    Errors: `TypeError` for what is not a denoiser or cannot be called; `ValueError` for a
    projection that changes the shape.
    """

    def __init__(self, denoiser: Denoiser, projection: Projection):
        super().__init__(denoiser)
        if isinstance(projection, type) or not callable(projection):
            raise TypeError(
                "a projection is a function of x0, such as Clip() or DynamicThreshold(); got"
                f" {projection!r}"
            )
        self.projection = projection
        self.outputs = denoiser.outputs

    def __repr__(self) -> str:
        return f"Projected({self.inner!r}, {self.projection!r})"

    def combine(self, calls: Sequence[Prepared], x: Tensor, t: Tensor) -> Tensor:
        return self._project(calls[0](x))

    def predict(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> tuple[Tensor, ...]:
        """What the denoiser says, with `x0` projected."""
        x0, *others = self.inner.predict(x, t, **condition)
        return (self._project(x0), *others)

    def _project(self, x0: Tensor) -> Tensor:
        projected = self.projection(x0)
        if not isinstance(projected, Tensor) or projected.shape != x0.shape:
            raise ValueError(
                f"the projection of x0 of shape {tuple(x0.shape)} returned"
                f" {what_came(projected)}; it must keep the shape"
            )
        return projected
