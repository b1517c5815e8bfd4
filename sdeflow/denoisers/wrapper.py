"""Denoisers that hold denoisers.

`Wrapper` is the base, which hands on what they know. `Reprocessed` is a denoiser on the path of
another process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow._utils.math import Scalar, as_time, batch_invariant, expand
from sdeflow.denoisers.base import Denoiser, match_noise_level
from sdeflow.process import Process

Prepared = Callable[[Tensor], Tensor]
"""A denoiser at one time and under one condition: `x0` as a function of the state."""


class Wrapper(Denoiser):
    """A denoiser that holds one or several denoisers. It hands on everything that they know.

    A subclass says which calls make one prediction (`inner_calls`), and how (`combine`). All else
    follows: process, shape, `nsr_range`, `default_grid`, the check of conditions, the rows of a
    batch, other processes, prepared times, and the number of forwards. Guidance by hand:

        class Guided(Wrapper):
            def __init__(self, denoiser, scale):
                super().__init__(denoiser)
                self.scale = scale

            def inner_calls(self, condition):
                return [(self.inner, condition), (self.inner, {**condition, "label": None})]

            def combine(self, calls, x, t):
                conditional, unconditional = (call(x) for call in calls)
                return unconditional + self.scale * (conditional - unconditional)

    - `denoisers`: what it holds (`held`), at least one; `inner` is the first. The others are put
      under the process of the first. `nsr_range` is the range at which all of them are trusted.
    - Other names, such as `class_names`, are looked up in the first.
    - `known_density` is False. A wrapper whose prediction is that of a known density sets it.
    - One that holds data for each sample overrides `rows`, and starts from `super().rows(index)`.
    - One that overrides `__call__` in place of `combine` overrides `forwards` too.
    - One that makes fewer calls at some times (guidance within an interval) overrides `forwards`.

    Errors: `TypeError` for what is no denoiser; `ValueError` for denoisers of different shapes, or
    whose ranges do not overlap.
    """

    def __init__(self, *denoisers: Denoiser):
        name = type(self).__name__
        for denoiser in denoisers or (None,):
            if not isinstance(denoiser, Denoiser):
                raise TypeError(
                    f"{name} wraps a Denoiser, such as Prediction(network, 'eps', VP()); got"
                    f" {'none' if denoiser is None else type(denoiser).__name__}"
                )
        self.process = denoisers[0].process
        self.held: tuple[Denoiser, ...] = tuple(
            d if d.process == self.process else d.under(self.process) for d in denoisers
        )
        self.default_grid, self.data_std = self.inner.default_grid, self.inner.data_std
        shapes = {d.shape for d in self.held} - {None}
        if len(shapes) > 1:
            raise ValueError(
                f"{name} wraps denoisers of one shape; got {' and '.join(map(str, shapes))}"
            )
        self.shape = next(iter(shapes), None)
        low = max(d.nsr_range[0] for d in self.held)
        high = min(d.nsr_range[1] for d in self.held)
        if not low < high:
            raise ValueError(
                f"{name} wraps denoisers that are trusted at common noise levels; their nsr_range"
                f" are {', '.join(str(d.nsr_range) for d in self.held)}"
            )
        self.nsr_range = low, high

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__call__" in vars(cls) and cls.forwards is Wrapper.forwards:
            raise TypeError(
                f"{cls.__name__} overrides __call__, so that its calls cannot be counted: define"
                " forwards(times, **condition) as well, or combine(calls, x, t) in place of"
                " __call__"
            )

    def __getattr__(self, name: str) -> Any:
        # `held` is not there yet while a wrapper is copied or unpickled.
        if name == "held" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.held[0], name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.held))})"

    @property
    def inner(self) -> Denoiser:
        """The first of the denoisers that it holds."""
        return self.held[0]

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The modules of all denoisers that it holds."""
        return tuple(network for denoiser in self.held for network in denoiser.networks)

    # ------------------------------------------------------------------------ what a subclass says

    def inner_calls(
        self, condition: Mapping[str, Any]
    ) -> Sequence[tuple[Denoiser, Mapping[str, Any]]]:
        """The calls that make one prediction, in order: a denoiser and its condition each.

        By default each denoiser is called once, with the condition as it is.
        """
        return [(denoiser, condition) for denoiser in self.held]

    def combine(self, calls: Sequence[Prepared], x: Tensor, t: Tensor) -> Tensor:
        """`x0` at the state `x` (`[B, ...]`) and the time `t` (float64, one or `[B]`).

        `calls` are those of `inner_calls` at this time, as functions of a state. By default there
        is one, and its prediction is returned.
        """
        if len(calls) != 1:
            raise NotImplementedError(
                f"{type(self).__name__} makes {len(calls)} calls: define combine(calls, x, t)"
            )
        return calls[0](x)

    # --------------------------------------------------------------------------------- what follows

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        t = as_time(t).to("cpu", torch.float64)
        calls = [partial(d._at_time, t, dict(c)) for d, c in self.inner_calls(condition)]
        return self._combined(calls, t, x)

    def at(self, times: Tensor, x: Tensor, /, **condition: Any) -> Sequence[Prepared]:
        if type(self).__call__ is not Wrapper.__call__:
            return super().at(times, x, **condition)
        prepared = [d.at(times, x, **c) for d, c in self.inner_calls(condition)]
        return [
            partial(self._combined, [calls[k] for calls in prepared], t)
            for k, t in enumerate(times.unbind())
        ]

    def _combined(self, calls: Sequence[Prepared], t: Tensor, x: Tensor) -> Tensor:
        if len(calls) > 1:  # a network may return one tensor of its own at every call
            calls = [partial(_clone, call) for call in calls]
        return self.combine(calls, x, t)

    def forwards(self, times: Tensor, /, **condition: Any) -> Tensor:
        """The forwards of all inner calls together, at each of `times`, int64 `[K]`."""
        spent = [d.forwards(times, **c) for d, c in self.inner_calls(condition)]
        return sum(spent, torch.zeros(len(times), dtype=torch.int64))

    def network_gradients(self, times: Tensor, /, **condition: Any) -> Tensor:
        """The gradients of all inner calls together, at each of `times`, int64 `[K]`."""
        spent = [d.network_gradients(times, **c) for d, c in self.inner_calls(condition)]
        return sum(spent, torch.zeros(len(times), dtype=torch.int64))

    def check_condition(self, condition: Mapping[str, Any]) -> None:
        try:
            calls = self.inner_calls(condition)
        except KeyError as error:
            raise TypeError(
                f"{self!r} needs the condition {error}: pass condition={{{error}: ...}}"
            ) from error
        for denoiser, given in calls:
            denoiser.check_condition(given)

    def under(self, process: Process) -> Denoiser:
        """The same wrapper around its denoisers on the path of another process."""
        if process == self.process:
            return self
        other = self._holding([denoiser.under(process) for denoiser in self.held])
        other.process, other.default_grid = process, other.inner.default_grid
        return other

    def rows(self, index: Tensor) -> Denoiser:
        return self._holding([denoiser.rows(index) for denoiser in self.held])

    def _holding(self, denoisers: Sequence[Denoiser]) -> Wrapper:
        """A copy that holds others; itself where they are the same."""
        if all(new is old for new, old in zip(denoisers, self.held, strict=True)):
            return self
        other = copy(self)
        other.held = tuple(denoisers)
        return other


