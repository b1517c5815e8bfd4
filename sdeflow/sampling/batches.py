"""The loop over the batches of a solve.

Each batch is integrated or replayed, checked, and joined to the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow._utils import memory as _memory
from sdeflow._utils.math import transformed
from sdeflow._utils.memory import Memory
from sdeflow.denoisers import Denoiser
from sdeflow.errors import NonFiniteError, OutOfMemoryError, SolverError
from sdeflow.noise import BrownianNoise, Noise, SeededNoise
from sdeflow.plan.execute import version
from sdeflow.plan.instructions import Call, Record
from sdeflow.plan.plan import Plan
from sdeflow.reverse import Reverse
from sdeflow.sampling import cuda_graphs
from sdeflow.sampling.batch_size import BatchSize, in_batches, window
from sdeflow.sampling.cuda_graphs import GraphCache
from sdeflow.sampling.faults import Faults, Stopped
from sdeflow.sampling.inputs import Conditions, Inputs
from sdeflow.sampling.request import CallInfo, Request
from sdeflow.solvers.base import GridSolver, OnCall, Solution, Solver, run_plan


class ProgressBar:
    """The progress bar of a solve, one step a network call; or none, where not `shown`."""

    def __init__(self, shown: bool, n: int, calls: int | None):
        self.shown, self._calls, self._at = shown, calls, 0
        self.title = f"sampling {n}"
        self._bar = tqdm(unit="call", desc=self.title, dynamic_ncols=True) if shown else None

    def begin(self, batches: int) -> None:
        """A batch begins, of so many that are left. The count of an abandoned batch is undone."""
        if self._bar is not None:
            self._bar.n = self._at
            self._bar.total = None if self._calls is None else self._at + self._calls * batches
            self._bar.refresh()

    def end(self) -> None:
        """The batch is done."""
        self._at = 0 if self._bar is None else self._bar.n

    def update(self, calls: int = 1) -> None:
        """So many calls more."""
        if self._bar is not None:
            self._bar.update(calls)

    @contextlib.contextmanager
    def saying(self, text: str) -> Iterator[None]:
        """Show `text` within the block."""
        if self._bar is not None:
            self._bar.set_description(text)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.set_description(self.title)

    def close(self) -> None:
        """Leave it as it is."""
        if self._bar is not None:
            self._bar.close()


@dataclass
class Loop:
    """A solve of all samples, batch by batch."""

    request: Request
    method: Solver | Plan
    denoiser: Denoiser
    inputs: Inputs
    times: Tensor
    conditions: Conditions
    size: BatchSize
    graphs: GraphCache
    bar: ProgressBar
    parts: list[Solution] = field(default_factory=list)
    _pending: tuple[slice, Solution, Tensor] | None = None
    """A replayed batch whose result is not checked yet: the device works on it while the next one
    is prepared.
    """

    def run(self) -> Solution:
        """The solution of all samples. An error has the finished batches in its `finished`."""
        device = self.inputs.device
        self.size.find(device, self._entries, self._bytes_a_row)
        _memory.begin_peak(device)
        try:
            in_batches(self.size, self._batch, self._release)
            self._settle()
        except BaseException as error:  # Ctrl-C and errors of the network too
            with contextlib.suppress(NonFiniteError):
                self._settle()
            self._keep_finished(error)
            raise
        whole, fits = self._joined()
        if not fits:
            spent = OutOfMemoryError(
                f"all {self.inputs.n} samples are done, but do not fit twice on {device}, as"
                " joining the batches takes: ask for fewer at a time. They are in this error's"
                " `finished`, on the CPU"
            )
            spent.finished = whole
            raise spent
        return dataclasses.replace(
            whole, statistics={**whole.statistics, **self.graphs.statistics(), **self._memory()}
        )

    def _batch(self, rows: slice) -> None:
        self.bar.begin(-(-(self.inputs.n - rows.start) // self.size.now))
        if self.graphs and self._denoiser(rows) is not self.denoiser:
            self.graphs.refuse(
                "the denoiser holds data for each sample, and a graph would hold those of one batch"
            )
        wide = window(rows, self.size.now) if self.graphs else rows
        source, state = self._begin(wide)
        if self.graphs:
            done = self.graphs.solve(self._plan, state, self.conditions.rows(wide), source)
            if done is not None:
                self._settle()  # of the batch before, now that the device has the next one
                part = _cast(_last(done[0], rows.stop - rows.start), self.inputs.dtype)
                self._pending = rows, part, done[1]
                if self.bar.shown:
                    self._settle()
                return
            if wide != rows:
                source, state = self._begin(rows)
        self._settle()
        self.parts.append(self._integrated(rows, source, state))
        self.bar.end()

    def _denoiser(self, rows: slice) -> Denoiser:
        """The denoiser for some rows: what it holds for each sample is cut along."""
        if rows == slice(0, self.inputs.n):
            return self.denoiser
        return self.denoiser.rows(torch.arange(rows.start, rows.stop))

    def _reverse(self, rows: slice) -> Reverse:
        return Reverse(self._denoiser(rows), self.conditions.cut(rows))

    def _begin(self, rows: slice) -> tuple[Noise, Tensor]:
        inputs = self.inputs
        source = noise_of(self.request.noise, inputs, rows)
        start = float(self.times[0].detach())
        return source, inputs.state(self.denoiser.process, start, rows, source)

    def _integrated(self, rows: slice, source: Noise, state: Tensor) -> Solution:
        reverse = self._reverse(rows)
        collected: list[Tensor] = []
        # Adaptive solvers refuse steps that are not finite, and say so themselves.
        # The transforms of torch.func show no values.
        hidden = getattr(self.method, "adaptive", False) or transformed(state)
        faults = None if hidden else Faults(state.device)
        watch = self._watcher(collected if self.request.x0s else None, rows, faults)
        try:
            part = self._integrate(reverse, state, source, watch)
        except Stopped as stopped:
            assert faults is not None
            part = Solution(stopped.x, stopped.nfe)
            self._refuse(rows, part, faults, reverse)
        except (SolverError, NonFiniteError) as error:
            if rows.start:
                error.add_note(f"Sample 0 of this batch is number {rows.start} of all samples.")
            raise
        part = _cast(part, self.inputs.dtype)
        if not (transformed(part.x) or bool(torch.isfinite(part.x).all())):
            self._refuse(rows, part, faults or Faults(state.device), reverse)
        part.network_calls, part.network_gradients = reverse.forwards, reverse.gradients
        part.x0s = torch.stack(collected).to(part.x.dtype) if collected else None
        return part

    def _integrate(
        self, reverse: Reverse, x: Tensor, source: Noise, watch: OnCall | None, plain: bool = False
    ) -> Solution:
        record = self.request.trajectory and not plain
        if isinstance(self.method, Plan):
            return run_plan(self._plan, reverse, x, source, watch)
        return self.method.integrate(
            reverse, x, self.times, source, finish=self.request.finish, record=record, on_call=watch
        )

    @cached_property
    def _plan(self) -> Plan:
        if isinstance(self.method, Plan):
            if self.request.trajectory and not any(
                isinstance(i, Record) for i in self.method.instructions
            ):
                raise ValueError(
                    "this plan was traced without record=True, so it keeps no trajectory: trace it"
                    " with it"
                )
            return self.method
        assert isinstance(self.method, GridSolver)
        finish, record = self.request.finish, self.request.trajectory
        return self.method.plan(self.denoiser.process, self.times, finish=finish, record=record)

    def _watcher(
        self, x0s: list[Tensor] | None, rows: slice, faults: Faults | None
    ) -> OnCall | None:
        """What is done after each network call, or None where nothing is."""
        callback = self.request.callback
        if not self.bar.shown and callback is None and x0s is None:
            return None if faults is None else faults.see

        def watch(index: int, call: Call, x: Tensor, x0: Tensor) -> None:
            if faults is not None:
                faults.see(index, call, x, x0)
            if x0s is not None or callback is not None:
                # A network may write into its output at its next call.
                x0 = x0.clone()
            if x0s is not None:
                x0s.append(x0)
            if callback is not None:
                s = float(call.s)
                nsr = float(call.sigma) / s if s else float("inf")
                before = version(x), version(x0)
                callback(CallInfo(index, index + 1, float(call.t), nsr, x, x0, rows))
                if (version(x), version(x0)) != before:
                    raise SolverError(
                        "a callback changed the state in place: let it work on a clone"
                    )
            self.bar.update()

        return watch

    # ------------------------------------------------------------------------------ what went wrong

    def _settle(self) -> None:
        """Check the result of the batch that was replayed last; this waits for the device."""
        if self._pending is None:
            return
        (rows, part, finite), self._pending = self._pending, None
        # Rows that only filled the batch up do not matter.
        sound = bool(finite) and part.x.dtype != torch.float16  # whose cast may overflow
        if not sound and not bool(torch.isfinite(part.x).all()):
            self._refuse_replayed(rows, part)
        self.parts.append(part)
        self.bar.update(part.nfe)
        self.bar.end()

    def _refuse(self, rows: slice, part: Solution, faults: Faults, reverse: Reverse) -> NoReturn:
        """Raise the error for a result that is not finite."""
        part.network_calls, part.network_gradients = reverse.forwards, reverse.gradients
        error = faults.error(part.x, rows.start)
        error.partial = part
        raise error

    def _refuse_replayed(self, rows: slice, part: Solution) -> NoReturn:
        """Raise the error for a replayed batch that is not finite. A graph shows no call, so that
        the batch is solved again without one, to find the first call at fault.
        """
        faults = Faults(part.x.device)
        if isinstance(self.request.noise, str):  # the same seeds make the same solve
            source, state = self._begin(rows)
            reverse = self._reverse(rows)
            with contextlib.suppress(Stopped):
                self._integrate(reverse, state, source, faults.see, plain=True)
        error = faults.error(part.x, rows.start)
        error.partial = part
        raise error

    def _keep_finished(self, error: BaseException) -> None:
        """Give an error the finished batches, as its `finished`, and a note that says so."""
        finished = self._joined()[0] if self.parts else None
        own = isinstance(error, SolverError | NonFiniteError)
        if own or finished is not None:
            with contextlib.suppress(AttributeError, TypeError):  # it takes no attributes
                error.finished = finished  # type: ignore[attr-defined]
        if finished is not None and not own:
            error.add_note(
                f"{len(finished.x)} of {self.inputs.n} samples were finished before. They are not"
                " lost: this exception's `finished` is their Solution (after an error in a"
                " notebook or at the prompt, sys.last_value.finished)."
            )

    def _joined(self) -> tuple[Solution, bool]:
        """The finished batches as one, and whether they fit on the device.

        If the device has no memory to join them, they are on the CPU.
        """
        try:
            return join(self.parts), True
        except (MemoryError, RuntimeError) as error:
            if not _memory.out_of_memory(error):
                raise
        return join([_on_cpu(part) for part in self.parts]), False

    # --------------------------------------------------------------------------------------- memory

    def _release(self) -> None:
        """Free what can be freed, after a batch that did not fit."""
        self._settle()
        self.graphs.release()
        _memory.release(self.inputs.device)

    @property
    def _entries(self) -> int:
        """Entries of one sample's state."""
        return math.prod(self.inputs.shape)

    def _bytes_a_row(self, rows: int) -> int:
        """The bytes that a row of a batch takes on CUDA.

        One call with a few rows measures the network's; the plan's states are counted.
        """
        device = self.inputs.device
        some = slice(0, rows)
        _, state = self._begin(some)
        before = torch.cuda.memory_allocated(device)
        _memory.begin_peak(device)
        with torch.no_grad():
            calls = self._reverse(some).calls(self.times[:1].detach(), state)
            calls[0](state)
        peak = _memory.peak(device) or before
        states = 16  # of an adaptive solver
        if isinstance(self.method, Plan) or cuda_graphs.is_planned(self.method):
            plan = self._plan
            kept = len(plan.grid) + 1 if self.request.trajectory else 0
            kept += plan.nfe if self.request.x0s else 0
            states = 4 + plan.buffers + 2 * kept + (plan.draws if self.graphs else 0)
        return (
            -(-(peak - before) // rows) + states * self._entries * self.inputs.computed_in.itemsize
        )

    def _memory(self) -> dict[str, Memory]:
        """The entry of `Solution.statistics` about memory."""
        first = self.parts[0]
        buffers = None if first.plan is None else first.plan.buffers * first.x.nbytes
        peak = _memory.peak(self.inputs.device)
        took = Memory(peak, buffers, self.graphs.bytes if self.graphs else None)
        return {} if took == Memory() else {"memory": took}


def noise_of(noise: str | Noise, inputs: Inputs, rows: slice) -> Noise:
    """The source of noise for some rows: of a kind, or the one given if it fits."""
    seeds, shape = inputs.seeds[rows], inputs.shape
    if isinstance(noise, Noise):
        if (len(noise.seeds), tuple(noise.shape)) != (len(seeds), shape):
            raise ValueError(
                f"the noise is made for {len(noise.seeds)} samples of shape {tuple(noise.shape)},"
                f" and a batch here has {len(seeds)} of shape {shape}: a noise of your own serves"
                " one batch of n samples"
            )
        return noise
    kinds = {"seeded": SeededNoise, "brownian": BrownianNoise}
    if noise not in kinds:
        raise ValueError(f"noise is 'seeded', 'brownian' or a Noise; got {noise!r}")
    return kinds[noise](seeds, shape, device=inputs.device, dtype=inputs.computed_in)


def _last(part: Solution, rows: int) -> Solution:
    """The last rows of a batch."""
    if rows == len(part.x):
        return part
    trajectory, x0s = (
        None if kept is None else kept[:, -rows:] for kept in (part.trajectory, part.x0s)
    )
    return dataclasses.replace(part, x=part.x[-rows:], trajectory=trajectory, x0s=x0s)


def _cast(part: Solution, dtype: torch.dtype) -> Solution:
    """A part in the dtype that was asked for."""
    if part.x.dtype == dtype:
        return part
    x0s, trajectory = (
        None if kept is None else kept.to(dtype) for kept in (part.x0s, part.trajectory)
    )
    return dataclasses.replace(part, x=part.x.to(dtype), x0s=x0s, trajectory=trajectory)


def _on_cpu(part: Solution) -> Solution:
    x0s, trajectory = (None if kept is None else kept.cpu() for kept in (part.x0s, part.trajectory))
    found = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in part.statistics.items()}
    x = part.x.cpu()
    return dataclasses.replace(part, x=x, trajectory=trajectory, x0s=x0s, statistics=found)


