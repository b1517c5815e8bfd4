r"""Plans: a solver's steps over a grid, traced once into a table of numbers, and the one loop that executes it.

A step of a fixed-grid solver is written as in its textbook, with `+`, `-` and `*` on the state, the network's outputs
and the noise. Run on symbolic operands (`Operand`) instead of tensors, the same step leaves a list of instructions:

    Draw(z, levels)      z := a standard normal
    Combine(y, terms)    y := sum_k c_k r_k, one linear combination of registers
    Call(F, x, level)    F := denoiser(x, t)

with every coefficient a float64 number. What a solve does is then data: it can be printed, saved, checked, compared,
and run with the process long gone. Values that one combination alone uses are merged into it, and registers are
assigned by liveness, so that a call costs its network and one combination into a preallocated buffer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeflow._files import write_whole
from sdeflow._math import Scalar, value_of
from sdeflow.errors import SolverError
from sdeflow.noise import Noise
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse

# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Draw:
    """`out := z`, a standard normal: the Brownian increment between two noise-to-signal ratios, or an independent draw."""

    out: int
    nsr: float | None = None
    nsr_next: float | None = None


@dataclass(frozen=True, slots=True)
class Combine:
    """`out := sum_k c_k register_k`; `terms` are pairs `(register, coefficient)`."""

    out: int
    terms: tuple[tuple[int, Scalar], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """`out := denoiser(register, t)`; `s` and `sigma` say what a consistent input holds of signal and noise."""

    out: int
    input: int
    t: Scalar
    s: Scalar
    sigma: Scalar


@dataclass(frozen=True, slots=True)
class Record:
    """The state at grid level `index` is in `input`; present in plans traced with `record=True`."""

    index: int
    input: int


Instruction = Draw | Combine | Call | Record


@dataclass(frozen=True)
class Plan:
    """A solve as a table: `nfe` network calls, each with its time and the combination that makes its input.

    `grid` holds `(t, s, sigma)` of every level; the state at its first level enters in register 0 and the result is in
    register `result`. `finished` says that it ends with the denoised prediction, at zero noise.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    result: int
    grid: tuple[tuple[float, float, float], ...]
    finished: bool
    solver: str = ""
    process: str = ""
    _calls: tuple[Call, ...] = field(init=False, repr=False, compare=False)
    _tensors: bool = field(init=False, repr=False, compare=False)
    _outlive: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_calls", tuple(i for i in self.instructions if isinstance(i, Call)))
        object.__setattr__(self, "_tensors", any(isinstance(number, Tensor) for number in self._numbers()))
        object.__setattr__(self, "_outlive", _outlive(self.instructions))

    @property
    def nfe(self) -> int:
        """Network calls that an execution makes."""
        return len(self._calls)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The network calls, in order."""
        return self._calls

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
        return _vector([call.t for call in self._calls])

    @cached_property
    def _times(self) -> Tensor:
        return self.times

    @property
    def coefficients(self) -> Tensor:
        """All coefficients, in the order of the instructions, float64, one vector."""
        return _vector([c for i in self.instructions if isinstance(i, Combine) for _, c in i.terms])

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through a coefficient or a time."""
        return self._tensors and any(isinstance(n, Tensor) and n.requires_grad for n in self._numbers())

    def _numbers(self) -> list[Scalar]:
        return [c for i in self.instructions if isinstance(i, Combine) for _, c in i.terms] + [c.t for c in self._calls]

    def with_numbers(self, coefficients: Tensor | None = None, times: Tensor | None = None) -> Plan:
        """The same table with other coefficients and call times; gradients flow through them where they require it.

        `consistency` goes on measuring against the `s` and `sigma` of the times that were traced.
        """
        if coefficients is not None and coefficients.shape != self.coefficients.shape:
            raise ValueError(
                f"this plan has {len(self.coefficients)} coefficients; got shape {tuple(coefficients.shape)}"
            )
        if times is not None and times.shape != (self.nfe,):
            raise ValueError(f"this plan makes {self.nfe} calls; got times of shape {tuple(times.shape)}")
        c = iter(_scalars(coefficients if coefficients is not None else self.coefficients))
        t = iter(_scalars(times if times is not None else self.times))
        changed: list[Instruction] = []
        for i in self.instructions:
            if isinstance(i, Combine):
                changed.append(Combine(i.out, tuple((register, next(c)) for register, _ in i.terms)))
            else:
                changed.append(replace(i, t=next(t)) if isinstance(i, Call) else i)
        return replace(self, instructions=tuple(changed))

    # ------------------------------------------------------------------------------------------------------- checking

    def consistency(self) -> dict[str, float]:
        """How exactly the table treats the simplest data, a single point `x0`, for which every prediction is `x0`.

        `signal`: the largest error of the coefficient of `x0` in a call's input, against `s`; zero in a consistent plan.
        `noise`: the largest relative error of the input's noise, against `sigma`; zero for ODE and exact-variance steps.
        `result`: the error of the coefficient of `x0` in a finished result, against 1.
        """
        signal, noise, result = 0.0, 0.0, 0.0
        _, s, sigma = self.grid[0]
        values: dict[int, dict[int, float]] = {0: {0: s, 1: sigma}}
        draws = 1  # basis vector 0 is x0, 1 is the start's noise, then one for each draw
        for i in self.instructions:
            match i:
                case Draw():
                    draws += 1
                    values[i.out] = {draws: 1.0}
                case Combine():
                    total: dict[int, float] = {}
                    for register, c in i.terms:
                        for basis, weight in values[register].items():
                            total[basis] = total.get(basis, 0.0) + value_of(c) * weight
                    values[i.out] = total
                case Call():
                    held = values[i.input]
                    signal = max(signal, abs(held.get(0, 0.0) - value_of(i.s)))
                    std = math.sqrt(sum(w * w for basis, w in held.items() if basis > 0))
                    noise = max(noise, abs(std / value_of(i.sigma) - 1.0))
                    values[i.out] = {0: 1.0}
        if self.finished and self._calls:
            result = abs(values[self.result].get(0, 0.0) - 1.0)
        return {"signal": signal, "noise": noise, "result": result}

    def allclose(self, other: Plan, rtol: float = 1e-12, atol: float = 1e-14) -> bool:
        """Whether two plans are the same instructions with the same numbers to rounding."""
        if (self._skeleton(), self.result, self.finished) != (other._skeleton(), other.result, other.finished):
            return False
        return all(torch.allclose(a, b, rtol=rtol, atol=atol) for a, b in zip(self._all(), other._all(), strict=True))

    def _skeleton(self) -> list[Any]:
        """The instructions without their numbers."""
        skeleton: list[Any] = []
        for i in self.instructions:
            match i:
                case Draw():
                    skeleton.append(("draw", i.out, i.nsr is None))
                case Combine():
                    skeleton.append(("combine", i.out, *(register for register, _ in i.terms)))
                case Call():
                    skeleton.append(("call", i.out, i.input))
                case Record():
                    skeleton.append(i)
        return skeleton

    def _all(self) -> list[Tensor]:
        """Every number of the instructions: coefficients, times, and the levels of calls and draws."""
        levels = [n for call in self._calls for n in (call.s, call.sigma)]
        draws = [n for i in self.instructions if isinstance(i, Draw) and i.nsr is not None for n in (i.nsr, i.nsr_next)]
        return [self.coefficients, self.times, _vector(levels), _vector(draws)]

    # --------------------------------------------------------------------------------------------- printing and storing

    def __str__(self) -> str:
        """The plan as a table, a row a call."""
        names = {0: "x"}
        head = f"{self.solver or 'plan'} under {self.process or '?'}: t {self.grid[0][0]:g} -> {self.grid[-1][0]:g}"
        head += " -> zero noise" if self.finished else ""
        lines = [
            f"{head} | NFE {self.nfe} | {self.draws} draws | {self.buffers} buffers",
            f"{'call':>4}  {'t':>10}  {'nsr':>10}  input",
        ]
        pending: list[str] = []
        number = 0
        for i in self.instructions:
            match i:
                case Draw():
                    names[i.out] = "z"
                case Combine():
                    terms = " ".join(f"{value_of(c):+.6g}·{names.get(r, f'r{r}')}" for r, c in i.terms)
                    names[i.out] = "x" if i.out == 0 else f"r{i.out}"
                    pending.append(f"{names[i.out]} = {terms}")
                case Call():
                    nsr = value_of(i.sigma) / value_of(i.s) if value_of(i.s) else math.inf
                    what = "; ".join(pending) or names.get(i.input, f"r{i.input}")
                    lines.append(f"{number:>4}  {value_of(i.t):>10.5g}  {nsr:>10.5g}  {what}")
                    names[i.out] = f"F{number}"
                    number, pending = number + 1, []
        lines.append(
            f"{'end':>4}  {'':>10}  {'':>10}  {'; '.join(pending) or names.get(self.result, f'r{self.result}')}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and strings; floats survive JSON exactly."""
        rows: list[list[Any]] = []
        for i in self.instructions:
            match i:
                case Draw():
                    rows.append(["draw", i.out, i.nsr, i.nsr_next])
                case Combine():
                    rows.append(["combine", i.out, [[r, value_of(c)] for r, c in i.terms]])
                case Call():
                    rows.append(["call", i.out, i.input, value_of(i.t), value_of(i.s), value_of(i.sigma)])
                case Record():
                    rows.append(["record", i.index, i.input])
        keys = ("registers", "result", "grid", "finished", "solver", "process")
        return {"format": "sdeflow-plan-1", **{key: getattr(self, key) for key in keys}, "instructions": rows}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_dict` described."""
        if not isinstance(data, dict) or data.get("format") != "sdeflow-plan-1":
            raise ValueError("this is not a plan saved by sdeflow (its format should be 'sdeflow-plan-1')")
        makers: dict[str, Callable[..., Instruction]] = {"draw": Draw, "call": Call, "record": Record}
        instructions = tuple(
            Combine(row[1], tuple((int(r), value_of(c)) for r, c in row[2]))
            if row[0] == "combine"
            else makers[row[0]](*row[1:])
            for row in data["instructions"]
        )
        _check_registers(instructions, data["registers"], data["result"])
        keys = ("registers", "result", "finished", "solver", "process")
        grid = tuple((float(t), float(s), float(sigma)) for t, s, sigma in data["grid"])
        return cls(instructions, grid=grid, **{key: data[key] for key in keys})

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_whole(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode(), "plan")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by `save`."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not a plan saved by sdeflow: {error}") from error

    # ------------------------------------------------------------------------------------------------------- execution

    def execute(
        self,
        reverse: Reverse,
        x: Tensor,
        noise: Noise | None,
        on_call: Callable[[int, Call, Tensor, Tensor], None] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the table on the state `x` (`[B, ...]`, left as it is); returns the result and the recorded states.

        On a device nothing here waits for it. Where gradients flow, combinations make new tensors instead of writing
        into buffers. `on_call(k, call, input, x0)` is called after each network call; what it keeps, it must clone. A
        network may return its own input, or one tensor at every call; one that alternates between several must clone.
        """
        if self._tensors and not torch.is_grad_enabled():
            plain = self.with_numbers(self.coefficients.detach(), self.times.detach())
            return plain.execute(reverse, x, noise, on_call)
        if self.draws and noise is None:
            raise SolverError(f"{self.solver or 'this plan'} draws noise: give it a source of noise")
        calls = iter(reverse.calls(self.times if self._tensors else self._times, x)) if self.nfe else iter(())
        combine = _combine_new if torch.is_grad_enabled() else _combine_into
        registers: list[Any] = [None] * self.registers
        registers[0] = x if torch.is_grad_enabled() else x.clone()
        owned: dict[int, Tensor] = {0: registers[0]}
        drawn: dict[int, Tensor] = {}
        recorded: list[Tensor] = []
        # A network may return one tensor of its own at every call. Where an output must outlive the next call, the first
        # such tells: it is copied, and held until the next one shows whether it came in the same place.
        lent: Tensor | None = None
        reuses: bool | None = None
        number = 0
        for i in self.instructions:
            if type(i) is Combine:
                registers[i.out] = combine(i, registers, owned, x)
            elif type(i) is Call:
                given = registers[i.input]
                before = _version(given)
                output = next(calls)(given)
                reverse.nfe += 1
                if _version(given) != before:
                    raise SolverError(
                        "the network changed its input in place, and the solver needs it: let it work on a clone"
                    )
                if lent is not None:
                    reuses, lent = _share(lent, output), None
                # Or it may hand back its own input; the buffer behind it will be written again.
                if _share(given, output) or (reuses and number in self._outlive):
                    output = output.clone()
                elif reuses is None and number in self._outlive and not torch.is_grad_enabled():
                    lent, output = output, output.clone()
                registers[i.out] = output
                if on_call is not None:
                    on_call(number, i, given, output)
                    if _version(given) != before:
                        raise SolverError("a callback changed the state in place: let it work on a clone")
                number += 1
            elif type(i) is Draw:
                assert noise is not None
                if not noise.in_place or torch.is_grad_enabled():
                    registers[i.out] = noise.draw(i.nsr, i.nsr_next).to(x)
                    continue
                if i.out not in drawn:
                    drawn[i.out] = torch.empty_like(x)
                registers[i.out] = noise.draw(i.nsr, i.nsr_next, out=drawn[i.out])
            elif type(i) is Record:
                recorded.append(registers[i.input].clone())
        result = registers[self.result]
        # What a network returned may be its own; the result is the caller's.
        return result if self.result in owned or torch.is_grad_enabled() else result.clone(), recorded


def _check_registers(instructions: Sequence[Instruction], registers: int, result: int) -> None:
    """Raise `ValueError` unless every register exists and is written before it is read."""
    written = {0}
    for i in instructions:
        if not set(_reads(i)) <= written:
            raise ValueError("a damaged plan: it reads a register that nothing wrote")
        if not isinstance(i, Record):
            written.add(i.out)
    if result not in written or not all(0 <= register < registers for register in written):
        raise ValueError(f"a damaged plan: it has {registers} registers and uses others")


def _outlive(instructions: Sequence[Instruction]) -> frozenset[int]:
    """The calls whose outputs are read after the next call."""
    holds: dict[int, int] = {}  # register -> number of the call whose output it holds
    kept: set[int] = set()
    number = 0
    for i in instructions:
        kept.update(holds[r] for r in _reads(i) if r in holds and holds[r] < number - 1)
        if not isinstance(i, Record):
            holds.pop(i.out, None)
        if isinstance(i, Call):
            holds[i.out] = number
            number += 1
    return frozenset(kept)


def _version(x: Tensor) -> int:
    """How often a tensor has been written to."""
    return 0 if x.is_inference() else x._version


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _combine_into(i: Combine, registers: list[Any], owned: dict[int, Tensor], like: Tensor) -> Tensor:
    """A linear combination written into the register's own buffer, two terms in the first pass and one in each other."""
    terms = i.terms
    out = owned.get(i.out)
    if out is None:
        out = owned[i.out] = torch.empty_like(like)
    first, a = terms[0]
    x = registers[first]
    if len(terms) == 1:
        return torch.mul(x, a, out=out)
    second, b = terms[1]
    y = registers[second]
    if abs(a + b - 1.0) < 1e-15 and y.dtype == x.dtype:
        torch.lerp(y, x, a, out=out)
    else:
        # Not torch.addr, which takes one pass: it rounds the tail of a tensor otherwise than its body, so that the bits of
        # a sample would depend on its place in the batch.
        torch.mul(x, a, out=out).add_(y, alpha=b)
    for register, c in terms[2:]:
        out.add_(registers[register], alpha=c)
    return out


def _combine_new(i: Combine, registers: list[Any], owned: dict[int, Tensor], like: Tensor) -> Tensor:
    """A linear combination as a new tensor, through which gradients flow to registers and coefficients."""
    total: Tensor | None = None
    for register, c in i.terms:
        term = registers[register] * c  # a 0-d tensor on the CPU: it is not copied, and its dtype does not spread
        total = term if total is None else total + term
    assert total is not None
    return total.to(like.dtype)


def _vector(numbers: Sequence[Scalar]) -> Tensor:
    if any(isinstance(number, Tensor) for number in numbers):
        return torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in numbers])
    return torch.tensor(numbers, dtype=torch.float64)


def _scalars(vector: Tensor) -> list[Scalar]:
    return list(vector.unbind()) if vector.requires_grad else vector.tolist()


# ----------------------------------------------------------------------------------------------------------- tracing


class Operand:
    """A linear combination of values that a trace has seen; what a step computes with in place of tensors."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[int, Scalar]):
        self.terms = terms

    def __add__(self, other: Operand) -> Operand:
        if not isinstance(other, Operand):
            return NotImplemented
        terms = dict(self.terms)
        for value, c in other.terms.items():
            terms[value] = terms[value] + c if value in terms else c
        return Operand(terms)

    def __neg__(self) -> Operand:
        return self * -1.0

    def __sub__(self, other: Operand) -> Operand:
        return self + -other if isinstance(other, Operand) else NotImplemented

    def __mul__(self, factor: Scalar) -> Operand:
        if isinstance(factor, Operand):
            raise SolverError("a step multiplied two states: steps of a plan are linear; override integrate instead")
        return Operand({value: c * factor for value, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> Operand:
        return self * (1.0 / divisor)

    def __bool__(self) -> bool:
        raise SolverError(
            "a step asked for the value of a state: steps of a plan cannot depend on it; override integrate instead"
        )


class Trace(Reverse):
    """A recorder that stands in for the reverse process and the noise while a solver's steps run symbolically."""

    def __init__(self, process: Process):
        self.process = process
        self.condition: dict[str, Any] = {}
        self.nfe = 0
        self._known = {}
        self.instructions: list[Instruction] = []
        self.values = 1  # value 0 is the state that the solve starts from

    def value(self, operand: Operand) -> int:
        """The value that holds `operand`, computed now if none does; the operand then refers to it."""
        terms = {v: c for v, c in operand.terms.items() if not (isinstance(c, float) and c == 0.0)}
        if len(terms) == 1:
            (value, c) = next(iter(terms.items()))
            if isinstance(c, float) and c == 1.0:
                operand.terms = terms
                return value
        for c in terms.values():
            if isinstance(c, float) and not math.isfinite(c):
                raise SolverError(
                    f"a step has a coefficient of {c}: the method is not defined on this grid (zero noise, or no signal left?)"
                )
        if not terms:
            raise SolverError("a step made a state of nothing: all its coefficients are zero")
        out = self._new()
        self.instructions.append(Combine(out, tuple(terms.items())))
        operand.terms = {out: 1.0}
        return out

    def _new(self) -> int:
        self.values += 1
        return self.values - 1

    def __call__(self, x: Any, t: Level) -> Operand:
        self.nfe += 1
        given = self.value(x)
        out = self._new()
        self.instructions.append(Call(out, given, t.t, t.s, t.sigma))
        return Operand({out: 1.0})

    def draw(self, t: Level | None = None, t_next: Level | None = None) -> Operand:
        """A standard normal: between two levels, or independent."""
        out = self._new()
        between = (None, None) if t is None or t_next is None else (value_of(t.nsr), value_of(t_next.nsr))
        self.instructions.append(Draw(out, *between))
        return Operand({out: 1.0})

    def keep(self, state: Any) -> Any:
        """`state`, nested tuples of operands, with every operand held by one value."""
        if isinstance(state, Operand):
            self.value(state)
        elif isinstance(state, tuple | list):
            for entry in state:
                self.keep(entry)
        return state

    def record(self, index: int, x: Operand) -> None:
        """Mark the state at a grid level."""
        self.instructions.append(Record(index, self.value(x)))


def optimise(instructions: Iterable[Instruction], result: int) -> tuple[tuple[Instruction, ...], int, int]:
    """Merge values used by one combination alone into it, drop what nobody uses, and assign registers by liveness.

    Returns the instructions, the number of registers and the register of the result.
    """
    merged = _merge(list(instructions), result)
    alive = _alive(merged, result)
    return _assign(alive, result)


def _reads(i: Instruction) -> Iterator[int]:
    if isinstance(i, Combine):
        yield from (value for value, _ in i.terms)
    elif isinstance(i, Call | Record):
        yield i.input


def _merge(instructions: list[Instruction], result: int) -> list[Instruction]:
    users: dict[int, list[Instruction]] = {}
    for i in instructions:
        for value in _reads(i):
            users.setdefault(value, []).append(i)
    merged: list[Instruction] = []
    pending: dict[int, Combine] = {}  # combinations that only one later combination reads
    for i in instructions:
        if isinstance(i, Combine):
            terms: dict[int, Scalar] = {}
            for value, c in i.terms:
                inner = pending[value].terms if value in pending else ((value, 1.0),)
                for v, w in inner:
                    terms[v] = terms[v] + w * c if v in terms else w * c
            i = Combine(i.out, tuple(terms.items()))
            who = users.get(i.out, [])
            if i.out != result and len(who) == 1 and isinstance(who[0], Combine):
                pending[i.out] = i
                continue
        merged.append(i)
    return merged


def _alive(instructions: list[Instruction], result: int) -> list[Instruction]:
    needed = {result}
    kept: list[Instruction] = []
    for i in reversed(instructions):
        # A network call is never dropped: it is what the budget counts.
        if isinstance(i, Call | Record) or i.out in needed:
            kept.append(i)
            needed.update(_reads(i))
    return kept[::-1]


def _assign(instructions: list[Instruction], result: int) -> tuple[tuple[Instruction, ...], int, int]:
    last = {value: n for n, i in enumerate(instructions) for value in _reads(i)}
    last[result] = len(instructions)
    place = {0: 0}
    free: list[int] = []
    count = 1
    # Registers that combinations write own a buffer; those of outputs and draws only refer to what they are given.
    owning = {0}
    done: list[Instruction] = []

    def take(own: bool) -> int:
        nonlocal count
        for register in free:
            if (register in owning) == own:
                free.remove(register)
                return register
        count += 1
        if own:
            owning.add(count - 1)
        return count - 1

    for n, i in enumerate(instructions):
        dying = [value for value in dict.fromkeys(_reads(i)) if last[value] == n and value in place]
        match i:
            case Combine():
                # Write over an owned operand that dies here, which then comes first; else into a free buffer.
                own = [value for value in dying if place[value] in owning]
                terms = i.terms
                if own:
                    out, source = place[own[0]], own[0]
                    terms = tuple(sorted(terms, key=lambda term: term[0] != source))
                    dying.remove(source)
                else:
                    out = take(True)
                done.append(Combine(out, tuple((place[value], c) for value, c in terms)))
                place[i.out] = out
            case Call():
                out = take(False)
                done.append(replace(i, out=out, input=place[i.input]))
                place[i.out] = out
            case Draw():
                place[i.out] = take(False)
                done.append(replace(i, out=place[i.out]))
            case Record():
                done.append(replace(i, input=place[i.input]))
        free.extend(place[value] for value in dying)
        free.sort()
        if not isinstance(i, Record) and i.out not in last:  # a call whose prediction nobody uses
            free.append(place[i.out])
    return tuple(done), count, place[result]
