"""Every registered name makes something that says what it is; aliases reach it; a misspelt one
names the nearest.
"""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from sdeflow import registry
from sdeflow.errors import UnknownNameError
from sdeflow.process import VP, Process
from sdeflow.registry import GRIDS, PROCESSES, SOLVERS, Entry
from sdeflow.solvers.base import Solver

TABLES = {"solver": SOLVERS, "grid": GRIDS, "process": PROCESSES}
ENTRIES = [(kind, entry) for kind, table in TABLES.items() for entry in table.values()]


@pytest.mark.parametrize(
    ("kind", "entry"), ENTRIES, ids=lambda v: v.name if isinstance(v, Entry) else v
)
def test_an_entry_explains_itself(kind: str, entry: Entry) -> None:
    doc = entry.kind.__doc__
    assert doc, f"{entry.name} has no docstring"
    assert entry.summary.endswith(".")
    assert len(entry.summary) > 15
    assert "Source:" in doc, f"{entry.name} names no source"
    if kind == "solver":
        assert "Cost:" in doc
        assert "rder:" in doc


@pytest.mark.parametrize(
    ("kind", "entry"), ENTRIES, ids=lambda v: v.name if isinstance(v, Entry) else v
)
def test_names_and_aliases_reach_the_entry(kind: str, entry: Entry) -> None:
    for name in (entry.name, *entry.aliases, entry.name.upper(), entry.name.replace("_", "-")):
        assert registry.lookup(TABLES[kind], kind, name) is entry


@pytest.mark.parametrize("kind", TABLES)
def test_no_two_entries_share_a_name(kind: str) -> None:
    names = [name for entry in TABLES[kind].values() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() and "-" not in name for name in names)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_a_frozen_value(name: str) -> None:
    solver = registry.solver(name)
    assert isinstance(solver, Solver)
    assert dataclasses.is_dataclass(solver)
    assert solver == registry.solver(name)
    assert hash(solver) == hash(registry.solver(name))
    assert isinstance(solver.order, int)
    assert solver.source
    assert solver.cost
    assert isinstance(solver.stochastic, bool)
    assert isinstance(solver.adaptive, bool)
    assert pickle.loads(pickle.dumps(solver)) == solver
    for field in dataclasses.fields(solver):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(solver, field.name, None)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_is_a_frozen_value(name: str) -> None:
    process = registry.process(name)
    assert process == registry.process(name)
    assert hash(process) == hash(registry.process(name))
    assert pickle.loads(pickle.dumps(process)) == process
    with pytest.raises(dataclasses.FrozenInstanceError):
        process.t_min = 0.5


@pytest.mark.parametrize(
    ("find", "misspelt", "meant"),
    [
        (registry.solver, "hoin", "heun"),
        (registry.solver, "eulermaruyama", "euler_maruyama"),
        (registry.process, "vpp", "vp"),
        (registry.process, "rectifiedflow", "rectified_flow"),
        (registry.grid_function, "karass", "karras"),
    ],
)
def test_a_misspelt_name_names_the_nearest(find: object, misspelt: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean.*'{meant}'"):
        find(misspelt)  # type: ignore[operator]


def test_things_themselves_pass_through() -> None:
    process, solver = VP(), registry.solver("heun")
    assert registry.process(process) is process
    assert registry.solver(solver) is solver
    assert registry.process(VP) == VP()
    assert registry.solver(type(solver)) == solver

    def grid(process: Process, n: int, **ends: float) -> torch.Tensor:
        return torch.linspace(1.0, 0.1, n)

    assert registry.grid_function(grid) is grid


@pytest.mark.parametrize("find", [registry.solver, registry.process])
def test_other_things_are_refused(find: object) -> None:
    with pytest.raises(TypeError, match=r"got (int|float|NoneType)"):
        find(3)  # type: ignore[operator]


def test_methods_of_other_libraries_are_reached_by_a_colon() -> None:
    assert registry.solver("torchdiffeq:dopri8").method == "dopri8"  # type: ignore[attr-defined]
    assert registry.solver("torchsde:srk").method == "srk"  # type: ignore[attr-defined]
    with pytest.raises(UnknownNameError):
        registry.solver("heun:dopri8")
