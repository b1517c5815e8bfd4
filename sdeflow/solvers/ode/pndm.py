r"""PNDM, PLMS and iPNDM: Adams-Bashforth's constant weights on eps, carried by DDIM's step.

DDIM takes a state along a given eps,
$x_+ = \frac{s_+}{s} x + (\sigma_+ - \frac{s_+}{s}\sigma)\,\varepsilon$. These methods put a mean of
several eps there:

| `p` | mean of the last `p` |
|---|---|
| 1 | $\varepsilon_0$ |
| 2 | $(3\varepsilon_0 - \varepsilon_1)/2$ |
| 3 | $(23\varepsilon_0 - 16\varepsilon_1 + 5\varepsilon_2)/12$ |
| 4 | $(55\varepsilon_0 - 59\varepsilon_1 + 37\varepsilon_2 - 9\varepsilon_3)/24$ |

Only where the levels are equally spaced in nsr are these the exact weights (then PNDM is
Adams-Bashforth). On other grids whose steps change smoothly the methods are of order 2, whatever
`p`; where steps jump they are of order 1. With few steps the constant weights extrapolate less than
the exact ones, which often helps. `LMS` has the exact weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from sdeflow._utils.math import Scalar
from sdeflow._utils.renamed import renamed
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.ode.deis import EpsMultistep
from sdeflow.solvers.ode.multistep import Weights
from sdeflow.solvers.ode.weights import has_signal, predicted

ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""The weights of the last 1, 2, 3 and 4 slopes where steps are equal, newest first."""


def carried(x: Any, value: Any, t: Level, t_next: Level, predicts: str = "eps") -> Any:
    """DDIM's step along a given `eps`; with `predicts="x0"` along a given `x0`, which is the same
    and needs no signal at `t`.
    """
    if predicts == "x0":
        ratio = t_next.sigma / t.sigma
        return ratio * x + (t_next.s - t.s * ratio) * value
    ratio = t_next.s / t.s
    return ratio * x + (t_next.sigma - t.sigma * ratio) * value


@dataclass(frozen=True)
class IPNDM(EpsMultistep):
    r"""iPNDM: `x_next = (s_next / s) x + s_next (nsr_next - nsr) sum_j c_j eps_j` with
    Adams-Bashforth's constant weights.

    PNDM without its costly start: the first steps weigh 1, 2, ..., `p` predictions.

    - `p`: predictions, 1 to 4.

    Cost: 1 call a step. Order: 2 (1 with `p=1`, which is DDIM); 1 where steps in nsr jump from one
    to the next. Source: Zhang & Chen, "DEIS" (2022), appendix; Liu et al., "PNDM" (2022).
    """

    p: int = 4

    source: ClassVar[str] = "Zhang & Chen 2022"

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        (whole,) = super().weights(nodes[:1], t, t_next, process)
        return [whole * c for c in ADAMS_BASHFORTH[len(nodes) - 1]]

    def readable(self, t: Level) -> bool:
        return True  # the weights are constant


@renamed({"exact": "exact_weights"})
@dataclass(frozen=True)
class IPNDMv(EpsMultistep):
    r"""iPNDM_v: iPNDM with weights for variable steps,
    `x_next = (s_next / s) x + s_next (nsr_next - nsr) sum_j c_j eps_j`.

    - `p`: predictions, 1 to 4.
    - `exact_weights`: the weights of the actual steps, as intended; the method is then `LMS(p)`. By
      default the weights are those of the published code. From `p=3` on that code has a factor
      inside a bracket instead of outside it. With `p=4` it also has a wrong sign and one ratio of
      steps in place of another, so that the weights sum to 1 only where the two ratios are equal.

    Cost: 1 call a step. Order: 2 (1 with `p=1`, which is DDIM): the start bounds it. Source: Zhou
    et al., diff-sampler (2023).
    """

    p: int = 4
    exact_weights: bool = False

    clock = "nsr"
    source: ClassVar[str] = "Zhou et al. 2023, diff-sampler"

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        if self.exact_weights:
            return super().weights(nodes, t, t_next, process)
        (whole,) = super().weights(nodes[:1], t, t_next, process)
        readings = [t_next.nsr, *(node.nsr for node in nodes)]
        return [whole * c for c in published_weights([a - b for a, b in pairwise(readings)])]


