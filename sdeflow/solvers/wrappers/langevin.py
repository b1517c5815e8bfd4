"""Solvers that hold a solver: the Langevin corrector makes a predictor-corrector sampler of any
other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.sde.classic import EulerMaruyama, langevin_move
from sdeflow.solvers.wrappers.base import Nested


@dataclass(frozen=True)
class Langevin(Nested):
    r"""Predictor-corrector: `steps` Langevin moves at each level, then a step of `solver`.

    A move is `x += e score + sqrt(2 e) z` with `e = 2 (snr sigma)^2`. The paper takes
    `e = 2 (snr |z| / |score|)^2`, with norms averaged over the batch. Here `sigma`, its
    expectation, stands for `|z| / |score|`: the step is linear, and no sample depends on its batch.
    The moves leave each level's distribution in place up to a bias. The bias falls with `snr` and
    not with the grid, so that the order is 0.

    Cost: `steps` more calls a step. Order: 0. Source: Song et al. (2021), algorithms 2-5;
    `snr=0.16` is their choice for CIFAR-10.
    """

    solver: GridSolver = field(default_factory=EulerMaruyama)
    steps: int = 1
    snr: float = 0.16

    order: ClassVar[int] = 0
    source: ClassVar[str] = "Song et al. 2021, alg. 2-5"
    cost: ClassVar[str] = "that of `solver` + `steps` a step"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0.0 < self.snr < 1.0:
            raise ValueError(
                f"Langevin needs steps >= 1 and 0 < snr < 1; got steps={self.steps}, snr={self.snr}"
            )

    def calls(self, levels: int, *, finish: bool = True) -> int:
        return self.solver.calls(levels, finish=finish) + self.steps * (levels - 1)

    def start(self, steps: int) -> Any:
        return self.solver.start(steps)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        for _ in range(self.steps):
            x = langevin_move(reverse, x, t, 2.0 * (self.snr * t.sigma) ** 2, noise)
        return self.solver.step(reverse, x, t, t_next, noise, state)

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        return self.solver.finish(reverse, x, t, noise, state)
