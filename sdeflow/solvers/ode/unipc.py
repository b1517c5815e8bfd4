"""UniPC: a multistep predictor in `lam` and a corrector that costs no call, under the published
coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sdeflow._utils.math import Scalar
from sdeflow.errors import unknown
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.weights import adams, frame_value, has_signal


@dataclass(frozen=True)
class UniPC(GridSolver):
    r"""UniPC: the predictor UniP-p over `p` predictions, and the corrector UniC-p that does the
    same step again with the next one.

    With nodes at `r_k = (lam_k - lam)/h` and `F` the prediction or the noise, both solve
    `sum_k c_k r_k^m = (m + 1)! phi_{m+2} h / B(h)` and step by
    `DDIM + B(h) sum_k c_k (F_k - F)/r_k`. `B(h)` cancels wherever that system is solved, and what
    remains are the weights of the polynomial through all nodes: those of `ExponentialAdams` in
    clock `lam`. It matters only where the paper sets the one coefficient of the system to 1/2: in
    UniP-2 and in UniC-1.

    - `p`: predictions, 1, 2 or 3; a step that starts uses as many as there are.
    - `variant`: `"bh1"`, `B = h`, or `"bh2"`, `B = e^h - 1` (`1 - e^-h` for x0).
    - `frame`: `"x0"`, the prediction, or `"eps"`.
    - `corrector`: without it, this is UniP. The corrector of a step is over as many predictions as
      its predictor, and one more.
    - `lower_final`: the last steps use fewer predictions, `min(p, steps left + 1)`.

    The prediction at the predicted state serves the corrector and the next step, and is not
    evaluated again (PEC).

    Cost: 1 call a step. Order: `p + 1`, at most 3, as it starts by a step over one prediction;
    without corrector `p`, at most 2. Source: Zhao et al., "UniPC" (2023), algorithms 1-2 (5-8 in
    x0).
    """

    p: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    frame: Literal["x0", "eps"] = "x0"
    corrector: bool = True
    lower_final: bool = True

    source: ClassVar[str] = "Zhao et al. 2023"

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or self.p not in (1, 2, 3):
            raise ValueError(
                f"UniPC uses p = 1, 2 or 3 predictions; got p={self.p!r}. ExponentialAdams(p,"
                " corrector=True) has more"
            )
        for kind, value, known in (
            ("variant", self.variant, ("bh1", "bh2")),
            ("frame", self.frame, ("x0", "eps")),
        ):
            if value not in known:
                raise unknown(kind, value, known)

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence, the start included."""
        return min(self.p + 1, 3) if self.corrector else min(self.p, 2)

    def start(self, steps: int) -> Any:
        return (
            steps,
            (),
            None,
        )  # steps left; (level, F) of the last predictions, newest first; the step to be corrected

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        left, history, last = state
        x0 = reverse(x, t)
        value = frame_value(self.frame, x, x0, t)
        if last is not None:
            before, used, b = last
            again = self._weights([t, *(level for level, _ in used)], before, t, reverse.process)
            x = x + again[0] * value
            for new, old, (_, F) in zip(again[1:], b, used, strict=True):
                x = x + (new - old) * F
        history = ((t, value), *history)[: self.p]
        if not has_signal(t, t_next):
            return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t), (left - 1, history, None)
        p = min(self.p, left + 1) if self.lower_final else self.p
        used = tuple(node for node in history if has_signal(node[0]))[:p]
        b = self._weights([level for level, _ in used], t, t_next, reverse.process)
        x_next = (t_next.sigma / t.sigma if self.frame == "x0" else t_next.s / t.s) * x
        for weight, (_, F) in zip(b, used, strict=True):
            x_next = x_next + weight * F
        return x_next, (left - 1, history, (t, used, b) if self.corrector else None)

    def _weights(
        self, nodes: list[Level], t: Level, t_next: Level, process: Process
    ) -> list[Scalar]:
        """Those of `F` at `nodes` in the step from `t`, which is one of them, to `t_next`."""
        if len(nodes) != 2:
            return adams(self.frame, "lam", nodes, t, t_next, process)[1]
        # The one coefficient is 1/2, where the system's solution would differ from it by O(h).
        h = t_next.lam - t.lam
        expm1 = torch.expm1 if isinstance(h, Tensor) else math.expm1
        z, scale = (-h, -t_next.s) if self.frame == "x0" else (h, -t_next.sigma)
        b_of_h = z if self.variant == "bh1" else expm1(z)
        i = 0 if nodes[0] is not t else 1
        r = (nodes[i].lam - t.lam) / h
        weight = 0.5 * scale * b_of_h / r
        rest = scale * expm1(z) - weight
        return [weight, rest] if i == 0 else [rest, weight]