class Reprocessed(Wrapper):
    """A denoiser on the path of another process: the noise level is matched, within its
    `nsr_range`, and the state rescaled (`match_noise_level`).
    """

    def __init__(self, denoiser: Denoiser, process: Process):
        super().__init__(denoiser)
        self.process, self.default_grid = process, None
        self.known_density = denoiser.known_density

    def __repr__(self) -> str:
        return f"{self.inner!r}.under({self.process!r})"

    def _native(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return match_noise_level(self.process, self.inner.process, self.nsr_range, t)

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        t_native, factor = batch_invariant(
            lambda t: torch.stack(self._native(t)), as_time(t).to("cpu", torch.float64)
        )
        return self.inner(x * expand(factor, x), t_native, **condition)

    def at(self, times: Tensor, x: Tensor, /, **condition: Any) -> Sequence[Prepared]:
        t_native, factors = self._native(times)
        calls = self.inner.at(t_native, x, **condition)
        numbers = factors.unbind() if factors.requires_grad else factors.tolist()
        return [
            partial(_rescaled, call, factor) for call, factor in zip(calls, numbers, strict=True)
        ]

    def forwards(self, times: Tensor, /, **condition: Any) -> Tensor:
        return self.inner.forwards(self._native(times)[0], **condition)

    def network_gradients(self, times: Tensor, /, **condition: Any) -> Tensor:
        return self.inner.network_gradients(self._native(times)[0], **condition)

    def under(self, process: Process) -> Denoiser:
        return self.inner.under(process)


def _rescaled(call: Prepared, factor: Scalar, x: Tensor) -> Tensor:
    return call(x * factor)


def _clone(call: Prepared, x: Tensor) -> Tensor:
    return call(x).clone()
