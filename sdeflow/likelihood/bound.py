r"""The variational bound of a chain, term by term, and its continuous-time form.

For times $t_N > \dots > t_1$ and the reverse chain $p(x_N) \prod p(x_{i-1} | x_i)\,p(x_0 | x_1)$,

$$-\log p(x_0) \le \underbrace{\mathrm{KL}(q(x_N|x_0)\,\|\,p(x_N))}_{\text{prior}}
+ \sum_{i=2}^N \underbrace{E_q\,\mathrm{KL}(q(x_{i-1}|x_i, x_0)\,\|\,p(x_{i-1}|x_i))}_{\text{terms}}
\underbrace{-\,E_q\log p(x_0|x_1)}_{\text{decoder}} .$$

With $r = \mathrm{nsr}_{i-1}/\mathrm{nsr}_i$, $u^2 = \sigma_{i-1}^2(1 - r^2)$,
$b = s_{i-1}(1 - r^2)$ and the variance $v$ of the reverse step, a term is, summed over the entries,

$$\tfrac12\Big(\frac{u^2}{v} - 1 - \log\frac{u^2}{v} + \frac{b^2 (\hat x_0 - x_0)^2}{v}\Big).$$

As the steps become many the terms become an integral over $\lambda = \log(s/\sigma)$ that no choice
of variance enters, $\int E|\varepsilon - \hat\varepsilon|^2\,d\lambda$, estimated at random
$\lambda$.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow._utils.checks import is_whole, one_of, positive_number
from sdeflow._utils.gaussian import discretised_nll, divergence, gaussian_nll
from sdeflow.denoisers import Denoiser, as_denoiser
from sdeflow.noise import Noise, SeededNoise
from sdeflow.process import Process
from sdeflow.sampling.inputs import Conditions
from sdeflow.solvers.base import check_times
from sdeflow.solvers.sde.optimal import TOP, Optimal

Variance = Literal["small", "large", "learned"] | Optimal


@dataclass(frozen=True)
class Bound:
    """The variational upper bound on `-log p(x0)` of each sample, in nats.

    `prior` and `decoder` are `[B]`. `terms` `[B, K]` are the steps from the noisiest on, at the
    times `times` (`[K]`, or `[B, K]` where they were drawn); where they are a random selection,
    each is weighted so that their sum estimates the sum of all.
    """

    prior: Tensor
    terms: Tensor
    decoder: Tensor
    times: Tensor
    dim: int

    @property
    def total(self) -> Tensor:
        """Nats of each sample, `[B]`: prior, terms and decoder together."""
        return self.prior + self.terms.sum(1) + self.decoder

    @property
    def mean(self) -> Tensor:
        """The average over the samples, in nats; gradients flow through it."""
        return self.total.mean()

    @property
    def bits_per_dim(self) -> float:
        """The average over the samples, in bits per entry."""
        return float(self.mean.detach()) / (self.dim * math.log(2.0))

    @property
    def standard_error(self) -> float:
        """The standard error of `bits_per_dim`, over the samples, their noise and their times."""
        if len(self.total) < 2:
            return math.nan
        spread = float(self.total.detach().std()) / math.sqrt(len(self.total))
        return spread / (self.dim * math.log(2.0))

    def __str__(self) -> str:
        nats = (
            float(part.detach().mean()) for part in (self.prior, self.terms.sum(1), self.decoder)
        )
        prior, terms, decoder = (part / (self.dim * math.log(2.0)) for part in nats)
        return (
            f"{self.bits_per_dim:.4f} bits/dim +- {self.standard_error:.4f}: prior {prior:.4f},"
            f" {self.terms.shape[1]} terms {terms:.4f}, decoder {decoder:.4f}"
        )


def variational_bound(
    model: Denoiser | Callable[..., Tensor],
    x0: Tensor,
    process: Process | None = None,
    *,
    times: Tensor | Sequence[float] | Literal["continuous"] | None = None,
    variance: Variance = "small",
    decoder: Literal["discretised", "gaussian"] = "discretised",
    prior_std: float | None = None,
    draws: int | None = None,
    proposal_std: float | None = 0.5,
    levels: int = 256,
    condition: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 0,
    noise: Noise | None = None,
    requires_grad: bool = False,
) -> Bound:
    r"""The variational bound on `-log p(x0)` of each sample of `x0` `[B, *shape]`: prior, every
    term, and decoder.

    - `times`: the chain's; by default the entries of the process's table of betas. `"continuous"`
      takes the limit of infinitely many steps between `t_max` and `t_min`.
    - `variance`: of the reverse steps, `"small"`, `"large"`, `"learned"` or `Optimal(...)`, as in
      `DDPM`. With `"small"` the decoder, whose posterior variance is 0, has that of the step before
      it (with one time only: "large").
    - `decoder`: `"discretised"` for data of `levels` equally spaced values from -1 to 1, a
      probability; `"gaussian"` for real data, a density. Its mean is the prediction at the last
      time.
    - `prior_std`: of `p(x_N) = N(0, prior_std^2 I)`, by default `sigma(t_N)`, from which samplers
      start. DDPM's is 1.
    - `draws`: so many of the terms for each sample, spread over the chain behind a random start: no
      bias, a standard error. By default all; 1 for `"continuous"`.
    - `proposal_std`: for `"continuous"`, the density of lam is proportional to `c^2 / (c^2 +
      nsr^2)` with `c` this number, for which the integrand of data of that standard deviation does
      not vary. `None` draws lam uniformly.
    - `seeds`: one a sample, or the first of consecutive ones; or a `noise` of your own.
    - `requires_grad`: let gradients flow, to the network and to `LearnedBetas`.

    With the optimal variances on Gaussian data `N(m, c^2 I)` the expected total is the entropy of
    the data and `KL(p(x_N) || N(0, prior_std^2 I))`, at any number of steps.

    Errors: `ValueError` for a process without a table where `times` is missing, draws out of range,
    or a learned variance that the model does not have. Cost: a call of the denoiser for each term,
    and one. Source: Ho et al. 2020, equations 5 and 13; Nichol & Dhariwal 2021; Kingma et al.
    (VDM) 2021, equation 17.
    """
    denoiser = as_denoiser(model, process)
    path = denoiser.process
    one_of("decoder", decoder, ("discretised", "gaussian"))
    if not isinstance(variance, Optimal):
        one_of("variance", variance, ("small", "large", "learned"))
    if variance == "learned" and "fraction" not in denoiser.outputs:
        raise ValueError(
            "variance='learned' needs a network that says it: Prediction(...,"
            " learned_variance=True)"
        )
    continuous = isinstance(times, str)
    if continuous:
        one_of("times", times, ("continuous", None))
        grid = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
    else:
        grid = _times(path, times)
    if noise is None:
        keys = range(seeds, seeds + len(x0)) if isinstance(seeds, int) else seeds
        noise = SeededNoise(keys, x0.shape[1:], x0.device, x0.dtype)
    given = Conditions(condition, len(x0), x0.device).values
    chain = _Chain(denoiser, x0, grid, variance, noise, given)
    with torch.enable_grad() if requires_grad else torch.no_grad():
        prior = chain.prior(prior_std)
        if continuous:
            terms, at = chain.integral(1 if draws is None else draws, proposal_std)
        else:
            terms, at = chain.terms(draws)
        nll = gaussian_nll if decoder == "gaussian" else discretised_nll
        last = chain.decoder(nll, levels if decoder == "discretised" else None, continuous)
    return Bound(prior, terms, last, at, x0[0].numel())


def _times(process: Process, times: Any) -> Tensor:
    """The chain's times, from the noisiest on."""
    if times is not None:
        grid = check_times(times)
        return grid.flip(0) if len(grid) > 1 and grid[0] < grid[-1] else grid
    table = getattr(process, "betas", None)
    if table is None:
        raise ValueError(
            f"{process!r} has no table of steps: give times=, or times='continuous' for the limit"
            " of infinitely many"
        )
    n = len(table)
    return torch.arange(n, 0, -1, dtype=torch.float64) / n


