r"""What a network knows, at one border: whatever it was trained to predict, sdeflow sees
$E[x_0 \mid x(t) = x]$.

Every parametrisation of the field is affine in the network's output, with four numbers that depend
on time alone:

$$x_0 = \mathrm{skip}\; x + \mathrm{out}\; F(\mathrm{scale}\; x,\; \mathrm{time}).$$

| predicts | skip | out |
|---|---|---|
| `x0` | 0 | 1 |
| `eps` | 1/s | -sigma/s |
| `score` | 1/s | sigma^2/s |
| `v` = (s eps - sigma x0)/r, r^2 = s^2 + sigma^2 | s/r^2 | -sigma/r |
| `velocity` = s' x0 + sigma' eps | sigma'/w | -sigma/w, w = s sigma' - s' sigma |
| EDM's preconditioning, n = nsr | d^2/(n^2 + d^2) | n d/sqrt(n^2 + d^2), * |

(*) with scale 1/sqrt(n^2 + d^2) and time log(n)/4.

A solve computes the four for all its times at once, in float64, before its loop (`Denoiser.at`).
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from copy import copy
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sdeflow._utils.checks import positive_number
from sdeflow._utils.math import Scalar, as_time, expand
from sdeflow.denoisers.base import Denoiser, match_noise_level, trained_range
from sdeflow.errors import unknown
from sdeflow.process import EDM, Process, Reversed, Tabulated

Parametrisation = Literal["eps", "x0", "score", "v", "velocity"]
"""What a network predicts."""

_ALSO = {
    "epsilon": "eps",
    "noise": "eps",
    "sample": "x0",
    "x_start": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
    "flow": "velocity",
}
"""Other libraries' words for them."""


HALF: ContextVar[torch.dtype | None] = ContextVar("HALF", default=None)
"""The half precision that the solve under way was asked for: that of the inputs of plain functions.
States, and all that is computed of them, are float32 then.
"""


class Affine(NamedTuple):
    """The four numbers of a parametrisation at each time:
    `x0 = skip x + out network(scale x, time)`.
    """

    skip: Tensor
    out: Tensor
    scale: Tensor
    time: Tensor