def published_weights(steps: Sequence[Scalar]) -> list[Scalar]:
    """iPNDM_v's weights as diff-sampler computes them, from the lengths of the next step and those
    before it, newest first.
    """
    if len(steps) == 1:
        return [1.0]
    h, a = steps[:2]
    first = [1.0 + h / (2.0 * a), -h / (2.0 * a)]
    if len(steps) == 2:
        return first
    b = steps[2]
    # Right is (1 - h / (3 (h + a))) / 2 times h (h + a) / (a (a + b)): the last factor belongs
    # outside the bracket.
    second = 0.5 * (1.0 - h / (3.0 * (h + a)) * (h * (h + a)) / (a * (a + b)))
    u = a / b
    weights = [first[0] + second, first[1] - (1.0 + u) * second, u * second]
    if len(steps) == 3:
        return weights
    c = steps[3]
    # Right is a minus between the two terms: for equal steps 9/24, and here 11/24.
    third = 0.5 * (1.0 - h / (3.0 * (h + a))) + (1.0 - h / (2.0 * (h + a))) * h / (
        6.0 * (h + a + b)
    )
    third = third * (h * (h + a) * (h + a + b)) / (a * (a + b) * (a + b + c))
    w = a * (a + b) / (b * (b + c))
    return [
        weights[0] + third,
        weights[1] - (1.0 + u + w) * third,
        weights[2] + (u + w * (1.0 + b / c)) * third,
        -w * u * third,  # right is b / c for u
    ]


@dataclass(frozen=True)
class PNDM(IPNDM):
    r"""PNDM: iPNDM's step, started by pseudo Runge-Kutta steps, in which every slope is an eps and
    every move DDIM's.

    - `p`: predictions, 2 to 4. `PNDM(4)` is the paper's F-PNDM, `PNDM(2, "heun")` its S-PNDM.
    - `start_up`: `"runge_kutta"` takes the first `p - 1` steps of 4 calls each, with the mean
      `(e_1 + 2 e_2 + 2 e_3 + e_4) / 6` and stages in the middle of a step in `t`; `"heun"` takes
      one step of 2 calls, with `(e_1 + e_2) / 2`, then weighs 2, 3, ..., `p` predictions: with
      `p=4` that is PLMS, the first sampler of Stable Diffusion.

    From a level without signal, where no x0 follows from an eps, the first step takes the same
    means of x0.

    From nsr of 1000 (`Cosine`) the pseudo Runge-Kutta steps need a fine grid: an error of eps is
    multiplied by the change of nsr.

    Cost: 1 call a step, and 4 in the first `p - 1` (or 2 in the first). Order: 2; with
    Runge-Kutta's start `p` where levels are equally spaced in nsr and `t`. Source: Liu et al.,
    "Pseudo numerical methods for diffusion models on manifolds" (2022).
    """

    p: int = 4
    start_up: Literal["runge_kutta", "heun"] = "runge_kutta"

    order: ClassVar[int] = 2
    source: ClassVar[str] = "Liu et al. 2022"
    cost: ClassVar[str] = "1 a step, more at the start"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p < 2:
            raise ValueError("PNDM weighs p = 2 to 4 predictions; with one it is DDIM")

    @property
    def _first(self) -> tuple[int, int]:
        """Steps at the start that are single steps, and the calls of each."""
        return (self.p - 1, 4) if self.start_up == "runge_kutta" else (1, 2)

    def calls(self, levels: int, *, finish: bool = True) -> int:
        steps, each = self._first
        return levels - 1 + int(finish) + (each - 1) * min(steps, levels - 1)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        left, history, _, seen = state
        if len(history) >= self._first[0]:
            return super().step(reverse, x, t, t_next, noise, state)
        predicts = "eps" if has_signal(t, t_next) else "x0"

        def slope(y: Any, level: Level) -> Any:
            return predicted(predicts, y, reverse(y, level), level)

        x0 = reverse(x, t)
        eps, e1 = eps_of(x, x0, t), predicted(predicts, x, x0, t)
        if self.start_up == "heun":
            mean = 0.5 * (e1 + slope(carried(x, e1, t, t_next, predicts), t_next))
        else:
            middle = reverse.level(0.5 * (t.t + t_next.t))
            e2 = slope(carried(x, e1, t, middle, predicts), middle)
            e3 = slope(carried(x, e2, t, middle, predicts), middle)
            e4 = slope(carried(x, e3, t, t_next, predicts), t_next)
            mean = (1 / 6) * (e1 + 2.0 * e2 + 2.0 * e3 + e4)
        return carried(x, mean, t, t_next, predicts), (left - 1, ((t, eps), *history), None, seen)
