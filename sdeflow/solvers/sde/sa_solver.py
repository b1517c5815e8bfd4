r"""SA-Solver, the stochastic Adams solver, with the paper's parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sdeflow._utils.checks import is_whole
from sdeflow._utils.math import Scalar, value_of
from sdeflow.process import Level, Process
from sdeflow.solvers.ode.multistep import Multistep, Weights, check_p, from_differences
from sdeflow.solvers.ode.weights import adams, has_signal
from sdeflow.solvers.sde.exponential import check_rate, rate_fall, rate_weights


@dataclass(frozen=True)
class SASolver(Multistep):
    r"""SA-Solver: a stochastic Adams-Bashforth step over `p` predictions, corrected by an
    Adams-Moulton one over `c`.

    With `T = 1 + tau^2`, nodes and Lagrange polynomials in `lam`, the newest prediction among the
    corrector's:

        x_next = (sigma_next / sigma) e^{-tau^2 h} x + sum_j b_j D_j
                 + sigma_next sqrt(1 - e^{-2 tau^2 h}) z
        b_j    = s_next T int e^{-T (lam_next - l)} l_j(l) dl  over the step

    - `p`, `c`: predictions that the predictor and the corrector interpolate; `c=0` for no
      corrector.
    - `tau`: how much noise; its square is the rate of `sdeflow.solvers.sde.exponential`. At 0 the
      ODE is solved.
    - `nsr_min`, `nsr_max`: where a step's end must lie for `tau` to hold; elsewhere the step is the
      ODE's. The paper chooses `[0.05, 1]` for EDM's CIFAR-10 networks.
    - `pece`: call the network again at the corrected state, at 2 calls a step.
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
        check_p(self.p, 6, "SA-Solver's predictor")
        if not (is_whole(self.c, 2, 6) or is_whole(self.c, 0, 0)):
            raise ValueError(
                "a corrector interpolates c = 2 or more predictions, up to 6, the new one counted;"
                f" c=0 is none; got c={self.c!r}"
            )
        if self.pece and not self.c:
            raise ValueError(
                f"pece=True calls the network again after the corrector: give it one, such as"
                f" c={self.p + 1}"
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
    def order(self) -> int:  # type: ignore[override]
        """Weak order of convergence, the first steps included."""
        if not self.c:
            return min(self.p, 2)
        return min(self.c, self.p + 1, 2 if self.tau else 3)

    @property
    def again(self) -> bool:  # type: ignore[override]
        """Whether the network is called again at the corrected state."""
        return self.pece

    @property
    def calls_of_step(self) -> int:
        return 2 if self.pece else 1

    @property
    def memory(self) -> int:
        return max(self.p, self.c - 1)

    def corrector_nodes(self, used: int) -> int:
        return self.c

    def rate(self, t_next: Level) -> float:
        """The rate of noise of the step to a level."""
        return self.tau * self.tau if self.nsr_min <= value_of(t_next.nsr) <= self.nsr_max else 0.0

    def delta(self, t: Level, t_next: Level) -> Scalar:
        return rate_fall(t, t_next, self.rate(t_next))

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        rate = self.rate(t_next)
        whole = rate_weights(t, t_next, rate)[1]
        if not has_signal(t, t_next):
            # Only with `pece`: the line through the step's two ends in e^lam, which is zero at one.
            new = whole * (1.0 + rate) / (2.0 + rate)
            return [new, whole - new]
        if not self.few_steps or len(nodes) != 2:
            return adams("x0", "lam", nodes, t, t_next, process, math.sqrt(rate))[1]
        # The line through both, with H/2 for the weight I_1(H) of its slope over the step.
        lams = [node.lam for node in nodes]
        h = t_next.lam - t.lam
        slope = 0.5 * t_next.s * (1.0 + rate) * h * h + whole * (t.lam - lams[0])
        return from_differences(lams, whole, slope)
