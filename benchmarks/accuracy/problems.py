"""The problems of `accuracy.py`: exact targets, one exact trajectory through all noise levels, and
what a method is given.

Every process is the same ordinary differential equation seen in another frame and clock. In the
angle `theta` of `tan(theta) = nsr`, and with `w = log tan(theta / 2)` for time, the state
`z = x / sqrt(s^2 + sigma^2)` obeys

    dz/dw = cos(theta) z - E[x0 | z],

which is smooth from pure noise (`w = 0`, where nsr is infinite) down to any noise level. It is
solved once for a target, from standard normal draws; what it passes at the ends of each process are
the starts and the references there. A start is thus an exact draw of `x(t_max)`, and no method pays
for beginning at a finite noise.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow import EDM, Process, grid, registry
from sdeflow.denoisers import Denoiser
from sdeflow.process import Level

VERSION = (
    2  # of the problems: change it with any of them, lest cached references be taken for theirs
)
NSR_TOP = 1e3  # where methods begin that cannot begin at pure noise, with the exact state there
STD = 0.5
PROCESSES = ("vp", "edm", "cosine", "rectified_flow")
TARGETS = {
    "mixture2": "2-d mixture, 8 modes on a ring",
    "mixture64": "64-d mixture, 50 modes, each with 4 wide directions of its own",
    "images": "kernel density on 400 real grey images of 8 x 8, bandwidth 0.05",
    "gauss1024": "1024-d Gaussian, 1/f^2 spectrum",
}


# ------------------------------------------------------------------------------------------ targets


class _At(NamedTuple):
    """A mixture at levels, a row each: `[T, K]`, of directions `[T, R K]`, and `s`, `[T, 1]`."""

    s: Tensor
    log_norm: Tensor
    precision: Tensor  # 1 / (s^2 d + sigma^2)
    gain: Tensor  # s d times it
    pull: Tensor  # of the directions: how much less precise they are, times the precision, halved
    lift: Tensor  # ... and how much more is gained along them


class Mixture(Denoiser):
    """Gaussians `N(m_k, d_k I + sum_r c_kr u_kr u_kr^T)` with orthonormal `u_kr`: the exact
    denoiser, in few products.

    The same numbers as `sdeflow.GaussianMixture(factor=, diag=)` (a test compares them), at a
    hundredth of its cost; and `sdeflow.Empirical`, where all widths are the bandwidth. Its calls
    are counted.
    """

    known_density = True

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        diag: Tensor,
        directions: Tensor | None = None,
        extra: Tensor | None = None,
    ):
        k, *shape = means.shape
        self.shape, self.process = tuple(shape), EDM()
        self.weights = weights / weights.sum()
        self.means, self.diag = means.reshape(k, -1), diag
        dim = self.means.shape[1]
        self.directions = (
            torch.zeros(k, 0, dim, dtype=torch.float64) if directions is None else directions
        )
        self.extra = torch.zeros(k, 0, dtype=torch.float64) if extra is None else extra
        self._along = torch.einsum("krd,kd->rk", self.directions, self.means).reshape(1, -1)
        self._even = bool((diag == diag[0]).all())
        self._norms = self.means.square().sum(1)
        self._tables: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self._levels: dict[tuple[float, float, torch.dtype], _At] = {}
        self.calls = 0

    def under(self, process: Process) -> Mixture:
        """The same mixture on the path of another process, with a counter of its own."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.process, other.calls, other._levels = process, 0, {}
        return other

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
        s, sigma = self.process.kernel(t)
        return self.denoise(self._prepare(s, sigma, x.dtype), x)

    def at(
        self, times: Tensor, x: Tensor, /, **condition: Any
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        prepared = self._prepare(*self.process.kernel(times), x.dtype)
        rows = zip(*(column.split(1) for column in prepared), strict=True)
        return [partial(self.denoise, _At(*row)) for row in rows]

    def at_level(self, x: Tensor, s: float, sigma: float) -> Tensor:
        """The prediction at `x = s x0 + sigma eps`; what depends on the level alone is
        remembered.
        """
        key = s, sigma, x.dtype
        level = self._levels.get(key)
        if level is None:
            if len(self._levels) > 500:
                self._levels.clear()
            ends = (
                torch.tensor([s], dtype=torch.float64),
                torch.tensor([sigma], dtype=torch.float64),
            )
            level = self._levels[key] = self._prepare(*ends, x.dtype)
        return self.denoise(level, x)

    def _prepare(self, s: Tensor, sigma: Tensor, dtype: torch.dtype) -> _At:
        s, sigma = s.reshape(-1, 1), sigma.reshape(-1, 1)
        e = s**2 * self.diag + sigma**2
        wide = e.unsqueeze(-1) + s.unsqueeze(-1) ** 2 * self.extra
        share = s.unsqueeze(-1) ** 2 * self.extra / wide
        gain = s * self.diag / e
        norm = self.weights.log() - 0.5 * (
            self.means.shape[1] * e.log() + (wide / e.unsqueeze(-1)).log().sum(-1)
        )
        norm = norm - 0.5 * s**2 * self._norms / e
        along = s.unsqueeze(-1) * (self.diag.unsqueeze(-1) + self.extra) / wide
        pull, lift = 0.5 * share / e.unsqueeze(-1), along - gain.unsqueeze(-1)
        columns = (s, norm, 1.0 / e, gain, pull.mT.flatten(1), lift.mT.flatten(1))
        return _At(*(column.to(dtype) for column in columns))

    def denoise(self, level: _At, x: Tensor) -> Tensor:
        """`E[x0 | x]`: one counted call."""
        self.calls += 1
        means, directions, along, transposed = self._table(x.dtype)
        flat = x.reshape(len(x), -1)
        s, rank = level.s, self.extra.shape[1]
        logits = (flat @ means.mT).mul_(s * level.precision).add_(level.log_norm)
        if not self._even:  # else it is the same for all
            logits.addcmul_(flat.square().sum(1, keepdim=True), level.precision, value=-0.5)
        if rank:
            q = (flat @ transposed).sub_(s * along)
            logits.add_((q * q).mul_(level.pull).reshape(len(x), rank, -1).sum(1))
        posterior = torch.softmax(logits, 1)
        if self._even:
            gain = level.gain[:, :1]
            out = (posterior @ means).mul_(1.0 - s * gain).addcmul_(flat, gain)
        else:
            gained = posterior * level.gain
            gain = gained.sum(1, keepdim=True)
            out = posterior.addcmul(gained, s, value=-1.0) @ means
            out.addcmul_(flat, gain)
        if rank:
            q = q.mul_(level.lift).reshape(len(x), rank, -1).mul_(posterior.unsqueeze(1))
            out.addmm_(q.reshape(len(x), -1), directions)
        return out.reshape(x.shape)

    def _table(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype not in self._tables:
            directions = self.directions.transpose(0, 1).reshape(-1, self.means.shape[1])
            tables = (self.means, directions, self._along, directions.mT.contiguous())
            self._tables[dtype] = tuple(table.to(dtype) for table in tables)
        return self._tables[dtype]

    def sample(
        self, n: int, seed: int, nsr: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Exact draws of `x0 + nsr eps`."""
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=draw)
        noise = torch.randn(n, self.means.shape[1], generator=draw, dtype=torch.float64)
        x = self.means[chosen] + (self.diag[chosen].unsqueeze(1) + nsr**2).sqrt() * noise
        along = torch.randn(n, self.extra.shape[1], generator=draw, dtype=torch.float64)
        x += torch.einsum("nr,nrd->nd", along * self.extra[chosen].sqrt(), self.directions[chosen])
        return x.reshape(n, *self.shape).to(dtype)

    def covariance_mean(self) -> float:
        """The variance of an entry, averaged over entries."""
        centre = self.weights @ self.means
        between = self.weights @ (self.means - centre).square().mean(1)
        return float(between + self.weights @ (self.diag + self.extra.sum(1) / self.means.shape[1]))


class Spectrum(Mixture):
    """A Gaussian around zero with independent entries of standard deviations `std`."""

    def __init__(self, std: Tensor):
        super().__init__(
            torch.ones(1, dtype=torch.float64),
            torch.zeros(1, *std.shape, dtype=torch.float64),
            std.new_zeros(1),
        )
        self.variances = std.double().square().reshape(1, -1)

    def _prepare(self, s: Tensor, sigma: Tensor, dtype: torch.dtype) -> Any:
        s, sigma = s.reshape(-1, 1), sigma.reshape(-1, 1)
        return ((s * self.variances / (s**2 * self.variances + sigma**2)).to(dtype),)

    def at(
        self, times: Tensor, x: Tensor, /, **condition: Any
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        (gains,) = self._prepare(*self.process.kernel(times), x.dtype)
        return [partial(self.denoise, (row,)) for row in gains.split(1)]  # type: ignore[arg-type]

    def denoise(self, level: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return (x.reshape(len(x), -1) * level[0]).reshape(x.shape)

    def sample(
        self, n: int, seed: int, nsr: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, self.variances.shape[1], generator=draw, dtype=torch.float64)
        return ((self.variances + nsr**2).sqrt() * noise).reshape(n, *self.shape).to(dtype)

    def flow(self, z: Tensor, nsr: float) -> Tensor:
        """The exact flow in the angle's frame, from pure noise down to `nsr`."""
        ends = (
            self.variances.sqrt()
            if nsr == 0.0
            else (self.variances + nsr**2).sqrt() / math.hypot(1.0, nsr)
        )
        return z if math.isinf(nsr) else (z.flatten(1) * ends).reshape(z.shape)


def _mixture2() -> Mixture:
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    std = 0.08
    radius = math.sqrt(2 * (STD**2 - std**2))
    ones = torch.ones(8, dtype=torch.float64)
    return Mixture(ones, radius * torch.stack([angles.cos(), angles.sin()], -1), std**2 * ones)


def _mixture64() -> Mixture:
    draw = torch.Generator().manual_seed(64)
    modes, dim, wide = 50, 64, 4

    def between(low: float, high: float, *size: int) -> Tensor:
        u = torch.rand(*size, generator=draw, dtype=torch.float64)
        return torch.exp(math.log(low) + math.log(high / low) * u)

    means = torch.randn(modes, dim, generator=draw, dtype=torch.float64)
    basis = torch.linalg.qr(
        torch.randn(modes, dim, wide, generator=draw, dtype=torch.float64)
    ).Q.mT.contiguous()
    diag, extra = between(0.1, 0.5, modes) ** 2, between(0.5, 2.0, modes, wide) ** 2
    weights = 0.2 + torch.rand(modes, generator=draw, dtype=torch.float64)
    size = STD / math.sqrt(Mixture(weights, means, diag, basis, extra).covariance_mean())
    return Mixture(weights, size * means, size**2 * diag, basis, size**2 * extra)


def _gauss1024() -> Mixture:
    """In the basis of the spectrum: solvers are linear in the state, so that turning it changes no
    error.
    """
    k = torch.fft.fftfreq(32, 1 / 32, dtype=torch.float64)
    f2 = (k[:, None] ** 2 + k[None, :] ** 2).clamp_min(1.0)
    variance = (1.0 / f2).reshape(1, 32, 32)
    return Spectrum(STD * (variance / variance.mean()).sqrt())


def images(data: str | None, cache: Path, count: int = 400, size: int = 8) -> Tensor:
    """A seeded subset of the images of `data`, `[count, 3, size, size]` bytes; kept in the cache,
    and taken from there.
    """
    kept = cache / f"images-{count}-{size}.pt"
    if not kept.exists():
        if not data:
            raise FileNotFoundError(
                f"the target images needs --data, a parquet file of images: {kept} is not there"
            )
        from sdeflow.images.datasets import load_images

        source = load_images(data, size=size, memory_gb=0.0, progress=False)
        chosen = torch.randperm(source.count, generator=torch.Generator().manual_seed(16))[:count]
        _save(source.get(chosen), kept)
    return torch.load(kept)


def _images(data: str | None, cache: Path) -> Mixture:
    pixels = images(data, cache).double().mean(1, keepdim=True) / 127.5 - 1.0
    bandwidth = 0.05
    pixels = (pixels - pixels.mean()) * math.sqrt(
        (STD**2 - bandwidth**2) / float(pixels.var(0, correction=0).mean())
    )
    ones = torch.ones(len(pixels), dtype=torch.float64)
    return Mixture(ones, pixels, bandwidth**2 * ones)


@lru_cache
def target(name: str, data: str | None, cache: Path) -> Mixture:
    """The target of a name, on the path of EDM."""
    if name == "images":
        return _images(data, cache)
    return {"mixture2": _mixture2, "mixture64": _mixture64, "gauss1024": _gauss1024}[name]()


# ---------------------------------------------------------------------------------------- reference


def _save(value: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save(value, part)
    part.replace(path)


def _stops() -> list[float]:
    """Noise levels at which the trajectory is kept, from high to low."""
    ends = [NSR_TOP]
    for name in PROCESSES:
        process = registry.process(name)
        ends += [process.level(process.t_max).nsr, process.level(process.t_min).nsr]
    return sorted(set(ends), reverse=True)


def follow(exact: Mixture, z: Tensor, stops: Sequence[float], rtol: float) -> dict[float, Tensor]:
    """The exact flow of pure noise `z`, at each of the noise levels `stops`, from high to low."""
    if isinstance(exact, Spectrum):
        return {nsr: exact.flow(z, nsr) for nsr in stops}
    from scipy.integrate import DOP853

    def right(w: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).reshape(z.shape)
        cos, sin = math.tanh(-w), 1.0 / math.cosh(w)
        return (cos * state - exact.at_level(state, cos, sin)).reshape(-1).numpy()

    out: dict[float, Tensor] = {}
    now = 0.0
    for nsr in stops:
        until = -math.asinh(1.0 / nsr) if math.isfinite(nsr) else 0.0
        if until < now:
            solve = DOP853(right, now, z.reshape(-1).numpy(), until, rtol=rtol, atol=0.1 * rtol)
            while solve.status == "running":
                solve.step()
            if solve.status != "finished":
                raise RuntimeError(f"the reference failed between nsr {nsr:g} and the level above")
            z, now = torch.from_numpy(solve.y).reshape(z.shape).clone(), until
        out[nsr] = z
    return out


def trajectory(
    name: str, starts: int, data: str | None, cache: Path, rtol: float
) -> dict[float, Tensor]:
    """The exact flow of `starts` draws of pure noise, `nsr -> z`, float64; solved once and kept in
    the cache.
    """
    stops = _stops()
    about = repr((VERSION, name, starts, rtol, stops, TARGETS[name]))
    kept = cache / f"flow-{name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.pt"
    if kept.exists():
        return torch.load(kept)
    exact = target(name, data, cache)
    z = torch.randn(
        starts,
        *(exact.shape or ()),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
    )
    out = follow(exact, z, stops, rtol)
    _save(out, kept)
    return out


# ------------------------------------------------------------------------------------------ problem


@dataclass
class Problem:
    """What a method is given: the exact denoiser, counted, and the state to start from; and what it
    should return.

    `start` is the state at `t_max` of the process. `ratio_start` is `x / s` at `nsr_top` (`t_top`
    in the process's time), for methods that know noise as `nsr` alone. `reference` is the denoised
    prediction at `t_min` on the exact flow.
    """

    name: str
    process_name: str
    target: Mixture
    process: Process
    start: Tensor
    ratio_start: Tensor
    nsr_top: float
    reference: Tensor | None = None
    _levels: dict[float, Level] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.t_top = self.process.t_max
        if self.nsr_top < self.process.level(self.process.t_max).nsr:
            # A hair below, lest a grid take it for more than it can lay.
            self.t_top = float(self.process.t_of_nsr(self.nsr_top * (1.0 - 1e-9)))
        self.nsr_min = float(self.process.level(self.process.t_min).nsr)

    @property
    def calls(self) -> int:
        """Calls of the denoiser so far."""
        return self.target.calls

    def level(self, t: float) -> Level:
        """The process at a time; remembered, for a peer that asks call by call."""
        t = float(t)
        if t not in self._levels:
            if len(self._levels) > 20_000:
                self._levels.clear()
            self._levels[t] = self.process.level(t)
        return self._levels[t]

    def denoise(self, y: Tensor, nsr: float | Tensor) -> Tensor:
        """`E[x0]` at `y = x / s`: one counted call."""
        return self.target.at_level(y, 1.0, float(nsr))

    def denoise_at(self, x: Tensor, t: float | Tensor) -> Tensor:
        """`E[x0]` at `x` and time `t` of the process: one counted call."""
        level = self.level(float(t))
        return self.target.at_level(x, level.s, level.sigma)

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """`dx/dt` of the probability-flow ODE: one counted call."""
        level = self.level(float(t))
        x0 = self.denoise_at(x, float(t))
        return level.ds * x0 + (level.dsigma / level.sigma) * (x - level.s * x0)

    def times(self, lay: grid.GridFunction, n: int) -> Tensor:
        """`n` times of a grid from `t_top` to `t_min`."""
        return lay(self.process, n, t_max=self.t_top)

    def ratios(self, lay: grid.GridFunction, n: int) -> Tensor:
        """`n` noise levels of a grid, from `nsr_top` to `nsr(t_min)`, float64."""
        nsr = self.process.nsr(self.times(lay, n))
        nsr[0] = self.nsr_top
        return nsr

    def errors(self, x: Tensor) -> tuple[float, float]:
        """Median and root mean square over samples of the rms error of `x`, in units of the rms of
        the exact results.
        """
        assert self.reference is not None
        each = (x.double() - self.reference).flatten(1).square().mean(1).sqrt()
        each = each / self.reference.square().mean().sqrt()
        if not bool(torch.isfinite(each).all()):
            raise FloatingPointError("not finite")
        return float(each.median()), float(each.square().mean().sqrt())


def problem(
    name: str, process_name: str, *, starts: int, data: str | None, cache: Path, rtol: float = 1e-11
) -> Problem:
    """The deterministic problem of a target and a process; float64."""
    process = registry.process(process_name)
    here = target(name, data, cache).under(process)
    flow = trajectory(name, starts, data, cache, rtol)
    top, end = process.level(process.t_max), process.level(process.t_min)
    nsr_top = min(top.nsr, NSR_TOP)
    z_end = flow[end.nsr] * math.hypot(end.s, end.sigma)
    return Problem(
        name,
        process_name,
        here,
        process,
        flow[top.nsr] * math.hypot(top.s, top.sigma),
        flow[nsr_top] * math.hypot(1.0, nsr_top),
        nsr_top,
        here.at_level(z_end, end.s, end.sigma),
    )


@dataclass
class Cloud(Problem):
    """A stochastic problem: exact draws of `x(t_max)` to start from, float32, and exact draws of
    the data to compare with.
    """

    quantiles: Tensor | None = None
    directions: Tensor | None = None

    @property
    def floor(self) -> float:
        """The distance of another exact set of as many samples, the mean of three."""
        draws = [self.distance(self.target.sample(len(self.start), seed)) for seed in (5, 6, 7)]
        return sum(draws) / len(draws)

    def distance(self, x: Tensor) -> float:
        """Sliced Wasserstein-2 distance to the data, in units of the data's std."""
        assert self.directions is not None
        assert self.quantiles is not None
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError("not finite")
        along = (x.flatten(1).float() @ self.directions).mT.contiguous().sort(1).values
        return float((along - self.quantiles).double().square().mean().sqrt()) / STD


@lru_cache
def _quantiles(
    name: str, samples: int, data: str | None, cache: Path, directions: int = 256
) -> tuple[Tensor, Tensor]:
    """Directions, and along each the quantiles of the data: means over 8 neighbours of eight times
    as many exact draws.
    """
    exact = target(name, data, cache)
    dim = math.prod(exact.shape or ())
    draw = torch.Generator().manual_seed(7)
    v = torch.nn.functional.normalize(torch.randn(dim, directions, generator=draw), dim=0)
    along = (exact.sample(8 * samples, 4).flatten(1) @ v).mT.contiguous().sort(1).values
    return v, along.reshape(directions, samples, 8).mean(2)


def cloud(name: str, process_name: str, *, samples: int, data: str | None, cache: Path) -> Cloud:
    """The stochastic problem of a target and a process."""
    process = registry.process(process_name)
    exact = target(name, data, cache)
    top = process.level(process.t_max)
    nsr_top = min(top.nsr, NSR_TOP)
    directions, quantiles = _quantiles(name, samples, data, cache)
    if top.nsr > 1e8:
        draw = torch.Generator().manual_seed(2)
        start = top.sigma * torch.randn(samples, *(exact.shape or ()), generator=draw)
    else:
        start = top.s * exact.sample(samples, 2, top.nsr)
    return Cloud(
        name,
        process_name,
        exact.under(process),
        process,
        start,
        exact.sample(samples, 2, nsr_top),
        nsr_top,
        None,
        {},
        quantiles,
        directions,
    )


# ------------------------------------------------------------------------------------------ methods


class CannotSpend(Exception):
    """The method has no way to make exactly so many calls."""


@dataclass(frozen=True)
class Method:
    """One setting of one solver: `run(problem, nfe)` returns samples, or raises `CannotSpend`.

    `default` marks what a user of the library gets by its defaults (or its own examples).
    """

    family: str
    name: str
    grid: str
    run: Callable[[Problem, int], Tensor]
    default: bool = False
    stochastic: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.family, self.name, self.grid


def methods_by_key(methods: Sequence[Method]) -> dict[tuple[str, str, str], Method]:
    """A table of methods; two under one name are a mistake."""
    out = {method.key: method for method in methods}
    if len(out) != len(methods):
        seen: set[tuple[str, str, str]] = set()
        twice = [m.key for m in methods if m.key in seen or seen.add(m.key)]  # type: ignore[func-returns-value]
        raise ValueError(f"two methods under one name: {twice[:3]}")
    return out


def betas(process: str) -> np.ndarray:
    """The table of 1000 betas whose levels are those of the process: even in its time, or in log
    noise for EDM.
    """
    path = registry.process(process)
    t = torch.linspace(path.t_min, path.t_max, 1000, dtype=torch.float64)
    if process == "edm":
        t = torch.exp(
            torch.linspace(math.log(path.t_min), math.log(path.t_max), 1000, dtype=torch.float64)
        )
    nsr = path.nsr(t).clamp_max(1e3).numpy()
    signal = 1.0 / (1.0 + nsr**2)
    return 1.0 - signal / np.concatenate([[1.0], signal[:-1]])
