r"""The step to zero noise, integrated over the last predictions instead of returning the last one.

In the noise-to-signal ratio $n$ the probability-flow ODE is $d(x/s) = \varepsilon\,dn$, so that the
result is

$$x(0) = x/s - \int_0^n \varepsilon\,dn.$$

The denoised prediction is that integral with $\varepsilon$ constant: it is off by
$n^2 / (2 c^2)$ of itself for data of standard deviation $c$, however many calls came before. The
last calls have seen $\varepsilon$ at three ratios, or more, and cost nothing further:

| `to_zero` | $\varepsilon$ between the last level and zero noise | predictions |
|---|---|---|
| `"prediction"` | constant: the result is the denoised prediction, as published | 1 |
| `"linear"` | $a + b n$ | 2 |
| `"smooth"` | $a + b n + c n^3$ | 3 |

On the exact path of a smooth density $\varepsilon$ is odd in $n$, and on data that fill fewer
dimensions than they have it also has a constant part: the third row holds both. The predictions
are the newest and, going back, those at ratios at least a quarter above the one before and at most
four times the last: nearer ones would magnify rounding, farther ones say little. With fewer of
them fewer terms are used; with one alone the result is the prediction and what the correction of
the last state added.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from sdeflow._utils.math import Scalar, value_of
from sdeflow.process import Level
from sdeflow.reverse import eps_of

ToZero = Literal["prediction", "linear", "smooth"]
"""How a multistep method takes the step to zero noise."""

Seen = tuple[tuple[Level, Any], ...]
"""Levels and their eps, newest first."""

_POWERS = {"linear": (0, 1), "smooth": (0, 1, 3)}
_APART, _FAR = 1.25, 4.0


def seen_with(seen: Seen, x: Any, x0: Any, t: Level) -> Seen:
    """`seen` with the prediction at `t`, without what is too far above it to be used."""
    n = value_of(t.nsr)
    near = tuple(old for old in seen if n <= value_of(old[0].nsr) <= _FAR * n)
    return ((t, eps_of(x, x0, t)), *near)


def integrated(to_zero: ToZero, x: Any, t: Level, seen: Seen) -> Any:
    """The result, from the state at the last level `t` and what was seen up to there."""
    chosen = [seen[0]]
    for level, eps in seen[1:]:
        if value_of(level.nsr) >= _APART * value_of(chosen[-1][0].nsr):
            chosen.append((level, eps))
    powers = _POWERS[to_zero][: len(chosen)]
    chosen = chosen[: len(powers)]
    result = (1.0 / t.s) * x
    for weight, (_, eps) in zip(_weights(powers, [a for a, _ in chosen]), chosen, strict=True):
        result = result - weight * eps
    return result


def _weights(powers: tuple[int, ...], levels: list[Level]) -> list[Scalar]:
    """`w_j` with `sum_j w_j f(n_j)` the integral of `f` from 0 to `n_0`, exact for the powers."""
    nsr = torch.stack([torch.as_tensor(level.nsr, dtype=torch.float64) for level in levels])
    k = torch.tensor(powers, dtype=torch.float64)
    weights = nsr[0] * torch.linalg.solve((nsr / nsr[0]) ** k[:, None], 1.0 / (k + 1.0))
    return [*weights.unbind()] if weights.requires_grad else weights.tolist()
