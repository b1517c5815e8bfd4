r"""Plans: a solver's steps over a grid, traced once into a table of numbers, and the one loop that
executes it.

A step of a fixed-grid solver is written as in its textbook, with `+`, `-` and `*` on the state, the
network's outputs and the noise. Run on symbolic operands (`Operand`) instead of tensors, the same
step leaves a list of instructions:

    Draw(z, levels)      z := a standard normal
    Combine(y, terms)    y := sum_k c_k r_k, one linear combination of registers
    Call(F, x, level)    F := denoiser(x, t)

with every coefficient a float64 number. What a solve does is then data: it can be printed, saved,
checked, compared, and run with the process long gone. Values that one combination alone uses are
merged into it, and registers are assigned by liveness, so that a call costs its network and one
combination into a preallocated buffer.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow._utils.checks import one_of
from sdeflow._utils.math import Scalar, value_of
from sdeflow._version import __version__
from sdeflow.denoisers.network import Network
from sdeflow.errors import CheckpointError, SolverError
from sdeflow.noise import BrownianNoise, Noise, SeededNoise, seeds_of
from sdeflow.plan.check import PlanReport, check
from sdeflow.plan.execute import OnCall, execute, outliving
from sdeflow.plan.files import DAMAGE, FORMAT, read_plan, verified, write_plan
from sdeflow.plan.instructions import Call, Combine, Draw, Instruction, Record, reads
from sdeflow.plan.plot import plot_unrolled
from sdeflow.plan.run import Run
from sdeflow.plan.unroll import Difference, Unrolled, as_vector, difference, unroll
from sdeflow.process import Process
from sdeflow.reverse import Reverse

KEYS = (
    *("format", "version", "registers", "result", "grid", "finished", "solver", "process"),
    "instructions",
)
"""The entries of a plan's dictionary."""


