r"""Plans unrolled: every call's input, and the result, as one linear function of what goes into a
solve.

A plan is linear in the state it starts from, the network's predictions and the noise, so that the
input of call `k` is

$$x_k = a_k x + \sum_{j<k} B_{kj} F_j + \sum_d C_{kd} z_d,$$

with the predictions $F_j$ of $x_0$. The table of these numbers defines the method, whatever its
registers and buffers. It can be measured, plotted, compared and fitted. `Unrolled.predicting` gives
the same method with another function of the prediction, such as $\varepsilon$, in place of $x_0$.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sdeflow._utils.math import Scalar
from sdeflow.errors import unknown
from sdeflow.plan.instructions import Call, Combine, Draw, Instruction

PREDICTS = ("x0", "eps", "v", "flow")
"""The functions of a prediction that a table can hold, see `sdeflow.solvers.ode.weights`."""


@dataclass(frozen=True, eq=False)
class Unrolled:
    """`x_k = start_k x + sum_j predictions_kj F_j + sum_d draws_kd z_d`; float64, a row a call, and
    the last row the result.

    `start` is `[rows]`, `predictions` `[rows, nfe]` (strictly lower triangular in the rows of
    calls) and `draws` `[rows, draws]`; `t`, `s`, `sigma` (`[rows]`) are the level of each row, 0, 1
    and 0 at the end of a finished solve, and `origin` is `(t, s, sigma)` of the start. Gradients
    flow through the numbers of the plan that require them.
    """

    start: Tensor
    predictions: Tensor
    draws: Tensor
    t: Tensor
    s: Tensor
    sigma: Tensor
    origin: tuple[float, float, float]
    predicts: str = "x0"
    _plain: Unrolled | None = field(default=None, repr=False)

    @property
    def nfe(self) -> int:
        """Network calls."""
        return self.predictions.shape[1]

    @property
    def matrix(self) -> Tensor:
        """All weights as one matrix, `[rows, 1 + nfe + draws]`: of the start, of the predictions,
        of the noise.
        """
        return torch.cat([self.start.unsqueeze(1), self.predictions, self.draws], 1)

    @property
    def columns(self) -> tuple[str, ...]:
        """What the columns of `matrix` weigh: `x`, `F0`, `F1`, ..., `z0`, `z1`, ..."""
        drawn = range(self.draws.shape[1])
        return ("x", *(f"F{j}" for j in range(self.nfe)), *(f"z{d}" for d in drawn))

    def __str__(self) -> str:
        """The matrix as a table, zeros left out."""
        names = [*map(str, range(self.nfe)), "end"]
        lines = [f"{'call':>4}  {'t':>10}" + "".join(f"  {name:>10}" for name in self.columns)]
        for name, t, row in zip(names, self.t.tolist(), self.matrix.tolist(), strict=True):
            cells = "".join(f"  {f'{c:.5g}' if c else '':>10}" for c in row)
            lines.append(f"{name:>4}  {t:>10.5g}{cells}".rstrip())
        return "\n".join(lines)

    @property
    def nsr(self) -> Tensor:
        """`sigma / s` of each row; infinite where no signal is left."""
        return self.sigma / self.s

    @property
    def signal(self) -> Tensor:
        """What each row holds of `x0` where every prediction is `x0` and the start is `s x0`; `s`
        in a consistent plan.
        """
        plain = self._plain or self
        return plain.start * self.origin[1] + plain.predictions.sum(1)

    def spread(self, std: float = 0.0) -> Tensor:
        r"""The standard deviation of each row on data $N(0, \mathrm{std}^2)$, from the exact law at
        the start.

        There the prediction is $\frac{s\,\mathrm{std}^2}{s^2 \mathrm{std}^2 + \sigma^2} x$, and the
        exact law at a level has the standard deviation $\sqrt{s^2 \mathrm{std}^2 + \sigma^2}$.
        `std=0` is data of a single point, in which all that spreads is the noise.
        """
        plain, n = self._plain or self, self.nfe
        gain = self.s[:n] * std**2 / (self.s[:n] ** 2 * std**2 + self.sigma[:n] ** 2)
        rows = plain._eliminated(gain, torch.zeros_like(gain))
        first = (self.origin[1] * std) ** 2 + self.origin[2] ** 2
        return torch.sqrt(rows[:, 0] ** 2 * first + (rows[:, n + 1 :] ** 2).sum(1))

    def detach(self) -> Unrolled:
        """The same without gradients, with predictions of x0."""
        plain = self._plain or self
        names = ("start", "predictions", "draws", "t", "s", "sigma")
        return replace(plain, **{name: getattr(plain, name).detach() for name in names})

    def predicting(self, predicts: str) -> Unrolled:
        """The same method with `F_j` another function of the prediction: `"x0"`, `"eps"`, `"v"` or
        `"flow"`.

        `ValueError` for `"eps"` where a call has no signal (`s = 0`).
        """
        if predicts not in PREDICTS:
            raise unknown("predicts", predicts, PREDICTS)
        if predicts == self.predicts:
            return self
        plain = self._plain or self
        if predicts == "x0":
            return plain
        return plain.with_predictions(
            *_prediction(predicts, self.s[: self.nfe], self.sigma[: self.nfe]), predicts
        )

    def with_predictions(self, of_state: Tensor, of_value: Tensor, predicts: str) -> Unrolled:
        """The same method with other functions `F_j` of the predictions,
        `x0 = of_state x + of_value F_j` at call `j`.
        """
        if self.predicts != "x0":
            raise ValueError(f"start from predictions of x0, not of {self.predicts}")
        rows, n = self._eliminated(of_state, of_value), self.nfe
        return replace(
            self,
            start=rows[:, 0],
            predictions=rows[:, 1 : n + 1],
            draws=rows[:, n + 1 :],
            predicts=predicts,
            _plain=self,
        )

    def _eliminated(self, of_state: Tensor, of_value: Tensor) -> Tensor:
        """The matrix with `of_state x + of_value F` in place of every prediction."""
        n = self.nfe
        system = torch.eye(n, dtype=torch.float64) - self.predictions[:n] * of_state
        given = torch.cat(
            [self.start[:n, None], self.predictions[:n] * of_value, self.draws[:n]], 1
        )
        inputs = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
        last = torch.cat([self.start[n:, None], self.predictions[n:] * of_value, self.draws[n:]], 1)
        return torch.cat([inputs, last + (self.predictions[n:] * of_state) @ inputs])


def _prediction(predicts: str, s: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`(a, b)` with `x0 = a x + b F`."""
    if predicts == "eps":
        if bool((s == 0.0).any()):
            raise ValueError(
                "no x0 follows from eps where no signal is left (s = 0): choose predicts='v'"
            )
        return 1.0 / s, -sigma / s
    if predicts == "flow":
        return 1.0 / (s + sigma), -sigma / (s + sigma)
    r2 = s * s + sigma * sigma
    return s / r2, -sigma / torch.sqrt(r2)


