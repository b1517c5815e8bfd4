"""Data sets with exact denoisers: the empirical distribution, or a kernel density on it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdeflow.process import EDM, Process
from sdeflow.targets.base import (
    TINY,
    Target,
    compute_dtype,
    standard_normal,
)


class _Cloud(NamedTuple):
    """A data set at a level; all of shape `[T, 1]`."""

    s: Tensor
    spread: Tensor  # s^2 bandwidth^2 + sigma^2
    gain: Tensor  # s bandwidth^2 / spread
    rest: Tensor  # 1 - s gain = sigma^2 / spread


class Empirical(Target):
    r"""A kernel density on a data set, $\frac1N\sum_i N(x_i, h^2 I)$: with $h = 0$, the ideal
    denoiser of the data.

    - `data`: `[N, *shape]`, kept in its own dtype (integers become float32), never copied to
      float64 as a whole.
    - `bandwidth`: $h \ge 0$, the standard deviation of the kernel.
    - `chunk`: how many data are compared at a time, by default what makes 4 million numbers. Memory
      beyond the data is `O(chunk (B + dim))`, unless gradients flow.

    The posterior weights are $\mathrm{softmax}_i(-|x - s\,x_i|^2 / 2(s^2 h^2 + \sigma^2))$. At
    small noise distances must not cancel: on the CPU they come from products of matrices in
    float64, on other devices they are summed entry by entry.

    Errors: `ValueError` for an empty data set or a negative bandwidth.

    Cost: `O(B N dim)`. Source: Karras et al. (2022), equation 57.
    """

    def __init__(
        self,
        data: Tensor,
        bandwidth: float = 0.0,
        *,
        process: Process | None = None,
        chunk: int | None = None,
    ):
        data = torch.as_tensor(data)
        if data.ndim < 2 or not data.numel():
            raise ValueError(f"data has shape [N, *shape], N at least 1; got {tuple(data.shape)}")
        if not (bandwidth >= 0.0 and math.isfinite(bandwidth)):
            raise ValueError(
                "bandwidth is the kernel's standard deviation, finite and at least 0; got"
                f" {bandwidth}"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(
                f"chunk is how many data are compared at a time, at least 1; got {chunk}"
            )
        super().__init__(data.shape[1:], EDM() if process is None else process)
        self.data = data if data.is_floating_point() else data.float()
        if not bool(torch.isfinite(self.data).all()):
            raise ValueError("data has entries that are not finite")
        self.bandwidth = float(bandwidth)
        with torch.no_grad():
            exact = self.data.to(torch.promote_types(self.data.dtype, torch.float32))
            norm = float(torch.linalg.vector_norm(exact))
        self.data_std = math.hypot(norm / math.sqrt(self.data.numel()), self.bandwidth)
        self.chunk = max(1, 2**22 // self.dim) if chunk is None else int(chunk)
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return (
            f"Empirical({len(self.data)} data of shape {self.shape}, bandwidth={self.bandwidth:g},"
            f" {self.process})"
        )

    def _prepare(self, s: Tensor, sigma: Tensor, x: Tensor, fixed: Any) -> _Cloud:
        spread = (s**2 * self.bandwidth**2 + sigma**2).clamp_min(TINY)
        gain = s * self.bandwidth**2 / spread
        columns = (s, spread, gain, 1.0 - s * gain)
        return _Cloud(
            *(c.reshape(-1, 1).to(device=x.device, dtype=self._precision(x)) for c in columns)
        )

    @staticmethod
    def _precision(x: Tensor) -> torch.dtype:
        return torch.float64 if x.device.type == "cpu" else compute_dtype(x)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The flattened data where `x` is, and half their squared norms; kept for the next call."""
        key = x.device, self._precision(x)
        if key not in self._moved:
            rows = self.data.reshape(len(self.data), -1).to(x.device)
            norms = [0.5 * part.to(key[1]).square().sum(-1) for part in rows.split(self.chunk)]
            self._moved[key] = rows, torch.cat(norms)
        return self._moved[key]

    def _half_distances(self, x: Tensor, part: Tensor, half_norms: Tensor, s: Tensor) -> Tensor:
        """`|x - s x_i|^2 / 2`, `[B, chunk]`."""
        if x.dtype == torch.float64:
            return s**2 * half_norms + 0.5 * x.square().sum(-1, keepdim=True) - s * (x @ part.mT)
        if len(s) == 1:
            return 0.5 * torch.cdist(x, s * part, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        # One time a sample: one sample at a time, so that no sample gets its own copy of the data.
        pairs = zip(x.split(1), s.split(1), strict=True)
        return torch.cat(
            [self._half_distances(row, part, half_norms, scale) for row, scale in pairs]
        )

    def _posterior(self, x: Tensor, level: _Cloud) -> tuple[Tensor, Tensor]:
        r"""`E[x_i | x]` and $\log\sum_i e^{-|x - s x_i|^2 / 2\,\mathrm{spread}}$, streamed under a
        running maximum.
        """
        rows, norms = self._rows(x)
        x = x.to(self._precision(x))
        top = x.new_full((len(x), 1), -math.inf)
        total, average = torch.zeros_like(top), torch.zeros_like(x)
        for part, half_norms in zip(rows.split(self.chunk), norms.split(self.chunk), strict=True):
            part = part.to(x.dtype)
            logits = -self._half_distances(x, part, half_norms, level.s) / level.spread
            top_next = torch.maximum(top, logits.detach().amax(-1, keepdim=True))
            shrink, weights = torch.exp(top - top_next), torch.exp(logits - top_next)
            total = total * shrink + weights.sum(-1, keepdim=True)
            average = average * shrink + weights @ part
            top = top_next
        return average / total, (top + total.log()).squeeze(-1)

    def _denoise(self, x: Tensor, level: Any) -> Tensor:
        average, _ = self._posterior(x, level)
        return level.gain * x + level.rest * average

    def _score(self, x: Tensor, level: Any) -> Tensor:
        average, _ = self._posterior(x, level)
        return (level.s * average - x) / level.spread

    def _log_prob(self, x: Tensor, level: Any) -> Tensor:
        if bool((level.spread <= 10.0 * TINY).any()):
            raise ValueError(
                "points have no density without noise; give a bandwidth, or a t with noise"
            )
        _, log_sum = self._posterior(x, level)
        log_norm = 0.5 * self.dim * torch.log(2.0 * math.pi * level.spread).squeeze(-1) + math.log(
            len(self.data)
        )
        return log_sum - log_norm

    @property
    def mean(self) -> Tensor:
        """Mean of the data, `shape`, float64."""
        return self.data.mean(0, dtype=torch.float64).cpu()

    def covariance(self) -> Tensor:
        """Covariance matrix of the flattened data, the kernel's included, `[dim, dim]`, float64."""
        centre = self.mean.reshape(-1)
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for part in self.data.reshape(len(self.data), -1).split(self.chunk):
            centred = part.cpu().double() - centre
            total += centred.mT @ centred
        return total / len(self.data) + self.bandwidth**2 * torch.eye(self.dim, dtype=torch.float64)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(self.data), (n,), generator=generator, device=generator.device)
        x0 = self.data.reshape(len(self.data), -1)[which.to(self.data.device)].cpu().double()
        if self.bandwidth:
            x0 = x0 + self.bandwidth * standard_normal(n, self.dim, generator=generator)
        return x0


# -------------------------------------------------------------------------------------------- input
