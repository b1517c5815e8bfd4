r"""The training losses of the literature, as frozen values:
`loss(model, x0, t=None, eps=None, generator=None, **condition)` is the loss `[B]` of each sample.

    loss = Simple("v", weight=MinSNR(5.0))
    loss(Prediction(network, "v", VP()), x0, generator=generator).mean().backward()

`model` is a denoiser on the process that its network was trained under: a `Prediction` or a
`Preconditioned`. What is random and not given is drawn from `generator`, on the device of `x0`: the
times `t` `[B]`, and the noise `eps` of the shape of `x0`. All losses are means over a sample's
values, not sums.

Every regression loss is one: with $x = s\,x_0 + \sigma\,\varepsilon$ and a prediction that is
affine in $\hat x_0$, whatever is predicted, it is $w(t)\,|\hat x_0 - x_0|^2$.

| predicted | $w$ |
|---|---|
| x0 | $1$ |
| eps | $s^2/\sigma^2$ |
| v | $(s^2 + \sigma^2)/\sigma^2$ |
| velocity | $(s' - s\,\sigma'/\sigma)^2$ |
| score, times a weight $\lambda$ | $\lambda\,s^2/\sigma^4$ |
| EDM's preconditioned network, $n$ = nsr, $d$ = `sigma_data` | $(n^2 + d^2)/(n d)^2$ |

So what a network predicts and what a loss weighs are two choices. The loss is computed from the
network's own output $F$ and the target $F^*$ that belongs to $x_0$, as $w\,\mathrm{out}^2\,|F -
F^*|^2$, with coefficients that have no small differences of large numbers.

Source. Ho et al. 2020, equation 14; Vincent 2011; Hyvarinen 2005; Song et al. 2019 (sliced); Song
et al. 2021; Karras et al. 2022, equation 8; Lipman et al. 2022; Hang et al. 2023 (min-SNR); Choi et
al. 2022 (P2); Ning et al. 2023 (input perturbation); Nichol and Dhariwal 2021 (hybrid); Kingma et
al. 2021, appendix I.1 (stratified noise levels); Ho and Salimans 2021 (label dropout).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from sdeflow._utils.checks import fraction, one_of, positive_number, whole_number
from sdeflow._utils.gaussian import discretised_nll, divergence, gaussian_nll
from sdeflow._utils.math import derivative
from sdeflow.denoisers import Denoiser, Parametrisation, Preconditioned, Prediction
from sdeflow.denoisers.network import Affine, Network
from sdeflow.errors import unknown
from sdeflow.process import FromBetas, Process


class At(NamedTuple):
    """A process at the times of a batch, `[B, 1, ...]`: what a weight is a function of."""

    s: Tensor
    sigma: Tensor
    ds: Tensor | None = None
    dsigma: Tensor | None = None

    @property
    def snr(self) -> Tensor:
        """`s^2 / sigma^2`."""
        return (self.s / self.sigma) ** 2


class Weight(Protocol):
    """A weight of `|x0_hat - x0|^2`, as a function of the level."""

    def __call__(self, at: At, /) -> Tensor: ...


@dataclass(frozen=True)
class MinSNR:
    """The weight `min(snr, gamma)` of `|x0_hat - x0|^2`: for eps `min(snr, gamma) / snr`, for v
    under VP `min(snr, gamma) / (snr + 1)`.

    Source: Hang et al. 2023, with gamma = 5.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        positive_number("gamma of MinSNR", self.gamma)

    def __call__(self, at: At, /) -> Tensor:
        return at.snr.clamp(max=self.gamma)


