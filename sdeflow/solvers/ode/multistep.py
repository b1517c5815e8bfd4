r"""The step of all linear multistep methods: a combination of the last predictions, perhaps
corrected by the next one, perhaps with noise.

With nodes $t_j$, functions $F_j$ of the predictions there (`sdeflow.solvers.ode.weights`) and
$\delta$ the fall of the state beyond that of the ODE (`step_weights`), a step is

$$x_+ = \frac{\rho_+}{\rho} e^{-\delta} x + \sum_j b_j F_j + \sigma_+ \sqrt{1 - e^{-2\delta}}\; z.$$

A method is its weights $b_j$. Without noise, $\delta = 0$.

**The corrector is free.** The next step needs the prediction at the predicted state. With it, the
last step is taken again over one more node, from the same state and with the same noise. The two
differ in their weights only, so that the corrected state is
$x_c = x_+ + \sum_j (b^c_j - b^p_j) F_j$. A plan needs no second state for it.

**The ends.** From and to a level without signal ($s = 0$) the prediction is held: DDIM's step, or
with noise an ancestral step. In the clocks `lam` and `nsr` such a level has no reading and is left
out of the nodes. The step to zero noise is the prediction, as published; or, with `to_zero=`, from
the state at the last level, corrected where the method corrects, eps is integrated over the last
predictions (`sdeflow.solvers.ode.to_zero`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from sdeflow._utils.checks import is_whole
from sdeflow._utils.math import Scalar, is_tensor
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.to_zero import ToZero, integrated, seen_with
from sdeflow.solvers.ode.weights import has_signal, predicted, rho, step_weights

Weights = Sequence[Scalar]
"""What a step multiplies the values at its nodes by, in their order."""


class Multistep(GridSolver):
    """A linear multistep method; a subclass gives `weights`, and fields in place of the attributes.

    - `p`: predictions that a step weighs; the first steps have fewer.
    - `predicts`, `predicts_scale`: which function of them, see `sdeflow.solvers.ode.weights`.
    - `clock`: the variable of the interpolating polynomial.
    - `lower_final`: the last steps use fewer predictions, `min(p, steps left + 1)`.
    - `again`: whether the network is called again at the corrected state (PECE).
    - `to_zero`: the step to zero noise, see `sdeflow.solvers.ode.to_zero`.
    """

    p: int
    predicts: str = "x0"
    predicts_scale: float = 1.0
    clock: str = "lam"
    lower_final: bool = False
    again: bool = False
    to_zero: ToZero = "prediction"

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence; the first step, of order 1, bounds it by 2."""
        return min(self.p, 2)

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        """`b_j` of the step from `t` to `t_next`, for each of `nodes`, newest first; `t` is one of
        them. Both ends of the step have signal, unless `again` is set.
        """
        raise NotImplementedError

    def delta(self, t: Level, t_next: Level) -> Scalar:
        """By how much more than in the ODE the logarithm of the state falls; 0.0 without noise."""
        return 0.0

    def corrector_nodes(self, used: int) -> int:
        """How many predictions correct a step that used so many, the new one counted; 0 for no
        correction.
        """
        return 0

    @property
    def memory(self) -> int:
        """Predictions that are kept."""
        return self.p

    def readable(self, t: Level) -> bool:
        """Whether a level has a reading in the clock, so that it can be a node."""
        return self.clock not in ("lam", "nsr") or has_signal(t)

    def start(self, steps: int) -> Any:
        # Steps left; (level, F) of the last calls, newest first; the step that may be corrected;
        # (level, eps) for the step to zero noise, where it wants them.
        return steps, (), None, ()

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        left, history, last, seen = state
        process = reverse.process
        x0 = reverse(x, t)
        if self.to_zero != "prediction":
            seen = seen_with(seen, x, x0, t)
        value = predicted(self.predicts, x, x0, t, self.predicts_scale)
        if last is not None:
            x = self._corrected(process, x, value, t, last)
        history = ((t, value), *history)[: self.memory]
        delta = self.delta(t, t_next)
        kept, whole, spread = step_weights(t, t_next, delta)
        nodes: Any = ((t, x0),)
        b: Weights = [whole]
        used = 1
        if has_signal(t, t_next):
            nodes = tuple(node for node in history if self.readable(node[0]))
            used = min(len(nodes), self.p, left + 1 if self.lower_final else self.p)
            b = self.weights([level for level, _ in nodes[:used]], t, t_next, process)
            if self.predicts != "x0":
                kept = rho(self.predicts, t_next, self.predicts_scale) / rho(
                    self.predicts, t, self.predicts_scale
                )
        x_next = kept * x
        for weight, (_, F) in zip(b, nodes, strict=False):
            x_next = x_next + weight * F
        if is_tensor(delta) or delta:
            x_next = x_next + spread * noise(t, t_next)
        c = self.corrector_nodes(used)
        last = (t, nodes, b, c) if c and (self.again or has_signal(t, t_next)) else None
        if last and self.again:
            x0_next = reverse(x_next, t_next)
            x_next, last = self._corrected(process, x_next, x0_next, t_next, last), None
        return x_next, (left - 1, history, last, seen)

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        _, _, last, seen = state
        x0 = reverse(x, t)
        if self.to_zero == "prediction":
            return x0
        seen = seen_with(seen, x, x0, t)
        if last is not None:
            value = predicted(self.predicts, x, x0, t, self.predicts_scale)
            x = self._corrected(reverse.process, x, value, t, last)
        elif len(seen) == 1:
            return x0  # which is all there is, and finite where there is no signal
        return integrated(self.to_zero, x, t, seen)

    def _corrected(self, process: Process, x: Any, value: Any, t: Level, last: Any) -> Any:
        """The state at `t`, after the step to it is taken again with the prediction there."""
        before, nodes, b, c = last
        levels = [t, *(level for level, _ in nodes[: c - 1])]
        newest, *others = self.weights(levels, before, t, process)
        x = x + newest * value
        for (_, F), (new, old) in zip(nodes, zip_longest(others, b, fillvalue=0.0), strict=False):
            x = x + (new - old) * F
        return x


def from_differences(
    readings: Sequence[Scalar], whole: Scalar, slope: Scalar = 0.0, bend: Scalar = 0.0
) -> list[Scalar]:
    """The weights of the values `F_j` at 1 to 3 `readings` in a sum over divided differences,
    `whole F_0 + slope F[0, 1] + bend F[0, 1, 2]`.
    """
    if len(readings) == 1:
        return [whole]
    first, second = readings[:2]
    a, b = slope / (first - second), 0.0
    if len(readings) == 3:
        curve = bend / (first - readings[2])
        a, b = a + curve / (first - second), curve / (second - readings[2])
    return [whole + a, -a - b, b][: len(readings)]


def check_p(p: object, most: int, who: str, hint: str = "") -> None:
    """A `ValueError` unless `p` is a whole number from 1 to `most`."""
    if not is_whole(p, 1, most):
        known = "1, 2 or 3" if most == 3 else f"1 to {most}"
        raise ValueError(f"{who} uses p = {known} predictions; got p={p!r}{hint}")