def join(parts: list[Solution]) -> Solution:
    """The solutions of consecutive batches as one.

    Batches of an adaptive solver differ in their number of calls: the last prediction of a shorter
    one stands for the calls that it did not make, as it does for a sample that has finished.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    calls = max(0 if part.x0s is None else len(part.x0s) for part in parts)

    def stacked(name: str) -> Tensor | None:
        kept = [getattr(part, name) for part in parts]
        if name == "x0s":
            kept = [_padded(x0s, calls) for x0s in kept]
        return None if kept[0] is None else torch.cat(kept, 1)

    statistics = dict(first.statistics)
    for key, value in first.statistics.items():
        if isinstance(value, Tensor) and value.ndim:
            statistics[key] = torch.cat([part.statistics[key] for part in parts])
    return dataclasses.replace(
        first,
        x=torch.cat([part.x for part in parts]),
        nfe=max(part.nfe for part in parts),
        network_calls=sum(part.network_calls for part in parts),
        network_gradients=sum(part.network_gradients for part in parts),
        statistics=statistics,
        trajectory=stacked("trajectory"),
        x0s=stacked("x0s"),
        interpolant=None,
    )


def _padded(x0s: Tensor | None, calls: int) -> Tensor | None:
    """Predictions `[nfe, ...]` as those of so many calls, the last one repeated."""
    if x0s is None or len(x0s) == calls:
        return x0s
    return torch.cat([x0s, x0s[-1:].expand(calls - len(x0s), *x0s.shape[1:])])
