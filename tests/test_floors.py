"""The arrows run one way: a file imports only from lower floors. Stated once, in the table below."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sdeflow"

FLOORS = {
    0: [
        "plan",
        "execution",
        "errors",
        "_version",
        "_math",
        "_memory",
        "_weak",
        "distributed",
        "execution.kernel",
        "solvers.tableaus",
        "recipes",
        "models.unet",
        "models.ema",
    ],
    1: [
        "generate.company",
        "models.compiling",
        "training.step",
        "process",
        "noise",
        "evaluation.metrics",
        "_files",
        "data",
        "models",
        "runs",
        "plan.instructions",
        "models.power",
    ],
    2: [
        "denoiser",
        "images",
        "generate.shards",
        "grid.laying",
        "grid.quantiles",
        "execution.combine",
        "plan.unroll",
        "plan.files",
    ],
    3: [
        "generate.identity",
        "start",
        "execution.execute",
        "targets",
        "guidance",
        "projection",
        "inverse",
        "training.losses",
        "reverse",
        "models.checkpoint",
        "plan.check",
        "plot",
        "grid.clocks",
        "grid.tables",
    ],
    4: [
        "models.posthoc",
        "training.config",
        "evaluation.features",
        "plan.plan",
        "plan.trace",
        "solvers.weights",
        "grid.discrete",
        "grid.wrappers",
        "grid.budget",
    ],
    5: ["training.trainer", "evaluation.reference", "execution.capture", "grid", "solvers", "solvers.base"],
    6: ["solvers.exponential", "solvers.runge_kutta", "solvers.control", "solvers.external", "solvers.exponential_sde"],
    7: [
        "solvers.adaptive",
        "solvers.adams",
        "solvers.dpm_solver",
        "solvers.deis",
        "solvers.unipc",
        "solvers.stochastic",
        "solvers.sde_dpm_solver",
        "solvers.seeds",
        "solvers.stochastic_adams",
        "solvers.er_sde",
        "solvers.nested",
        "solvers.adaptive_sde",
    ],
    8: [
        "solvers.auto",
        "solvers.pndm",
        "solvers.wrappers",
        "solvers.dpm_adaptive",
        "solvers.sa_solver",
        "solvers.churn",
        "solvers.ancestral",
        "solvers.restart",
    ],
    9: ["registry", "likelihood", "execution.batching", "execution.compiled"],
    10: ["times", "loop"],
    11: ["sampling"],
    12: ["training.run", "generate.run", "grid.search", "tune", "cli.options"],
    13: ["training", "generate", "evaluation.drawn", "cli.train", "cli.ema", "cli.sample", "cli.info", "cli.plan"],
    14: ["evaluation.run", "cli.generate"],
    15: ["evaluation", "cli.evaluate"],
    16: ["cli"],
    17: ["__main__", "__init__"],
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}

REQUIRED = {"torch", "numpy", "torchdiffeq", "torchsde", "safetensors", "tqdm", "typer", "PIL"}
"""What `pip install sdeflow` brings; anything else is imported where it is used."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)
        found[name] = path
    return found


MODULES = modules()


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Every module that a file imports, by its full name; `from package import module` names the module."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_level:
        inside = {id(n) for f in nodes if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
        nodes = [n for n in nodes if id(n) not in inside]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor they come from"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("sdeflow.")
                found.add(f"sdeflow.{inner}" if node.module.startswith("sdeflow") and inner in MODULES else node.module)
    return found


def own(path: Path) -> set[str]:
    """The sdeflow modules that a file imports."""
    names = {name for name in imports(path) if name == "sdeflow" or name.startswith("sdeflow.")}
    return {name.removeprefix("sdeflow").removeprefix(".") or "__init__" for name in names}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_from_lower_floors(module: str) -> None:
    assert module in FLOOR, f"{module} is new: give it a floor in tests/test_floors.py"
    for other in own(MODULES[module]):
        assert other in FLOOR, f"{module} imports {other}, which has no floor"
        assert FLOOR[other] < FLOOR[module], (
            f"{module} (floor {FLOOR[module]}) imports {other} (floor {FLOOR[other]}): arrows run down"
        )


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("models")))
def test_models_stand_alone(module: str) -> None:
    """An architecture needs torch; only the checkpoint loader knows the denoiser that it returns."""
    allowed = {"errors", "_files", "distributed", *(name for name in MODULES if name.startswith("models"))}
    assert own(MODULES[module]) <= (allowed | {"denoiser"} if module == "models.checkpoint" else allowed)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_required_packages_are_imported_at_the_top(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(MODULES[module], top_level=True)} - {"sdeflow"}
    assert outside <= REQUIRED | set(sys.stdlib_module_names), "an optional package is imported where it is used"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_takes_open_keyword_arguments(module: str) -> None:
    """A misspelt argument is a TypeError; only the network's own `**condition` is open."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
            assert node.args.kwarg.arg == "condition", f"{module}.{node.name} takes **{node.args.kwarg.arg}"


def test_the_import_is_light() -> None:
    """No optional package, no compilation, no network, no figure at import."""
    code = (
        "import sys, sdeflow; heavy = 'datasets', 'pyarrow', 'matplotlib', 'torchvision', 'torch._inductor.codecache'; "
        "print(*[module for module in heavy if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
