r"""Checks of a plan from its numbers alone: is it consistent, and which polynomials do its steps
reproduce?

**Consistency.** On data of a single point every prediction is exact, and each call's input should
hold `s` of the point and `sigma` of noise. On Gaussian data the prediction is known too, and with
it the variance at every call. Its error there is the error of the steps themselves.

**Order.** The ODE is $d(x/\rho) = F\,dq$ for a function $F$ of the prediction
(`sdeflow.solvers.ode.weights` has the table of them). A step from one call to another is
$x_+ = \frac{\rho_+}{\rho}x + \sum_j b_j F_j$. It is of order $p$ only if it is right wherever $F$
is a polynomial of degree less than $p$ in some clock $c$:

$$\sum_j b_j\, u_j^m = \rho_+ \int_q^{q_+} u^m\,dq,
\qquad u = \frac{c - c_0}{c_+ - c_0}, \qquad m = 0, \dots, p - 1.$$

For multistep methods these conditions suffice. A step that the next prediction corrects is measured
as predicted, since that is the state that the call sees. A Runge-Kutta step also needs good enough
stages. A published method may meet a condition only up to terms of higher order; that shows as a
defect (`PlanReport.defects`). Where a plan draws noise, the condition is on the mean of the reverse
SDE. The rate of noise is read from the share of the state that a step keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow._utils import math as _math
from sdeflow.errors import unknown
from sdeflow.plan.unroll import PREDICTS, Unrolled, format_magnitude
from sdeflow.process import Level, Process
from sdeflow.process.clock import Clock

DEGREES = 6  # polynomials of degree 0 to 5
WINDOW = 12  # rows back to which a step may reach
WHAT = {"velocity": "dx/dt", "slope": "d(x/s)/dlam"}
CHECK_PREDICTS = (*PREDICTS, "slope", "velocity")
CHECK_CLOCKS = ("lam", "nsr", "angle", "t")


@dataclass(frozen=True, eq=False)
class PlanReport:
    """What `Plan.check` found; print it. A row a network call, and the last one for the result.

    - `signal`: the error of the share of `x0`, on data of one point.
    - `noise`: the relative error of the noise's standard deviation there.
    - `gaussian`: the relative error of the standard deviation on data `N(0, std^2)`.
    - `degrees`: the degree up to which polynomials of `predicts` in `clock` are reproduced by the
      step that leads to the row; -1 where not even constants are, None where no step leads there
      (the first call, several at one level, no signal).
    - `defects`: `[rows, 6]`, the relative error on the monomials; NaN where there is no step. A
      method that holds its last prediction is wrong by 1 on all but the constant.
    - `stages`: which rows are stages within a step.
    - `ties`: other pairs of function and clock that are reproduced as well.
    """

    title: str
    t: Tensor
    nsr: Tensor
    signal: Tensor
    noise: Tensor
    gaussian: Tensor
    std: float
    predicts: str
    clock: str
    degrees: tuple[int | None, ...]
    defects: Tensor
    stages: tuple[bool, ...]
    ties: tuple[tuple[str, str], ...]

    @property
    def consistent(self) -> bool:
        """Whether a point comes out exactly, and its share is right in every call's input."""
        return bool((self.signal.abs() < 1e-9).all())

    @property
    def exact_noise(self) -> bool:
        """Whether the noise on a point is exact in every call's input."""
        return bool((self.noise.abs() < 1e-9).all())

    @property
    def steps(self) -> tuple[int, ...]:
        """The degrees of the steps from level to level, without the stages within them."""
        return _steps(self.degrees, self.stages)

    @property
    def degree(self) -> int | None:
        """The degree that most steps reproduce; None for a plan of no step."""
        steps = sorted(self.steps)
        return max(steps, key=lambda d: (steps.count(d), d)) if steps else None

    @property
    def starts_with(self) -> int:
        """Steps at the start that reproduce less than most do."""
        degree = self.degree
        return next(
            (n for n, d in enumerate(self.steps) if degree is not None and d >= degree),
            len(self.steps),
        )

    @property
    def function(self) -> str:
        """The function that is reproduced and its clock, in words."""
        return f"{WHAT.get(self.predicts, self.predicts)} in {self.clock}"

    def __str__(self) -> str:
        """The findings in words, and the numbers as a table."""
        lines = [
            self.title,
            *self._words(),
            "",
            f"{'call':>4}  {'t':>10}  {'nsr':>10}  {'signal':>8}  {'noise':>8}  ",
        ]
        lines[-1] += f"{f'N(0,{self.std:g}²)':>9}  {'degree':<8}  next"
        for k, degree in enumerate(self.degrees):
            name = "end" if k == len(self.degrees) - 1 else str(k)
            shown = "" if degree is None else "none" if degree < 0 else str(degree)
            after = (
                ""
                if degree is None or degree + 1 >= DEGREES
                else format_magnitude(float(self.defects[k, degree + 1]))
            )
            what = f"{shown + ' stage' * bool(self.stages[k] and shown):<10}{after}"
            numbers = "  ".join(
                f"{format_magnitude(float(c[k])):>8}" for c in (self.signal, self.noise)
            )
            row = f"{name:>4}  {float(self.t[k]):>10.5g}  {float(self.nsr[k]):>10.5g}  {numbers}  "
            lines.append((row + f"{format_magnitude(float(self.gaussian[k])):>9}  {what}").rstrip())
        return "\n".join(lines)

    def _words(self) -> list[str]:
        signal, noise = (
            format_magnitude(float(column.abs().max())) for column in (self.signal, self.noise)
        )
        point = "exact in every call" if self.consistent else f"its share is off by up to {signal}"
        spread = "exact" if self.exact_noise else f"off by up to {noise}"
        off, end = (
            format_magnitude(float(number))
            for number in (self.gaussian.abs().max(), self.gaussian[-1].abs())
        )
        lines = [
            f"a point     {point}; its noise is {spread}",
            f"a Gaussian  of std {self.std:g}: std off by up to {off}, at the end by {end}",
        ]
        degree = self.degree
        if degree is None:
            return [*lines, "order       no step to measure"]
        nearly = _nearly(self.defects, self.stages)
        if degree < 0:
            text = (
                f"most steps do not reproduce even a constant; of {self.function} they are off by"
                f" {nearly:.1%}"
            )
            return [*lines, f"order       {text} in the median"]
        ties = f" (and {len(self.ties)} other pairs of function and clock)" if self.ties else ""
        start = f", after {self.starts_with} of less at the start" if self.starts_with else ""
        lines.append(f"order       degree {degree} of {self.function} in most steps{start}{ties}")
        if nearly < 0.3:
            text = f"and nearly of the next degree: off by {nearly:.1%} in the median"
            lines.append(f"            {text}")
        return lines