@dataclass(frozen=True)
class P2:
    """The weight `snr / (k + snr)^gamma` of `|x0_hat - x0|^2`: for eps `1 / (k + snr)^gamma`.

    Source: Choi et al. 2022, with k = 1 and gamma = 1.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        positive_number("k of P2", self.k)

    def __call__(self, at: At, /) -> Tensor:
        return at.snr / (self.k + at.snr) ** self.gamma


# ------------------------------------------------------------------------------------- the contract


class Loss(ABC):
    """A training loss; a subclass says what the loss is at given times and noise (`at_noise`).

    Errors: `TypeError` for what is no denoiser; `ValueError` for a network that is asked under
    another process than its own.
    """

    path: Process | None = None
    stratified: bool = False

    def __call__(
        self,
        model: Denoiser,
        x0: Tensor,
        t: float | Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        **condition: Any,
    ) -> Tensor:
        """The loss `[B]` of each sample of `x0` `[B, ...]`."""
        times = self.times(model, x0, t, generator)
        if eps is None:
            eps = _normal(x0, generator)
        return self.at_noise(model, x0, times, eps, None, condition)

    @abstractmethod
    def at_noise(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        seen: Tensor | None,
        condition: dict[str, Any],
    ) -> Tensor:
        """The loss at the times `t` `[B]` with the noise `eps`; the network's input has the noise
        `seen` in its place, where it is given.
        """

    def times(
        self,
        model: Denoiser,
        x0: Tensor,
        t: float | Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Times `[B]` of the model's process: `t`, or draws. They are uniform over the entries of a
        table of betas, or over the time of the process (or of `path`).
        """
        process = _process_of(model)
        dtype = torch.float64 if x0.device.type == "cpu" else torch.float32
        if t is not None:
            given = torch.as_tensor(t, dtype=dtype, device=x0.device)
            return given.expand(len(x0))
        u = _uniform(len(x0), x0.device, generator, self.stratified).to(dtype)
        path = self.path or process
        if isinstance(path, FromBetas):
            times = ((u * len(path.betas)).floor() + 1.0) / len(path.betas)
        else:
            times = path.t_min + u * (path.t_max - path.t_min)
        if path == process:
            return times
        low, high = model.nsr_range
        return process.t_of_nsr(path.nsr(times).clamp(low, high))

    def describe(self) -> str:
        """The loss in a line, for a model card."""
        return repr(self)


def _process_of(model: Denoiser) -> Process:
    if not isinstance(model, Denoiser):
        raise TypeError(
            "a loss takes a Denoiser, such as Prediction(network, 'eps', VP()) or"
            f" Preconditioned(network); got {type(model).__name__}"
        )
    native = getattr(model, "native", model.process)
    if native != model.process:
        raise ValueError(
            f"a network is trained under its own process, {native!r}; this one was put under"
            f" {model.process!r}"
        )
    return model.process


def _uniform(
    n: int, device: torch.device, generator: torch.Generator | None, stratified: bool
) -> Tensor:
    """Uniform numbers `[n]` in [0, 1), one from each of n equal slices where `stratified`."""
    if not stratified:
        return torch.rand(n, device=device, generator=generator)
    start = torch.rand((), device=device, generator=generator)
    return (torch.arange(n, device=device) / n + start) % 1


def _normal(x0: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x0.shape, device=x0.device, dtype=x0.dtype, generator=generator)


def _shaped(number: Tensor, x0: Tensor) -> Tensor:
    """`[B]` or `[]` as `[B, 1, ...]`, in the dtype of `x0`."""
    number = number.to(x0.dtype)
    return number.reshape(-1, *[1] * (x0.ndim - 1)) if number.ndim else number


def _level(process: Process, t: Tensor, x0: Tensor, slopes: bool = False) -> At:
    """The process at `t`, in the dtype of the times."""
    s, sigma = process.s(t), process.sigma(t)
    if not slopes:
        return At(s, sigma)
    return At(s, sigma, derivative(process.s, t), derivative(process.sigma, t))


def _asked(
    network: Network, numbers: Affine, x: Tensor, condition: dict[str, Any], whole: bool = False
) -> Tensor:
    """The network's output for the state `x`; with `whole` that of all its channels."""
    time = numbers.time if not numbers.time.is_floating_point() else numbers.time.float()
    ask = network._output if whole else network._run
    return ask(x * _shaped(numbers.scale, x), time.expand(len(x)), condition, network.dtype)


def _target(numbers: Affine, at: At, x0: Tensor, eps: Tensor) -> Tensor:
    """The output that would say `x0`: `(x0 - skip x) / out` with `x = s x0 + sigma eps`."""
    of_x0 = (1.0 - numbers.skip * at.s) / numbers.out
    of_eps = numbers.skip * at.sigma / numbers.out
    return _shaped(of_x0, x0) * x0 - _shaped(of_eps, x0) * eps


# ------------------------------------------------------------------------------------- regressions


