r"""SEEDS: exponential Runge-Kutta steps of the reverse SDE, their stages on one exact
Ornstein-Uhlenbeck path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.ode.ddim import STAGES
from sdeflow.solvers.ode.multistep import check_p
from sdeflow.solvers.ode.weights import between, check_ratio, has_signal, moment
from sdeflow.solvers.sde.exponential import RateSolver, check_rate, rate_weights


@dataclass(frozen=True)
class SEEDS(RateSolver):
    r"""SEEDS-1, 2 and 3: stages at fractions `r` of the step in `lam`, with the exact joint law of
    their noises.

    With `H_r = (1 + eta) r h`, the moments `I_k` (`weights.moment`) and
    `P(r) = kept_r x + s_r I_0(H_r) D` the step held by the prediction `D` at `t`:

        SEEDS-1:  x_next = P(1) + q_next
        SEEDS-2:  u = P(r) + q_r,  x_next = P(1) + s_next I_0(H_1) / (2 r) (D_u - D) + q_next
        SEEDS-3:  u = P(1/3) + q_1,  v = P(2/3) + 2 s_v I_1(H_2/3) (D_u - D) + q_2,
                  x_next = P(1) + 3/2 s_next I_1(H_1) (D_v - D) + q_next

    The noises are values of one Ornstein-Uhlenbeck path that starts from zero in every step: from
    one stage to the next `q` is kept as the state is, and a fresh normal of that interval's
    `spread` is added.

    - `p`: 1, 2 or 3 calls a step.
    - `eta`: the rate of noise, as in `SDEDPMSolverPP`; at 0 they are DPM-Solver++ singlestep, of
      order `p`.
    - `r`: the fraction at which SEEDS-2 has its stage, up to 1.
    - `taylor`: SEEDS-2 takes `I_1(H) / r` for `I_0(H) / (2 r)`. With `r=1` that is the exponential
      Heun method.

    Where no signal is left the stages stand at fractions of `e^lam`, in which the prediction is
    then interpolated.

    Cost: `p` calls and `p` draws a step. Weak order: `min(p, 2)`. Strong order: 1.
    Source: Gonzalez et al., "SEEDS" (2023), algorithms 1-3 in the prediction of the data.
    """

    p: int = 3
    eta: float = 1.0
    r: float = 0.5
    taylor: bool = False

    source: ClassVar[str] = "Gonzalez et al. 2023"
    cost: ClassVar[str] = "`p` a step"

    def __post_init__(self) -> None:
        check_p(self.p, 3, "SEEDS")
        check_rate("eta", self.eta)
        check_ratio(self.r)

    @property
    def order(self) -> int:  # type: ignore[override]
        """Weak order of convergence; that of the ODE's method with `eta=0`."""
        return self.p if self.eta == 0.0 else min(self.p, 2)

    @property
    def calls_of_step(self) -> int:
        return self.p

    @property
    def _ratios(self) -> tuple[float, ...]:
        return (self.r,) if self.p == 2 else STAGES[self.p]

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        x0 = reverse(x, t)
        lam = has_signal(t, t_next)
        change, ahead = None, 1.0  # the last stage's prediction less that at t, and where it stands
        q, before = None, t  # the noise so far, and where
        for stage, r in enumerate((*self._ratios, 1.0), 1):
            level = between(reverse, t, t_next, r)
            kept, whole, _ = rate_weights(t, level, self.eta)
            y = kept * x + whole * x0
            if change is not None:
                y = y + (r / ahead * self._slope(t, level, whole, lam)) * change
            if self.eta and before is not level:
                kept, _, spread = rate_weights(before, level, self.eta)
                fresh = spread * noise(before, level)
                q, before = (fresh if q is None else kept * q + fresh), level
            if q is not None:
                y = y + q
            if stage < self.p:
                change, ahead = reverse(y, level) - x0, r
        return y, state

    def _slope(self, t: Level, level: Level, whole: Any, lam: bool) -> Any:
        """The weight of a change of the prediction that grows in proportion to the way from `t` to
        `level`.
        """
        if self.p == 2 and not self.taylor:
            return 0.5 * whole
        if lam:
            return level.s * moment(1, (1.0 + self.eta) * (level.lam - t.lam))
        # In e^lam from or to zero, of which the integrand is a power.
        return (1.0 + self.eta) / (2.0 + self.eta) * whole