def unroll(
    instructions: Sequence[Instruction],
    result: int,
    grid: Sequence[tuple[float, float, float]],
    finished: bool,
) -> Unrolled:
    """The instructions of a plan, unrolled; `grid` holds `(t, s, sigma)` of its levels."""
    nfe = sum(isinstance(i, Call) for i in instructions)
    width = 1 + nfe + sum(isinstance(i, Draw) for i in instructions)
    basis = torch.eye(width, dtype=torch.float64)
    held: dict[int, Tensor] = {0: basis[0]}
    rows: list[Tensor] = []
    levels: list[tuple[Scalar, Scalar, Scalar]] = []
    drawn = 1 + nfe
    for i in instructions:
        match i:
            case Draw():
                held[i.out] = basis[drawn]
                drawn += 1
            case Combine():
                held[i.out] = _combination(i, held)
            case Call():
                rows.append(held[i.input])
                levels.append((i.t, i.s, i.sigma))
                held[i.out] = basis[len(rows)]
    matrix = torch.stack([*rows, held[result]])
    levels.append((0.0, 1.0, 0.0) if finished else grid[-1])
    t, s, sigma = (as_vector(column) for column in zip(*levels, strict=True))
    return Unrolled(
        matrix[:, 0], matrix[:, 1 : nfe + 1], matrix[:, nfe + 1 :], t, s, sigma, grid[0]
    )