class Regression(Loss):
    """A loss `weight(t) |x0_hat - x0|^2`, the mean over a sample's values."""

    slopes: bool = False
    """Whether the weight needs the derivatives of the process."""

    @abstractmethod
    def weigh(self, at: At) -> Tensor:
        """The weight of `|x0_hat - x0|^2` at a level of `path` (or of the model's process)."""

    def at_noise(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        seen: Tensor | None,
        condition: dict[str, Any],
    ) -> Tensor:
        process = _process_of(model)
        at = _level(process, t, x0)
        path, t_path = self.path or process, t
        if path != process:
            t_path = path.t_of_nsr(process.nsr(t))
        weight = self.weigh(_level(path, t_path, x0, self.slopes))
        s, sigma = _shaped(at.s, x0), _shaped(at.sigma, x0)
        x = s * x0 + sigma * (eps if seen is None else seen)
        if isinstance(model, Network):
            numbers = model.affine(t)
            weight = weight * numbers.out**2
            wrong = _asked(model, numbers, x, condition) - _target(numbers, at, x0, eps)
        elif seen is not None:
            raise TypeError(
                "input perturbation trains a network's own output: pass a Prediction or a"
                f" Preconditioned, not {type(model).__name__}"
            )
        else:
            wrong = model(x, t, **condition) - x0
        return weight.to(wrong.dtype) * wrong.square().flatten(1).mean(1)


def _predicted(predicts: str, at: At) -> Tensor:
    """The weight of `|x0_hat - x0|^2` that makes it the squared error of another prediction."""
    match predicts:
        case "x0":
            return torch.ones_like(at.s)
        case "eps":
            return at.snr
        case "v":
            return 1.0 + at.snr
        case "score":
            return at.snr / at.sigma**2
    assert at.ds is not None
    assert at.dsigma is not None
    return (at.ds - at.s * at.dsigma / at.sigma) ** 2


@dataclass(frozen=True)
class Simple(Regression):
    """The squared error of eps, x0, v, the velocity or the score: DDPM's L_simple and its
    relatives.

    - `predicts`: whose squared error; the network may predict something else.
    - `weight`: a weight of `|x0_hat - x0|^2` in place of that one: `MinSNR()`, `P2()`, or a
      function of the level.
    - `path`: the process whose time is uniform and whose quantities are meant, by default the
      model's own.
    - `stratified`: times from equal slices of the batch.

    On data `N(0, c^2 I)` the least loss at a time is `w c^2 sigma^2 / (s^2 c^2 + sigma^2)`. Source:
    Ho et al. 2020, equation 14 (eps, uniform over the entries of a table); Salimans & Ho 2022 (v).
    """

    predicts: Parametrisation = "eps"
    weight: Weight | None = None
    path: Process | None = None
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.predicts not in get_args(Parametrisation):
            raise unknown("prediction", self.predicts, get_args(Parametrisation))

    @property
    def slopes(self) -> bool:  # type: ignore[override]
        return self.weight is None and self.predicts == "velocity"

    def weigh(self, at: At) -> Tensor:
        return _predicted(self.predicts, at) if self.weight is None else self.weight(at)


@dataclass(frozen=True)
class FlowMatching(Regression):
    """Flow matching: the squared error of the velocity `s' x0 + sigma' eps`; under rectified flow
    that is `eps - x0`.

    `logit_std=None` draws the time uniformly. A number draws `log nsr` normally, with `logit_mean`
    and that standard deviation: under rectified flow that is the logit of t. `path` and
    `stratified` as in `Simple`. Source: Lipman et al. 2022; Liu et al. 2022; Esser et al. 2024
    (logit-normal times).
    """

    logit_mean: float = 0.0
    logit_std: float | None = None
    path: Process | None = None
    stratified: bool = False

    slopes = True

    def __post_init__(self) -> None:
        if self.logit_std is not None:
            positive_number("logit_std of FlowMatching", self.logit_std)

    def weigh(self, at: At) -> Tensor:
        return _predicted("velocity", at)

    def times(
        self,
        model: Denoiser,
        x0: Tensor,
        t: float | Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        if t is not None or self.logit_std is None:
            return super().times(model, x0, t, generator)
        process = _process_of(model)
        u = _uniform(len(x0), x0.device, generator, self.stratified)
        return _lognormal_times(process, u, self.logit_mean, self.logit_std)


def _lognormal_times(process: Process, uniform: Tensor, mean: float, std: float) -> Tensor:
    nsr = (mean + std * _normal_quantile(uniform)).exp()
    if nsr.device.type == "cpu":
        nsr = nsr.double()
    return process.t_of_nsr(nsr)


def _normal_quantile(uniform: Tensor) -> Tensor:
    # An ulp from 0 or 1 the inverse of the normal distribution is infinite; 1e-6 is 4.75 standard
    # deviations out.
    return math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)


