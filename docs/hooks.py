"""What the documentation takes from the code at build time, so that it cannot disagree with it (a
hook of mkdocs).

`python docs/hooks.py` brings the figures of README.md up to date with benchmarks/results; a test
notices where they are not.

A page asks for it with a comment on a line of its own:

    <!-- table: solvers KIND --> what the registry knows: solvers (all, or of a kind), grids or processes
    <!-- result: overhead -->    a table of benchmarks/results, with its command, machine and date, and its figure if it has one
    <!-- results -->             the same for every benchmark that no other page shows, each with what it measures
    <!-- floors -->              the files of the package, each with its floor and the first sentence of its docstring
    <!-- figure: FILE caption --> a picture of docs/assets, once it is there
    <!-- card -->                the card of the bundled checkpoint, from the checkpoint itself
    <!-- help -->                the help of every command of the command line
    <!-- errors -->              every error, with its first sentence
    <!-- include: FILE part -->  a file of the repository's root, or the part of it between the comments "part" and "/part"
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdeflow"
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(
    r"^<!-- (table|results|result|layers|figure|card|help|errors|include)(?:: (.+?))? -->$",
    re.MULTILINE,
)


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Replace every marker of a page by what it asks for."""
    return MARKER.sub(lambda match: MAKERS[match[1]](match[2]), markdown)


# ------------------------------------------------------------------------------------- the registry


def tables(which: str) -> str:
    """A table of the registry: `solvers`, perhaps of one kind (`solvers multistep`), `grids` or
    `processes`.
    """
    which, _, kind = which.partition(" ")
    return (
        solvers(kind)
        if kind
        else {"solvers": solvers, "grids": grids, "processes": processes}[which]()
    )


def solvers(kind: str = "") -> str:
    """Every registered solver, or those of a kind."""
    from sdeflow import registry

    rows = []
    for entry in registry.SOLVERS.values():
        solver = entry.make()
        if kind not in ("", kind_of(solver)):
            continue
        order = str(solver.order) if solver.order else "none"
        rows.append(
            [
                f"`{entry.name}`",
                _link(entry.kind) + _arguments(entry),
                ("SDE" if solver.stochastic else "ODE") + (", adaptive" if solver.adaptive else ""),
                f"weak {order}" if solver.stochastic and solver.order else order,
                _calls(solver),
                _memory(solver),
                "yes" if solver.reversible else "no",
                solver.source,
                ", ".join(f"`{alias}`" for alias in entry.aliases),
            ]
        )
    head = [
        "name",
        "class",
        "solves",
        "order",
        "network calls",
        "tensors",
        "encodes",
        "source",
        "also called",
    ]
    return _table(head, rows)


KINDS = ("multistep", "singlestep", "stochastic", "wrapper", "adaptive", "external")


def kind_of(solver: Any) -> str:
    """In which table of docs/solvers.md a solver stands, one of `KINDS`."""
    from sdeflow.solvers.base import GridSolver
    from sdeflow.solvers.external.torchdiffeq import TorchDiffEq
    from sdeflow.solvers.external.torchsde import TorchSDE
    from sdeflow.solvers.wrappers.base import Nested

    if isinstance(solver, TorchDiffEq | TorchSDE):
        return "external"
    if not isinstance(solver, GridSolver):
        return "adaptive"
    if isinstance(solver, Nested):
        return "wrapper"
    if solver.stochastic:
        return "stochastic"
    return "multistep" if solver.calls(20) - solver.calls(19) == 1 else "singlestep"


def _calls(solver: Any) -> str:
    """What a step costs: counted, where a solver has a budget and does not leave it to the one it
    holds.
    """
    if kind_of(solver) in ("wrapper", "adaptive", "external"):
        return str(solver.cost)
    each = solver.calls(20) - solver.calls(19)
    more = solver.calls(20, finish=False) - 19 * each
    return f"{each} a step" + (f", and {more} more" if more else "")


def _memory(solver: Any) -> str:
    """Tensors of a state's size that a solve holds at once: the registers of a plan of 12 steps."""
    from sdeflow import VP, grid
    from sdeflow.solvers.base import GridSolver

    if not isinstance(solver, GridSolver):
        return ""
    return str(solver.plan(VP(), grid.uniform_sqrt_t(VP(), 13)).registers)


def _arguments(entry: Any) -> str:
    """What a name stands for besides its class."""
    return "".join(f" `{name}={value!r}`" for name, value in entry.arguments.items())


