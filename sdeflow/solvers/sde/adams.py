r"""Stochastic exponential Adams: linear multistep methods of the reverse SDE, of which SA-Solver is
the published one.

Over nodes $t_j$ with the predictions $D_j$ and their Lagrange polynomials $\ell_j$ in a clock $u$,
and with $\eta$ the rate of noise, the step of `sdeflow.solvers.sde.exponential` has the weights

$$b_j = s_+\, (1 + \eta) \int_\lambda^{\lambda_+}
e^{-(1 + \eta)(\lambda_+ - l)}\, \ell_j(u(l))\, dl.$$

The nodes up to $t$ make a predictor. A corrector takes the same step again over the next prediction
too, see `sdeflow.solvers.ode.multistep`.

| member of the family | is |
|---|---|
| `StochasticAdams(p, eta=0)` | `ExponentialAdams(p, "x0", start_up="orders")` |
| `StochasticAdams(1, eta)` | `SDEDPMSolverPP(1, eta)`, `SEEDS(1, eta)`; `DDPM` at `eta=1` |
| `StochasticAdams(2, eta)`, `StochasticAdams(3, eta)` | `SDEDPMSolverPP(p, eta, exact_weights=True)` |
| `StochasticAdams(p, eta, clock="nsr")` | `ERSDE(p, phi=1 + eta, exact_weights=True)` |
| `StochasticAdams(p, tau**2, corrector=True)` | `SASolver(p, p + 1, tau, lower_final=False)` |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sdeflow.process import Level, Process
from sdeflow.solvers.ode.multistep import Multistep, Weights, check_p
from sdeflow.solvers.ode.weights import NodeClock, adams
from sdeflow.solvers.sde.exponential import RateSolver, check_rate


@dataclass(frozen=True)
class StochasticAdams(RateSolver, Multistep):
    r"""Stochastic exponential Adams: the last `p` predictions interpolated in any clock, with exact
    weights and any noise.

        x_next = (sigma_next / sigma) e^{-eta h} x + sum_j b_j D_j
                 + sigma_next sqrt(1 - e^{-2 eta h}) z

    with the weights of the module.

    - `p`: predictions that are interpolated, 1 to 6; the first steps have fewer.
    - `eta`: the rate of noise: 0 is the ODE, 1 the reverse SDE.
    - `clock`: the variable of the polynomial: `"lam"`, `"nsr"`, `"angle"` (`atan nsr`), `"flow"`,
      `"bounded_lam"` or `"t"`.
    - `corrector`: take each step again with the next prediction and the same noise, at no cost
      (PEC).

    Cost: 1 call a step. Weak order: `min(p, 2)`, with the corrector 2; with `eta=0` the corrector
    brings `min(p + 1, 3)`. Strong order: 1. Source: Xue et al., "SA-Solver" (2023), propositions
    4.2 and 5.1; Hochbruck & Ostermann (2010).
    """

    p: int = 2
    eta: float = 1.0
    clock: NodeClock = "lam"
    corrector: bool = False

    source: ClassVar[str] = "Xue et al. 2023; Hochbruck & Ostermann 2010"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_p(self.p, 6, "stochastic Adams")
        check_rate("eta", self.eta)

    @property
    def order(self) -> int:  # type: ignore[override]
        """Weak order of convergence, the first steps included."""
        return min(self.p + 1, 2 if self.eta else 3) if self.corrector else min(self.p, 2)

    def corrector_nodes(self, used: int) -> int:
        return used + 1 if self.corrector else 0

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        return adams("x0", self.clock, nodes, t, t_next, process, math.sqrt(self.eta))[1]
