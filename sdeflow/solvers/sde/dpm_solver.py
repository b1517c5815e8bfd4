r"""SDE-DPM-Solver++: the reverse SDE's exponential integrators of k-diffusion and diffusers,
multistep and singlestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sdeflow._utils import math as _math
from sdeflow._utils.renamed import renamed
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.ode.dpm_solver import taylor_weights
from sdeflow.solvers.ode.multistep import Multistep, Weights, check_p
from sdeflow.solvers.ode.weights import between, check_ratio, has_signal
from sdeflow.solvers.sde.exponential import RateSolver, check_rate, ratio_weights


@renamed({"exact": "exact_weights"})
@dataclass(frozen=True)
class SDEDPMSolverPP(RateSolver, Multistep):
    r"""SDE-DPM-Solver++ multistep: the prediction is a polynomial in `lam` through the last `p`,
    noise is added at the rate `eta`.

    With `H = (1 + eta) h`, the moments `I_k(H)` (`weights.moment`) and the slopes `a` and `b` of
    the last two intervals, in units of the step (`a = (D - D_1) / r0`, `b = (D_1 - D_2) / r1`):

        x_next = (sigma_next / sigma) e^{-eta h} x + s_next (I_0 D + correction)
                 + sigma_next sqrt(1 - e^{-2 eta h}) z

        p   as published                     exact_weights=True, the polynomial's own integral
        1   0                                0
        2   (I_0 / 2) a      (midpoint)      I_1 a                               (heun)
        3   I_1 c1 + (I_2 / 2) c2            I_1 c1 + I_2 c2

        with c2 = (a - b) / (r0 + r1) and c1 = a + r0 c2

    - `p`: predictions that are interpolated, 1, 2 or 3; the first steps have fewer.
    - `eta`: the rate of noise: 0 is DPM-Solver++, 1 the reverse SDE. It is k-diffusion's `eta`, and
      `tau^2` of SA-Solver; DDIM's `eta` is another number, except at 0 and at 1
      (`sdeflow.solvers.sde.exponential`).
    - `exact_weights`: integrate the polynomial exactly; that is `StochasticAdams(p, eta)`.

    The published `p=3` takes half of the second derivative's term, and is of order 2 with `eta=0`
    too. With few steps of the SDE the midpoint form of `p=2` is by far the best of them.

    Cost: 1 call a step. Weak order: `min(p, 2)`. Strong order: 1. Source: Lu et al., "DPM-Solver++"
    (2022), section 5; `p=3` and `eta`: Crowson, k-diffusion (2022).
    """

    p: int = 2
    eta: float = 1.0
    exact_weights: bool = False

    source: ClassVar[str] = "Lu et al. 2022; Crowson 2022"

    def __post_init__(self) -> None:
        check_p(self.p, 3, "SDE-DPM-Solver++")
        check_rate("eta", self.eta)

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        midpoint = self.p == 2 and not self.exact_weights
        kappa = 1.0 if self.exact_weights else 0.5
        return taylor_weights("x0", nodes, t_next, midpoint, kappa, self.eta)


@dataclass(frozen=True)
class SDEDPMSolverPPSingle(RateSolver):
    r"""SDE-DPM-Solver++ singlestep (k-diffusion's `dpmpp_sde`): one stage at the fraction `r` of
    the step in `lam`.

    With `kept`, `whole` and `spread` those of an ancestral step of DDIM's `eta`, to the stage and
    over the step:

        u      = kept_u x + whole_u D + spread_u z_u
        x_next = kept x + whole ((1 - 1/(2r)) D + 1/(2r) D_u) + spread z

    Both noises belong to one Brownian path: with `z_v` that of the rest of the step, in the clock
    nsr^2 of the reverse SDE,
    `z = (sqrt(nsr^2 - nsr_u^2) z_u + sqrt(nsr_u^2 - nsr_next^2) z_v) / sqrt(nsr^2 - nsr_next^2)`.
    With a `z` of its own the method would be of weak order 1. k-diffusion's tree has the clock nsr;
    at `eta=1` on Gaussian data its variance converges at order 2, the one here at 3. `SEEDS(2)` is
    the same with the exact joint law of the two.

    `eta` is the ratio of standard deviations, DDIM's, from 0 to 1, not the rate of the multistep
    methods.

    Cost: 2 calls and 2 draws a step. Weak order: 2. Strong order: 1. Source: Crowson, k-diffusion
    (2022), after Lu et al. (2022).
    """

    eta: float = 1.0
    r: float = 0.5

    order: ClassVar[int] = 2
    source: ClassVar[str] = "Crowson 2022"
    cost: ClassVar[str] = "2 a step"
    calls_per_step: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_rate("DDIM's eta", self.eta, most=1.0)
        check_ratio(self.r)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        x0 = reverse(x, t)
        level = between(reverse, t, t_next, self.r)
        kept, whole, spread = ratio_weights(t, level, self.eta)
        u = kept * x + whole * x0
        z = noise(t, level) if self.eta else None
        if z is not None:
            u = u + spread * z
        ahead = 0.5 / self.r
        kept, whole, spread = ratio_weights(t, t_next, self.eta)
        x_next = kept * x + (whole * (1.0 - ahead)) * x0 + (whole * ahead) * reverse(u, level)
        if z is None:
            return x_next, state
        first, second = self._shares(t, level, t_next)
        x_next = x_next + (spread * first) * z
        return x_next + (spread * second) * noise(level, t_next) if second else x_next, state

    def _shares(self, t: Level, level: Level, t_next: Level) -> tuple[Any, Any]:
        """The weights of the two increments in the noise of the whole step; their squares sum to
        1.
        """
        if self.r == 1.0 or not has_signal(t):
            return 1.0, 0.0
        whole = (t.nsr - t_next.nsr) * (t.nsr + t_next.nsr)
        first = (t.nsr - level.nsr) * (t.nsr + level.nsr) / whole
        second = (level.nsr - t_next.nsr) * (level.nsr + t_next.nsr) / whole
        return _math.sqrt(first), _math.sqrt(second)
