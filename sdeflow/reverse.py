"""A process and a denoiser together: what a solver asks of them, and the only place where a
denoiser is called.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.denoisers import Denoiser
from sdeflow.denoisers.condition import PerSample, Shared, cut, plain
from sdeflow.process import Level, Process


@dataclass
class Spent:
    """What was spent: calls of the denoiser, forwards of networks, gradients of networks."""

    nfe: int = 0
    forwards: int = 0
    gradients: int = 0

    def add(
        self,
        denoiser: Denoiser,
        condition: Mapping[str, Any],
        times: Tensor,
        together: bool = False,
    ) -> Spent:
        """Add a call of a denoiser at each of `times` (`[K]`); or, `together`, one call whose
        samples are at these times, which takes what the costliest of them takes.
        """
        times = times.detach()
        forwards = denoiser.forwards(times, **condition)
        gradients = denoiser.network_gradients(times, **condition)
        self.nfe += 1 if together else len(times)
        self.forwards += int(forwards.max() if together else forwards.sum())
        self.gradients += int(gradients.max() if together else gradients.sum())
        return self


class Reverse:
    """The reverse of a process, as a denoiser knows it: `x0`, `eps`, `score` and `velocity` of a
    state at a level.

    Each of the four calls the denoiser once. `nfe` counts these calls, `forwards` and `gradients`
    what they take of networks. They use only `+`, `-` and `*`, so that the same solver step runs
    on tensors (the textbook) and on symbolic operands (`sdeflow.plan.plan`).
    """

    def __init__(self, denoiser: Denoiser, condition: Mapping[str, Any] | None = None):
        self.denoiser = denoiser
        self.process: Process = denoiser.process
        self._nodes = dict(condition or {})
        self.condition = {name: plain(node) for name, node in self._nodes.items()}
        denoiser.check_condition(self.condition)
        self.spent = Spent()
        self._at_time: dict[float, Level] = {}
        self._at_lam: list[tuple[float, Level]] = []

    @property
    def nfe(self) -> int:
        """Calls of the denoiser so far."""
        return self.spent.nfe

    @property
    def forwards(self) -> int:
        """Forwards of networks so far."""
        return self.spent.forwards

    @property
    def gradients(self) -> int:
        """Gradients of networks so far."""
        return self.spent.gradients

    def prepare(self, times: Tensor, lams: Sequence[float] = ()) -> list[Level]:
        """The levels at `times`; they, and those where `log(s / sigma)` is one of `lams`, are
        computed in one vectorised pass and remembered.
        """
        given = len(times)
        if lams:
            at = self.process.t_of_lam(torch.tensor(lams, dtype=torch.float64))
            times = torch.cat([times, at])
        levels = self.process.levels(times)
        if levels and isinstance(levels[0].t, float):
            self._at_time.update((level.t, level) for level in levels)
            # A process may not reach a `lam` that is asked for: it is known by what was asked.
            asked = [*(level.lam for level in levels[:given]), *lams]
            self._at_lam += zip(asked, levels, strict=True)
            self._at_lam.sort(key=_first)
        return levels[:given]

    def level(self, t: float | Tensor) -> Level:
        """The process at one time; a lookup where `prepare` has seen it."""
        known = self._at_time.get(t) if isinstance(t, float) else None
        return known if known is not None else self.process.level(t)

    def level_of_lam(self, lam: float | Tensor) -> Level:
        """The process at the time where `log(s / sigma) = lam`; a lookup where `prepare` has seen
        it, to rounding.
        """
        if isinstance(lam, float) and (known := self._find(lam)) is not None:
            return known
        t = self.process.t_of_lam(lam)
        return self.level(t if isinstance(lam, Tensor) else float(t))

    def _find(self, lam: float) -> Level | None:
        """The level that is known for a `lam`, if any."""
        i = bisect_left(self._at_lam, lam, key=_first)
        for known, level in self._at_lam[max(i - 1, 0) : i + 1]:
            if abs(known - lam) <= 1e-13 * (1.0 + abs(lam)):
                return level
        return None

    def __call__(self, x: Any, t: Level) -> Any:
        """`E[x0 | x(t) = x]`."""
        time = torch.as_tensor(t.t, dtype=torch.float64)
        return self.ask(x, time.reshape(-1) if time.ndim else time)

    def ask(self, x: Tensor, t: Tensor) -> Tensor:
        """`E[x0 | x(t) = x]` at one time, or at one a sample (`[B]`)."""
        self.spent.add(self.denoiser, self.condition, t.reshape(-1), together=True)
        return self.denoiser(x, t, **self.condition)

    def predict(self, x: Tensor, t: Level) -> tuple[Tensor, ...]:
        """All that the denoiser says of a state, `x0` first: `Denoiser.outputs` names it."""
        time = torch.as_tensor(t.t, dtype=torch.float64)
        self.spent.add(self.denoiser, self.condition, time.reshape(-1), together=True)
        return self.denoiser.predict(x, time, **self.condition)

    def count(self, times: Tensor) -> None:
        """Count one call of the denoiser at each of `times`, made by someone else."""
        self.spent.add(self.denoiser, self.condition, times)

    def rows(self, index: Tensor, size: int) -> Reverse:
        """The same for the samples `index` of a batch of `size`; what it spends is counted here
        too.

        Conditions are cut along as `sdeflow.denoisers.condition` says; those that were given here
        as they are, where they are tensors or lists of `size` rows. So is what the denoiser holds
        for each sample (`Denoiser.rows`).
        """
        some = copy(self)
        some.denoiser = self.denoiser.rows(index)
        some._nodes = {name: cut(_marked(node, size), index) for name, node in self._nodes.items()}
        some.condition = {name: plain(node) for name, node in some._nodes.items()}
        return some

    def calls(self, times: Tensor, x: Tensor) -> Sequence[Callable[[Tensor], Tensor]]:
        """The denoiser at each of `times`, prepared; whoever runs them counts them (`count`)."""
        return self.denoiser.at(times, x, **self.condition)

    def materialise(self, state: Any) -> Any:
        """`state` itself.

        A trace then holds its operands in values of their own: call it between steps within a step.
        """
        return state

    def eps(self, x: Any, t: Level) -> Any:
        """`eps = (x - s x0) / sigma`."""
        return eps_of(x, self(x, t), t)

    def score(self, x: Any, t: Level) -> Any:
        """`score = -eps / sigma`."""
        return self.eps(x, t) * (-1.0 / t.sigma)

    def velocity(self, x: Any, t: Level) -> Any:
        """`dx/dt = s' x0 + sigma' eps`, the right-hand side of the probability-flow ODE."""
        x0 = self(x, t)
        return t.ds * x0 + t.dsigma * eps_of(x, x0, t)


def eps_of(x: Any, x0: Any, t: Level) -> Any:
    """`eps = (x - s x0) / sigma`, for states or symbolic operands."""
    return (x - t.s * x0) * (1.0 / t.sigma)


def _marked(value: Any, size: int) -> Any:
    """A condition that was given as it is: per sample where it is a tensor or a list of `size`
    rows, else shared.
    """
    if not isinstance(value, Tensor | list | tuple):
        return value
    scalar = isinstance(value, Tensor) and not value.ndim
    return PerSample(value) if not scalar and len(value) == size else Shared(value)


def _first(entry: tuple[float, Level]) -> float:
    return entry[0]