class Network(Denoiser):
    """A network behind an affine parametrisation; `Prediction` and `Preconditioned` say which.

    `native` is the process that the network was trained under, `process` the path that it is asked
    about.
    """

    channels: int = 1
    """How many times the channels of a state the network returns."""

    def __init__(
        self,
        network: Callable[..., Tensor],
        native: Process,
        nsr_range: tuple[float, float] | None,
        shape: Sequence[int] | None,
    ):
        if not callable(network):
            raise TypeError(
                f"a network is called as network(x, t, **condition); got {type(network).__name__}"
            )
        if nsr_range is not None and not 0 <= nsr_range[0] < nsr_range[1]:
            raise ValueError(f"nsr_range is (low, high) with 0 <= low < high; got {nsr_range}")
        _check_signature(network)
        self.network = network
        self.native = self.process = native
        self.nsr_range = (
            trained_range(native)
            if nsr_range is None
            else (float(nsr_range[0]), float(nsr_range[1]))
        )
        self.shape = None if shape is None else tuple(int(size) for size in shape)
        self._declared = nsr_range is not None

    @abstractmethod
    def affine(self, t: Tensor) -> Affine:
        """The four numbers at times `t` of the network's own process, float64."""

    def under(self, process: Process) -> Network:
        """The same network on the path of another process; its four numbers change, the cost of a
        call does not.
        """
        if not isinstance(process, Process):
            raise TypeError(f"a denoiser is put under a Process, such as VP(); got {process!r}")
        other = copy(self)
        other.process = process
        other.default_grid = type(self).default_grid if process == self.native else None
        return other

    def numbers(self, t: Tensor) -> Affine:
        """The four numbers at times `t` of `process`, float64 on the CPU."""
        if self.process == self.native and not self._declared:
            affine = self.affine(t)
        else:
            t_native, factor = match_noise_level(self.process, self.native, self.nsr_range, t)
            skip, out, scale, time = self.affine(t_native)
            affine = Affine(skip * factor, out, scale * factor, time)
        finite = torch.isfinite(affine.skip) & torch.isfinite(affine.out)
        if not bool(finite.all()):
            where = float(torch.broadcast_to(t, finite.shape)[~finite].reshape(-1)[0])
            raise ValueError(
                f"{self!r} cannot say x0 at t={where:g}, where no signal is left (s = 0): only x0-,"
                " v- and velocity-predictions can; start from a smaller t, or declare"
                " nsr_range=(low, high) with a finite high"
            )
        return affine

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        skip, out, scale, time = self._placed(x, t)
        return skip * x + out * self._run(x * scale, time, condition, self.dtype)

    def _placed(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four numbers, shaped to multiply `x`, and the network's times."""
        t = as_time(t).to("cpu", torch.float64)
        # A time a sample: rounded the same way whatever the batch (see `_math.batch_invariant`).
        numbers = self.numbers(t if t.ndim == 0 else torch.cat([t, t[-1:].expand(-len(t) % 16)]))
        if t.ndim:
            numbers = Affine(*(c[: len(t)] if c.ndim else c for c in numbers))
        skip, out, scale = (expand(c, x) for c in numbers[:3])
        return skip, out, scale, self._network_time(numbers.time, x)

    def at(
        self, times: Tensor, x: Tensor, /, **condition: Any
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        """The network at each of `times`, its numbers computed once and its times placed on the
        device once.
        """
        if condition:
            self.check_condition(condition)
        numbers = self.numbers(times)
        rows = self._network_time(
            torch.broadcast_to(numbers.time, times.shape).unsqueeze(-1), x
        ).unbind()
        dtype = self.dtype
        skip, out, scale = (
            [*c.unbind()] if c.requires_grad else c.tolist()
            for c in torch.broadcast_tensors(*numbers[:3])
        )
        return [
            partial(self._call, skip[k], out[k], scale[k], time, condition, dtype)
            for k, time in enumerate(rows)
        ]

    def _call(
        self,
        skip: Scalar,
        out: Scalar,
        scale: Scalar,
        time: Tensor,
        condition: dict[str, Any],
        dtype: torch.dtype | None,
        x: Tensor,
    ) -> Tensor:
        output = self._run(x if scale == 1.0 else x * scale, time, condition, dtype)
        if skip == 0.0:
            return output if out == 1.0 else output * out
        if isinstance(out, Tensor):
            return x * skip + output * out
        return torch.add(x * skip, output, alpha=out)

    def _network_time(self, time: Tensor, x: Tensor) -> Tensor:
        """Times as the network takes them: `[..., B]`, float32 (integers stay integers), on the
        device of `x`.
        """
        time = time if not time.is_floating_point() else time.to(torch.float32)
        if x.is_cuda and not time.requires_grad:
            time = time.pin_memory()  # from pageable memory the copy would wait for the device
        return time.to(x.device, non_blocking=True).expand(*time.shape[:-1], x.shape[0])

    def _run(
        self, x: Tensor, time: Tensor, condition: dict[str, Any], dtype: torch.dtype | None
    ) -> Tensor:
        output = self._output(x, time, condition, dtype)
        return output if self.channels == 1 else output[:, : x.shape[1]]

    def _output(
        self, x: Tensor, time: Tensor, condition: dict[str, Any], dtype: torch.dtype | None
    ) -> Tensor:
        """All that the network returns, `channels` times the channels of `x`, in the dtype of
        `x`.
        """
        try:
            output = self.network(
                x if dtype is None or dtype == x.dtype else x.to(dtype), time, **condition
            )
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise RuntimeError(
                f"{error}. {_name(self.network)} differentiates, and samplers run it without"
                " gradients: write `with torch.enable_grad():` in it, and there"
                " `x = x.detach().requires_grad_()`"
            ) from error
        expected = x.shape
        if self.channels != 1:
            expected = torch.Size((x.shape[0], self.channels * x.shape[1], *x.shape[2:]))
        if not isinstance(output, Tensor) or output.shape != expected:
            raise ValueError(_misfit(self.network, output, x, self.channels))
        if not output.is_floating_point():
            raise ValueError(
                f"{_name(self.network)} returned {output.dtype}; it must return floating-point"
                " numbers, such as output.float()"
            )
        return output.to(x.dtype)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of a module's weights, to which states are cast; for a plain function the half
        precision that a solve was asked for, or None: it takes what comes.
        """
        if isinstance(self.network, nn.Module):
            for parameter in self.network.parameters():
                if parameter.is_floating_point():
                    return parameter.dtype
            return None
        return HALF.get()

    def check_condition(self, condition: Mapping[str, Any]) -> None:
        parameters = _parameters(self.network)
        if parameters is None:
            return
        named = [
            p for p in [*parameters][2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        for p in named:
            if p.default is p.empty and p.name not in condition:
                raise TypeError(
                    f"the network needs the condition {p.name!r}: pass condition={{{p.name!r}:"
                    " ...}"
                )
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        known = [p.name for p in named]
        for name in condition:
            if name not in known:
                raise TypeError(
                    f"the network takes no condition {name!r}; it takes"
                    f" {', '.join(map(repr, known)) or 'none'}"
                )


def _name(network: Callable[..., Any]) -> str:
    """How an error calls a network."""
    name = getattr(network, "__name__", type(network).__name__)
    return "the network" if name == "<lambda>" else f"the network {name}"


def _parameters(network: Callable[..., Any]) -> Sequence[inspect.Parameter] | None:
    """The parameters of a network's call; None where they cannot be known."""
    target = network.forward if isinstance(network, nn.Module) else network
    try:
        return tuple(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None


def _check_signature(network: Callable[..., Any]) -> None:
    """Raise `TypeError` for a network that cannot be called with a state and a time."""
    parameters = _parameters(network)
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < 2:
        raise TypeError(
            f"a network is called as network(x, t, **condition), and {_name(network)} takes"
            f" {', '.join(places) or 'nothing'} by position: wrap it in a function (or module) of"
            " x and t"
        )


def _misfit(network: Callable[..., Any], output: Any, x: Tensor, channels: int = 1) -> str:
    """What is wrong with an output that is no tensor, or not of the shape of the state."""
    hint = ""
    if isinstance(output, Tensor):
        got = f"shape {tuple(output.shape)}"
        double = x.ndim > 1 and output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]
        if channels == 1 and double:
            hint = (
                "; twice the channels is a learned variance: Prediction(..., learned_variance=True)"
                " reads it"
            )
    else:
        got = type(output).__name__
        within = ""
        if isinstance(output, Mapping):
            fitting = (k for k, v in output.items() if isinstance(v, Tensor) and v.shape == x.shape)
            within = next((f"[{key!r}]" for key in fitting), "")
        elif isinstance(output, list | tuple) and output and isinstance(output[0], Tensor):
            within = "[0]"
        for name in ("sample", "logits", "pred", "prediction", "out"):
            if isinstance(getattr(output, name, None), Tensor):
                within = f".{name}"
                break
        if within:
            hint = (
                f": take {within} of it, in a function (or module) `def network(x, t, **condition):"
                f" return {_name(network).removeprefix('the network ')}(x, t, **condition){within}`"
            )
    must = "the same shape" if channels == 1 else "twice the channels, for learned_variance=True"
    return (
        f"{_name(network)} returned {got} for a state of shape {tuple(x.shape)}; it must return"
        f" {must}{hint}"
    )


class Prediction(Network):
    """A network `network(x, t, **condition)` that predicts eps, x0, the score, v or the velocity.

    `predicts` takes other libraries' words too: `"epsilon"` and `"noise"` for eps, `"sample"` and
    `"x_start"` for x0, `"v_prediction"` for v, `"flow_prediction"` for the velocity. `process` is
    the one it was trained under. `time` says what the network is given:
    `"continuous"`, the process's own time, of shape `[B]`, float32; `"index"`, the nearest entry of
    the process's table (`Process.from_betas`), counted from 0, int64; or a function of `t`, such as
    `lambda t: 999 * t`, of tensors or of one number. It is `"continuous"` by default, but must be
    given for a process of a table. `nsr_range` is the range it was trained on, by default that of
    the process; outside it the network is asked at the nearest level it knows. (On its own process,
    and with no range declared, it is asked wherever a given grid goes.) `data_std` is the standard
    deviation of the data, for a warning where the ends of the process do not suit it.

        Prediction(unet, "eps", Process.from_betas(betas), time="index", shape=(3, 32, 32))

    `learned_variance=True` is for a network that returns twice the channels, `[B, 2 C, ...]`. The
    first half predicts, the second half `w` says the variance of a step of the chain: with
    `fraction = (w + 1) / 2`, `log variance = fraction log beta + (1 - fraction) log beta_tilde`,
    between the variances "large" and "small" of `DDPM`. `predict` then returns `(x0, fraction)`,
    `outputs` is `("x0", "fraction")`, and `DDPM(variance="learned")` samples with it. All other
    solvers use `x0` alone. Source: Nichol & Dhariwal 2021, equation 15.

    Errors: `ValueError` for an unknown prediction, for `time="index"` without a table and a table
    without `time`, for eps or the score of a table that ends without signal; in a call, for an
    output of another shape or a level where the prediction does not determine x0. `TypeError` for
    a network that takes no time.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        predicts: Parametrisation,
        process: Process,
        *,
        time: Literal["continuous", "index"] | Callable[[Tensor], Tensor] | None = None,
        nsr_range: tuple[float, float] | None = None,
        shape: Sequence[int] | None = None,
        data_std: float | None = None,
        learned_variance: bool = False,
    ):
        predicts = _ALSO.get(predicts, predicts)  # type: ignore[assignment]
        if predicts not in get_args(Parametrisation):
            raise unknown("prediction", predicts, get_args(Parametrisation), _ALSO)
        if not isinstance(process, Process):
            raise TypeError(
                f"Prediction needs the process that the network was trained under; got {process!r}"
            )
        process.check()
        if time is None and isinstance(process, Tabulated):
            raise ValueError(
                f"is this network given an entry of the table of {process!r}, or its time? Say"
                ' time="index" for integers from 0, as DDPM networks take, or time="continuous" for'
                " t from 0 to 1"
            )
        time = "continuous" if time is None else time
        if time not in ("continuous", "index") and not callable(time):
            raise ValueError(f'time is "continuous", "index" or a function of t; got {time!r}')
        if time == "index" and not isinstance(process, Tabulated):
            raise ValueError(
                'time="index" needs a table of times: use process=Process.from_betas(betas)'
            )
        if isinstance(process, Tabulated) and predicts in ("eps", "score"):
            _check_terminal(process, predicts, nsr_range)
        if nsr_range is None and predicts in ("eps", "score") and trained_range(process)[1] > 1e6:
            # They do not determine x0 where no signal is left (Cosine's s(1) is 6e-17): ask at the
            # nearest level that does.
            nsr_range = (0.0, 1e3)
        super().__init__(network, process, nsr_range, shape)
        if data_std is not None:
            self.data_std = positive_number("data_std", data_std)
        self.predicts, self.time = predicts, time
        if learned_variance:
            self.channels, self.outputs = 2, ("x0", "fraction")

    def __repr__(self) -> str:
        return (
            f"Prediction({type(self.network).__name__}, {self.predicts!r},"
            f" {type(self.native).__name__})"
        )

    def predict(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> tuple[Tensor, ...]:
        """`(x0,)`; with a learned variance `(x0, fraction)`, both of the shape of `x`."""
        if self.channels == 1:
            return (self(x, t, **condition),)
        skip, out, scale, time = self._placed(x, t)
        output, w = self._output(x * scale, time, condition, self.dtype).chunk(2, 1)
        return skip * x + out * output, (w + 1.0) / 2.0

    def affine(self, t: Tensor) -> Affine:
        s, sigma = self.native.kernel(t)
        one = torch.ones_like(t)
        match self.predicts:
            case "x0":
                skip, out = torch.zeros_like(t), one
            case "eps":
                skip, out = 1.0 / s, -sigma / s
            case "score":
                skip, out = 1.0 / s, self.native.variance(t) / s
            case "v":
                r2 = s**2 + sigma**2
                skip, out = s / r2, -sigma / r2.sqrt()
            case "velocity":
                ds, dsigma = self.native.ds(t), self.native.dsigma(t)
                wronskian = s * dsigma - ds * sigma
                # Of a reversed process, the velocity along the time before it was reversed.
                back = -1.0 if isinstance(self.native, Reversed) else 1.0
                skip, out = dsigma / wronskian, -back * sigma / wronskian
        return Affine(skip, out, one, self._times(t))

    def _times(self, t: Tensor) -> Tensor:
        if self.time == "index":
            table = self.native
            assert isinstance(table, Tabulated)
            return table.index(t).round().clamp(0, table.size - 1).long()
        t = self.native.network_time(t)
        return t if self.time == "continuous" else _labels(self.time, t)


def _labels(function: Callable[[Tensor], Any], t: Tensor) -> Tensor:
    """A user's function of time at every entry of `t`, also where it only takes one number."""
    flat = t.reshape(-1)
    try:
        labels = torch.as_tensor(function(flat))
        if labels.numel() == flat.numel():
            return labels.reshape(t.shape)
    except (TypeError, ValueError, RuntimeError):
        pass
    each = [torch.as_tensor(function(one)) for one in flat]
    if any(label.numel() != 1 for label in each):
        raise ValueError(
            "time= is a function of t that returns one number for each time; got shape"
            f" {tuple(each[0].shape)} for one"
        )
    return torch.stack([label.reshape(()) for label in each]).reshape(t.shape)


def _check_terminal(
    process: Tabulated, predicts: str, nsr_range: tuple[float, float] | None
) -> None:
    """Refuse a prediction that does not determine x0 at the end of a table without signal."""
    if trained_range(process)[1] < 1e6 or (nsr_range is not None and nsr_range[1] < 1e6):
        return
    raise ValueError(
        f"{process!r} ends without signal (zero-terminal SNR), where {predicts} does not determine"
        " x0. Networks of such tables predict 'v', 'x0' or 'velocity'; an eps-network was trained"
        " on the table before it was rescaled: give that one, or nsr_range=(low, high) with the"
        " largest sigma / s that it was trained on"
    )


class Preconditioned(Network):
    r"""A network behind EDM's preconditioning: `x0 = c_skip x + c_out F(c_in x, log(nsr)/4)`, of
    process `EDM`.

    With $n$ = nsr and $d$ = `sigma_data`: $c_{skip} = d^2/(n^2 + d^2)$,
    $c_{out} = n d/\sqrt{n^2 + d^2}$ and $c_{in} = 1/\sqrt{n^2 + d^2}$.

    Source: Karras et al. (2022), table 1 and section 5.
    """

    # Images have structure at noise far above their own scale, on which a grid uniform in lam is
    # sparse (docs/benchmarks/defaults.md).
    default_grid = "karras"

    def __init__(
        self,
        network: Callable[..., Tensor],
        sigma_data: float = 0.5,
        nsr_range: tuple[float, float] = (0.002, 80.0),
        shape: Sequence[int] | None = None,
    ):
        if not sigma_data > 0:
            raise ValueError(
                "sigma_data is the standard deviation of the data, a positive number; got"
                f" {sigma_data}"
            )
        super().__init__(network, EDM(), nsr_range, shape)
        self.sigma_data = self.data_std = float(sigma_data)

    def __repr__(self) -> str:
        return f"Preconditioned({type(self.network).__name__}, sigma_data={self.sigma_data:g})"

    def affine(self, t: Tensor) -> Affine:
        d2, r2 = self.sigma_data**2, t**2 + self.sigma_data**2
        return Affine(d2 / r2, t * self.sigma_data / r2.sqrt(), r2.rsqrt(), t.log() / 4.0)


def as_denoiser(score_fn: Any, process: Process | None) -> Denoiser:
    """The denoiser that a user's first argument means, on the path of `process`.

    A `Denoiser` is put under the process; a plain function is a score function `score_fn(x, t)` of
    the process. A bare module could predict anything, so that is an error.
    """
    if isinstance(score_fn, Denoiser):
        return (
            score_fn if process is None or process == score_fn.process else score_fn.under(process)
        )
    if isinstance(score_fn, nn.Module):
        raise TypeError(
            f"what does {type(score_fn).__name__} predict? Say so: Prediction(module, 'eps',"
            " process) (or 'x0', 'score', 'v', 'velocity'), or Preconditioned(module) for EDM's"
            " preconditioning; only a plain function is taken for a score"
        )
    if not callable(score_fn):
        raise TypeError(
            "the first argument is a Denoiser or a score function score_fn(x, t); got"
            f" {type(score_fn).__name__}"
        )
    if process is None:
        raise TypeError(
            "a score function score_fn(x, t) needs the process that its times belong to:"
            " process=VP(), say"
        )
    if isinstance(process, Tabulated):
        raise TypeError(
            f"is the score function given an entry of the table of {process!r}, or its time? Say"
            ' Prediction(score_fn, \'score\', process, time="index") or time="continuous"'
        )
    return Prediction(score_fn, "score", process)