@dataclass(frozen=True)
class Plan:
    """A solve as a table: `nfe` network calls, each with its time and the combination that makes
    its input.

    `grid` holds `(t, s, sigma)` of every level; the state at its first level enters in register 0
    and the result is in register `result`. `finished` says that it ends with the denoised
    prediction, at zero noise.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    result: int
    grid: tuple[tuple[float, float, float], ...]
    finished: bool
    solver: str = ""
    process: str = ""

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The network calls, in order."""
        return tuple(i for i in self.instructions if isinstance(i, Call))

    @property
    def nfe(self) -> int:
        """Network calls that an execution makes."""
        return len(self.calls)

    @cached_property
    def _tensors(self) -> bool:
        """Whether a coefficient or a time is a tensor."""
        return any(isinstance(number, Tensor) for number in self._numbers())

    @cached_property
    def _outlive(self) -> frozenset[int]:
        """The calls whose outputs are read after the next call."""
        return outliving(self.instructions)

    @property
    def finish(self) -> str:
        """The step to zero noise: `"prediction"`, where the result is the last prediction as it is,
        `"integrated"`, where it is a combination of more, or `"none"`.
        """
        if not self.finished:
            return "none"
        last = next(i for i in reversed(self.instructions) if not isinstance(i, Record))
        return "prediction" if isinstance(last, Call) else "integrated"

    @cached_property
    def draws(self) -> int:
        """Noise draws that an execution makes."""
        return sum(isinstance(i, Draw) for i in self.instructions)

    @cached_property
    def buffers(self) -> int:
        """States held at once: the registers that combinations write, the start's included."""
        return len({i.out for i in self.instructions if isinstance(i, Combine)} | {0})

    @property
    def times(self) -> Tensor:
        """The times of the calls, float64, `[nfe]`."""
        return as_vector([call.t for call in self.calls])

    @cached_property
    def _times(self) -> Tensor:
        return self.times

    @property
    def coefficients(self) -> Tensor:
        """All coefficients, in the order of the instructions, float64, one vector."""
        return as_vector(
            [c for i in self.instructions if isinstance(i, Combine) for _, c in i.terms]
        )

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through a coefficient or a time."""
        return self._tensors and any(
            isinstance(n, Tensor) and n.requires_grad for n in self._numbers()
        )

    def _numbers(self) -> list[Scalar]:
        return [c for i in self.instructions if isinstance(i, Combine) for _, c in i.terms] + [
            c.t for c in self.calls
        ]

    def with_numbers(self, coefficients: Tensor | None = None, times: Tensor | None = None) -> Plan:
        """The same table with other coefficients and call times; gradients flow through them where
        they require it.

        `consistency` goes on measuring against the `s` and `sigma` of the times that were traced.
        """
        if coefficients is not None and coefficients.shape != self.coefficients.shape:
            raise ValueError(
                f"this plan has {len(self.coefficients)} coefficients; got shape"
                f" {tuple(coefficients.shape)}"
            )
        if times is not None and times.shape != (self.nfe,):
            raise ValueError(
                f"this plan makes {self.nfe} calls; got times of shape {tuple(times.shape)}"
            )
        c = iter(_scalars(coefficients if coefficients is not None else self.coefficients))
        t = iter(_scalars(times if times is not None else self.times))
        changed: list[Instruction] = []
        for i in self.instructions:
            if isinstance(i, Combine):
                changed.append(
                    Combine(i.out, tuple((register, next(c)) for register, _ in i.terms))
                )
            else:
                changed.append(replace(i, t=next(t)) if isinstance(i, Call) else i)
        return replace(self, instructions=tuple(changed))

    # ------------------------------------------------------------------------------------- checking

    def consistency(self) -> dict[str, float]:
        """How exactly the table treats the simplest data, a single point `x0`, for which every
        prediction is `x0`.

        `signal`: the largest error of the coefficient of `x0` in a call's input, against `s`; zero
        in a consistent plan. `noise`: the largest relative error of the input's noise, against
        `sigma`; zero for ODE and exact-variance steps. `result`: the error of the coefficient of
        `x0` in a finished result, against 1.
        """
        rows, n = self.unrolled().detach(), self.nfe
        off = (rows.signal - rows.s).abs()
        spread = (rows.spread()[:n] / rows.sigma[:n] - 1.0).abs()
        return {
            "signal": float(off[:n].max()) if n else 0.0,
            "noise": float(spread.max()) if n else 0.0,
            "result": float(off[n]) if n and self.finished else 0.0,
        }

    def unrolled(self, predicts: str = "x0") -> Unrolled:
        """Every call's input and the result as a linear function of the start, the predictions
        before it and the noise.

        `predicts` is the function of the prediction: `"x0"`, `"eps"`, `"v"` or `"flow"`. Gradients
        flow through it.
        """
        return unroll(self.instructions, self.result, self.grid, self.finished).predicting(predicts)

    def matrix(self, predicts: str = "x0") -> Tensor:
        """`unrolled(predicts)` as one float64 matrix `[nfe + 1, 1 + nfe + draws]`: a row a call,
        and the result.
        """
        return self.unrolled(predicts).matrix

    def check(
        self,
        process: Process | None = None,
        *,
        predicts: str | None = None,
        clock: str | None = None,
        std: float = 0.5,
    ) -> PlanReport:
        """Consistency at every call, and the polynomials that each step reproduces: see
        `sdeflow.plan.check`. Print the report.

        - `predicts`: which function is a polynomial: `"x0"`, `"eps"`, `"v"`, `"flow"`, `"slope"`
          for `d(x/s)/dlam`, or `"velocity"` for `dx/dt`.
        - `clock`: the variable of the polynomial: `"lam"`, `"nsr"`, `"angle"` or `"t"`.
        - `process`: needed for `clock="t"` and `predicts="velocity"`.
        - `std`: the standard deviation of the Gaussian data.

        By default the report takes the pair of function and clock that the steps reproduce best.
        Errors: `ValueError` for another process than the plan's.
        """
        if process is not None:
            self._check_process(process)
        times = {t for t, _, _ in self.grid}
        return check(self.unrolled(), self._head(), times, process, predicts, clock, std)

    def compare(self, other: Plan) -> Difference:
        """How far two plans are from being one method, whatever their registers;
        `compare(other).close()` says whether.
        """
        drawn = [
            [i.interval for i in plan.instructions if isinstance(i, Draw)] for plan in (self, other)
        ]
        ends = self.finished == other.finished
        return difference(self.unrolled(), other.unrolled(), drawn, ends)

    def allclose(self, other: Plan, rtol: float = 1e-12, atol: float = 1e-14) -> bool:
        """Whether two plans are the same instructions with the same numbers to rounding; `compare`
        looks past registers.
        """
        (table, numbers), (other_table, other_numbers) = (
            _split([plan._rows(), plan.result, plan.finished]) for plan in (self, other)
        )
        return table == other_table and torch.allclose(numbers, other_numbers, rtol=rtol, atol=atol)

    # ------------------------------------------------------------------------- printing and storing

    def _head(self) -> str:
        """What it is, in a line."""
        head = (
            f"{self.solver or 'plan'} under {self.process or '?'}: t {self.grid[0][0]:g} ->"
            f" {self.grid[-1][0]:g}"
        )
        ends = {
            "none": "",
            "prediction": " -> zero noise",
            "integrated": " -> zero noise, integrated",
        }
        return head + ends[self.finish]

    def plot(self, path: str | os.PathLike[str] | None = None, predicts: str = "x0") -> Any:
        """The plan as a `matplotlib` figure (heat map of `matrix(predicts)`, levels, weights); as
        PNG in `path` too if given.

        Errors: `MissingExtraError` without matplotlib (`pip install 'sdeflow[plot]'`).
        """
        return plot_unrolled(self.unrolled(predicts), self._head(), path)

    def __str__(self) -> str:
        """The plan as a table, a row a call."""
        names = {0: "x"}
        lines = [
            f"{self._head()} | NFE {self.nfe} | {self.draws} draws | {self.buffers} buffers",
            f"{'call':>4}  {'t':>10}  {'nsr':>10}  input",
        ]
        pending: list[str] = []
        number = 0
        for i in self.instructions:
            match i:
                case Draw():
                    names[i.out] = "z"
                case Combine():
                    terms = " ".join(
                        f"{value_of(c):+.6g}·{names.get(r, f'r{r}')}" for r, c in i.terms
                    )
                    names[i.out] = "x" if i.out == 0 else f"r{i.out}"
                    pending.append(f"{names[i.out]} = {terms}")
                case Call():
                    nsr = value_of(i.sigma) / value_of(i.s) if value_of(i.s) else math.inf
                    what = "; ".join(pending) or names.get(i.input, f"r{i.input}")
                    lines.append(f"{number:>4}  {value_of(i.t):>10.5g}  {nsr:>10.5g}  {what}")
                    names[i.out] = f"F{number}"
                    number, pending = number + 1, []
        lines.append(
            f"{'end':>4}  {'':>10}  {'':>10} "
            f" {'; '.join(pending) or names.get(self.result, f'r{self.result}')}"
        )
        return "\n".join(lines)

    def _rows(self) -> list[list[Any]]:
        """The instructions as lists of plain numbers and strings."""
        rows: list[list[Any]] = []
        for i in self.instructions:
            match i:
                case Draw():
                    rows.append(["draw", i.out, i.nsr, i.nsr_next])
                case Combine():
                    rows.append(["combine", i.out, [[r, value_of(c)] for r, c in i.terms]])
                case Call():
                    rows.append(
                        ["call", i.out, i.input, value_of(i.t), value_of(i.s), value_of(i.sigma)]
                    )
                case Record():
                    rows.append(["record", i.index, i.input])
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and strings; floats survive JSON exactly."""
        keys = KEYS[2:-1]
        facts = {
            "format": FORMAT,
            "version": __version__,
            **{key: getattr(self, key) for key in keys},
        }
        return {**facts, "instructions": self._rows()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_dict` described; `ValueError` for anything else: another format, a
        number that is not finite, a register that is out of bounds or read before it is written.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            stated = data.get("format") if isinstance(data, dict) else None
            if str(stated).startswith(FORMAT.rstrip("0123456789")):
                raise ValueError(
                    f"its format is {stated!r} (written by sdeflow {data.get('version')}), and"
                    f" sdeflow {__version__} reads {FORMAT!r}: install a version that reads it"
                )
            raise ValueError(
                f"this is not a plan saved by sdeflow (its format should be {FORMAT!r})"
            )
        data = verified(data)
        if unknown := sorted(map(str, data.keys() - set(KEYS))):
            raise ValueError(
                f"a plan saved by sdeflow has no entry {unknown[0]!r}: the file is damaged"
            )
        try:
            instructions = tuple(map(_instruction, data["instructions"]))
            grid = tuple((_real(t), _real(s), _real(sigma)) for t, s, sigma in data["grid"])
            registers, result = _whole(data["registers"]), _whole(data["result"])
            finished, solver, process = data["finished"], data["solver"], data["process"]
            if (type(finished), type(solver), type(process)) != (bool, str, str):
                raise TypeError("finished is a truth value, solver and process are text")
            if not re.fullmatch(r"\d+\.\d+[\w.+-]*", data["version"]):
                raise ValueError(f"{data['version']!r} is no version of sdeflow")
        except (AttributeError, *DAMAGE) as error:
            raise ValueError(
                f"this is not a plan saved by sdeflow, or damaged: {type(error).__name__} {error}"
            ) from error
        _check_registers(instructions, registers, result)
        if not grid:
            raise ValueError("a damaged plan: it has no grid")
        if any(isinstance(i, Record) and i.index >= len(grid) for i in instructions):
            raise ValueError("a damaged plan: it records levels that its grid does not have")
        return cls(instructions, registers, result, grid, finished, solver, process)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, whole or not at all: as safetensors if `path` ends so, else as JSON;
        floats survive both exactly.
        """
        write_plan(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by `save`; `CheckpointError`, a `ValueError`, for a file that is
        missing, damaged or none.
        """
        data = read_plan(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not a plan saved by sdeflow, or damaged: {error}"
            ) from error

    # ------------------------------------------------------------------------------------ execution

    def start(
        self,
        x: Tensor,
        *,
        seeds: int | Sequence[int] | None = None,
        noise: Literal["seeded", "brownian"] | Noise = "seeded",
        model: Network | None = None,
        requires_grad: bool = False,
    ) -> Run:
        """Begin an execution on the state `x` (`[B, *shape]`, at the first level of `grid`) whose
        network calls are made outside, one `send` a call: see `Run`.

        - `seeds`: one a sample, or the first of consecutive ones; needed where the plan draws noise
          of a kind. `noise`: as in `sample`.
        - `model`: a `Prediction` or `Preconditioned`. The run then scales its input, says its time
          and takes its raw output; the network itself is not called.
        - `requires_grad`: let gradients flow through the run.

        Errors: `ValueError` for a plan that draws noise without seeds, or a model on another path.
        """
        if not isinstance(x, Tensor) or x.ndim < 1 or not x.is_floating_point():
            raise TypeError("x is the state to start from, a floating-point tensor [B, *shape]")
        if self._tensors and not requires_grad:
            return self.with_numbers(self.coefficients.detach(), self.times.detach()).start(
                x, seeds=seeds, noise=noise, model=model
            )
        if model is not None:
            if not isinstance(model, Network):
                raise TypeError(
                    "model is a Prediction or a Preconditioned network; of any other denoiser send"
                    f" the predictions of x0, denoiser(run.x, run.t); got {type(model).__name__}"
                )
            self._check_process(model.process)
        source = noise if isinstance(noise, Noise) else None
        if source is None and self.draws:
            if seeds is None:
                raise ValueError(
                    f"{self.solver or 'this plan'} draws noise: give it seeds=, one a sample or"
                    " the first of them"
                )
            kinds: dict[str, type[Noise]] = {"seeded": SeededNoise, "brownian": BrownianNoise}
            one_of("noise", noise, kinds)
            each = seeds_of(seeds, len(x))
            source = kinds[str(noise)](each, x.shape[1:], device=x.device, dtype=x.dtype)
        if source is not None and (len(source.seeds), *source.shape) != tuple(x.shape):
            raise ValueError(
                f"the noise is of {len(source.seeds)} samples of shape {source.shape}, and the"
                f" state has shape {tuple(x.shape)}: they must fit"
            )
        return Run(self, x, source, model, requires_grad)

    def _check_process(self, process: Process) -> None:
        """Raise `ValueError` for another process than the plan's."""
        levels = process.levels([t for t, _, _ in self.grid])
        for level, (t, s, sigma) in zip(levels, self.grid, strict=True):
            if max(abs(level.s - s), abs(level.sigma - sigma)) > 1e-9 * (1.0 + sigma):
                raise ValueError(
                    f"this plan was traced under {self.process}; {process!r} differs at t={t:g}"
                )

    def execute(
        self,
        reverse: Reverse,
        x: Tensor,
        noise: Noise | None,
        on_call: OnCall | None = None,
        networks: Sequence[Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the table on the state `x` (`[B, ...]`, left as it is); returns the result and the
        recorded states.

        On a device nothing here waits for it. Where gradients flow, combinations make new tensors
        instead of writing into buffers. `on_call(k, call, input, x0)` is called after each network
        call; it may keep both, and change neither. A network may return its own input, or one
        tensor at every call. One that alternates between several is a `SolverError` where the
        solver still needs what was overwritten. `networks` are the denoisers at the calls' times,
        if `reverse.calls(plan.times, x)` has prepared them already.
        """
        if self._tensors and not torch.is_grad_enabled():
            plain = self.with_numbers(self.coefficients.detach(), self.times.detach())
            return plain.execute(reverse, x, noise, on_call, networks)
        if self.draws and noise is None:
            raise SolverError(
                f"{self.solver or 'this plan'} draws noise: give it a source of noise"
            )
        if networks is None:
            networks = (
                reverse.calls(self.times if self._tensors else self._times, x) if self.nfe else ()
            )
        done = execute(
            self.instructions,
            self.registers,
            self.result,
            networks,
            x,
            noise,
            self._outlive,
            on_call,
        )
        reverse.count(self._times)
        return done


def _instruction(row: Any) -> Instruction:
    """The instruction that a row of `Plan.to_dict` describes."""
    kind, *numbers = row
    if kind == "combine":
        out, terms = numbers
        if not terms:
            raise ValueError("a damaged plan: it combines nothing")
        return Combine(_whole(out), tuple((_whole(r), _real(c)) for r, c in terms))
    if kind == "draw":
        out, nsr, nsr_next = numbers
        if (nsr is None) != (nsr_next is None):
            raise ValueError("a damaged plan: a draw has one level")
        return Draw(_whole(out), _ratio(nsr), _ratio(nsr_next))
    if kind == "call":
        out, given, t, s, sigma = numbers
        return Call(_whole(out), _whole(given), _real(t), _real(s), _real(sigma))
    if kind == "record":
        index, given = numbers
        return Record(_whole(index), _whole(given))
    raise ValueError(f"a damaged plan: it has an instruction {kind!r}")


def _whole(number: Any) -> int:
    """A register or a count as it was written: a whole number that is not negative."""
    if type(number) is not int or number < 0:
        raise ValueError(f"a damaged plan: {number!r} is no whole number from 0 on")
    return number


def _real(number: Any) -> float:
    """A coefficient, a time or a level as it was written: a finite number."""
    if type(number) not in (int, float) or not math.isfinite(number):
        raise ValueError(f"a damaged plan: {number!r} is no finite number")
    return float(number)


def _ratio(number: Any) -> float | None:
    """A draw's noise-to-signal ratio: None, or a number from 0 to infinity."""
    if number is None:
        return None
    if type(number) not in (int, float) or not number >= 0.0:
        raise ValueError(f"a damaged plan: {number!r} is no noise-to-signal ratio")
    return float(number)


def _check_registers(instructions: Sequence[Instruction], registers: int, result: int) -> None:
    """Raise `ValueError` unless every register exists and is written before it is read, and each
    has a use, so that no number in a file asks for memory.
    """
    written = {0}
    for i in instructions:
        if not set(reads(i)) <= written:
            raise ValueError("a damaged plan: it reads a register that nothing wrote")
        if not isinstance(i, Record):
            written.add(i.out)
    if registers > 1 + len(instructions):
        raise ValueError(
            f"a damaged plan: it has {registers} registers for {len(instructions)} instructions"
        )
    if result not in written or not all(0 <= register < registers for register in written):
        raise ValueError(f"a damaged plan: it has {registers} registers and uses others")


def _scalars(vector: Tensor) -> list[Scalar]:
    return list(vector.unbind()) if vector.requires_grad else vector.tolist()


def _split(value: list[Any]) -> tuple[list[Any], Tensor]:
    """Nested lists with `float` in the place of every number that is one, and those numbers."""
    numbers: list[float] = []

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(entry) for entry in value]
        if not isinstance(value, float):
            return value
        numbers.append(value)
        return float

    return without(value), torch.tensor(numbers, dtype=torch.float64)
