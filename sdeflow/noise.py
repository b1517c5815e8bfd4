r"""Where randomness comes from: one generator per sample, so that a sample never depends on its
batch.

Every draw is one call of a sample's own shape, contiguous, in float32, on the CPU; only then is it
cast and moved. The noise of a row is therefore bit-identical alone, in any batch, in any order, in
any dtype and on any device of one machine. torch draws normals with the vector instructions of the
CPU: another kind of CPU may change last digits (by 2e-6 between AVX2 and none).

`SeededNoise` draws in sequence. `BrownianNoise` draws the increments of a Brownian path that the
seed alone fixes: as $g^2 = s^2\,d\,\mathrm{nsr}^2/dt$, the noise that a reverse SDE adds between
two levels is, in units of the signal, an increment of a Brownian motion $W$ in the clock
$\tau = \mathrm{nsr}^2$: one seed, one path, at 20 steps and at 40.

The path is a binary tree over $u = \log_2 \mathrm{nsr}$ in $[-64, 64]$, with $W = 0$ at the lower
end. A node is the middle of an interval $[l, r]$ of $u$; given $W$ at the two ends, $W$ there comes
from the Brownian bridge

$$W(\tau) = \frac{(\tau_r - \tau)\,W_l + (\tau - \tau_l)\,W_r}{\tau_r - \tau_l}
+ \sqrt{\frac{(\tau - \tau_l)(\tau_r - \tau)}{\tau_r - \tau_l}}\; z,$$

with $z$ from a generator keyed by (seed, node). A point inside the last interval, the leaf, is one
more such bridge. So $W$ is a function of (seed, $\tau$) and of nothing else, and its joint law is
exact at points in distinct leaves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

# What a keyed generator is for; part of its key.
_DRAWS, _NODES, _INFINITE, _CLOSE = 1, 2, 3, 4


class Noise(ABC):
    """A source of standard normal noise `[B, *shape]`, one generator a sample.

    - `seeds`: a Python integer a sample, in $[-2^{63}, 2^{64})$; equal seeds give equal noise. A
      negative seed means `seed + 2^64`, as in torch.
    - `shape`: the shape of one sample.
    - `device`, `dtype`: where the noise goes and what it is cast to; neither changes what is drawn.

    torch's CPU generator reads 32 bits of its seed: seeds below $2^{32}$ are its own, larger ones
    are hashed.

    Errors: `TypeError` for seeds that are not integers or a dtype that is not floating;
    `ValueError` for no seeds, seeds out of range, or a shape with a size below 1.
    """

    def __init__(
        self,
        seeds: Iterable[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.seeds = _check_seeds(seeds)
        self.shape = tuple(int(size) for size in shape)
        if any(size < 1 for size in self.shape):
            raise ValueError(
                f"shape is the shape of one sample, every size at least 1; got {self.shape}"
            )
        if not dtype.is_floating_point:
            raise TypeError(f"noise needs a floating dtype, such as torch.float32; got {dtype}")
        self.device, self.dtype = torch.device(device), dtype
        self._bits = np.array([seed % 2**64 for seed in self.seeds], dtype=np.uint64)
        self._scratch = torch.Generator()
        self._stream = [torch.Generator().manual_seed(key) for key in self._keys(_DRAWS)]

    def start(self) -> Tensor:
        """The noise that a solve starts from: the same at every call, for the same seeds, from
        every kind of noise.

        For a seed below $2^{32}$ it is
        `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`.
        """
        small = self._bits < 2**32
        return self._place(self._keyed(np.where(small, self._bits, _mix(self._bits)).tolist()))

    in_place: ClassVar[bool] = False
    """Whether `draw` takes `out=`; a noise of your own need not."""

    @abstractmethod
    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Standard normal noise for the step between two noise-to-signal ratios; without them, an
        independent draw.

        `out`, a contiguous tensor `[B, *shape]` of this noise's dtype and device, receives the draw
        and is returned.
        """

    def _next(self, out: Tensor | None) -> Tensor:
        """The next draw of every sample's stream."""
        self._check(out)
        direct = (
            out is not None
            and out.dtype == torch.float32
            and out.device.type == "cpu"
            and out.is_contiguous()
        )
        noise = out if direct and out is not None else self._empty()
        for row, generator in zip(noise.unbind(), self._stream, strict=True):
            row.normal_(generator=generator)
        return noise if direct else self._place(noise, out)

    def _check(self, out: Tensor | None) -> None:
        if out is not None and out.shape != (len(self.seeds), *self.shape):
            raise ValueError(
                f"out has shape {tuple(out.shape)}; a draw has shape"
                f" {(len(self.seeds), *self.shape)}"
            )

    def _keyed(self, keys: list[int]) -> Tensor:
        """A standard normal draw from one fresh generator a sample."""
        noise = self._empty()
        for row, key in zip(noise.unbind(), keys, strict=True):
            row.normal_(generator=self._scratch.manual_seed(key))
        return noise

    def _keys(self, purpose: int, node: int = 0) -> list[int]:
        """The seeds of the generators of (sample, purpose, node)."""
        salt = _mix(np.array([8 * node + purpose], dtype=np.uint64))
        return _mix(self._bits ^ salt).tolist()

    def _empty(self) -> Tensor:
        # Fresh pinned memory, not a buffer of our own: the caching host allocator reuses it only
        # once its copy is done.
        return torch.empty(
            len(self.seeds), *self.shape, dtype=torch.float32, pin_memory=self.device.type == "cuda"
        )

    def _place(self, noise: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            # Moved before it is widened, so that no float64 crosses to an accelerator.
            return noise.to(self.device, non_blocking=True).to(self.dtype)
        return out.copy_(noise, non_blocking=True)


class SeededNoise(Noise):
    """A stream of independent draws a sample, whatever the levels.

        SeededNoise(seeds=range(64), shape=(3, 32, 32)).draw()

    Cost: that of `torch.randn`, a call a sample.
    """

    in_place: ClassVar[bool] = True

    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """The next standard normal draw `[B, *shape]`; the levels do not matter."""
        return self._next(out)


class _Node(NamedTuple):
    """A visited node: its number (the root's is 1, the children of `i` are `2i` and `2i + 1`) and
    `W` there.
    """

    number: int
    value: Tensor


class BrownianNoise(Noise):
    r"""The standardised increments of a Brownian path in $\tau$ = nsr^2 that is a function of the
    seed alone.

    `draw(nsr, nsr_next)` is $(W(\tau) - W(\tau'))/\sqrt{|\tau - \tau'|}$ with $\tau'$ =
    `nsr_next^2`: pass the level that a step starts from, then the one it goes to; swapped, the sign
    changes (but for levels that share a leaf, below). Over disjoint intervals increments are
    independent, and that of a long step is the sum of those of the short steps within it, to
    float32 rounding, whatever the order of the queries. `nsr = inf` (or above 2^64) gives an
    independent draw keyed by the seed; `nsr_next = 0` is a level like any other. `draw()` is a draw
    from an independent stream, in sequence.

    A leaf is 1.1 percent wide in nsr. A step narrower than two leaves is refined until it is not,
    so that its law stays exact; there, short and long steps agree but for what happens within a
    leaf. Levels that differ by less than 5e-6 (relative) get a normal of their own.

    Cost: a draw a call, and a draw for each tree node that the last call did not visit: some 7 a
    call in a solve of 40 steps, 4 in one of 1000. Memory: 15 tensors `[B, *shape]` float32, at most
    27.

    Source: Lévy's construction; the virtual Brownian tree of Li et al., "Scalable gradients for
    SDEs" (2020).
    """

    in_place: ClassVar[bool] = True

    _TOP = 64.0  # the tree spans nsr from 2^-64 to 2^64
    _DEPTH = 13  # leaves of width 128 / 2^13 = 1/64 in log2 nsr
    _DEEPEST = 25

    _last: tuple[float, int, Tensor] | None = None
    """The point visited last: its nsr, its depth, and W there."""

    @cached_property
    def _root(self) -> Tensor:
        """W at the top of the tree."""
        return self._keyed(self._keys(_NODES)).mul_(2.0**self._TOP)

    @cached_property
    def _path(self) -> list[_Node]:
        """The nodes from the root to the point visited last."""
        return []

    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """The standardised increment `[B, *shape]` between two levels; without levels, an
        independent draw.

        Errors: `ValueError` for one level without the other, or one that is negative or NaN.
        """
        if nsr is None and nsr_next is None:
            return self._next(out)
        self._check(out)
        if nsr is None or nsr_next is None:
            raise ValueError(
                "a Brownian increment lies between two levels: draw(nsr, nsr_next); draw() is"
                " independent"
            )
        a, b = float(nsr), float(nsr_next)
        if not (a >= 0.0 and b >= 0.0):
            raise ValueError(
                f"noise-to-signal ratios are non-negative numbers; got nsr={a} and nsr_next={b}"
            )
        return self._place(self._increment(a, b), out)

    def _increment(self, a: float, b: float) -> Tensor:
        if max(a, b) >= 2.0**self._TOP:
            return self._keyed(self._keys(_INFINITE))
        u_a, u_b = self._clock(a), self._clock(b)
        gap = abs(u_a - u_b) if u_a != u_b else 0.0
        width = 2.0 * self._TOP  # of the whole tree
        depth = self._DEPTH
        while gap < 2.0 * width / 2**depth:
            depth += 1
            if depth > self._DEEPEST:
                leaf = int(
                    (min(max(u_a, -self._TOP), self._TOP) + self._TOP) / width * 2**self._DEEPEST
                )
                return self._keyed(self._keys(_CLOSE, leaf))
        start = self._value(a, u_a, depth)
        # Into memory from which the copy to a device need not wait.
        increment = torch.sub(start, self._value(b, u_b, depth), out=self._empty())
        return increment.mul_(1.0 / math.sqrt(abs((a - b) * (a + b))))

    def _clock(self, nsr: float) -> float:
        return math.log2(nsr) if nsr > 2.0**-self._TOP else -math.inf

    def _value(self, nsr: float, u: float, depth: int) -> Tensor:
        """`W(nsr^2)`, from the tree to `depth`."""
        if self._last is not None and self._last[:2] == (nsr, depth):
            return self._last[2]
        value = self._descend(nsr, u, depth)
        self._last = (nsr, depth, value)
        return value

    def _descend(self, nsr: float, u: float, depth: int) -> Tensor:
        number, low, high = 1, -self._TOP, self._TOP
        w_low, w_high = torch.zeros(()), self._root
        if u == -math.inf:
            return torch.zeros_like(w_high)
        for level in range(depth):
            middle = (low + high) / 2.0
            if level >= len(self._path) or self._path[level].number != number:
                # The path to the last point only: a monotone sweep never comes back to the nodes
                # that are dropped here.
                del self._path[level:]
                self._path.append(
                    _Node(number, self._bridge(w_low, w_high, low, high, 4.0**middle, number))
                )
            w_middle = self._path[level].value
            if u == middle:
                return w_middle
            if u < middle:
                number, high, w_high = 2 * number, middle, w_middle
            else:
                number, low, w_low = 2 * number + 1, middle, w_middle
        return self._bridge(w_low, w_high, low, high, nsr**2, number)

    def _bridge(
        self, w_low: Tensor, w_high: Tensor, low: float, high: float, tau: float, number: int
    ) -> Tensor:
        """`W(tau)` given `W` at both ends of an interval, with the normal of node `number`."""
        # The tree's lower end stands for zero, where W is zero.
        tau_low, tau_high = 4.0**low if low > -self._TOP else 0.0, 4.0**high
        whole = tau_high - tau_low
        below, above = max(tau - tau_low, 0.0), max(tau_high - tau, 0.0)
        noise = self._keyed(self._keys(_NODES, number)).mul_(math.sqrt(below * (above / whole)))
        # One rounding an operation: a fused multiply-add may round otherwise at the end of a
        # vectorised loop, and a row's bits would depend on its place in the batch.
        return noise.add_(w_low * (above / whole)).add_(w_high * (below / whole))


def seeds_of(seeds: int | Sequence[int], n: int) -> tuple[int, ...]:
    """A seed for each of `n` samples: those given, or the first of consecutive ones."""
    each: Any = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    if not hasattr(each, "__len__"):
        each = range(index(each), index(each) + n)
    if len(each) != n:
        raise ValueError(f"a seed a sample: {n} samples and {len(each)} seeds")
    return tuple(map(index, each))


def _check_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    try:
        checked = tuple(index(seed) for seed in seeds)
    except TypeError as error:
        raise TypeError(
            f"seeds are integers, one a sample, such as range(64) or [7]; got {seeds!r}"
        ) from error
    if not checked:
        raise ValueError("seeds are integers, one a sample; got none")
    for seed in checked:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"a seed lies in [-2^63, 2^64); got {seed}")
    return checked


def _mix(bits: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of each 64 (Source: splitmix64, Steele et al. 2014)."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
