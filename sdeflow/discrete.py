r"""Diffusion of discrete data: bits and categories, with an exact posterior, an exact denoiser of a
data set and a bound in bits.

It stands beside the Gaussian core and uses only its noise. Time is an integer, $t = 0$ (data) to
$T$. Every entry of $x$ takes one of $K$ values and follows its own Markov chain, independently of
the others, with a row-stochastic matrix at every step:

$$q(x_t = k \mid x_{t-1} = j) = Q_t[j, k], \qquad
q(x_t = k \mid x_0 = a) = \bar Q_t[a, k], \qquad \bar Q_t = Q_1 Q_2 \cdots Q_t .$$

A denoiser is what it is in the Gaussian core: `denoiser(x, t, **condition)` returns
$E[x_0 \mid x_t = x]$. For bits that is $P(x_0 = 1 \mid x_t)$, of the shape of `x`. Categories stand
for their one-hot codes, so it is $P(x_0 = a \mid x_t)$, with one more axis of size $K$. Any
function or `nn.Module` of that kind will do; it is called with `t` as a float32 tensor `[B]`.

The posterior given $x_0$ is Bayes' rule, and it is linear in the one-hot code of $x_0$. Its
expectation therefore needs no more than the denoiser:

$$p(x_{t'} = j \mid x_t = k) = Q_{t' \to t}[j, k]\,\sum_a \frac{\bar Q_{t'}[a, j]}{\bar Q_t[a, k]}\,
P(x_0 = a \mid x_t), \qquad t' < t .$$

With the exact denoiser these are the exact marginals of every entry of $x_{t'}$, the best that a
reverse process with independent entries can do.

Source. Sohl-Dickstein et al. 2015, sections 2.1 to 2.4 and table 1 of the appendix; Austin et al.
2021, sections 3 and 4 (kernels as matrices).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdeflow.noise import SeededNoise

LEAST = 1e-30  # a predicted probability below it counts as it: the bound stays finite


def harmonic_betas(steps: int) -> Tensor:
    r"""`betas[t - 1] = 1 / (T - t + 1)`, float64 `[T]`: $\bar\alpha_t = 1 - t/T$, every step erases
    the same share of the data, and at $T$ nothing is left.

    Errors: `ValueError` for less than one step. Source: Sohl-Dickstein et al. 2015, section 2.4.1.
    """
    if steps < 1:
        raise ValueError(f"steps is the number of steps of the chain, at least 1; got {steps}")
    return 1.0 / torch.arange(steps, 0, -1, dtype=torch.float64)


@dataclass(frozen=True)
class DiscreteBound:
    """The variational upper bound on the bits of each sample, -log2 p(x0), under a reverse process.

    `prior` `[B]` is KL(q(x_T | x_0) || prior), `terms` `[B, draws]` are the steps, each weighted so
    that their sum estimates the sum over all steps, `total` `[B]` is the sum of both.
    """

    prior: Tensor
    terms: Tensor

    @property
    def total(self) -> Tensor:
        """Bits of each sample, `[B]`."""
        return self.prior + self.terms.sum(1)

    @property
    def mean(self) -> float:
        """The average over the samples, in bits per sample."""
        return float(self.total.mean())

    @property
    def standard_error(self) -> float:
        """The standard error of `mean`, over the samples and the noise."""
        return float(self.total.std() / math.sqrt(len(self.total)))


class CategoricalProcess:
    """A Markov chain over K categories for every entry of x: `x` holds integers from 0 to K - 1.

    - `kernels`: `[T, K, K]`, rows are distributions: `kernels[t - 1, j, k]` is
      q(x_t = k | x_{t-1} = j).
    - `prior`: `[K]`, what the reverse process starts from; by default the average of q(x_T | x_0)
      over x_0.

    Matrices are float64; states are worked on in float64 on the CPU, and in float32 elsewhere.

    Errors: `ValueError` for shapes that do not fit or rows that are not distributions.
    """

    _dtype = torch.int64

    def __init__(self, kernels: Tensor, prior: Tensor | Sequence[float] | None = None):
        self.kernels = _distributions("kernels", kernels)
        if self.kernels.ndim != 3 or self.kernels.shape[1] != self.kernels.shape[2]:
            raise ValueError(f"kernels has shape [T, K, K]; got {tuple(self.kernels.shape)}")
        self.steps, self.states = self.kernels.shape[:2]
        products = [torch.eye(self.states, dtype=torch.float64)]
        for kernel in self.kernels:
            products.append(products[-1] @ kernel)
        self.products = torch.stack(products)
        self.prior = products[-1].mean(0) if prior is None else _distributions("prior", prior)
        if self.prior.shape != (self.states,):
            raise ValueError(f"prior has shape [{self.states}]; got {tuple(self.prior.shape)}")

    @classmethod
    def resampling(
        cls, betas: Tensor | Sequence[float], rates: Tensor | Sequence[float]
    ) -> CategoricalProcess:
        r"""Step t replaces an entry, with probability `betas[t - 1]`, by a draw from `rates` `[K]`:
        $Q_t = (1 - \beta_t) I + \beta_t 1 r^T$.

        Equal rates are the uniform kernel. All weight on one category makes that category absorbing
        (a mask).
        """
        return cls(_resampling(betas, rates), rates)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={self.steps}, states={self.states})"

    # ------------------------------------------------------------------------ the forward process

    def transition(self, t: int, t_noisier: int) -> Tensor:
        """The matrix q(x_t_noisier = k | x_t = j), `[K, K]`, float64."""
        low, high = int(self._index(t)), int(self._index(t_noisier))
        if low > high:
            raise ValueError(f"transition goes from t to a noisier time; got {low} and {high}")
        product = torch.eye(self.states, dtype=torch.float64)
        for kernel in self.kernels[low:high]:
            product = product @ kernel
        return product

    def marginal(self, x0: Tensor, t: float | Tensor) -> Tensor:
        """The distribution q(x_t | x_0) of every entry, `[B, *shape, K]`; for bits the probability
        of a 1, `[B, *shape]`.

        `x0` holds data, or probabilities such as a denoiser's; `t` is one time or one a sample.
        """
        return self._pack(_apply(self._probabilities(x0), self.products[self._index(t)]))

    def posterior(self, x: Tensor, x0: Tensor, t: float | Tensor, t_next: float | Tensor) -> Tensor:
        r"""The distribution of every entry of x(t_next) given `x` at the noisier time `t` and x0,
        shaped as `marginal`.

        $$q(x_{t'} = j \mid x_t, x_0) =
        Q_{t' \to t}[j, x_t]\,\bar Q_{t'}[x_0, j] / \bar Q_t[x_0, x_t].$$

        With a denoiser's probabilities for `x0` it is the step of the reverse process. Probability
        of an x0 that cannot lead to `x` is left out; where nothing remains, every x0 that can is as
        likely.
        """
        times, times_next = torch.broadcast_tensors(self._index(t), self._index(t_next))
        pairs = list(zip(times_next.tolist(), times.tolist(), strict=True))
        known = {pair: self.transition(*pair) for pair in set(pairs)}
        steps = torch.stack([known[pair] for pair in pairs])
        codes, p = self._probabilities(x), self._probabilities(x0)
        return self._pack(self._reverse(codes, p, steps, times, times_next))

    def perturb(
        self,
        x0: Tensor,
        t: float | Tensor,
        *,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw of x_t given the data `x0`, of its shape: from `seeds`, one a sample or the first
        of consecutive ones, or from a generator.
        """
        if (seeds is None) == (generator is None):
            raise ValueError("perturb takes seeds, one a sample, or a generator")
        if seeds is None:
            uniform = torch.rand(x0.shape, device=x0.device, generator=generator)
        else:
            uniform = _uniform(self._noise(seeds, x0).draw())
        return self._perturb(x0, self._probabilities(x0), self._index(t), uniform)

    # ------------------------------------------------------------------------ the reverse process

    def times(self, nfe: int | None = None) -> list[int]:
        """The times of a reverse process of `nfe` steps: T to 0, as evenly as integers can be."""
        nfe = self.steps if nfe is None else nfe
        if not 1 <= nfe <= self.steps:
            raise ValueError(f"nfe is a number of steps from 1 to {self.steps}; got {nfe}")
        return [round(self.steps * (nfe - i) / nfe) for i in range(nfe + 1)]

    @torch.no_grad()
    def sample(
        self,
        denoiser: Callable[..., Tensor],
        *,
        n: int | None = None,
        seeds: int | Sequence[int] = 0,
        shape: Sequence[int] | None = None,
        nfe: int | None = None,
        device: torch.device | str = "cpu",
        trajectory: bool = False,
        **condition: Any,
    ) -> Tensor:
        """Samples `[n, *shape]`: draws from the prior, taken through `nfe` steps of the reverse
        process, by default all T.

        - `seeds`: one a sample, or the first of `n` consecutive ones; a row depends on its own.
        - `shape`: of one sample; by default the denoiser's.
        - `trajectory`: return the states at all `times(nfe)`, `[nfe + 1, n, *shape]`.

        Errors: `ValueError` for an unknown shape, a number of seeds that is not `n`, or an `nfe`
        above T. Cost: `nfe` calls of the denoiser.
        """
        shape = getattr(denoiser, "shape", None) if shape is None else shape
        if shape is None:
            raise ValueError("this denoiser does not know its shape: give shape, of one sample")
        noise = SeededNoise(_seeds(seeds, n), shape, device)
        uniform = _uniform(noise.start())
        x = _draw(self.prior.to(uniform).expand(*uniform.shape, -1), uniform).to(self._dtype)
        states = [x]
        for t, t_next in pairwise(self.times(nfe)):
            p = self._ask(denoiser, x, self._index(t), condition)
            step = self.transition(t_next, t)[None]
            q = self._reverse(self._probabilities(x), p, step, self._index(t), self._index(t_next))
            x = _draw(q, _uniform(noise.draw(float(t), float(t_next)))).to(self._dtype)
            if trajectory:
                states.append(x)
        return torch.stack(states) if trajectory else x

    @torch.no_grad()
    def bound(
        self,
        denoiser: Callable[..., Tensor],
        x0: Tensor,
        *,
        nfe: int | None = None,
        draws: int | None = None,
        seeds: int | Sequence[int] = 0,
        **condition: Any,
    ) -> DiscreteBound:
        r"""The variational bound on the bits of each sample of `x0`, for the chain of `nfe` steps
        from $t_0 = T$ to $t_n = 0$.

        $$-\log_2 p(x_0) \le \mathrm{KL}(q(x_T|x_0)\,\|\,\mathrm{prior}) +
        \sum_i E_q\,\mathrm{KL}(q(x_{t_{i+1}} | x_{t_i}, x_0)\,\|\,p(x_{t_{i+1}} | x_{t_i}))$$

        The last term is $-\log_2 p(x_0 | x_{t_{n-1}})$. Divergences are exact; the expectation over
        $x_t$ takes one draw for each step and sample, from the sample's seed. `draws` asks for so
        many steps a sample, spread evenly over the chain behind a random start: cheaper and without
        bias. The standard error covers both.

        Errors: `ValueError` for `nfe` or `draws` out of range. Cost: `draws` calls of the denoiser,
        by default `nfe`.
        """
        times = torch.tensor(self.times(nfe))
        steps = len(times) - 1
        draws = steps if draws is None else draws
        if not 1 <= draws <= steps:
            raise ValueError(f"draws is a number of steps from 1 to {steps}; got {draws}")
        kernels = torch.stack([self.transition(b, a) for a, b in pairwise(times.tolist())])
        noise = self._noise(seeds, x0)
        offset = _uniform(noise.draw()).flatten(1)[:, 0].cpu()
        truth = self._probabilities(x0)
        terms = []
        for i in range(draws):
            index = ((i + offset) * (steps / draws)).long().clamp(max=steps - 1)
            t, t_next = times[index], times[index + 1]
            x = self._perturb(x0, truth, t, _uniform(noise.draw()))
            p = self._ask(denoiser, x, t, condition)
            terms.append(self._term(x, truth, p, kernels[index], t, t_next))
        prior = _divergence(_apply(truth, self.products[-1:]), self.prior.to(truth))
        return DiscreteBound(prior, torch.stack(terms, 1) * (steps / draws))

    def loss(
        self,
        denoiser: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        auxiliary: float = 0.0,
        **condition: Any,
    ) -> Tensor:
        """A training loss `[B]`, in bits: T times the term of `bound` at a random time. On average
        it is the bound without its share of the prior.

        `t` `[B]` fixes the times, from 1 to T. `auxiliary` is the weight of the cross-entropy
        -log2 p(x_0 | x_t) that is added; it has the same optimum. `generator`, on the device of
        `x0`, makes all that is random. Source: Austin et al. 2021, equation 5.
        """
        if t is None:
            size = (len(x0),)
            t = torch.randint(1, self.steps + 1, size, device=x0.device, generator=generator)
        t = self._index(t)
        if bool((t < 1).any()):
            raise ValueError(f"the times of the loss lie from 1 to {self.steps}")
        truth = self._probabilities(x0)
        uniform = torch.rand(x0.shape, device=x0.device, generator=generator)
        x = self._perturb(x0, truth, t, uniform)
        p = self._ask(denoiser, x, t, condition)
        value = self.steps * self._term(x, truth, p, self.kernels[t - 1], t, t - 1)
        return value + auxiliary * _divergence(truth, p) if auxiliary else value

    # ---------------------------------------------- distributions inside are [B, *shape, K], always

    def _probabilities(self, x: Tensor) -> Tensor:
        """States as one-hot codes, or probabilities as they are."""
        if x.is_floating_point():
            if x.shape[-1] != self.states:
                raise ValueError(
                    f"states are integers; probabilities have a last axis of {self.states}; got"
                    f" {x.dtype} of shape {tuple(x.shape)}"
                )
            return x.to(_working(x))
        if x.device.type == "cpu" and not bool(((x >= 0) & (x < self.states)).all()):
            raise ValueError(f"states are integers from 0 to {self.states - 1}")
        return torch.nn.functional.one_hot(x.long(), self.states).to(_working(x))

    def _pack(self, p: Tensor) -> Tensor:
        return p

    def _index(self, t: float | Tensor) -> Tensor:
        """Times as an index, `[1]` or `[B]`, int64 on the CPU."""
        times = torch.as_tensor(t).detach().cpu().reshape(-1)
        index = times.long()
        if not bool(((index == times) & (index >= 0) & (index <= self.steps)).all()):
            raise ValueError(f"times are integers from 0 (data) to {self.steps}; got {t}")
        return index

    def _noise(self, seeds: int | Sequence[int], x0: Tensor) -> SeededNoise:
        return SeededNoise(_seeds(seeds, len(x0)), x0.shape[1:], x0.device)

    def _perturb(self, x0: Tensor, truth: Tensor, t: Tensor, uniform: Tensor) -> Tensor:
        if truth.shape[:-1] != x0.shape:
            raise TypeError("data are states, integers; these are probabilities")
        x = _draw(_apply(truth, self.products[t]), uniform)
        return x.to(x0.dtype if x0.is_floating_point() else self._dtype)

    def _ask(
        self, denoiser: Callable[..., Tensor], x: Tensor, t: Tensor, condition: dict[str, Any]
    ) -> Tensor:
        time = t.to(x.device, torch.float32).expand(len(x))
        p = self._probabilities(denoiser(x, time, **condition))
        if p.shape != (*x.shape, self.states):
            raise ValueError(
                f"a denoiser returns E[x0 | x_t]; for states of shape {tuple(x.shape)} this one"
                f" returned probabilities of shape {tuple(p.shape)}, the last axis the categories"
            )
        return p

    def _reverse(
        self, codes: Tensor, p: Tensor, steps: Tensor, t: Tensor, t_next: Tensor
    ) -> Tensor:
        likelihood = _apply(codes, self.products[t].mT)  # of x for each x0
        # LEAST decides alone where p leaves nothing that can lead to x.
        weights = (p + LEAST) / likelihood.masked_fill(likelihood == 0.0, math.inf)
        q = _apply(codes, steps.mT) * _apply(weights, self.products[t_next])
        return q / q.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)

    def _term(
        self, x: Tensor, truth: Tensor, p: Tensor, steps: Tensor, t: Tensor, t_next: Tensor
    ) -> Tensor:
        codes = self._probabilities(x)
        q = self._reverse(codes, truth, steps, t, t_next)
        return _divergence(q, self._reverse(codes, p, steps, t, t_next))


class BinomialProcess(CategoricalProcess):
    r"""Bits that are forgotten: step t replaces a bit, with probability $\beta_t$, by a new one
    that is 1 with probability `rate`.

    $$q(x_t = 1 \mid x_{t-1}) = (1 - \beta_t)\,x_{t-1} + \beta_t\,r, \qquad
    q(x_t = 1 \mid x_0) = \bar\alpha_t\,x_0 + (1 - \bar\alpha_t)\,r, \qquad
    \bar\alpha_t = \prod_{i \le t} (1 - \beta_i).$$

    A 0 flips with probability $\beta_t r$, a 1 with probability $\beta_t (1 - r)$. States are
    floating tensors of zeros and ones `[B, *shape]`; what `marginal` and `posterior` return, and
    what a denoiser returns, are probabilities of a 1, of the same shape.

    - `betas`: `[T]`, in [0, 1]; `harmonic_betas(T)` leaves nothing of the data at T.
    - `rate`: the probability of a 1 in pure noise, in (0, 1); it is the prior.

    Errors: `ValueError` for numbers out of range, or states that are not in [0, 1]. Source:
    Sohl-Dickstein et al. 2015, appendix, table 1 (with rate 0.5).
    """

    _dtype = torch.float32

    def __init__(self, betas: Tensor | Sequence[float], rate: float = 0.5):
        if not 0.0 < rate < 1.0:
            raise ValueError(f"rate is the probability of a 1 in pure noise, in (0, 1); got {rate}")
        rates = [1.0 - rate, rate]
        super().__init__(_resampling(betas, rates), rates)
        self.rate = rate

    def __repr__(self) -> str:
        return f"BinomialProcess(steps={self.steps}, rate={self.rate:g})"

    def _probabilities(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError("bits are 0 or 1, and their probabilities lie in [0, 1]")
        x = x.to(_working(x))
        return torch.stack([1.0 - x, x], -1)

    def _pack(self, p: Tensor) -> Tensor:
        return p[..., 1]


class CategoricalEmpirical:
    r"""The exact denoiser of a data set of categories: $P(x_0 = a \mid x_t)$, `[B, *shape, K]`.

    The posterior weight of datum i is proportional to
    $w_i \prod_e \bar Q_t[x_{i,e}, x_{t,e}]$, over the entries e.

    - `data`: `[N, *shape]`, integers from 0 to K - 1. `weights`: `[N]`, by default equal.
    - `process`: the path; `.under(process)` is the same data on another.

    A state that no datum can reach is answered as by those that miss it in the fewest entries.
    Works and answers in float64 on the CPU, in float32 elsewhere.

    Errors: `ValueError` for empty data, entries that are not states, or weights that do not fit.
    Cost: K^2 products of matrices `[B, dim]` and `[dim, N]`.
    """

    def __init__(
        self,
        data: Tensor,
        process: CategoricalProcess,
        weights: Tensor | Sequence[float] | None = None,
    ):
        if data.ndim < 2 or not data.numel():
            raise ValueError(f"data has shape [N, *shape], N at least 1; got {tuple(data.shape)}")
        self.data, self.process, self.shape = data, process, tuple(data.shape[1:])
        self.codes = process._probabilities(data).flatten(1, -2)
        if self.codes.shape[1] != math.prod(self.shape) or bool((self.codes % 1.0 != 0.0).any()):
            raise ValueError("data are states, not probabilities")
        equal = [1.0 / len(data)] * len(data)
        self.weights = _distributions("weights", equal if weights is None else weights)
        if self.weights.shape != (len(data),):
            raise ValueError(f"weights has shape [{len(data)}]; got {tuple(self.weights.shape)}")

    def under(self, process: CategoricalProcess) -> CategoricalEmpirical:
        """The same data set on the path of another process."""
        return type(self)(self.data, process, self.weights)

    def __call__(self, x: Tensor, t: float | Tensor, /) -> Tensor:
        """`E[x0 | x_t = x]`; `t` is one time or one a sample."""
        codes = self.process._probabilities(x).flatten(1, -2)
        data = self.codes.to(codes)
        floor = torch.finfo(codes.dtype).tiny
        table = self.process.products[self.process._index(t)].clamp_min(floor).log().to(codes)
        joint = self.weights.log().to(codes).expand(len(x), -1)
        for a in range(self.process.states):
            for k in range(self.process.states):
                joint = joint + table[:, a, k, None] * (codes[..., k] @ data[..., a].mT)
        p = torch.einsum("bn,nda->bda", joint.softmax(-1), data)
        return self.process._pack(p.reshape(*x.shape, self.process.states))


class BinaryEmpirical(CategoricalEmpirical):
    """The exact denoiser of a data set of bits `[N, *shape]`: `P(x0 = 1 | x_t)`, of the shape of x.

    As `CategoricalEmpirical`, for a `BinomialProcess`: with it, the reverse process and the bound
    are the best that independent bits in each step allow.
    """

    def __init__(
        self,
        data: Tensor,
        process: BinomialProcess,
        weights: Tensor | Sequence[float] | None = None,
    ):
        if not isinstance(process, BinomialProcess):
            raise TypeError(f"BinaryEmpirical lives on a BinomialProcess; got {process!r}")
        super().__init__(data, process, weights)


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.device.type == "cpu" else torch.float32


def _uniform(normal: Tensor) -> Tensor:
    return torch.special.ndtr(normal.to(_working(normal)))


def _draw(p: Tensor, uniform: Tensor) -> Tensor:
    """A category for every entry, int64, by inverting the distribution function."""
    return (uniform.unsqueeze(-1) >= p.cumsum(-1)[..., :-1]).sum(-1)


def _apply(p: Tensor, matrices: Tensor) -> Tensor:
    """The row vectors `[B, *shape, K]` times a matrix each sample, `[B, K, K]`, or one for all."""
    return (p.flatten(1, -2) @ matrices.to(p)).reshape(p.shape)


def _divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) in bits, summed over the entries, `[B]`."""
    p = p.clamp_min(LEAST)
    # q log(q/p) - (q - p): the second part sums to zero, and makes rounding small of second order.
    ratio = ((q - p) / p).clamp_min(torch.finfo(p.dtype).eps - 1.0)
    nats = torch.where(q > 0.0, q * torch.log1p(ratio), 0.0) - (q - p)
    return nats.flatten(1).sum(1) / math.log(2.0)


def _seeds(seeds: int | Sequence[int], n: int | None) -> Sequence[int]:
    if isinstance(seeds, int):
        return range(seeds, seeds + (1 if n is None else n))
    if n is not None and len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds for {n} samples: give one a sample, or the first")
    return seeds


def _distributions(name: str, rows: Tensor | Sequence[float]) -> Tensor:
    value = torch.as_tensor(rows, dtype=torch.float64, device="cpu")
    if not bool((value >= 0.0).all()) or not bool(((value.sum(-1) - 1.0).abs() < 1e-6).all()):
        raise ValueError(
            f"{name} must be distributions: not negative, their sum along the last axis 1"
        )
    return value


def _resampling(betas: Tensor | Sequence[float], rates: Tensor | Sequence[float]) -> Tensor:
    table = torch.as_tensor(betas, dtype=torch.float64, device="cpu").reshape(-1, 1, 1)
    if not bool(((table >= 0.0) & (table <= 1.0)).all()) or not len(table):
        raise ValueError("betas are probabilities, one a step, in [0, 1]")
    stationary = _distributions("rates", rates)
    return (1.0 - table) * torch.eye(len(stationary), dtype=torch.float64) + table * stationary