def check(
    rows: Unrolled,
    title: str,
    times: set[float],
    process: Process | None = None,
    predicts: str | None = None,
    clock: str | None = None,
    std: float = 0.5,
) -> PlanReport:
    """The report on an unrolled plan, whose grid has `times`; see `Plan.check`."""
    for kind, value, known in (
        ("predicts", predicts, CHECK_PREDICTS),
        ("clock", clock, CHECK_CLOCKS),
    ):
        if value is not None and value not in known:
            raise unknown(kind, value, known)
    if process is None and "t" in (clock, _own_clock(predicts)):
        raise ValueError(
            "what a plan reproduces in its time t depends on the process between its calls: pass"
            " process="
        )
    if not std > 0.0:
        raise ValueError(
            "std is the standard deviation of Gaussian data, above 0; a point is checked anyway;"
            f" got {std}"
        )
    found: list[tuple[str, str, Tensor]] = []
    nodes = _Nodes(rows, process)
    for f in CHECK_PREDICTS if predicts is None else (predicts,):
        if f == "velocity" and process is None:
            continue
        own = _own_clock(f)
        for c in CHECK_CLOCKS if clock is None else (clock,):
            if (own is not None and c != own) or (c == "t" and process is None):
                continue
            found.append((f, c, nodes.defects(f, c)))
    if not found:
        raise ValueError(
            f"predicts={predicts!r} is checked in the clock {_own_clock(predicts)} alone; got"
            f" {clock}"
        )
    stages = _stages(rows, times)
    scored = [(f, c, d, _score(d, stages)) for f, c, d in found]
    f, c, defects, best = max(scored, key=lambda entry: entry[3])  # the first of equals
    ties = tuple((a, b) for a, b, _, score in scored if score == best and (a, b) != (f, c))
    finite = rows.sigma > 0.0
    law = torch.sqrt((rows.s * std) ** 2 + rows.sigma**2)
    spread = rows.spread()
    return PlanReport(
        title=title,
        t=rows.t,
        nsr=rows.nsr,
        signal=(rows.signal - rows.s).detach(),
        noise=torch.where(finite, spread / rows.sigma - 1.0, spread).detach(),
        gaussian=(rows.spread(std) / law - 1.0).detach(),
        std=std,
        predicts=f,
        clock=c,
        degrees=_degrees(defects),
        defects=defects,
        stages=stages,
        ties=ties,
    )


