r"""What a denoiser is: anything that knows $E[x_0 \mid x(t) = x]$."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.process import Process


class _Renamed:
    """An attribute that has a new name: whoever reads or sets the old one gets an error that says
    so.
    """

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        raise AttributeError(f"`{self.name}` of a denoiser is called `{self.new}` since 0.6")

    def __set__(self, instance: Any, value: Any) -> None:
        self.__get__(instance)


class Denoiser(ABC):
    """Anything that knows `E[x0 | x(t) = x]`: a wrapped network, an exact distribution, or a guided
    denoiser.

    `process` is the path whose states and times it is called with; `nsr_range` the noise-to-signal
    ratios at which it is trusted; `shape` the shape of one sample, or None where any shape will do.

    A denoiser that holds other denoisers derives from `sdeflow.denoisers.Wrapper`.
    """

    process: Process
    nsr_range: tuple[float, float] = (0.0, math.inf)
    shape: tuple[int, ...] | None = None
    default_grid: str | None = None
    """The grid that suits this denoiser on its own process, where that is not
    `Process.default_grid`.
    """
    known_density: bool = False
    """Whether it is the denoiser of a known density. The paths of such a denoiser are smooth, and
    `solver="auto"` then takes higher orders.
    """
    exact = _Renamed("known_density")
    data_std: float | None = None
    """The root mean square of the data's entries, where it is known: their standard deviation, if
    their mean is 0. Samplers warn where the ends of the process do not suit it.
    """
    outputs: tuple[str, ...] = ("x0",)
    """The names of what `predict` returns."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "exact" in vars(cls):
            raise TypeError(f"{cls.__name__}.exact is called known_density since 0.6")

    @abstractmethod
    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        """`E[x0 | x(t) = x]` for `x` of shape `[B, ...]`; `t` is one time, or one a sample
        (`[B]`).
        """

    def predict(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> tuple[Tensor, ...]:
        """All that the denoiser says of a state, in the order of `outputs`; `x0` comes first."""
        return (self(x, t, **condition),)

    def at(
        self, times: Tensor, x: Tensor, /, **condition: Any
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        """The denoiser at each of `times` (float64, `[K]`), with all that depends on time alone
        computed once.

        `x` is a tensor like the states it will be called with; only its shape, dtype and device are
        used. This default calls the denoiser with each time. Override it where that is slow.
        """
        return [partial(self._at_time, t, condition) for t in times.unbind()]

    def _at_time(self, t: Tensor, condition: dict[str, Any], x: Tensor) -> Tensor:
        return self(x, t, **condition)

    def under(self, process: Process) -> Denoiser:
        """The same denoiser on the path of another process: `nsr` is matched and `x` rescaled."""
        if process == self.process:
            return self
        from sdeflow.denoisers.wrapper import Reprocessed  # a wrapper is itself a denoiser

        return Reprocessed(self, process)

    def check_condition(self, condition: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise `TypeError` for a condition that the network does not take."""

    def rows(self, index: Tensor) -> Denoiser:
        """The denoiser for the samples `index` (int64) of those that it stands for now.

        A denoiser that holds data for each sample overrides it and returns one that holds the rows
        `index`; all others return themselves. It is called for each batch of a solve, and by
        adaptive solvers again for the samples of the batch that are still under way.
        """
        return self

    def forwards(self, times: Tensor, /, **condition: Any) -> Tensor:
        """How many forwards of a network one call takes at each of `times` (`[K]`), int64 `[K]`.

        A forward of a batch counts once; a batch of twice as many rows counts twice.
        """
        return torch.ones(len(times), dtype=torch.int64)

    def network_gradients(self, times: Tensor, /, **condition: Any) -> Tensor:
        """How many gradients of a network, in its input, one call takes at each of `times`, int64
        `[K]`.
        """
        return torch.zeros(len(times), dtype=torch.int64)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The modules that it calls. The first one's device is where samples are made."""
        network = getattr(self, "network", None)
        return (network,) if isinstance(network, nn.Module) else ()


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


def what_came(value: Any) -> str:
    """The shape of a tensor, or the type of anything else, for errors."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
