"""Tracing: a step run on symbolic operands instead of tensors leaves the list of instructions of a
plan.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sdeflow._utils.math import Scalar, value_of
from sdeflow.errors import SolverError
from sdeflow.plan.instructions import Call, Combine, Draw, Instruction, Record, reads
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, Spent


class Operand:
    """A linear combination of values that a trace has seen; what a step computes with in place of
    tensors.
    """

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
            raise SolverError(
                "a step multiplied two states: steps of a plan are linear; override integrate"
                " instead"
            )
        return Operand({value: c * factor for value, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> Operand:
        return self * (1.0 / divisor)

    def __bool__(self) -> bool:
        raise SolverError(
            "a step asked for the value of a state: steps of a plan cannot depend on it; override"
            " integrate instead"
        )


class Trace(Reverse):
    """A recorder that stands in for the reverse process and the noise while a solver's steps run
    symbolically.
    """

    def __init__(self, process: Process):
        self.process = process
        self.condition: dict[str, Any] = {}
        self._at_time = {}
        self._at_lam = []
        self.begin(stand_ins=False)

    def begin(self, *, stand_ins: bool) -> None:
        """Start with no instruction, and with the levels that are known by now.

        With `stand_ins`, a level that is not known is noted, and an approximate one stands in for
        it. `compute_missing` then computes all that were noted in one pass.
        """
        self.spent = Spent()
        self.instructions: list[Instruction] = []
        self.values = 1  # value 0 is the state that the solve starts from
        self._missing_times: dict[float, None] = {}
        self._missing_lams: dict[float, None] = {}
        finite = sorted((t, v.lam) for t, v in self._at_time.items() if math.isfinite(v.lam))
        self._known = finite if stand_ins else []

    @property
    def missing(self) -> bool:
        """Whether a level stood in for one that is not known."""
        return bool(self._missing_times or self._missing_lams)

    def compute_missing(self) -> None:
        """Compute the levels that were noted, in one vectorised pass."""
        times = torch.tensor(list(self._missing_times), dtype=torch.float64)
        self.prepare(times, list(self._missing_lams))

    def level(self, t: Any) -> Level:
        if not isinstance(t, float) or not self._known or t in self._at_time:
            return super().level(t)
        self._missing_times[t] = None
        return _stand_in(t, _interpolated(t, self._known))

    def level_of_lam(self, lam: Any) -> Level:
        if not isinstance(lam, float) or not self._known:
            return super().level_of_lam(lam)
        if (known := self._find(lam)) is not None:
            return known
        self._missing_lams[lam] = None
        t = _interpolated(lam, [(known, t) for t, known in reversed(self._known)])
        return _stand_in(min(max(t, self.process.t_min), self.process.t_max), lam)

    def value(self, operand: Operand) -> int:
        """The value that holds `operand`, computed now if none does; the operand then refers to
        it.
        """
        terms = {v: c for v, c in operand.terms.items() if not (isinstance(c, float) and c == 0.0)}
        if len(terms) == 1:
            value, c = next(iter(terms.items()))
            if isinstance(c, float) and c == 1.0:
                operand.terms = terms
                return value
        for c in terms.values():
            if isinstance(c, float) and not math.isfinite(c):
                raise SolverError(
                    f"a step has a coefficient of {c}: the method is not defined on this grid (zero"
                    " noise, or no signal left?)"
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
        self.spent.nfe += 1
        given = self.value(x)
        out = self._new()
        self.instructions.append(Call(out, given, t.t, t.s, t.sigma))
        return Operand({out: 1.0})

    def predict(self, x: Any, t: Level) -> tuple[Any, ...]:
        """An error: a call of a plan has one prediction, x0."""
        raise SolverError(
            "a step asked for more than x0 of the network, such as a learned variance: a plan holds"
            " one prediction a call; sample with this solver by itself, without a plan"
        )

    def draw(self, t: Level | None = None, t_next: Level | None = None) -> Operand:
        """A standard normal: between two levels, or independent."""
        out = self._new()
        between = (
            (None, None) if t is None or t_next is None else (value_of(t.nsr), value_of(t_next.nsr))
        )
        self.instructions.append(Draw(out, *between))
        return Operand({out: 1.0})

    def materialise(self, state: Any) -> Any:
        """`state`, nested tuples of operands, with every operand held by one value."""
        if isinstance(state, Operand):
            self.value(state)
        elif isinstance(state, tuple | list):
            for entry in state:
                self.materialise(entry)
        return state

    def record(self, index: int, x: Operand) -> None:
        """Mark the state at a grid level."""
        self.instructions.append(Record(index, self.value(x)))


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """The value at `x` of the broken line through `points`, which rise in the first coordinate."""
    if len(points) == 1:
        return points[0][1] - (x - points[0][0])
    i = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (a, y), (b, y_next) = points[i - 1 : i + 1]
    return y + (y_next - y) * (x - a) / (b - a)


def _stand_in(t: float, lam: float) -> Level:
    """A level at about the time `t` with `log(s / sigma) = lam` and some signal and noise."""
    nsr = math.exp(min(max(-lam, -300.0), 300.0))
    s = 1.0 / math.hypot(1.0, nsr)
    return Level(t, s, nsr * s, -s, nsr * s)


def optimise(
    instructions: Iterable[Instruction], result: int
) -> tuple[tuple[Instruction, ...], int, int]:
    """Merge values used by one combination alone into it, drop what nobody uses, and assign
    registers by liveness.

    Returns the instructions, the number of registers and the register of the result.
    """
    merged = _merge(list(instructions), result)
    alive = _alive(merged, result)
    return _assign(alive, result)


def _merge(instructions: list[Instruction], result: int) -> list[Instruction]:
    users: dict[int, list[Instruction]] = {}
    for i in instructions:
        for value in reads(i):
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
            needed.update(reads(i))
    return kept[::-1]


def _assign(
    instructions: list[Instruction], result: int
) -> tuple[tuple[Instruction, ...], int, int]:
    last = {value: n for n, i in enumerate(instructions) for value in reads(i)}
    last[result] = len(instructions)
    place = {0: 0}
    free: list[int] = []
    count = 1
    # Registers that combinations write own a buffer; those of outputs and draws only refer to what
    # they are given.
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
        dying = [value for value in dict.fromkeys(reads(i)) if last[value] == n and value in place]
        match i:
            case Combine():
                # Write over an owned operand that dies here, which then comes first; else into a
                # free buffer.
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