@dataclass
class _Chain:
    """The parts of a bound, for a batch."""

    denoiser: Denoiser
    x0: Tensor
    times: Tensor
    variance: Variance
    noise: Noise
    condition: dict[str, Any]

    def _shaped(self, number: Tensor) -> Tensor:
        number = number.to(self.x0.device, self.x0.dtype)
        return number.reshape(-1, *[1] * (self.x0.ndim - 1)) if number.ndim else number

    def _predict(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """`x0_hat - x0` and the fraction of a learned variance, for fresh noise at the times."""
        s, sigma = (self._shaped(c) for c in self.denoiser.process.kernel(t))
        x = s * self.x0 + sigma * self.noise.draw().to(self.x0)
        if self.variance == "learned":
            x0, fraction = self.denoiser.predict(x, t, **self.condition)[:2]
            return x0 - self.x0, fraction
        return self.denoiser(x, t, **self.condition) - self.x0, None

    def _error(self, nsr: Tensor) -> Tensor:
        assert isinstance(self.variance, Optimal)
        values = [self.variance.mean_squared_error(n) for n in nsr.detach().reshape(-1).tolist()]
        return torch.tensor(values, dtype=torch.float64).reshape(nsr.shape)

    def prior(self, std: float | None) -> Tensor:
        s, sigma = self.denoiser.process.kernel(self.times[0])
        width = (
            sigma
            if std is None
            else torch.tensor(positive_number("prior_std", std), dtype=torch.float64)
        )
        mean = self._shaped(s) * self.x0
        log_q, log_p = (self._shaped(2.0 * c.log()) for c in (sigma, width))
        return divergence(mean.square(), log_q, log_p).flatten(1).sum(1)

    def _step(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`log u^2`, `b` and the log variance of "large", of steps between two times."""
        path = self.denoiser.process
        (s, sigma), (s_next, sigma_next) = path.kernel(t), path.kernel(t_next)
        ratio = sigma_next * s / (s_next * sigma)
        lost = (1.0 - ratio) * (1.0 + ratio)
        log_small = (sigma_next**2 * lost).log()
        return log_small, s_next * lost, log_small + 2.0 * (sigma / sigma_next).log()

    def terms(self, draws: int | None) -> tuple[Tensor, Tensor]:
        steps = len(self.times) - 1
        if draws is not None and not is_whole(draws, 1, steps):
            raise ValueError(f"draws is a number of the chain's terms, 1 to {steps}; got {draws}")
        if steps == 0:
            return self.x0.new_zeros(len(self.x0), 0), self.times[:0]
        if draws is None:
            found = [self._term(t, u) for t, u in zip(self.times[:-1], self.times[1:], strict=True)]
            return torch.stack(found, 1), self.times[:-1]
        offset = self._offset()
        found, at = [], []
        for k in range(draws):
            index = ((k + offset) * (steps / draws)).long().clamp(max=steps - 1)
            found.append(self._term(self.times[index], self.times[index + 1]))
            at.append(self.times[index])
        return torch.stack(found, 1) * (steps / draws), torch.stack(at, 1)

    def _offset(self) -> Tensor:
        """A uniform number for each sample, `[B]`, float64 on the CPU."""
        normal = self.noise.draw().flatten(1)[:, 0]
        return torch.special.ndtr(normal.to("cpu", torch.float64)).clamp(max=1 - 1e-12)

    def _term(self, t: Tensor, t_next: Tensor) -> Tensor:
        gap, fraction = self._predict(t)
        log_small, b, log_large = self._step(t, t_next)
        small = self._shaped(log_small)
        log_v: Tensor = small
        if fraction is not None:
            log_v = small + fraction * (self._shaped(log_large) - small)
        elif self.variance == "large":
            log_v = self._shaped(log_large)
        elif isinstance(self.variance, Optimal):
            error = self._error(self.denoiser.process.nsr(t))
            log_v = self._shaped((log_small.exp() + b**2 * error).log())
        return divergence((self._shaped(b) * gap).square(), small, log_v).flatten(1).sum(1)

    def integral(self, draws: int, std: float | None) -> tuple[Tensor, Tensor]:
        if not is_whole(draws, 1):
            raise ValueError(f"draws is a number of times a sample, at least 1; got {draws}")
        path = self.denoiser.process
        low, high = self.denoiser.nsr_range
        ends = path.nsr(self.times).tolist()
        first, last = (
            max(-math.log(ends[0]), -math.log(min(high, TOP))),
            -math.log(max(ends[1], low)),
        )
        offset = self._offset()
        found, at = [], []
        for k in range(draws):
            u = (k + offset) / draws
            if std is None:
                lam = first + u * (last - first)
                weight = torch.full_like(lam, last - first)
            else:  # G(lam) = log(1 + c^2 e^(2 lam)) / 2, whose derivative is the proposal
                c2 = positive_number("proposal_std", std) ** 2
                below, above = (0.5 * math.log1p(c2 * math.exp(2.0 * e)) for e in (first, last))
                place = below + u * (above - below)
                lam = 0.5 * (torch.expm1(2.0 * place) / c2).log()
                weight = (above - below) * (1.0 + torch.exp(-2.0 * lam) / c2)
            t = path.t_of_lam(lam)
            gap, _ = self._predict(t)
            factor = (weight * torch.exp(2.0 * lam)).to(self.x0.device, self.x0.dtype)
            found.append(factor * gap.square().flatten(1).sum(1) / draws)
            at.append(t)
        return torch.stack(found, 1), torch.stack(at, 1)

    def decoder(self, nll: Callable[..., Tensor], levels: int | None, continuous: bool) -> Tensor:
        t = self.times[-1]
        gap, fraction = self._predict(t)
        log_large = self._shaped(2.0 * self.denoiser.process.sigma(t).log())
        log_small = log_large
        if len(self.times) > 1 and not continuous:
            log_small = self._shaped(self._step(self.times[-2], t)[0])
        log_v = log_small if self.variance == "small" else log_large
        if fraction is not None:
            log_v = log_small + fraction * (log_large - log_small)
        elif isinstance(self.variance, Optimal):
            log_v = self._shaped(self._error(self.denoiser.process.nsr(t)).log())
        more = {} if levels is None else {"levels": levels}
        return nll(self.x0, self.x0 + gap, log_v, **more).flatten(1).sum(1)
