"""Modules that moved in 0.6: their old names import for one release, with a `DeprecationWarning`
that names the new place.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "data": "images.datasets",
    "denoiser": "denoisers",
    "distributed": "_utils.distributed",
    "evaluation.drawn": "evaluation.sampled",
    "evaluation.reference": "evaluation.measure",
    "evaluation.run": "evaluation.api",
    "execution.batching": "sampling.batch_size",
    "execution.capture": "sampling.capture",
    "execution.combine": "plan.combine",
    "execution.compiled": "sampling.cuda_graphs",
    "execution.execute": "plan.execute",
    "generate.company": "generate.coordination",
    "generate.identity": "images.labels",
    "generate.run": "generate.api",
    "generate.shards": "images.shards",
    "grid.budget": "solvers.auto.grid",
    "grid.clocks": "grid.continuous",
    "grid.laying": "grid.base",
    "grid.search": "tuning.gits",
    "loop": "sampling.batches",
    "models.compiling": "models.torch_compile",
    "models.posthoc": "models.ema.posthoc",
    "models.power": "models.ema.power",
    "plot": "plan.plot",
    "projection": "denoisers.thresholding",
    "recipes": "solvers.auto.recipes",
    "runs": "_utils.run_control",
    "solvers.adams": "solvers.ode.adams",
    "solvers.adaptive_sde": "solvers.adaptive.sde",
    "solvers.ancestral": "solvers.wrappers.ancestral",
    "solvers.churn": "solvers.wrappers.churn",
    "solvers.control": "solvers.adaptive.step_size",
    "solvers.deis": "solvers.ode.deis",
    "solvers.dpm_adaptive": "solvers.adaptive.dpm_solver",
    "solvers.dpm_solver": "solvers.ode.dpm_solver",
    "solvers.er_sde": "solvers.sde.er_sde",
    "solvers.exponential": "solvers.ode.ddim",
    "solvers.exponential_sde": "solvers.sde.exponential",
    "solvers.nested": "solvers.wrappers.base",
    "solvers.pndm": "solvers.ode.pndm",
    "solvers.restart": "solvers.wrappers.restart",
    "solvers.runge_kutta": "solvers.ode.runge_kutta",
    "solvers.sa_solver": "solvers.sde.sa_solver",
    "solvers.sde_dpm_solver": "solvers.sde.dpm_solver",
    "solvers.seeds": "solvers.sde.seeds",
    "solvers.stochastic": "solvers.sde.classic",
    "solvers.stochastic_adams": "solvers.sde.adams",
    "solvers.tableaus": "solvers.ode.tableaus",
    "solvers.unipc": "solvers.ode.unipc",
    "solvers.weights": "solvers.ode.weights",
    "start": "sampling.inputs",
    "times": "sampling.times",
    "training.losses": "losses",
    "training.run": "training.api",
    "training.step": "training.cuda_graph",
}
"""Old place to new place, below `sdeflow`."""

RENAMED = {"generate.Generated": "generate.GenerationResult", "grid.auto": "solvers.auto.grid.auto"}
"""Old name to new name, below `sdeflow`."""


MOVED_NAMES = {
    ("generate.shards", "read_images"): "images.datasets",
    ("loop", "Step"): "sampling.api",
}
"""Single names that went elsewhere than the rest of their old module."""


class _Moved(MetaPathFinder, Loader):
    """Finds the old name of a module, and forwards what is asked of it to the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a moved module; None for any other."""
        name = fullname.removeprefix("sdeflow.")
        if name == "execution":
            return ModuleSpec(fullname, self, is_package=True)
        return ModuleSpec(fullname, self) if fullname != name and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Forward the module's attributes, after a warning."""
        old = module.__name__
        if (place := MOVED.get(old.removeprefix("sdeflow."))) is None:
            return
        new = importlib.import_module(f"sdeflow.{place}")
        warnings.warn(
            f"{old} is now {new.__name__}; the old name goes in 0.7",
            DeprecationWarning,
            stacklevel=2,
        )

        def forward(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            place = MOVED_NAMES.get((old.removeprefix("sdeflow."), name))
            return getattr(importlib.import_module(f"sdeflow.{place}") if place else new, name)

        module.__getattr__ = forward  # type: ignore[method-assign]


def _renamed(module: str, name: str) -> Any:
    """What an old name of a module stands for, after a warning; `AttributeError` for any other."""
    if (place := RENAMED.get(f"{module}.{name}")) is None:
        raise AttributeError(f"module 'sdeflow.{module}' has no attribute {name!r}")
    home, _, new = place.rpartition(".")
    text = f"sdeflow.{module}.{name} is now sdeflow.{place}; the old name goes in 0.7"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(f"sdeflow.{home}"), new)


class _Renamed(ModuleType):
    """A module with names that have changed."""

    def __getattr__(self, name: str) -> Any:
        return _renamed(self.__name__.removeprefix("sdeflow."), name)


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
    for place in RENAMED:
        if module := sys.modules.get(f"sdeflow.{place.rpartition('.')[0]}"):
            module.__class__ = _Renamed
