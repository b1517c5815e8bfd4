"""The process of a linear SDE, by quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow._utils import math as _math
from sdeflow._utils.math import as_time
from sdeflow.process.base import Process, check_span


@dataclass(frozen=True, eq=False)
class FromSDE(Process):
    r"""The process of a linear SDE $dx = f(t)\,x\,dt + g(t)\,dw$ by quadrature.

    $s = s_0 \exp\int_0^t f$ and $\sigma^2 = s^2\,(\sigma_0^2/s_0^2 + \int_0^t g^2/s^2)$, with
    16-point Gauss-Legendre panels that are halved until they agree to 1e-13. It is accurate to
    1e-10 where `f` and `g2` are smooth and finite on `[0, t_max]`. Both are torch functions of a
    float64 tensor of any shape. The methods `f` and `g2` return the given functions themselves.

    Errors: `ValueError` where `f` or `g2` is not finite on `[0, t_max]`, or `g2` is negative.
    """

    f_given: Callable[[Tensor], Tensor]
    g2_given: Callable[[Tensor], Tensor]
    s0: float = 1.0
    sigma0: float = 0.0
    t_min: float = 1e-3
    t_max: float = 1.0
    _edges: Tensor = field(init=False, repr=False)
    _log_s: Tensor = field(init=False, repr=False)
    _nsr2: Tensor = field(init=False, repr=False)
    _one_law: ClassVar[bool] = True  # sigma comes from the same function as s

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        check_span(self)
        if self.s0 <= 0 or self.sigma0 < 0 or self.t_min < 0:
            raise ValueError("from_sde needs s0 > 0, sigma0 >= 0 and t_min >= 0")
        probe = torch.linspace(0.0, self.t_max, 257, dtype=torch.float64)
        for name, values in (("f", self._f(probe)), ("g2", self._g2(probe))):
            bad = ~torch.isfinite(values)
            if name == "g2":
                bad |= values < 0
            if bool(bad.any()):
                where = float(probe[bad][0])
                raise ValueError(
                    f"{name}({where:.6g}) = {float(values[bad][0])}: from_sde needs finite f and g2"
                    " >= 0 on [0, t_max]; lower t_max?"
                )
        edges = self._refine(probe[::16].contiguous())
        log_s = self._integrate(self._f, edges[:-1], edges[1:]).cumsum(0)
        object.__setattr__(self, "_edges", edges)
        object.__setattr__(self, "_log_s", torch.cat([torch.zeros(1, dtype=torch.float64), log_s]))
        growth = self._integrate(self._growth, edges[:-1], edges[1:]).cumsum(0)
        object.__setattr__(
            self,
            "_nsr2",
            (self.sigma0 / self.s0) ** 2 + torch.cat([torch.zeros(1, dtype=torch.float64), growth]),
        )

    def _f(self, t: Tensor) -> Tensor:
        return torch.broadcast_to(torch.as_tensor(self.f_given(t), dtype=t.dtype), t.shape)

    def f(self, t: float | Tensor) -> Tensor:
        """The `f` that was given."""
        return self._f(as_time(t))

    def g2(self, t: float | Tensor) -> Tensor:
        """The `g2` that was given."""
        return self._g2(as_time(t))

    def _g2(self, t: Tensor) -> Tensor:
        return torch.broadcast_to(torch.as_tensor(self.g2_given(t), dtype=t.dtype), t.shape)

    def _growth(self, t: Tensor) -> Tensor:
        """`d nsr^2 / dt = g2 / s^2`."""
        return self._g2(t) * torch.exp(-2.0 * self._log_signal(t)) / self.s0**2

    @staticmethod
    def _integrate(
        function: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, n: int = 16
    ) -> Tensor:
        nodes, weights = (c.to(a.device, a.dtype) for c in _math.gauss_legendre(n))
        width = (b - a).unsqueeze(-1)
        return ((function(a.unsqueeze(-1) + width * nodes) * weights) * width).sum(-1)

    def _refine(self, edges: Tensor) -> Tensor:
        """Panels halved until 16 nodes and twice 16 nodes agree on the integrals of `f` and of
        `g2 / s^2`.
        """
        for _ in range(40):
            a, b = edges[:-1], edges[1:]
            middle = (a + b) / 2

            def growth(t: Tensor, a: Tensor = a) -> Tensor:
                """`g2 / s^2` in units of `s(a)`, `a` the panel's start."""
                return self._g2(t) * torch.exp(
                    -2.0 * self._integrate(self._f, a.unsqueeze(-1).expand_as(t), t)
                )

            poor = torch.zeros_like(a, dtype=torch.bool)
            for function in (self._f, growth):
                whole = self._integrate(function, a, b)
                halves = self._integrate(function, a, middle) + self._integrate(function, middle, b)
                poor |= (whole - halves).abs() > 1e-13 * (1.0 + halves.abs())
            if not bool(poor.any()) or len(edges) > 20_000:
                break
            edges = torch.cat([edges, middle[poor]]).sort().values
        return edges

    def _panel(self, t: Tensor) -> Tensor:
        return (
            torch.searchsorted(
                self._edges.to(t.device), t.detach().double().contiguous(), right=True
            )
            - 1
        ).clamp(0, len(self._edges) - 2)

    def _log_signal(self, t: Tensor) -> Tensor:
        """`log(s / s0)`."""
        i = self._panel(t)
        return self._log_s.to(t.device, t.dtype)[i] + self._integrate(
            self._f, self._edges.to(t.device, t.dtype)[i], t
        )

    def s(self, t: Tensor) -> Tensor:
        """`s0 exp(int f)`."""
        return self.s0 * torch.exp(self._log_signal(t))

    def variance(self, t: Tensor) -> Tensor:
        """`s^2 (sigma0^2 / s0^2 + int g2 / s^2)`."""
        i = self._panel(t)
        growth = self._integrate(self._growth, self._edges.to(t.device, t.dtype)[i], t)
        return self.s(t) ** 2 * (self._nsr2.to(t.device, t.dtype)[i] + growth)

    def sigma(self, t: Tensor) -> Tensor:
        """Square root of `variance`."""
        return self.variance(t).sqrt()