def _combination(i: Combine, held: dict[int, Tensor]) -> Tensor:
    numbers = as_vector([c for _, c in i.terms])
    return (numbers.unsqueeze(1) * torch.stack([held[register] for register, _ in i.terms])).sum(0)


def as_vector(numbers: Sequence[Scalar]) -> Tensor:
    """Numbers as one float64 vector, through which gradients flow to those that require them."""
    if any(isinstance(number, Tensor) for number in numbers):
        return torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in numbers])
    return torch.tensor(numbers, dtype=torch.float64)


@dataclass(frozen=True)
class Difference:
    """How two plans differ as methods, whatever their registers: `Plan.compare`; print it.

    `nfe` and `draws` are those of the one and the other. `weights` is the largest absolute
    difference of the unrolled matrices, the largest entry of which is `scale`; `times`, `levels`
    and `intervals` are those of the calls' times, of their `s` and `sigma`, and of the
    noise-to-signal ratios between which noise is drawn. All are infinite where the plans do not
    have the same numbers of calls and draws. `ends` says whether both end at zero noise, or both do
    not.
    """

    nfe: tuple[int, int]
    draws: tuple[int, int]
    weights: float
    scale: float
    times: float
    levels: float
    intervals: float
    ends: bool

    def close(self, tolerance: float = 1e-12) -> bool:
        """Whether they are one method to rounding; weights are measured against the largest."""
        parts = (self.weights / max(self.scale, 1.0), self.times, self.levels, self.intervals)
        return self.ends and all(part <= tolerance for part in parts)

    def __str__(self) -> str:
        """The differences in words."""
        if self.nfe[0] != self.nfe[1] or self.draws[0] != self.draws[1]:
            a, b = (
                f"{nfe} calls and {draws} draws"
                for nfe, draws in zip(self.nfe, self.draws, strict=True)
            )
            return f"cannot be compared: {a}, against {b}"
        end = "" if self.ends else "; one ends at zero noise and the other does not"
        return (
            f"weights differ by up to {format_magnitude(self.weights)} (the largest is"
            f" {self.scale:.3g}), times by {format_magnitude(self.times)}, levels by"
            f" {format_magnitude(self.levels)}, intervals of noise by"
            f" {format_magnitude(self.intervals)}{end}"
        )


def difference(
    a: Unrolled,
    b: Unrolled,
    drawn: Sequence[Sequence[tuple[float, float]]],
    ends: bool,
) -> Difference:
    """How the unrolled plan `b` differs from `a`; `drawn` are the noise-to-signal ratios of their
    draws.
    """
    nfe, draws = (a.nfe, b.nfe), (a.draws.shape[1], b.draws.shape[1])
    scale = max(float(rows.matrix.detach().abs().max()) for rows in (a, b))
    if a.matrix.shape != b.matrix.shape:
        return Difference(nfe, draws, math.inf, scale, math.inf, math.inf, math.inf, ends)

    def largest(p: Tensor, q: Tensor) -> float:
        gap = torch.where(p == q, 0.0, (p - q).abs())  # infinities are equal to themselves
        return float(gap.detach().max()) if gap.numel() else 0.0

    levels = largest(torch.stack([a.s, a.sigma]), torch.stack([b.s, b.sigma]))
    start = max(abs(p - q) for p, q in zip(a.origin, b.origin, strict=True))
    p, q = (torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2) for pairs in drawn)
    gaps = (
        largest(a.matrix, b.matrix),
        scale,
        largest(a.t, b.t),
        max(levels, start),
        largest(p, q),
    )
    return Difference(nfe, draws, *gaps, ends)


def format_magnitude(number: float) -> str:
    """A number of which the size is of interest."""
    return "0" if number == 0.0 else f"{number:.0e}" if math.isfinite(number) else "-"
