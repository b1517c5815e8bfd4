r"""Likelihood along the probability-flow ODE, with any of its solvers.

The density moves with the ODE: $\log p_0(x(t_0)) = \log p_1(x(t_1)) + \int_{t_0}^{t_1}
\nabla\cdot\mathrm{velocity}\,dt$. With $\mathrm{velocity} = \frac{\sigma'}{\sigma} x +
s\,\lambda'\,\hat x_0$ and $J = \partial\hat x_0/\partial x$ the divergence is
$d\,\sigma'/\sigma + s\,\lambda'\,\mathrm{tr} J$, and its linear part has a closed form:

$$\log p_0 = \log p_1 + d\log\frac{\sigma_1}{\sigma_0} + \int s\,\mathrm{tr} J\,d\lambda .$$

**The trace by the solver's own weights.** The state obeys $x' = \frac{\sigma'}{\sigma}x +
s\lambda'\hat x_0$, so that $x_1/\sigma_1 = x_0/\sigma_0 + \int\frac s\sigma\hat x_0\,d\lambda$. A
further coordinate $m$ with the "prediction" $\sigma\,\mathrm{tr} J$ and $m_0 = 0$ obeys the same
equation and ends at $m_1/\sigma_1 = \int s\,\mathrm{tr} J\,d\lambda$. So every solver of the ODE
integrates the density with its own weights, order and error control, by being given a denoiser with
one more entry.

**A Gaussian part taken out.** For data of standard deviation c the trace is
$s\,\mathrm{tr} J = d\,c^2/(c^2 + \mathrm{nsr}^2)$, with a closed integral. `reference_std=c` leaves
only the difference to the solver: then $d\log(\sigma_1/\sigma_0)$ becomes
$\frac d2\log\frac{s_1^2c^2 + \sigma_1^2}{s_0^2c^2 + \sigma_0^2}$.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow import registry
from sdeflow._utils.checks import one_of, whole_number
from sdeflow._utils.math import as_time
from sdeflow.denoisers import Denoiser, Wrapper, as_denoiser
from sdeflow.grid import GridFunction, dense_lam
from sdeflow.noise import SeededNoise
from sdeflow.process import Process
from sdeflow.sampling.api import run
from sdeflow.sampling.request import Request
from sdeflow.sampling.times import default_levels, grid_for, make_times
from sdeflow.solvers.adaptive.runge_kutta import RK45
from sdeflow.solvers.base import Solver, check_times
from sdeflow.solvers.ode.adams import ExponentialAdams

Divergence = Literal["exact", "hutchinson", "hutch++"]
Dequantise = Literal["uniform", "truncated_normal"]

FEW_CALLS = ExponentialAdams(4, corrector=True)
"""The solver of a likelihood with a budget, chosen by measurement on smooth mixtures."""


def few_calls(
    process: Process,
    n: int,
    *,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """The grid of a likelihood with a budget: `dense_lam` with center 1.2 and width 1.5, dense
    where data of standard deviation 0.3 to 1 have their structure.
    """
    return dense_lam(process, n, center=1.2, width=1.5, t_min=t_min, t_max=t_max)


@dataclass(frozen=True)
class LogLikelihood:
    """The log-likelihood of each sample, in nats, and what it speaks of.

    - `value` `[B]`: of what `of` says: a density, or a lower bound on the log-probability of
      discrete data.
    - `standard_error`: of the mean over the batch, in nats; probes and dequantisation included.
    - `probe_error` `[B]`: the standard error of each value over its probes; None where there is one
      or none.
    - `prior_gap`: an upper bound on `KL(p(x(t_max)) || N(0, sigma(t_max)^2 I))`, in nats, the mean
      over the batch of `|s(t_max) x0|^2 / (2 sigma(t_max)^2)`. The model's prior is the Gaussian.
    - `nfe`, `network_calls`, `network_gradients`: what was spent. `x`: the latent, the state at
      `t_max`. `point`: the data at which the density was taken, after dequantisation.
    """

    value: Tensor
    of: str
    prior_gap: float
    nfe: int
    network_calls: int
    network_gradients: int
    x: Tensor
    point: Tensor
    probe_error: Tensor | None = None

    @property
    def standard_error(self) -> float:
        """The standard error of the mean of `value`, in nats; NaN for one sample."""
        n = len(self.value)
        return float(self.value.double().std()) / math.sqrt(n) if n > 1 else math.nan

    @property
    def bits_per_dim(self) -> float:
        """Minus the mean of `value`, in bits per entry."""
        return -float(self.value.double().mean()) / (self.x[0].numel() * math.log(2.0))

    @property
    def bits_standard_error(self) -> float:
        """The standard error of `bits_per_dim`."""
        return self.standard_error / (self.x[0].numel() * math.log(2.0))

    def __str__(self) -> str:
        return (
            f"{self.bits_per_dim:.4f} bits/dim +- {self.bits_standard_error:.4f} ({self.of}),"
            f" NFE {self.nfe}, prior gap at most {self.prior_gap:.2g} nats"
        )


def log_likelihood(
    model: Denoiser | Callable[..., Tensor],
    x0: Tensor,
    process: Process | str | None = None,
    *,
    solver: str | Solver | None = None,
    nfe: int | None = None,
    grid: str | GridFunction | Tensor | Sequence[float] | None = None,
    divergence: Divergence = "exact",
    probes: int | None = None,
    seeds: int | Sequence[int] = 0,
    dequantise: Dequantise | None = None,
    levels: int = 256,
    reference_std: float | None = None,
    condition: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> LogLikelihood:
    r"""The log-likelihood of each sample of `x0` `[B, *shape]` under the model, along the
    probability-flow ODE.

    - `solver`, `nfe`, `grid`: any solver of the ODE: adaptive, Runge-Kutta or multistep. By default
      `RK45(rtol=1e-5, atol=1e-5)`; with `nfe` alone, in so few calls, `FEW_CALLS` on `few_calls`.
      A grid of given times increases.
    - `divergence`: `"exact"`, a gradient for each entry; `"hutchinson"`, one for each probe;
      `"hutch++"`, three for each three probes, exact on the part of the Jacobian that a third of
      them spans. Probes are Rademacher, fixed for the whole solve, from the sample's seed.
    - `probes`: 1 by default, 3 for hutch++ (a multiple of 3).
    - `dequantise`: None is the density of `x0 + nsr(t_0) eps`, the data as the model knows them at
      the first time, at `x0`. For data of `levels` equally spaced values from -1 to 1, `"uniform"`
      adds noise as wide as a spacing, and `"truncated_normal"` the model's own noise at the first
      time, cut off at half a spacing; both give a lower bound on the log-probability.
      [The page](../theory/likelihood.md) has a table of what each loses.
    - `reference_std`: the standard deviation of the Gaussian whose divergence is taken out and
      integrated in closed form; by default 0.5 for solvers with a budget and 0 for adaptive ones.
    - `seeds`: one a sample, or the first of consecutive ones; a row depends on its own.

    `LogLikelihood.of` says what the value speaks of, and `prior_gap` how far the prior may be off.

    Errors: `ValueError` for a solver of the SDE, probes that do not fit, or data outside [-1, 1]
    with `dequantise`. Cost: `nfe` calls and as many times the gradients of the divergence. Source:
    Song et al. 2021, section 4.3 and appendix D.2; Grathwohl et al. (FFJORD) 2019; Meyer et al.
    (Hutch++) 2021; Zheng et al. (i-DODE) 2023 for the truncated normal.
    """
    denoiser = as_denoiser(model, None if process is None else registry.process(process))
    one_of("divergence", divergence, ("exact", "hutchinson", "hutch++"))
    one_of("dequantise", dequantise, (None, "uniform", "truncated_normal"))
    if solver is None:
        solver = RK45(rtol=1e-5, atol=1e-5) if nfe is None else FEW_CALLS
        if nfe is not None and grid is None:
            grid = few_calls
    method = registry.solver(solver).for_denoiser(denoiser)
    if not method.reversible:
        raise ValueError(
            f"{type(method).__name__} draws noise: a likelihood needs a solver of the ODE, such as"
            " 'rk45' or 'adams3'"
        )
    count = _probes(divergence, probes)
    path, times = denoiser.process, _times(method, denoiser, grid, nfe)
    dim, keys = (
        x0[0].numel(),
        list(range(seeds, seeds + len(x0)) if isinstance(seeds, int) else seeds),
    )
    source = SeededNoise(keys, x0.shape[1:], x0.device, x0.dtype)
    first, last = path.level(float(times[0])), path.level(float(times[-1]))
    point, change, of = _dequantised(x0, dequantise, first.nsr, levels, source)
    probe = None
    if count:
        signs = SeededNoise(keys, (count, dim), x0.device, x0.dtype).draw()
        probe = torch.where(signs < 0, -torch.ones_like(signs), torch.ones_like(signs))
    width = (0.0 if method.adaptive else 0.5) if reference_std is None else float(reference_std)
    augmented = Augmented(denoiser, tuple(x0.shape[1:]), divergence, probe, width)
    state = torch.cat([first.s * point.flatten(1), point.new_zeros(len(x0), augmented.traces)], 1)
    solution = run(
        Request(
            score_fn=augmented,
            solver=method,
            grid=times,
            x=state,
            t=float(times[0]),
            finish=False,
            seeds=keys,
            condition=condition,
            batch_size=batch_size,
        )
    )
    x, traces = solution.x[:, :dim], solution.x[:, dim:].double() * dim / last.sigma
    linear = (
        0.5
        * dim
        * math.log(
            ((last.s * width) ** 2 + last.sigma**2) / ((first.s * width) ** 2 + first.sigma**2)
        )
    )
    prior = -0.5 * (x.double() / last.sigma).square().sum(1)
    prior = prior - dim * (math.log(last.sigma) + 0.5 * math.log(2.0 * math.pi))
    value = prior + linear + traces.mean(1) + dim * math.log(first.s) + change
    error = traces.std(1) / math.sqrt(traces.shape[1]) if traces.shape[1] > 1 else None
    gap = 0.5 * float((last.s * point.double() / last.sigma).square().flatten(1).sum(1).mean())
    return LogLikelihood(
        value.to(x0.dtype),
        of,
        gap,
        solution.nfe,
        solution.network_calls,
        solution.network_gradients,
        x.reshape(x0.shape),
        point,
        error,
    )


def _probes(divergence: Divergence, probes: int | None) -> int:
    if divergence == "exact":
        if probes is not None:
            raise ValueError("divergence='exact' takes no probes: choose 'hutchinson' or 'hutch++'")
        return 0
    count = whole_number(
        "probes", (1 if divergence == "hutchinson" else 3) if probes is None else probes
    )
    if divergence == "hutch++" and count % 3:
        raise ValueError(f"hutch++ takes a multiple of 3 probes; got {count}")
    return count


def _times(method: Solver, denoiser: Denoiser, grid: Any, nfe: int | None) -> Tensor:
    """Times from data to noise."""
    if grid is not None and not isinstance(grid, str) and not callable(grid):
        times = check_times(grid)
        if len(times) < 2 or times[-1] < times[0]:
            raise ValueError("a likelihood runs from data to noise: give times that increase")
        return times
    if nfe is not None:
        count = method.levels(nfe, finish=False)
    else:
        count = 2 if method.adaptive else default_levels(method, finish=False)
    placed = grid_for(grid, method, denoiser, finish=False)
    return make_times(denoiser.process, placed, count, None).flip(0)


def _dequantised(
    x0: Tensor, kind: Dequantise | None, nsr: float, levels: int, source: SeededNoise
) -> tuple[Tensor, float, str]:
    """The point at which the density is taken, what is added to its logarithm, and what the sum
    is.
    """
    if kind is None:
        return x0, 0.0, f"log density of x0 + {nsr:.3g} eps, at x0"
    whole_number("levels", levels, 2, of="values")
    if float(x0.detach().abs().max()) > 1.0 + 1e-6:
        raise ValueError("dequantise needs data of equally spaced values from -1 to 1")
    spacing, dim = 2.0 / (levels - 1), x0[0].numel()
    uniform = torch.special.ndtr(source.start())  # in [0, 1]
    said = f"lower bound on the log-probability of {levels} values, {kind.replace('_', ' ')}"
    if kind == "uniform":
        return x0 + (uniform - 0.5) * spacing, dim * math.log(spacing), said
    reach = spacing / (2.0 * nsr)
    mass = math.erf(reach / math.sqrt(2.0))
    z = math.sqrt(2.0) * torch.erfinv((2.0 * uniform - 1.0) * mass)
    return x0 + nsr * z.clamp(-reach, reach), -dim * truncated_normal_entropy(nsr, reach), said


def truncated_normal_entropy(std: float, reach: float) -> float:
    """`E log q` of `std z` with `z` normal and cut off at `|z| < reach`: minus the entropy, in
    nats.

    `-(1 + log(2 pi std^2)) / 2 - log Z + reach phi(reach) / Z` with `Z = erf(reach / sqrt 2)`.
    """
    mass = math.erf(reach / math.sqrt(2.0))
    height = math.exp(-0.5 * reach**2) / math.sqrt(2.0 * math.pi)
    return -0.5 * (1.0 + math.log(2.0 * math.pi * std**2)) - math.log(mass) + reach * height / mass


class Augmented(Wrapper):
    """A denoiser of flat states `[B, d + k]` whose last entries are "predictions" of the density:
    `sigma (tr J - reference) / d`, with `J` the Jacobian of `x0` in `x`.

    `probes` `[B, K, d]` are fixed; Hutchinson's method has an entry for each of them, the others
    one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        divergence: Divergence,
        probes: Tensor | None,
        reference_std: float,
    ):
        super().__init__(denoiser)
        self.inside, self.divergence, self.probes = shape, divergence, probes
        self.reference_std, self.dim = reference_std, math.prod(shape)
        self.traces = probes.shape[1] if divergence == "hutchinson" and probes is not None else 1
        self.shape = (self.dim + self.traces,)

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        t = as_time(t)
        with torch.enable_grad():
            state = x[:, : self.dim].detach().reshape(len(x), *self.inside).requires_grad_()
            x0 = self.inner(state, t, **condition)

            def product(v: Tensor) -> Tensor:
                """`v^T J`, `[B, d]`."""
                (row,) = torch.autograd.grad(
                    x0, state, v.reshape(state.shape), retain_graph=True, allow_unused=True
                )
                return torch.zeros_like(v) if row is None else row.flatten(1)

            traces = self._traces(product, state) if x0.requires_grad else None
        if traces is None:
            traces = x.new_zeros(len(x), self.traces)
        s, sigma = (c.reshape(-1, 1) for c in self.process.kernel(t.to("cpu", torch.float64)))
        c2 = self.reference_std**2
        reference = (self.dim * s * c2 / (s**2 * c2 + sigma**2)).to(x.device, x.dtype)
        density = sigma.to(x.device, x.dtype) / self.dim * (traces - reference)
        return torch.cat([x0.detach().flatten(1), density], 1)

    def _traces(self, product: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """The trace of J, `[B, traces]`."""
        flat = state.detach().flatten(1)
        if self.probes is None:
            total = torch.zeros_like(flat[:, 0])
            for i in range(self.dim):
                one = torch.zeros_like(flat)
                one[:, i] = 1.0
                total = total + product(one)[:, i]
            return total.unsqueeze(1)
        probes = self.probes.to(flat)
        if self.divergence == "hutchinson":
            return torch.stack([(product(v) * v).sum(1) for v in probes.unbind(1)], 1)
        return self._hutch(product, probes).unsqueeze(1)

    @staticmethod
    def _hutch(product: Callable[[Tensor], Tensor], probes: Tensor) -> Tensor:
        """Hutch++: the trace on the span of `J^T S` exactly, Hutchinson's estimate on the rest."""
        third = probes.shape[1] // 3
        sketch = torch.stack([product(v) for v in probes[:, :third].unbind(1)], 2)  # [B, d, m]
        basis, _ = torch.linalg.qr(sketch)
        inside = sum((product(q) * q).sum(1) for q in basis.unbind(2))
        rest = probes[:, third:]
        rest = rest - (rest @ basis) @ basis.mT
        outside = sum((product(g) * g).sum(1) for g in rest.unbind(1))
        return inside + outside / rest.shape[1]

    def forwards(self, times: Tensor, /, **condition: Any) -> Tensor:
        return self.inner.forwards(times, **condition)

    def network_gradients(self, times: Tensor, /, **condition: Any) -> Tensor:
        each = self.dim if self.probes is None else self.probes.shape[1]
        if self.divergence == "hutch++" and self.probes is not None:
            each += min(each // 3, self.dim)  # the sketch's basis
        return self.inner.network_gradients(times, **condition) + each

    def rows(self, index: Tensor) -> Denoiser:
        other = copy(self)
        other.held = tuple(denoiser.rows(index) for denoiser in self.held)
        if self.probes is not None:
            other.probes = self.probes.index_select(0, index.to(self.probes.device))
        return other