def grids() -> str:
    """Every registered grid."""
    from sdeflow import registry

    rows = []
    for entry in registry.GRIDS.values():
        rows.append(
            [
                f"`{entry.name}`",
                _link(entry.kind),
                _cell(entry.summary) + _arguments(entry),
                ", ".join(f"`{alias}`" for alias in entry.aliases),
            ]
        )
    return _table(["name", "function", "levels", "also called"], rows)


def processes() -> str:
    """Every registered process, with its default span and the largest noise-to-signal ratio."""
    from sdeflow import registry

    rows = []
    for entry in registry.PROCESSES.values():
        process = entry.make()
        low, high = (float(process.nsr(t)) for t in (process.t_min, process.t_max))
        span = f"{process.t_min:g} to {process.t_max:.4g}"
        defaults = [f"`{process.default_grid}`", f"`{process.default_clock}`"]
        rows.append(
            [
                f"`{entry.name}`",
                _link(entry.kind),
                _cell(entry.summary),
                span,
                f"{low:.3g} to {high:.4g}",
                *defaults,
            ]
        )
    return _table(
        ["name", "class", "what it is", "t", "nsr", "default grid", "default clock"], rows
    )


def _link(thing: Any) -> str:
    return f"[`{thing.__name__}`][{thing.__module__}.{thing.__qualname__}]"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# -------------------------------------------------------------------------------------- the results


def result(name: str) -> str:
    """The table that `benchmarks/NAME.py` wrote, and its figure; a note on how to make it where
    there is none.
    """
    path = RESULTS / f"{name}.md"
    if not path.is_file():
        return f'!!! note "Not measured yet"\n    `python benchmarks/{name}.py` writes this table.'
    text = path.read_text().strip()
    for kind in ("png", "svg"):
        if (RESULTS / f"{name}.{kind}").is_file() and f"{name}.{kind}" not in text:
            text += f"\n\n![{name}](results/{name}.{kind})"
    return re.sub(
        r"\]\((?:benchmarks/results/|\./)?(?!results/|https?:|#)([\w.-]+\.(?:png|svg))\)",
        r"](results/\1)",
        text,
    )


def results() -> str:
    """A section a benchmark: what its script says it measures, and the tables that it wrote."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    placed = set(re.findall(r"^<!-- result: (.+?) -->$", pages, re.MULTILINE))
    scripts = [
        path for path in sorted((ROOT / "benchmarks").glob("*.py")) if not path.stem.startswith("_")
    ]
    tables = {path.stem for path in RESULTS.glob("*.md")} - placed
    parts = []
    for path in scripts:
        name = path.stem
        mine = {
            table for table in tables if table == name or table.startswith((f"{name}_", f"{name}-"))
        }
        tables -= mine
        if name not in placed:
            shown = [result(table) for table in sorted(mine or {name})]
            parts += [f"## {name}", ast.get_docstring(ast.parse(path.read_text())) or "", *shown]
    for name in sorted(tables):
        parts += [f"## {name}", result(name)]
    return "\n\n".join(parts)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Put the pictures of benchmarks/results beside the pages."""
    from mkdocs.structure.files import File

    for path in sorted([*RESULTS.glob("*.png"), *RESULTS.glob("*.svg")]):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


MEASURED = re.compile(
    r"(<!-- measured: ([\w-]+) rows: (.+?) -->\n).*?(<!-- /measured -->)", re.DOTALL
)


def refreshed(readme: str) -> str:
    """`README.md` with its tables as benchmarks/results has them now."""
    return MEASURED.sub(
        lambda match: match[1] + excerpt(match[2], match[3].split(" | ")) + match[4], readme
    )


def excerpt(name: str, wanted: list[str]) -> str:
    """The rows of a result in which one of `wanted` stands, under their head, and the line that
    says how they were made.

    `first table` is all of that.
    """
    path = RESULTS / f"{name}.md"
    if not path.is_file():
        return "\n*Not measured yet.*\n\n"
    lines = path.read_text().strip().splitlines()
    if wanted == ["first table"]:
        first = next(i for i, line in enumerate(lines) if line.startswith("|---"))
        rows = list(
            range(
                first + 1, next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
            )
        )
    else:
        rows = [
            i
            for i, line in enumerate(lines)
            if line.startswith("| ") and any(f"| {text} |" in line for text in wanted)
        ]
    head = max(i for i, line in enumerate(lines) if line.startswith("|---") and i < rows[0])
    return "\n".join(
        ["", lines[head - 1], lines[head], *(lines[i] for i in rows), "", lines[-1], "", ""]
    )


