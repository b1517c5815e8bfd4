"""A plan executed call by call, by whoever calls the network."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdeflow._utils.math import value_of
from sdeflow.denoisers.network import Network
from sdeflow.errors import SolverError
from sdeflow.noise import Noise
from sdeflow.plan.execute import steps
from sdeflow.plan.instructions import Call

if TYPE_CHECKING:
    from sdeflow.plan.plan import Plan


class Run:
    """A plan that waits for a prediction at each of its calls; `Plan.start` makes it.

        run = plan.start(x, seeds=0)
        while not run.done:
            run.send(denoiser(run.x, run.t))
        x = run.result

    The result is bit for bit that of `Plan.execute`, for it is the same loop.

    - `t`, `nsr`: the time and the noise-to-signal ratio of the call that is due; `index` counts the
      calls from 0, `nfe` is how many there are.
    - `x`: the state there, `[B, *shape]`. It is the run's own: keep it, but do not write into it.
    - `input`, `time`: what the network is to be given. With `model` they are its scaled input and
      its own time (`[B]`, float32 or int64); without, `x` and `t` as `[B]`.
    - `send(prediction)`: the network's output with `model`, else the prediction of `x0`.
    - `done`, `result`: whether all calls were made, and the state at the end.

    Errors: `SolverError` for a prediction after the last, and for a result before it; `TypeError`
    and `ValueError` for a prediction that is no tensor of the state's shape.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        noise: Noise | None,
        model: Network | None = None,
        requires_grad: bool = False,
    ):
        self.plan, self.noise, self._grad = plan, noise, requires_grad
        self._mailbox = None if model is None else Mailbox(plan, model, x)
        self._steps: Generator[tuple[int, Call, Tensor], Tensor, tuple[Tensor, list[Tensor]]]
        self._steps = steps(plan.instructions, plan.registers, plan.result, x, noise, plan._outlive)
        self._due: tuple[int, Call, Tensor] | None = None
        self._end: tuple[Tensor, list[Tensor]] | None = None
        self._like = x
        self._advance(None)

    def __repr__(self) -> str:
        where = "done" if self._due is None else f"call {self.index + 1} of {self.nfe} is due"
        return f"Run({self.plan.solver or 'plan'}, {where})"

    def _advance(self, prediction: Tensor | None) -> None:
        """Go on to the next call, or to the end."""
        with torch.set_grad_enabled(self._grad):
            try:
                # A generator takes None as its first value.
                self._due = self._steps.send(prediction)  # type: ignore[arg-type]
            except StopIteration as end:
                self._due, self._end = None, end.value
            if self._due is not None and self._mailbox is not None:
                self._mailbox.address(self._due[0], self._due[2])

    @property
    def _call(self) -> tuple[int, Call, Tensor]:
        if self._due is None:
            raise SolverError(f"all {self.nfe} calls are made: take the result")
        return self._due

    @property
    def nfe(self) -> int:
        """How many calls the plan has."""
        return self.plan.nfe

    @property
    def done(self) -> bool:
        """Whether all calls were made."""
        return self._due is None

    @property
    def index(self) -> int:
        """The number of the call that is due, from 0."""
        return self._call[0]

    @property
    def t(self) -> float:
        """The time of the call that is due."""
        return value_of(self._call[1].t)

    @property
    def nsr(self) -> float:
        """The noise-to-signal ratio of the call that is due; infinite where no signal is left."""
        s, sigma = value_of(self._call[1].s), value_of(self._call[1].sigma)
        return sigma / s if s else math.inf

    @property
    def x(self) -> Tensor:
        """The state at the call that is due, `[B, *shape]`."""
        return self._call[2]

    @property
    def input(self) -> Tensor:
        """What the network is to be given: the scaled state, in its dtype; without `model` it is
        `x`.
        """
        state = self.x
        return state if self._mailbox is None else self._mailbox.input

    @property
    def time(self) -> Tensor:
        """The time that the network is to be given, `[B]`: its own with `model`, else `t` in
        float32.
        """
        if self._mailbox is not None and not self.done:
            return self._mailbox.time
        return torch.full((len(self.x),), self.t, dtype=torch.float32, device=self.x.device)

    def send(self, prediction: Tensor) -> None:
        """Answer the call that is due, and go on to the next, or to the result."""
        _, _, state = self._call
        if not isinstance(prediction, Tensor):
            raise TypeError(
                "send takes the prediction as a tensor; got"
                f" {type(prediction).__name__}"
                + (", whose tensor is its .sample" if hasattr(prediction, "sample") else "")
            )
        if prediction.shape != state.shape:
            raise ValueError(
                f"the state has shape {tuple(state.shape)}, and the prediction"
                f" {tuple(prediction.shape)}: they must be the same"
            )
        if self._mailbox is not None:
            with torch.set_grad_enabled(self._grad):
                prediction = self._mailbox.answer(prediction)
        self._advance(prediction)

    @property
    def result(self) -> Tensor:
        """The state at the end."""
        return self._ended[0]

    @property
    def trajectory(self) -> Tensor | None:
        """The state at every level and the result, `[levels, B, *shape]`; None for a plan that was
        traced without `record=True`.
        """
        result, recorded = self._ended
        if not recorded:
            return None
        return torch.stack([*recorded, result] if self.plan.finished else recorded)

    @property
    def _ended(self) -> tuple[Tensor, list[Tensor]]:
        if self._end is None:
            raise SolverError(
                f"the run is not done: call {self.index + 1} of {self.nfe} is due; send its"
                " prediction"
            )
        return self._end


class Mailbox:
    """The calls of a network by someone else: what it is to be given, and what its output says of
    `x0`, exactly as the denoiser itself has it.
    """

    def __init__(self, plan: Plan, model: Network, x: Tensor):
        self._dtype = model.dtype
        self._output: Tensor | None = None
        stand_in = copy(model)
        stand_in.network = self._network
        self._calls: Sequence[Any] = stand_in.at(plan.times.detach(), x) if plan.nfe else ()
        self._call: Any = None
        self._x = x

    def _network(self, x: Tensor, t: Tensor) -> Tensor:
        """Stands for the network: notes what it is given, and returns what it was told to."""
        self.input = x if self._dtype is None else x.to(self._dtype)
        self.time = t
        return torch.zeros_like(x) if self._output is None else self._output

    def address(self, index: int, x: Tensor) -> None:
        """The call `index` is due, of the state `x`."""
        self._call, self._x, self._output = self._calls[index], x, None
        self._call(x)

    def answer(self, output: Tensor) -> Tensor:
        """The prediction of `x0` that an output of the network is."""
        self._output = output
        prediction: Tensor = self._call(self._x)
        return prediction