@dataclass(frozen=True)
class EDMLoss(Regression):
    r"""The EDM-weighted denoising loss, `(n^2 + d^2) / (n d)^2 |x0_hat - x0|^2` with `n` = nsr and
    `d` = `sigma_data`.

    Behind `Preconditioned` it is $|F - (x_0 - c_{skip} x)/c_{out}|^2$, so that the network sees
    inputs and targets of unit variance at every noise level.

    `log(nsr)` is normal with `mean` and `std`, stratified over the batch: each of B equally likely
    slices is drawn from once, which leaves each draw's distribution as it is and the batch's
    average less noisy. A label (the condition `label`) becomes `null_label` ("no label") with
    probability `label_dropout`, so that the same network also learns the unconditional score;
    `null_label=None` leaves labels alone. Raises `ValueError` for numbers out of range.

    Source: Karras et al. 2022, equation 8 and table 1.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5
    label_dropout: float = 0.1
    null_label: int | None = None

    def __post_init__(self) -> None:
        positive_number("std of EDMLoss", self.std)
        positive_number("sigma_data of EDMLoss", self.sigma_data)
        fraction("label_dropout of EDMLoss", self.label_dropout)

    def nsr(self, batch: int, generator: torch.Generator) -> Tensor:
        """Noise-to-signal ratios [B], float32, one from each of B equally likely slices."""
        uniform = _uniform(batch, generator.device, generator, stratified=True)
        return (self.mean + self.std * _normal_quantile(uniform)).exp()

    def labels(self, label: Tensor | None, generator: torch.Generator | None) -> Tensor | None:
        """`label` [B] with some of its entries replaced by the null label."""
        if label is None or self.null_label is None:
            return label
        return dropped(label, self.label_dropout, self.null_label, generator)

    def weigh(self, at: At) -> Tensor:
        n = at.sigma / at.s
        return (n * n + self.sigma_data**2) / (n * self.sigma_data) ** 2

    def at(
        self,
        network: Callable[..., Tensor],
        x0: Tensor,
        nsr: Tensor,
        eps: Tensor,
        label: Tensor | None = None,
    ) -> Tensor:
        """The loss [B] of a network behind `Preconditioned` at the noise levels `nsr` [B] with the
        noise `eps`.
        """
        n = nsr.view(-1, *[1] * (x0.ndim - 1))
        d = self.sigma_data
        root = torch.sqrt(n * n + d * d)
        x = x0 + n * eps
        # (x0 - c_skip x) / c_out, with x0 - c_skip x = n (n x0 - d^2 eps) / root^2
        target = (n * x0 - d * d * eps) / (root * d)
        output = (
            network(x / root, nsr.log() / 4)
            if label is None
            else network(x / root, nsr.log() / 4, label)
        )
        return (output.float() - target).square().flatten(1).mean(1)

    def __call__(
        self,
        model: Denoiser,
        x0: Tensor,
        t: float | Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        **condition: Any,
    ) -> Tensor:
        """The loss `[B]` of each sample of `x0` `[B, ...]`."""
        times = self.times(model, x0, t, generator)
        if eps is None:
            eps = _normal(x0, generator)
        if condition.get("label") is not None:
            condition["label"] = self.labels(condition["label"], generator)
        plain = isinstance(model, Preconditioned) and model.sigma_data == self.sigma_data
        if plain and x0.dtype == torch.float32 and not {*condition} - {"label"}:
            nsr = times.to(x0.dtype)
            return self.at(model.network, x0, nsr, eps, condition.get("label"))  # type: ignore[attr-defined]
        return self.at_noise(model, x0, times, eps, None, condition)

    def times(
        self,
        model: Denoiser,
        x0: Tensor,
        t: float | Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        if t is not None:
            return super().times(model, x0, t, generator)
        process = _process_of(model)
        uniform = _uniform(len(x0), x0.device, generator, stratified=True)
        nsr = (self.mean + self.std * _normal_quantile(uniform)).exp()
        if isinstance(model, Preconditioned):
            return nsr
        return process.t_of_nsr(nsr.double() if nsr.device.type == "cpu" else nsr)

    def describe(self) -> str:
        """The loss in a line, for a model card."""
        return (
            f"EDM-weighted denoising loss, log(nsr) ~ N({self.mean:g}, {self.std:g}^2) stratified"
            f" over the batch, sigma_data {self.sigma_data:g}, label dropout {self.label_dropout:g}"
        )


# ----------------------------------------------------------------------------------- score matching

Lambda = Literal["sigma2", "g2", "one"]
"""The weight of a score-matching loss: `sigma^2`, the squared diffusion coefficient `g^2` (for
which denoising score matching bounds the likelihood), or 1.
"""


def _lambda(name: Lambda, process: Process, t: Tensor, sigma: Tensor) -> Tensor:
    if name == "sigma2":
        return sigma**2
    return process.g2(t) if name == "g2" else torch.ones_like(sigma)


def _score(model: Denoiser, x: Tensor, t: Tensor, at: At, condition: dict[str, Any]) -> Tensor:
    """`(s x0_hat - x) / sigma^2`."""
    if isinstance(model, Network):
        numbers = model.affine(t)
        output = _asked(model, numbers, x, condition)
        of_x = (at.s * numbers.skip - 1.0) / at.sigma**2
        return _shaped(of_x, x) * x + _shaped(at.s * numbers.out / at.sigma**2, x) * output
    x0 = model(x, t, **condition)
    return (_shaped(at.s, x) * x0 - x) / _shaped(at.sigma**2, x)


@dataclass(frozen=True)
class DSM(Regression):
    r"""Denoising score matching: $\lambda\,|s_\theta(x) - \nabla_x\log q(x|x_0)|^2$, where the
    gradient is $-\varepsilon/\sigma$.

    `weight` is lambda: "sigma2" (then it is the error of eps), "g2" (maximum likelihood) or "one".
    Source: Vincent 2011; Song et al. 2021, equation 7, and "Maximum likelihood training" (2021).
    """

    weight: Lambda = "sigma2"
    stratified: bool = False

    def __post_init__(self) -> None:
        one_of("weight of DSM", self.weight, get_args(Lambda))

    @property
    def slopes(self) -> bool:  # type: ignore[override]
        return self.weight == "g2"

    def weigh(self, at: At) -> Tensor:
        score = at.snr / at.sigma**2
        if self.weight == "one":
            return score
        if self.weight == "sigma2":
            return at.snr
        assert at.ds is not None
        assert at.dsigma is not None
        return score * 2.0 * at.sigma * (at.dsigma - at.ds / at.s * at.sigma)


@dataclass(frozen=True)
class ESM(Loss):
    r"""Exact score matching: $\lambda\,|s_\theta(x) - \nabla\log p(x)|^2$, for data whose score is
    known. Its least value is 0.

    `target` is a `Target` (`score(x, t)` on the model's process) or a function `score(x, t)`.
    `weight` as in `DSM`. Source: Hyvarinen 2005.
    """

    target: Any
    weight: Lambda = "sigma2"
    stratified: bool = False

    def __post_init__(self) -> None:
        one_of("weight of ESM", self.weight, get_args(Lambda))
        if not callable(getattr(self.target, "score", self.target)):
            raise TypeError(f"ESM needs a target with a score(x, t); got {self.target!r}")

    def at_noise(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        seen: Tensor | None,
        condition: dict[str, Any],
    ) -> Tensor:
        process = _process_of(model)
        at = _level(process, t, x0)
        x = _shaped(at.s, x0) * x0 + _shaped(at.sigma, x0) * eps
        exact = getattr(self.target, "score", self.target)(x, t)
        wrong = _score(model, x, t, at, condition) - exact
        weight = _lambda(self.weight, process, t, at.sigma)
        return weight.to(wrong.dtype) * wrong.square().flatten(1).mean(1)


@dataclass(frozen=True)
class SSM(Loss):
    r"""Sliced score matching: $\lambda\,(|s_\theta|^2 + 2\,v^T (\nabla s_\theta)\,v)/d$, the
    average over `probes` random directions $v$; no score of the data is needed.

    In expectation it is exact score matching less $\lambda E|\nabla\log p|^2/d$: its least value is
    minus that. Each probe costs one product with the Jacobian, a backward pass through the network
    (and one more for the gradient of the loss). `directions` are "rademacher" (for which
    $v^T v = d$) or "normal". Source: Song et al. 2019, with variance reduction (equation 8).
    """

    probes: int = 1
    weight: Lambda = "sigma2"
    directions: Literal["rademacher", "normal"] = "rademacher"
    stratified: bool = False

    def __post_init__(self) -> None:
        whole_number("probes of SSM", self.probes)
        one_of("weight of SSM", self.weight, get_args(Lambda))
        one_of("directions of SSM", self.directions, ("rademacher", "normal"))

    def __call__(
        self,
        model: Denoiser,
        x0: Tensor,
        t: float | Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        **condition: Any,
    ) -> Tensor:
        """The loss `[B]` of each sample of `x0` `[B, ...]`."""
        times = self.times(model, x0, t, generator)
        if eps is None:
            eps = _normal(x0, generator)
        probes = [_normal(x0, generator) for _ in range(self.probes)]
        if self.directions == "rademacher":
            probes = [torch.where(v < 0, -torch.ones_like(v), torch.ones_like(v)) for v in probes]
        return self.along(model, x0, times, eps, probes, condition)

    def at_noise(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        seen: Tensor | None,
        condition: dict[str, Any],
    ) -> Tensor:
        raise TypeError("sliced score matching has no target that input perturbation could keep")

    def along(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        probes: list[Tensor],
        condition: dict[str, Any],
    ) -> Tensor:
        """The loss `[B]` at times, noise and directions that are given."""
        process = _process_of(model)
        at = _level(process, t, x0)
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = _shaped(at.s, x0) * x0 + _shaped(at.sigma, x0) * eps
            x = x if x.requires_grad else x.requires_grad_()
            score = _score(model, x, t, at, condition)
            value = score.square().flatten(1).mean(1)
            for k, v in enumerate(probes):
                keep = training or k + 1 < len(probes)
                (product,) = torch.autograd.grad(
                    (score * v).sum(), x, create_graph=training, retain_graph=keep
                )
                value = value + 2.0 / len(probes) * (product * v).flatten(1).mean(1)
        weight = _lambda(self.weight, process, t, at.sigma).to(value.dtype)
        value = weight * value
        return value if training else value.detach()


# -------------------------------------------------------------------------- losses that hold losses


@dataclass(frozen=True)
class InputPerturbation(Loss):
    r"""Input perturbation (DDPM-IP): the network sees the noise $\varepsilon + \gamma\,\xi$, with
    $\xi$ normal, and its target stays that of $\varepsilon$.

    It imitates the error that a sampler feeds back to the network. `loss` is a regression loss,
    `gamma` 0.1 in the paper. The optimum for eps on data `N(0, c^2 I)` is the linear prediction
    `sigma x / (s^2 c^2 + (1 + gamma^2) sigma^2)`. Source: Ning et al. 2023, algorithm 1.
    """

    loss: Regression
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Regression):
            raise TypeError(f"InputPerturbation holds a regression loss; got {self.loss!r}")
        positive_number("gamma of InputPerturbation", self.gamma)

    def __call__(
        self,
        model: Denoiser,
        x0: Tensor,
        t: float | Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        **condition: Any,
    ) -> Tensor:
        """The loss `[B]` of each sample of `x0` `[B, ...]`."""
        times = self.loss.times(model, x0, t, generator)
        if eps is None:
            eps = _normal(x0, generator)
        seen = eps + self.gamma * _normal(x0, generator)
        return self.at_noise(model, x0, times, eps, seen, condition)

    def at_noise(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        seen: Tensor | None,
        condition: dict[str, Any],
    ) -> Tensor:
        return self.loss.at_noise(model, x0, t, eps, seen, condition)


@dataclass(frozen=True)
class LabelDropout(Loss):
    """A loss whose condition `label` becomes `null_label` with probability `share`, so that the
    network also learns the unconditional score. Source: Ho and Salimans 2021.
    """

    loss: Loss
    null_label: int
    share: float = 0.1

    def __post_init__(self) -> None:
        fraction("share of LabelDropout", self.share)

    def __call__(
        self,
        model: Denoiser,
        x0: Tensor,
        t: float | Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        **condition: Any,
    ) -> Tensor:
        """The loss `[B]` of each sample of `x0` `[B, ...]`."""
        label = condition.get("label")
        if label is not None:
            condition["label"] = dropped(label, self.share, self.null_label, generator)
        return self.loss(model, x0, t, eps, generator, **condition)

    def at_noise(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        seen: Tensor | None,
        condition: dict[str, Any],
    ) -> Tensor:
        return self.loss.at_noise(model, x0, t, eps, seen, condition)

    def describe(self) -> str:
        return f"{self.loss.describe()}, label dropout {self.share:g}"


def dropped(
    label: Tensor, share: float, null_label: int, generator: torch.Generator | None
) -> Tensor:
    """`label` `[B]` with a share of its entries, drawn at random, replaced by `null_label`."""
    if share == 0:
        return label
    drop = torch.rand(label.shape[0], device=label.device, generator=generator) < share
    return torch.where(drop, null_label, label)


# -------------------------------------------------------------------------------- learned variances


@dataclass(frozen=True)
class Hybrid(Loss):
    r"""The hybrid loss of learned variances: `L_simple + weight L_vlb`, where the mean is held
    fixed in the second part, so that it trains the variance alone.

    `model` is a `Prediction` with `learned_variance=True` on a table of betas. At entry i the
    second part is T times the term of the bound, in bits per dimension:
    $\mathrm{KL}(q(x_{i-1}|x_i, x_0)\,\|\,N(\hat\mu, v))$ for i > 1, and the decoder's
    $-\log_2 p(x_0 | x_1)$ for i = 1. `decoder` is "discretised" (data of 256 values from -1 to 1)
    or "gaussian". The optimum of the variance is `Optimal`'s. Source: Nichol & Dhariwal 2021,
    equation 16, weight 0.001.
    """

    weight: float = 1e-3
    predicts: Parametrisation = "eps"
    decoder: Literal["discretised", "gaussian"] = "discretised"
    stratified: bool = False

    def __post_init__(self) -> None:
        positive_number("weight of Hybrid", self.weight)
        one_of("decoder of Hybrid", self.decoder, ("discretised", "gaussian"))

    def at_noise(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        seen: Tensor | None,
        condition: dict[str, Any],
    ) -> Tensor:
        process = _process_of(model)
        if not (isinstance(model, Prediction) and model.channels == 2):
            raise TypeError(
                "Hybrid trains Prediction(..., learned_variance=True), a network with two outputs"
            )
        if not isinstance(process, FromBetas) or len(process.betas) < 2:
            raise ValueError("Hybrid needs a table of at least two betas: Process.from_betas(...)")
        steps = len(process.betas)
        at, numbers = _level(process, t, x0, self.predicts == "velocity"), model.affine(t)
        x = _shaped(at.s, x0) * x0 + _shaped(at.sigma, x0) * (eps if seen is None else seen)
        output, w = _asked(model, numbers, x, condition, whole=True).chunk(2, 1)
        wrong = output - _target(numbers, at, x0, eps)
        simple = (_predicted(self.predicts, at) * numbers.out**2).to(wrong.dtype)
        simple = simple * wrong.square().flatten(1).mean(1)
        # At the first entry the clipped posterior variance is that of the second.
        first = (t * steps).round() <= 1.0
        t_here = torch.where(first, torch.full_like(t, 2.0 / steps), t)
        here, before = _level(process, t_here, x0), _level(process, t_here - 1.0 / steps, x0)
        ratio = before.sigma * here.s / (before.s * here.sigma)
        lost = (1.0 - ratio) * (1.0 + ratio)
        log_small = (before.sigma**2 * lost).log()
        log_large = torch.where(
            first, 2.0 * at.sigma.log(), log_small + 2 * (here.sigma / before.sigma).log()
        )
        small, large = _shaped(log_small, x0), _shaped(log_large, x0)
        log_v = small + (w + 1.0) / 2.0 * (large - small)
        gap = _shaped(numbers.out, x0) * wrong.detach()  # x0_hat - x0
        step = divergence((_shaped(before.s * lost, x0) * gap).square(), small, log_v)
        nll = gaussian_nll if self.decoder == "gaussian" else discretised_nll
        bound = torch.where(_shaped(first.to(x0.dtype), x0) > 0, nll(x0, x0 + gap, log_v), step)
        bits = steps * bound.flatten(1).mean(1) / math.log(2.0)
        return simple + self.weight * bits
