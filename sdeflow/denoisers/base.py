r"""What a denoiser is: anything that knows $E[x_0 \mid x(t) = x]$; and the same denoiser under
another process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdeflow._utils.math import Scalar, as_time, batch_invariant, expand
from sdeflow.process import Process


class Denoiser(ABC):
    """Anything that knows `E[x0 | x(t) = x]`: a wrapped network, an exact distribution, or a guided
    denoiser.

    `process` is the path whose states and times it is called with; `nsr_range` the noise-to-signal
    ratios at which it is trusted; `shape` the shape of one sample, or None where any shape will do.
    """

    process: Process
    nsr_range: tuple[float, float] = (0.0, math.inf)
    shape: tuple[int, ...] | None = None
    default_grid: str | None = None
    """The grid that suits this denoiser on its own process, where that is not
    `Process.default_grid`.
    """
    exact: bool = False
    """Whether it is that of a known density: its paths are smooth, which `solver="auto"` makes use
    of.
    """

    @abstractmethod
    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        """`E[x0 | x(t) = x]` for `x` of shape `[B, ...]`; `t` is one time, or one a sample
        (`[B]`).
        """

    def at(
        self, times: Tensor, x: Tensor, /, **condition: Any
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        """The denoiser at each of `times` (float64, `[K]`), with all that depends on time alone
        computed once.

        `x` is a tensor like the states it will be called with; only its shape, dtype and device are
        used. This default calls the denoiser with each time; override it where that costs, in
        wrappers of a `Network` above all.
        """
        return [partial(self._later, t, condition) for t in times.unbind()]

    def _later(self, t: Tensor, condition: dict[str, Any], x: Tensor) -> Tensor:
        return self(x, t, **condition)

    def under(self, process: Process) -> Denoiser:
        """The same denoiser on the path of another process: `nsr` is matched and `x` rescaled."""
        return self if process == self.process else _Under(self, process)

    def check_condition(self, condition: Mapping[str, Any]) -> None:  # noqa: B027 - nothing to check by default
        """Raise `TypeError` for a condition that the network does not take."""

    def rows(self, index: Tensor) -> Denoiser:
        """The denoiser for the samples `index` of its batch; override it where it holds something
        for each sample.

        Adaptive solvers call it: samples that have arrived leave the batch.
        """
        return self


def match_noise_level(
    process: Process, native: Process, nsr_range: tuple[float, float], t: Tensor
) -> tuple[Tensor, Tensor]:
    """Where a denoiser of `native` must be asked for time `t` of `process`:
    `(native time, factor for x)`, float64.

    The noise-to-signal ratio is matched, within `nsr_range`, and `x` rescaled by the ratio of
    `sqrt(s^2 + sigma^2)`, which equals the ratio of `s` where `nsr` is the same, and is finite
    where no signal is left.
    """
    lam = process.lam(t)
    low, high = nsr_range
    lam_native = lam.clamp(
        min=-math.log(high) if high > 0 else None, max=-math.log(low) if low > 0 else None
    )
    t_native = native.t_of_lam(lam_native)
    # Where no signal is left, VE and EDM have no time: a million to one is as good.
    t_native = torch.where(torch.isfinite(t_native), t_native, native.t_of_lam(-math.log(1e6)))
    if process == native:
        t_native = torch.where(lam_native == lam, t, t_native)
    factor = torch.hypot(*native.kernel(t_native)) / torch.hypot(*process.kernel(t))
    return t_native, (
        factor if process != native else torch.where(t_native == t, torch.ones_like(factor), factor)
    )


def trained_range(process: Process) -> tuple[float, float]:
    """The noise-to-signal ratios at the ends of a process's time."""
    low, high = process.nsr(
        torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    ).tolist()
    return low, high


class _Under(Denoiser):
    """Any denoiser on the path of another process."""

    def __init__(self, inner: Denoiser, process: Process):
        self.inner, self.process, self.shape, self.nsr_range = (
            inner,
            process,
            inner.shape,
            inner.nsr_range,
        )
        self.exact = inner.exact

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet, while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        def matched(t: Tensor) -> Tensor:
            return torch.stack(
                match_noise_level(self.process, self.inner.process, self.nsr_range, t)
            )

        t_native, factor = batch_invariant(matched, as_time(t).to("cpu", torch.float64))
        return self.inner(x * expand(factor, x), t_native, **condition)

    def at(
        self, times: Tensor, x: Tensor, /, **condition: Any
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        t_native, factors = match_noise_level(
            self.process, self.inner.process, self.nsr_range, times
        )
        calls = self.inner.at(t_native, x, **condition)
        numbers = factors.unbind() if factors.requires_grad else factors.tolist()
        return [
            partial(_rescaled, call, factor) for call, factor in zip(calls, numbers, strict=True)
        ]

    def under(self, process: Process) -> Denoiser:
        return self.inner.under(process)

    def rows(self, index: Tensor) -> Denoiser:
        return _Under(self.inner.rows(index), self.process)


def _rescaled(call: Callable[[Tensor], Tensor], factor: Scalar, x: Tensor) -> Tensor:
    return call(x * factor)
