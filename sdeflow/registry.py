"""Names: solvers, grids and processes, with their aliases; the documentation, the command line and the tests iterate over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sdeflow import grid
from sdeflow.errors import unknown
from sdeflow.process import EDM, VE, VP, Cosine, Process, RectifiedFlow, SubVP
from sdeflow.solvers.adams import ExponentialAdams
from sdeflow.solvers.adaptive import RK23, RK45
from sdeflow.solvers.base import Solver
from sdeflow.solvers.exponential import DDIM
from sdeflow.solvers.external import TorchDiffEq, TorchSDE
from sdeflow.solvers.runge_kutta import RK4, Euler, Heun, Midpoint, Ralston
from sdeflow.solvers.stochastic import DDPM, AnnealedLangevin, EulerMaruyama
from sdeflow.solvers.wrappers import Langevin


@dataclass(frozen=True)
class Entry:
    """A registered name: the class or function behind it, its other names, and the arguments that it stands for."""

    name: str
    kind: Callable[..., Any]
    aliases: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def make(self) -> Callable[..., Any]:
        """What makes the thing; arguments given to it win over those of the name."""
        return partial(self.kind, **self.arguments) if self.arguments else self.kind

    @property
    def summary(self) -> str:
        """The first sentence of its documentation."""
        text = " ".join((self.kind.__doc__ or "").split("\n\n")[0].split())
        return text.split(". ")[0].rstrip(".") + "."


def _table(*entries: Entry) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


SOLVERS = _table(
    Entry("euler", Euler),
    Entry("heun", Heun),
    Entry("midpoint", Midpoint),
    Entry("ralston", Ralston),
    Entry("rk4", RK4),
    Entry("ddim", DDIM),
    Entry("adams1", ExponentialAdams, (), {"p": 1}),
    Entry("adams2", ExponentialAdams, (), {"p": 2}),
    Entry("adams3", ExponentialAdams, ("adams", "exponential_adams"), {"p": 3}),
    Entry("adams4", ExponentialAdams, (), {"p": 4}),
    Entry("euler_maruyama", EulerMaruyama, ("em", "reverse_sde")),
    Entry("ddpm", DDPM, ("ancestral",)),
    Entry("langevin", Langevin, ("predictor_corrector", "pc")),
    Entry("annealed_langevin", AnnealedLangevin, ("ncsn", "ald")),
    Entry("rk45", RK45, ("dopri5", "dormand_prince")),
    Entry("rk23", RK23, ("bogacki_shampine",)),
    Entry("torchdiffeq", TorchDiffEq),
    Entry("torchsde", TorchSDE),
)
"""Solvers by name; `torchdiffeq:METHOD` and `torchsde:METHOD` reach every method of those libraries."""

GRIDS = _table(
    Entry("uniform_t", grid.uniform_t, ("uniform",)),
    Entry("uniform_sqrt_t", grid.uniform_sqrt_t, ("sqrt_t",)),
    Entry("power_t", grid.power_t),
    Entry("uniform_lam", grid.uniform_lam, ("exponential", "logsnr")),
    Entry("uniform_angle", grid.uniform_angle),
    Entry("karras", grid.karras, ("edm",)),
    Entry("quadratic", grid.quadratic),
    Entry("leading", grid.leading),
    Entry("trailing", grid.trailing),
    Entry("linspace", grid.linspace),
)
"""Grids by name."""

PROCESSES = _table(
    Entry("vp", VP, ("ddpm_continuous",)),
    Entry("subvp", SubVP),
    Entry("cosine", Cosine),
    Entry("ve", VE, ("ncsn",)),
    Entry("edm", EDM, ("karras",)),
    Entry("rectified_flow", RectifiedFlow, ("flow", "rf")),
)
"""Processes by name, with their default parameters."""


def lookup(table: dict[str, Entry], kind: str, name: str) -> Entry:
    """The entry under a name or an alias; `UnknownNameError` names the nearest."""
    key = name.strip().lower().replace("-", "_")
    for entry in table.values():
        if key == entry.name or key in entry.aliases:
            return entry
    raise unknown(kind, name, [*table, *(alias for entry in table.values() for alias in entry.aliases)])


def solver(what: str | Solver) -> Solver:
    """The solver of a name; solvers pass through."""
    if isinstance(what, Solver):
        return what
    if isinstance(what, type) and issubclass(what, Solver):
        return what()
    if not isinstance(what, str):
        raise TypeError(f"a solver is a name or a Solver; got {type(what).__name__}")
    name, _, method = what.partition(":")
    entry = lookup(SOLVERS, "solver", name)
    if not method:
        return entry.make()
    if entry.kind not in (TorchDiffEq, TorchSDE):
        raise unknown("solver", what, SOLVERS)
    return entry.make(method)


def process(what: str | Process) -> Process:
    """The process of a name, with default parameters; processes pass through."""
    if isinstance(what, Process):
        return what
    if isinstance(what, type) and issubclass(what, Process):
        return what()
    if not isinstance(what, str):
        raise TypeError(f"a process is a name or a Process; got {type(what).__name__}")
    return lookup(PROCESSES, "process", what).make()


def grid_function(what: str | grid.GridFunction) -> grid.GridFunction:
    """The grid of a name; functions pass through."""
    return what if callable(what) else lookup(GRIDS, "grid", what).kind
