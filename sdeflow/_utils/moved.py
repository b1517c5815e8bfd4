"""Modules that moved in 0.6.

Their old names import for one release, with a `DeprecationWarning` that names the new place.
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

PLACES = {
    "": "denoiser=denoisers training.losses",
    "_utils": "distributed runs=run_control",
    "denoisers": "projection=thresholding",
    "evaluation": "evaluation.drawn=sampled evaluation.reference=measure evaluation.run=api",
    "generate": "generate.company=coordination generate.run=api",
    "grid": "grid.clocks=continuous grid.laying=base",
    "images": "data=datasets generate.identity=labels generate.shards",
    "models": "models.compiling=torch_compile",
    "models.ema": "models.posthoc models.power",
    "plan": "execution.combine execution.execute plot",
    "sampling": "execution.batching=batch_size execution.capture execution.compiled=cuda_graphs"
    " loop=batches start=inputs times",
    "solvers.adaptive": "solvers.adaptive_sde=sde solvers.control=step_size"
    " solvers.dpm_adaptive=dpm_solver",
    "solvers.auto": "grid.budget=grid recipes",
    "solvers.ode": "solvers.adams solvers.deis solvers.dpm_solver solvers.exponential=ddim"
    " solvers.pndm solvers.runge_kutta solvers.tableaus solvers.unipc solvers.weights",
    "solvers.sde": "solvers.er_sde solvers.exponential_sde=exponential solvers.sa_solver"
    " solvers.sde_dpm_solver=dpm_solver solvers.seeds solvers.stochastic=classic"
    " solvers.stochastic_adams=adams",
    "solvers.wrappers": "solvers.ancestral solvers.churn solvers.nested=base solvers.restart",
    "training": "training.run=api training.step=cuda_graph",
    "tuning": "grid.search=gits",
}
"""New folder to the old names of the modules that are there now, all below `sdeflow`;
`old=new` where a module's own name changed too.
"""

MOVED = {
    old: f"{folder}.{new or old.rpartition('.')[2]}".removeprefix(".")
    for folder, modules in PLACES.items()
    for old, _, new in (module.partition("=") for module in modules.split())
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
        text = f"{old} is now {new.__name__}; the old name goes in 0.7"
        warnings.warn(text, DeprecationWarning, stacklevel=2)

        def forward(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            place = MOVED_NAMES.get((old.removeprefix("sdeflow."), name))
            return getattr(importlib.import_module(f"sdeflow.{place}") if place else new, name)

        module.__getattr__ = forward  # type: ignore[method-assign]


def renamed(module: str, name: str) -> Any:
    """What an old name of a module stands for, after a warning; `AttributeError` for any other.

    `__getattr__ = partial(renamed, "grid")` in a module makes its old names work.
    """
    if (place := RENAMED.get(f"{module}.{name}")) is None:
        raise AttributeError(f"module 'sdeflow.{module}' has no attribute {name!r}")
    home, _, new = place.rpartition(".")
    text = f"sdeflow.{module}.{name} is now sdeflow.{place}; the old name goes in 0.7"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(f"sdeflow.{home}"), new)


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