# -------------------------------------------------------------------------------------- the package


def layers() -> str:
    """Every file of the package with its summary, layer by layer; tests/test_layers.py states the
    stack.
    """
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text())
    assigned = (n for n in tree.body if isinstance(n, ast.Assign))
    stack = next(n.value for n in assigned if ast.unparse(n.targets[0]) == "STACK")
    blocks = []
    for line in reversed(ast.literal_eval(stack).split("\n")[1:-1]):
        rows = []
        for name in line.split():
            files = sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / f"{name}.py"]
            for path in files:
                summary = ast.get_docstring(ast.parse(path.read_text())) or ""
                rows.append(f"{path.relative_to(PACKAGE).as_posix():<34} {_first(summary)}")
        blocks.append("\n".join(rows))
    return "```text\n" + "\n\n".join(blocks) + "\n```"


def _first(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    line = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.;])\s", line)[0].rstrip(".:;")


def errors() -> str:
    """Every error that sdeflow raises on purpose."""
    import sdeflow.errors

    kinds = [
        kind
        for kind in vars(sdeflow.errors).values()
        if isinstance(kind, type) and issubclass(kind, sdeflow.SdeflowError)
    ]
    rows = []
    for kind in kinds:
        builtin = [base.__name__ for base in kind.__bases__ if base is not sdeflow.SdeflowError]
        rows.append([_link(kind), f"`{builtin[0]}`", _cell(_first(kind.__doc__ or ""))])
    return _table(["error", "is also a", "meaning"], rows)


def figure(what: str) -> str:
    """A picture of docs/assets with its caption, or nothing where it has not been made."""
    name, _, caption = what.partition(" ")
    return (
        f"![{caption}](assets/{name})\n\n*{caption}*"
        if (ROOT / "docs" / "assets" / name).is_file()
        else ""
    )


def card() -> str:
    """What the bundled checkpoint says of its training."""
    from sdeflow import load
    from sdeflow.models.checkpoint import BUNDLED
    from sdeflow.training.api import card_markdown

    path = BUNDLED["cifar10"]
    if not path.is_file():
        return '!!! note "Not trained yet"\n    `sdeflow train` makes the checkpoint.'
    text = card_markdown(load(path).card)
    hashed = hashlib.sha256(path.read_bytes()).hexdigest()
    size = path.stat().st_size / 1e6
    return (
        f"{text.partition('# Model card')[2].strip()}\n\n- file: `{path.name}`, {size:.1f} MB,"
        f" SHA-256 `{hashed}`"
    )


def command_line() -> str:
    """The help of every command."""
    os.environ |= {"TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    import typer
    from typer.testing import CliRunner

    from sdeflow.cli import app

    parts = []
    for name in sorted(typer.main.get_group(app).commands):
        shown = CliRunner().invoke(app, [name, "--help"], prog_name="sdeflow")
        if shown.exit_code:
            raise RuntimeError(f"sdeflow {name} --help failed: {shown.output}")
        text = "\n".join(line.rstrip() for line in shown.output.strip("\n").splitlines())
        parts.append(f"## sdeflow {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def include(what: str) -> str:
    """A file of the repository's root, or a part of it, with its links as they are from the
    pages.
    """
    name, _, part = what.partition(" ")
    text = (ROOT / name).read_text()
    if part:
        text = text.split(f"<!-- {part} -->\n")[1].split(f"<!-- /{part} -->")[0]
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(
        r"\]\((CHANGELOG|CONTRIBUTING)\.md", lambda match: f"]({match[1].lower()}.md", text
    ).strip()


MAKERS: dict[str, Callable[[str], str]] = {
    "table": tables,
    "result": result,
    "results": lambda _: results(),
    "layers": lambda _: layers(),
    "figure": figure,
    "card": lambda _: card(),
    "help": lambda _: command_line(),
    "errors": lambda _: errors(),
    "include": include,
}

if __name__ == "__main__":
    argparse.ArgumentParser(
        description="Bring the figures of README.md up to date with benchmarks/results."
    ).parse_args()
    README = ROOT / "README.md"
    README.write_text(refreshed(README.read_text()))
