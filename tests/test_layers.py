"""The package is a stack of folders: imports point down, and no files import each other in a
circle.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sdeflow"

STACK = """
_version errors
_utils
noise process
images denoisers grid discrete
reverse targets models losses
plan
solvers
registry
sampling
tuning training generate likelihood
evaluation
cli
__init__ __main__
"""
"""A line a layer, the lowest first. A folder, or a file at the root, imports from lower lines only;
a new file needs no entry.
"""

LAYER = {
    name: layer for layer, line in enumerate(STACK.strip().splitlines()) for name in line.split()
}
REQUIRED = {
    "torch",
    "numpy",
    "torchdiffeq",
    "torchsde",
    "scipy",
    "safetensors",
    "tqdm",
    "typer",
    "PIL",
}
"""What `pip install sdeflow` brings. Anything else is imported where it is used."""


def modules() -> dict[str, Path]:
    """Every file, by its module's name below the package."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = modules()


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Every module that a file imports, by its full name. `from package import module` names the
    module.
    """
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_level:
        delayed = (ast.FunctionDef, ast.AsyncFunctionDef)
        inside = {
            id(n) for f in nodes if isinstance(f, delayed) or _for_types(f) for n in ast.walk(f)
        }
        nodes = [n for n in nodes if id(n) not in inside]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the layer it comes from"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("sdeflow.")
                is_module = node.module.startswith("sdeflow") and {inner, f"{inner}.__init__"} & {
                    *MODULES
                }
                found.add(f"sdeflow.{inner}" if is_module else node.module)
    return found


def _for_types(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def own(path: Path, *, top_level: bool = False) -> set[str]:
    """The files of sdeflow that a file imports; a package is its `__init__`."""
    names = {
        n.removeprefix("sdeflow").removeprefix(".")
        for n in imports(path, top_level=top_level)
        if n.split(".")[0] == "sdeflow"
    }
    return {name if name in MODULES else f"{name}.__init__".removeprefix(".") for name in names}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    here = module.split(".")[0]
    assert here in LAYER, f"{here} is new at the root: give it a layer in STACK"
    for other in own(MODULES[module]):
        there = other.split(".")[0]
        assert there == here or LAYER[there] < LAYER[here], (
            f"{module} imports {other}, which is not below it"
        )


def test_no_files_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter(
        {name: own(path, top_level=True) for name, path in MODULES.items()}
    ).prepare()


@pytest.mark.parametrize("depth", [1, 2])
def test_no_folders_import_each_other_in_a_circle(depth: int) -> None:
    """At depth 2 a folder is `solvers/ode`, and the files directly in `solvers` stand by
    themselves.
    """

    def place(name: str) -> str:
        parts = name.split(".")
        return name if len(parts) <= depth else ".".join(parts[:depth])

    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        others = {place(other) for other in own(path, top_level=True)}
        graph.setdefault(place(name), set()).update(others - {place(name)})
    graphlib.TopologicalSorter(graph).prepare()


def test_the_root_stays_small() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 28


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("models.")))
def test_models_stand_alone(module: str) -> None:
    """An architecture needs torch. Only the checkpoint loader knows the denoiser that it
    returns.
    """
    allowed = {"models", "errors", "_utils"} | (
        {"denoisers"} if module == "models.checkpoint" else set()
    )
    assert {other.split(".")[0] for other in own(MODULES[module])} <= allowed


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_required_packages_are_imported_at_the_top(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(MODULES[module], top_level=True)} - {
        "sdeflow"
    }
    assert outside <= REQUIRED | set(sys.stdlib_module_names), (
        "an optional package is imported where it is used"
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_takes_open_keyword_arguments(module: str) -> None:
    """A misspelt argument is a TypeError. Only the network's own `**condition` is open."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
            assert node.args.kwarg.arg == "condition", (
                f"{module}.{node.name} takes **{node.args.kwarg.arg}"
            )


def test_the_import_is_light() -> None:
    """No optional package, no compilation, no network, no figure at import."""
    code = (
        "import sys, sdeflow; heavy = 'datasets', 'pyarrow', 'matplotlib', 'torchvision',"
        " 'torch._inductor.codecache'; print(*[module for module in heavy if module in"
        " sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