def _own_clock(predicts: str | None) -> str | None:
    """The one clock in which a function is the right-hand side of the ODE."""
    return {"velocity": "t", "slope": "lam"}.get(predicts or "")


def _stages(rows: Unrolled, times: set[float]) -> tuple[bool, ...]:
    """Whether each row is a stage: off the grid's levels, or followed by another at its own
    level.
    """
    t = rows.t.tolist()
    on = [time in times for time in t[:-1]]
    if not any(on[1:]):  # a plan that leaves its grid, as churn does
        return (False,) * len(t)
    return (
        *(not here or time == after for here, time, after in zip(on, t[:-1], t[1:], strict=True)),
        False,
    )


def _steps(degrees: Sequence[int | None], stages: Sequence[bool]) -> tuple[int, ...]:
    """The degrees of the rows that steps lead to, without the stages within them."""
    rows = zip(degrees, stages, strict=True)
    return tuple(degree for degree, stage in rows if degree is not None and not stage)


def _score(defects: Tensor, stages: tuple[bool, ...]) -> tuple[int, float]:
    """How much a pair explains: first what is reproduced, then how nearly the next degree is."""
    total = sum(d + 1 for d in _steps(_degrees(defects), stages))
    return total, -round(_nearly(defects, stages), 3)


def _nearly(defects: Tensor, stages: tuple[bool, ...]) -> float:
    """The median relative error on the first monomial that is not reproduced; 1 at most."""
    steps = zip(defects.tolist(), _degrees(defects), stages, strict=True)
    errors = sorted(
        min(row[d + 1], 1.0)
        for row, d, stage in steps
        if d is not None and not stage and d + 1 < DEGREES
    )
    return errors[len(errors) // 2] if errors else 1.0


def _degrees(defects: Tensor) -> tuple[int | None, ...]:
    steps = ~defects[:, 0].isnan()
    return tuple(
        n - 1 if step else None
        for n, step in zip(_reproduced(defects), steps.tolist(), strict=True)
    )


class _Nodes:
    """The rows of a plan, the start in front of them, and the pairs of rows between which a step
    may lead.
    """

    def __init__(self, rows: Unrolled, process: Process | None):
        self.process = process
        self.rows = rows.detach()
        first = torch.tensor(rows.origin, dtype=torch.float64)
        self.t, self.s, self.sigma = (
            torch.cat([first[k : k + 1], column])
            for k, column in enumerate((self.rows.t, self.rows.s, self.rows.sigma))
        )
        self.lam = self.s.log() - self.sigma.log()
        # A step from where no signal is left is measured in the angle; what a stochastic one keeps
        # says nothing there.
        usable = self.sigma > 0.0 if not rows.draws.shape[1] else torch.isfinite(self.lam)
        count = len(self.t)
        pairs = [
            (i, k)
            for k in range(1, count)
            for i in range(max(0, k - WINDOW), k)
            if usable[i] and usable[k] and self.lam[i] != self.lam[k]
        ]
        self.i, self.k = (
            torch.tensor([pair[n] for pair in pairs], dtype=torch.long) for n in (0, 1)
        )

    def defects(self, predicts: str, clock: str) -> Tensor:
        """`[rows, DEGREES]`, of the best step to each row: relative errors on `u^m`, NaN where
        there is no step.
        """
        count = len(self.t) - 1
        none = torch.full((count, DEGREES), torch.nan, dtype=torch.float64)
        n = self.rows.nfe
        if not len(self.i) or (
            predicts in ("eps", "slope") and bool((self.rows.s[:n] == 0.0).any())
        ):
            return none
        start, weights = self._table(predicts)
        i, k = self.i, self.k
        rho, density = self._scale(predicts)
        points, gauss = _math.gauss_legendre(64)
        span = self.t if predicts == "velocity" else self.lam
        at = span[i, None] + points * (span[k] - span[i])[:, None]
        mass = gauss * (span[k] - span[i])[:, None] * density(at)
        if predicts != "velocity" and not bool(torch.isfinite(span).all()):
            theta = torch.atan2(self.sigma, self.s)
            between = theta[i, None] + points * (theta[k] - theta[i])[:, None]
            ends = ~(torch.isfinite(span[i]) & torch.isfinite(span[k]))[:, None]
            at = torch.where(ends, -torch.log(torch.tan(between)), at)
            turn = -(theta[k] - theta[i])[:, None] / (torch.sin(between) * torch.cos(between))
            mass = torch.where(ends, gauss * turn * density(at), mass)
        kept = rho[k] / rho[i]
        linear = (start[k] - kept * start[i]).abs() / (
            start[k].abs() + (kept * start[i]).abs() + 1e-300
        )
        if (
            self.rows.draws.shape[1] and predicts == "x0"
        ):  # the rate of noise is read from what a step keeps
            kept = start[k] / start[i]
            length = -torch.log(kept * self.s[i] / self.s[k])
            rate = length / (self.lam[k] - self.lam[i])
            left = (self.lam[k, None] - at) * rate[:, None]
            mass = gauss * length[:, None] * torch.exp(-left) * self.s[k, None]
            linear = torch.where(
                torch.isfinite(length) & (length * (self.lam[k] - self.lam[i]) > 0), 0.0, torch.inf
            )
        else:
            mass = mass * rho[k, None]
        b = weights[k] - kept[:, None] * weights[i]
        size = weights[k].abs() + kept[:, None].abs() * weights[i].abs()
        b = torch.where(b.abs() > 1e-12 * size.amax(1, keepdim=True), b, 0.0)
        reader = Clock(clock)
        c = reader.reading(Level(self.t, self.s, self.sigma, math.nan, math.nan))
        scale = c[k] - c[i]
        u_nodes = (c[1 : n + 1] - c[i, None]) / scale[:, None]
        u_nodes = torch.where(b != 0.0, u_nodes, 0.0)
        at_points = at if predicts == "velocity" else reader.of_lam(at, self.process)
        u_points = (at_points - c[i, None]) / scale[:, None]
        errors = []
        for m in range(DEGREES):  # on u^m
            exact, rounding = mass.sum(1), 1e-13 * size.sum(1)
            error = ((b.sum(1) - exact).abs() - rounding).clamp(min=0.0) / exact.abs()
            errors.append(error + torch.where(linear < 1e-9, 0.0, linear))
            if m + 1 < DEGREES:
                mass, b, size = mass * u_points, b * u_nodes, size * u_nodes.abs()
        table = torch.stack(errors, 1)
        table = torch.where(table.isfinite(), table, torch.inf)
        best: dict[int, tuple[int, int]] = {}
        for pair, (row, right) in enumerate(zip((k - 1).tolist(), _reproduced(table), strict=True)):
            best[row] = max(
                best.get(row, (0, 0)), (right, pair)
            )  # of equals the nearest, which comes last
        for row, (_, pair) in best.items():
            none[row] = table[pair]
        return none

    def _table(self, predicts: str) -> tuple[Tensor, Tensor]:
        """The weights of the start and of the predictions as a function of them, the row of the
        start first.
        """
        n = self.rows.nfe
        s, sigma = self.rows.s[:n], self.rows.sigma[:n]
        if predicts == "slope":  # -nsr eps = x0 - x / s
            turned = self.rows.with_predictions(1.0 / s, torch.ones_like(s), predicts)
        elif predicts == "velocity":  # s' x0 + sigma' eps
            assert self.process is not None
            ds, dsigma = self.process.ds(self.rows.t[:n]), self.process.dsigma(self.rows.t[:n])
            turn = s * dsigma - ds * sigma
            turned = self.rows.with_predictions(dsigma / turn, -sigma / turn, predicts)
        else:
            turned = self.rows.predicting(predicts)
        start = torch.cat([torch.ones(1, dtype=torch.float64), turned.start])
        return start, torch.cat([torch.zeros(1, n, dtype=torch.float64), turned.predictions])

    def _scale(self, predicts: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """`rho` of each row, and `dq/dlam` along a step (`dq/dt` for the velocity)."""
        s, sigma = self.s, self.sigma
        if predicts == "x0":
            return sigma, torch.exp
        if predicts == "eps":
            return s, lambda lam: -torch.exp(-lam)
        if predicts == "v":
            return torch.sqrt(s * s + sigma * sigma), lambda lam: -0.5 / torch.cosh(lam)
        if predicts == "flow":
            return s + sigma, lambda lam: -0.25 / torch.cosh(0.5 * lam) ** 2
        return (s if predicts == "slope" else torch.ones_like(s)), torch.ones_like


def _reproduced(defects: Tensor) -> list[int]:
    """How many monomials, from 1 up, are reproduced in each row."""
    return (defects < 1e-8).long().cumprod(1).sum(1).tolist()
