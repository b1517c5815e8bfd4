r"""SA-Solver, the stochastic Adams solver, with the paper's parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sdeflow._utils.math import Scalar, value_of
from sdeflow.process import Level, Process
from sdeflow.solvers.ode.weights import adams
from sdeflow.solvers.sde.adams import StochasticMultistep, check_count
from sdeflow.solvers.sde.exponential import check_rate, rate_weights


@dataclass(frozen=True)
class SASolver(StochasticMultistep):
    r"""SA-Solver: a stochastic Adams-Bashforth step over `p` predictions, corrected by an
    Adams-Moulton one over `c`.

    With `T = 1 + tau^2`, nodes and Lagrange polynomials in `lam`, the newest prediction among the
    corrector's:

        x_next = (sigma_next / sigma) e^{-tau^2 h} x + sum_j b_j D_j + sigma_next sqrt(1 - e^{-2 tau^2 h}) z
        b_j    = s_next T int e^{-T (lam_next - l)} l_j(l) dl  over the step

    - `p`, `c`: predictions that the predictor and the corrector interpolate; `c=0` for no
      corrector.
    - `tau`: how much noise; its square is the rate of `sdeflow.solvers.sde.exponential`. At 0 the
      ODE is solved.
    - `nsr_min`, `nsr_max`: where a step's end must lie for `tau` to hold; elsewhere the step is the
      ODE's. The paper chooses `[0.05, 1]` for EDM's CIFAR-10 networks.
    - `pece`: ask the network anew at the corrected state, at 2 calls a step.
    - `few_steps`: where two predictions are interpolated, take `T h / 2` for `I_1(T h)` (appendix
      D, after UniPC's `B(h) = h`).
    - `lower_final`: the last steps interpolate fewer predictions, `min(p, steps left + 1)`.

    The paper's last step has no noise and no corrector; here that is the step to zero noise.

    Cost: 1 call a step, with `pece` 2. Weak order: `min(p, 2)`, with a corrector 2; with `tau=0` up
    to 3. Strong order: 1. Source: Xue et al., "SA-Solver" (2023), equations 14 and 17, algorithm 1.
    """

    p: int = 3
    c: int = 4
    tau: float = 1.0
    nsr_min: float = 0.0
    nsr_max: float = math.inf
    pece: bool = False
    few_steps: bool = False
    lower_final: bool = True

    source: ClassVar[str] = "Xue et al. 2023"
    cost: ClassVar[str] = "1 a step (2 with `pece`)"

    def __post_init__(self) -> None:
        check_count("p", self.p, 1, "predictions are interpolated")
        check_count(
            "c",
            self.c,
            0,
            "predictions are interpolated by the corrector, the new one counted; 0 is none",
        )
        if self.c == 1:
            raise ValueError(
                "a corrector interpolates c = 2 or more predictions, the new one counted; c=0 is"
                " none; got c=1"
            )
        if self.pece and not self.c:
            raise ValueError(
                f"pece=True asks anew after the corrector: give it one, such as c={self.p + 1}"
            )
        check_rate("tau", self.tau)
        if not 0.0 <= self.nsr_min < self.nsr_max:
            raise ValueError(
                "tau holds where nsr_min <= nsr <= nsr_max, with 0 <= nsr_min < nsr_max; "
                f"got nsr_min={self.nsr_min!r}, nsr_max={self.nsr_max!r}"
            )

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.tau > 0.0

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        """Whether it also encodes."""
        return self.tau == 0.0

    @property
    def order(self) -> int:  # type: ignore[override]
        """Weak order of convergence, the first steps included."""
        if not self.c:
            return min(self.p, 2)
        return min(self.c, self.p + 1, 2 if self.tau else 3)

    @property
    def again(self) -> bool:  # type: ignore[override]
        """Whether the network is asked anew at the corrected state."""
        return self.pece

    @property
    def calls_of_step(self) -> int:
        return 2 if self.pece else 1

    def nodes(self, left: int) -> tuple[int, int]:
        return min(self.p, left + 1) if self.lower_final else self.p, self.c

    def rate(self, t_next: Level) -> float:
        return self.tau * self.tau if self.nsr_min <= value_of(t_next.nsr) <= self.nsr_max else 0.0

    def weights(
        self, process: Process, levels: Sequence[Level], t: Level, t_next: Level, rate: float
    ) -> Sequence[Scalar]:
        if not self.few_steps or len(levels) > 2:
            return adams("x0", "lam", levels, t, t_next, process, math.sqrt(rate))[1]
        # The line through both, with H/2 for the weight I_1(H) of its slope over the step.
        h = t_next.lam - t.lam
        whole = rate_weights(t, t_next, rate)[1]
        first = 0.5 * t_next.s * (1.0 + rate) * h
        new, old = levels
        of_old = (whole * (t.lam - new.lam) + first * h) / (old.lam - new.lam)
        return [whole - of_old, of_old]
