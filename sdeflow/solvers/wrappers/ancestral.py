"""Ancestral sampling with any solver of the ODE: each step goes below the next level, and noise
brings it back up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from sdeflow._utils import math as _math
from sdeflow._utils.math import value_of
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import DDIM, ancestral_shares, from_pure_noise
from sdeflow.solvers.ode.weights import has_signal
from sdeflow.solvers.wrappers.base import Stepwise


@dataclass(frozen=True)
class Ancestral(Stepwise):
    r"""Ancestral sampling around any solver of the ODE: step down past the next level, then add
    noise up to it.

        nsr_down = nsr_next sqrt(1 - eta^2 (1 - nsr_next^2 / nsr^2))
        nsr_up^2 = nsr_next^2 - nsr_down^2
        x_next = s_next / s_down (step of `solver` from nsr to nsr_down) + s_next s_noise nsr_up z

    Around `DDIM()` (Euler's method in the clock nsr) this is `DDIM(eta)`, and `DDPM` at `eta=1`.
    The noise is that of the step's interval, so that `noise="brownian"` couples step counts. Each
    step is a solve of its own, so that a multistep method takes only first steps. From a level
    without signal the steps are those of `DDIM(eta)`, as many as the solver makes calls. With
    `eta=0` the solver is `solver`, bit for bit.

    Cost: that of `solver`. Weak order: that of `solver`, where it needs no past; 0 unless
    `s_noise=1`. Source: Song, Meng & Ermon, "DDIM" (2020), equation 16; Ho et al. (2020), algorithm
    2; with other solvers first in Crowson's k-diffusion (2022).
    """

    solver: GridSolver = field(default_factory=DDIM)
    eta: float = 1.0
    s_noise: float = 1.0

    source: ClassVar[str] = "Song, Meng & Ermon 2020; Crowson 2022"
    cost: ClassVar[str] = "that of `solver`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.eta <= 1.0 and 0.0 <= self.s_noise < 2.0):
            raise ValueError(
                "Ancestral needs 0 <= eta <= 1 (the ODE, the reverse SDE) and 0 <= s_noise < 2;"
                f" got eta={self.eta}, s_noise={self.s_noise}"
            )
        if self.solver.stochastic:
            raise ValueError(
                f"Ancestral adds the noise to a solver of the ODE, such as Heun(); {self.solver}"
                " draws its own"
            )

    @property
    def active(self) -> bool:
        return self.eta > 0.0

    def one(self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any) -> Any:
        if not has_signal(t):
            calls = self.one_step_calls
            return from_pure_noise(reverse, x, t, t_next, calls, self._scaled(noise), self.eta)
        share, spread = ancestral_shares(t, t_next, self.eta)
        up = t_next.sigma * spread
        down = reverse.level_of_lam(t_next.lam - _math.log(share))
        if abs(value_of(down.lam) - value_of(t_next.lam) + math.log(value_of(share))) > 1e-9:
            down, up = self._beyond(reverse.process, down, t_next, share, up)
        x = (t_next.s / down.s) * self.one_step(reverse, x, t, down, noise)
        return x + up * self._scaled(noise)(t, t_next) if self.s_noise and value_of(up) else x

    def _beyond(
        self, process: Process, end: Level, t_next: Level, share: Any, up: Any
    ) -> tuple[Level, Any]:
        """`(down, up)` where the process ends, at `end`, before so little noise is reached."""
        clock = getattr(self.solver, "clock", "lam") or process.default_clock
        if (
            clock != "t"
        ):  # the solver reads s and sigma alone: the path goes on, with as much signal
            return replace(end, sigma=share * t_next.nsr * end.s), up
        ratio = end.nsr / t_next.nsr
        if value_of(ratio) >= 1.0:
            return t_next, 0.0
        return end, t_next.sigma * _math.sqrt((1.0 - ratio) * (1.0 + ratio))

    def _scaled(self, noise: Any) -> Any:
        return noise if self.s_noise == 1.0 else lambda *levels: self.s_noise * noise(*levels)
