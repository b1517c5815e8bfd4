"""UniPC: a multistep predictor in `lam` and a corrector that costs no call, under the published
coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sdeflow._utils.math import expm1
from sdeflow._utils.renamed import renamed
from sdeflow.process import Level, Process
from sdeflow.solvers.ode.multistep import Multistep, Weights, check_p
from sdeflow.solvers.ode.to_zero import ToZero
from sdeflow.solvers.ode.weights import adams


@renamed({"frame": "predicts"})
@dataclass(frozen=True)
class UniPC(Multistep):
    r"""UniPC: the predictor UniP-p over `p` predictions, and the corrector UniC-p, which takes the
    same step again with the next one.

    With nodes at `r_k = (lam_k - lam)/h` and `F` the prediction or the noise, both solve
    `sum_k c_k r_k^m = (m + 1)! phi_{m+2} h / B(h)` and step by
    `DDIM + B(h) sum_k c_k (F_k - F)/r_k`. Where that system is solved, `B(h)` cancels. What remains
    are the weights of the polynomial through all nodes, those of `ExponentialAdams` in clock `lam`.
    `B(h)` matters only where the paper sets the one coefficient of the system to 1/2: in UniP-2 and
    in UniC-1.

    - `p`: predictions, 1, 2 or 3; the first steps have fewer.
    - `variant`: `"bh1"`, `B = h`, or `"bh2"`, `B = e^h - 1` (`1 - e^-h` for x0).
    - `predicts`: `"x0"`, the prediction, or `"eps"`.
    - `corrector`: without it, this is UniP. The corrector of a step uses as many predictions as its
      predictor, and one more.
    - `lower_final`: the last steps use fewer predictions, `min(p, steps left + 1)`.
    - `to_zero`: the step to zero noise, see `sdeflow.solvers.ode.to_zero`.

    The prediction at the predicted state serves the corrector and the next step. It is not
    evaluated again (PEC).

    Cost: 1 call a step. Order: `p + 1`, at most 3, as it starts by a step over one prediction;
    without corrector `p`, at most 2. Source: Zhao et al., "UniPC" (2023), algorithms 1-2 (5-8 in
    x0).
    """

    p: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    predicts: Literal["x0", "eps"] = "x0"
    corrector: bool = True
    lower_final: bool = True
    to_zero: ToZero = field(default="prediction", kw_only=True)

    source: ClassVar[str] = "Zhao et al. 2023"

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = ". ExponentialAdams(p, corrector=True) has more"
        check_p(self.p, 3, "UniPC", hint)

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence, the start included."""
        return min(self.p + 1, 3) if self.corrector else min(self.p, 2)

    def corrector_nodes(self, used: int) -> int:
        return used + 1 if self.corrector else 0

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        if len(nodes) != 2:
            return adams(self.predicts, "lam", nodes, t, t_next, process)[1]
        # The one coefficient is 1/2, where the system's solution would differ from it by O(h).
        h = t_next.lam - t.lam
        z, scale = (-h, -t_next.s) if self.predicts == "x0" else (h, -t_next.sigma)
        b_of_h = z if self.variant == "bh1" else expm1(z)
        i = 0 if nodes[0] is not t else 1
        weight = 0.5 * scale * b_of_h / ((nodes[i].lam - t.lam) / h)
        rest = scale * expm1(z) - weight
        return [weight, rest] if i == 0 else [rest, weight]
