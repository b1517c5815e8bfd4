"""Writes into the Markdown files what they take from the code and from benchmarks/results.

    python docs/update.py           # writes
    python docs/update.py --check   # names the files that are out of date, and fails

A page marks such a part with two comments, each on a line of its own, and nobody edits what stands
between them:

    <!-- begin: NAME ARGUMENT -->
    <!-- end -->

NAME and ARGUMENT are one of:

    table solvers KIND        the registry: solvers (all, or of a kind), grids or processes
    result NAME               benchmarks/results/NAME.md and its figure
    excerpt NAME: A | B       the rows of a result that have the cell A or B; "first table" is that
    api PREFIX ...            the public names below modules, with their first sentences
    stack                     the folders of the package as a drawing, layer by layer
    layers                    the files of the package, layer by layer, with their first sentences
    card                      the card of the bundled checkpoint
    help                      the help of every command of the command line
    errors                    every error, with its first sentence
    moved                     modules and names that moved, old and new
    defaults                  the numerical defaults
    include FILE PART         a part of another file, between its comments "PART" and "/PART"

tests/test_docs.py fails where a file is out of date.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import sys
import textwrap
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdeflow"
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PART = re.compile(
    r"^<!-- begin: (\w+)(?: ([^\n]*?))? -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)


def pages() -> list[Path]:
    """Every Markdown file that may have such parts."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted(DOCS.rglob("*.md"))]


def updated(text: str, page: Path) -> str:
    """The text of a page, with its marked parts as they should be now."""

    def made(match: re.Match[str]) -> str:
        name, argument = match[1], match[2] or ""
        head = f"<!-- begin: {name} {argument}".rstrip()
        return f"{head} -->\n\n{MAKERS[name](argument, page).strip()}\n\n<!-- end -->"

    return PART.sub(made, text)


def update(check: bool = False) -> list[Path]:
    """Write the marked parts of every page. Returns the pages that changed, or would."""
    changed = []
    for page in pages():
        text = page.read_text()
        new = updated(text, page)
        if new != text:
            changed.append(page)
            if not check:
                page.write_text(new)
    return changed


def _from(page: Path, target: Path) -> str:
    """A relative link from a page to a file."""
    return Path(os.path.relpath(target, page.parent)).as_posix()


# ------------------------------------------------------------------------------------- the registry


def tables(which: str, page: Path) -> str:
    """A table of the registry: `solvers`, perhaps of one kind (`solvers multistep`), `grids` or
    `processes`.
    """
    which, _, kind = which.partition(" ")
    if which == "solvers":
        return solvers(kind, page)
    return {"grids": grids, "processes": processes}[which](page)


def solvers(kind: str = "", page: Path = DOCS / "index.md") -> str:
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
                _link(entry.kind, page) + _arguments(entry),
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
    """In which table of docs/reference/solvers.md a solver stands, one of `KINDS`."""
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


def grids(page: Path = DOCS / "index.md") -> str:
    """Every registered grid."""
    from sdeflow import registry

    rows = []
    for entry in registry.GRIDS.values():
        rows.append(
            [
                f"`{entry.name}`",
                _link(entry.kind, page),
                _cell(entry.summary) + _arguments(entry),
                ", ".join(f"`{alias}`" for alias in entry.aliases),
            ]
        )
    return _table(["name", "function", "levels", "also called"], rows)


def processes(page: Path = DOCS / "index.md") -> str:
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
                _link(entry.kind, page),
                _cell(entry.summary),
                span,
                f"{low:.3g} to {high:.4g}",
                *defaults,
            ]
        )
    return _table(
        ["name", "class", "what it is", "t", "nsr", "default grid", "default clock"], rows
    )


def _link(thing: Any, page: Path) -> str:
    """A name of the package, as a link to its entry in docs/api."""
    name, home = f"{thing.__module__}.{thing.__qualname__}", API.get(thing.__module__)
    label = f"`{thing.__name__}`"
    return f"[{label}]({_from(page, home)}#{name})" if home else label


def _api_pages() -> dict[str, Path]:
    """On which page of docs/api a module stands."""
    shown = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for match in PART.finditer(page.read_text()):
            if match[1] == "api":
                shown |= dict.fromkeys(public_modules(match[2].split()), page)
    return shown


def public_modules(prefixes: list[str]) -> list[str]:
    """The modules at and below each prefix, without those whose names begin with an underscore."""
    found = []
    for prefix in prefixes:
        root = ROOT / prefix.replace(".", "/")
        files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
        if not all(path.is_file() for path in files) or not files:
            raise FileNotFoundError(f"there is no module {prefix}")
        found += [
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in files
            if not path.stem.startswith("_")
        ]
    return list(dict.fromkeys(found))


def api(prefixes: str, page: Path) -> str:
    """A table of the public names of each module, and where mkdocs puts their docstrings."""
    shown = public_modules(prefixes.split())
    rows, blocks = [], []
    for module in shown:
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                text = _first(ast.get_docstring(node) or "")
                rows.append([f"`{node.name}`", f"`{module}`", _cell(text)])
        blocks.append(f"::: {module}")
    return "\n\n".join([_table(["name", "module", "what it is"], rows), *blocks])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# -------------------------------------------------------------------------------------- the results


def result(name: str, page: Path) -> str:
    """The table that a benchmark wrote, with its figure; a note where there is none."""
    path = RESULTS / f"{name}.md"
    if not path.is_file():
        return f"*Not measured yet: benchmarks/results has no {name}.md.*"
    text = path.read_text().strip().replace("```python", "```py")  # shown, and not run as a test
    for kind in ("png", "svg"):
        if (RESULTS / f"{name}.{kind}").is_file() and f"{name}.{kind}" not in text:
            text += f"\n\n![{name}]({name}.{kind})"
    return re.sub(
        r"\]\((?:benchmarks/results/|results/|\./)?(?!https?:|#)([\w.-]+\.(?:png|svg))\)",
        lambda match: f"]({_from(page, RESULTS / match[1])})",
        text,
    )


def excerpt(what: str, page: Path) -> str:
    """The rows of a result that have one of the wanted cells, under their head, and the line that
    says how they were made. `first table` is all of the first table.
    """
    name, _, rest = what.partition(": ")
    wanted = rest.split(" | ")
    path = RESULTS / f"{name}.md"
    if not path.is_file():
        return f"*Not measured yet: benchmarks/results has no {name}.md.*"
    lines = path.read_text().strip().splitlines()
    if wanted == ["first table"]:
        first = next(i for i, line in enumerate(lines) if line.startswith("|---"))
        last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
        rows = list(range(first + 1, last))
    else:
        rows = [
            i
            for i, line in enumerate(lines)
            if line.startswith("| ") and any(f"| {text} |" in line for text in wanted)
        ]
    head = max(i for i, line in enumerate(lines) if line.startswith("|---") and i < rows[0])
    return "\n".join([lines[head - 1], lines[head], *(lines[i] for i in rows), "", lines[-1]])


# -------------------------------------------------------------------------------------- the package


def stack() -> list[str]:
    """The layers of the package, the lowest first, a line of names each: `STACK` of the test."""
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text())
    assigned = (n for n in tree.body if isinstance(n, ast.Assign))
    value = next(n.value for n in assigned if ast.unparse(n.targets[0]) == "STACK")
    lines: list[str] = ast.literal_eval(value).strip().splitlines()
    return lines


def drawing() -> str:
    """The stack as a drawing: a box a layer, a line a name with its first sentence."""
    boxes = []
    for line in reversed(stack()):
        rows = []
        for name in line.split():
            path = PACKAGE / name
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            folder = f"{name}/" if path.parent != PACKAGE else name
            summary = ast.get_docstring(ast.parse(path.read_text())) or ""
            rooms = sorted(room.parent.name for room in (PACKAGE / name).glob("*/__init__.py"))
            text = textwrap.wrap(_first(summary), 78) + textwrap.wrap(
                " ".join(f"{room}/" for room in rooms), 78
            )
            rows += [
                f"{head:<12} {line}" for head, line in zip_longest([folder], text, fillvalue="")
            ]
        boxes.append(rows)
    width = max(len(row) for rows in boxes for row in rows)
    edge = "+" + "-" * (width + 2) + "+"
    lines = [edge]
    for rows in boxes:
        lines += [*(f"| {row:<{width}} |" for row in rows), edge]
    return "```text\n" + "\n".join(lines) + "\n```"


def layers() -> str:
    """Every file of the package with its summary, layer by layer; tests/test_layers.py states the
    stack.
    """
    blocks = []
    for line in reversed(stack()):
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


def errors(page: Path = DOCS / "index.md") -> str:
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
        rows.append([_link(kind, page), f"`{builtin[0]}`", _cell(_first(kind.__doc__ or ""))])
    return _table(["error", "is also a", "meaning"], rows)


def moved() -> str:
    """Modules and names that moved, old and new, from `sdeflow/_utils/moved.py`."""
    from sdeflow._utils.moved import MOVED, RENAMED

    rows = [
        [f"`sdeflow.{old}`", f"`sdeflow.{new}`"] for old, new in sorted((MOVED | RENAMED).items())
    ]
    return _table(["0.5", "0.6"], rows)


def card() -> str:
    """What the bundled checkpoint says of its training."""
    from sdeflow import load
    from sdeflow.models.checkpoint import BUNDLED
    from sdeflow.training.api import card_markdown

    path = BUNDLED["cifar10"]
    if not path.is_file():
        return "*Not trained yet: `sdeflow train` makes the checkpoint.*"
    text = card_markdown(load(path).card)
    hashed = hashlib.sha256(path.read_bytes()).hexdigest()
    size = path.stat().st_size / 1e6
    return (
        f"{text.partition('# Model card')[2].strip()}\n\n- file: `{path.name}`, {size:.1f} MB,"
        f" SHA-256 `{hashed}`"
    )


def defaults() -> str:
    """The numerical defaults of this version: what decides which samples a seed gives."""
    from sdeflow import Preconditioned, registry
    from sdeflow.sampling import DEFAULT_NFE, DEFAULT_SOLVER

    rows = [
        [
            "`sample`",
            f'solver `{DEFAULT_SOLVER}`, `nfe={DEFAULT_NFE}`, `noise="seeded"`',
            "the solver's, or the process's",
            "the process's",
        ]
    ]
    for name, entry in registry.PROCESSES.items():
        made = entry.make()
        rows.append(
            [f"`{name}`", f"`{made!r}`", f"`{made.default_grid}`", f"`{made.default_clock}`"]
        )
    rows += [
        ["a table of betas", "`t_min = 1/N`, `t_max = 1`", "`quadratic`", "`t`"],
        ["`Preconditioned` networks on `edm`", "", f"`{Preconditioned.default_grid}`", ""],
    ]
    for name, entry in registry.SOLVERS.items():
        solver = entry.make()
        own = f"`{solver.default_grid}`" if isinstance(solver.default_grid, str) else ""
        rows.append([f"`{name}`", f"`{solver!r}`", own, ""])
    return _table(["what", "default", "grid", "clock"], rows)


def command_line() -> str:
    """The help of every command, as plain text."""
    import click
    import typer

    from sdeflow.cli import app

    style, app.rich_markup_mode = app.rich_markup_mode, None  # plain text, whatever the terminal
    try:
        commands = typer.main.get_group(app).commands
    finally:
        app.rich_markup_mode = style
    parts = []
    for name in sorted(commands):
        context = click.Context(
            commands[name], info_name=f"sdeflow {name}", terminal_width=100, max_content_width=100
        )
        text = commands[name].get_help(context).strip("\n")
        lines = "\n".join(line.rstrip() for line in text.splitlines())
        parts.append(f"## sdeflow {name}\n\n```text\n{lines}\n```")
    return "\n\n".join(parts)


def include(what: str, page: Path) -> str:
    """A part of a file, with its links as they are from the page."""
    name, _, part = what.partition(" ")
    text = (ROOT / name).read_text().split(f"<!-- {part} -->\n")[1].split(f"<!-- /{part} -->")[0]
    return re.sub(
        r"\]\((?!https?:|#)([^)\s#]+)",
        lambda match: f"]({_from(page, (ROOT / name).parent / match[1])}",
        text,
    )


MAKERS: dict[str, Callable[[str, Path], str]] = {
    "table": tables,
    "result": result,
    "excerpt": excerpt,
    "api": api,
    "stack": lambda _, page: drawing(),
    "layers": lambda _, page: layers(),
    "card": lambda _, page: card(),
    "help": lambda _, page: command_line(),
    "errors": lambda _, page: errors(page),
    "moved": lambda _, page: moved(),
    "defaults": lambda _, page: defaults(),
    "include": include,
}

API = _api_pages()


def main() -> int:
    """Write the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description="Write the marked parts of the Markdown files.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    check = parser.parse_args().check
    changed = update(check)
    for page in changed:
        print(f"{'out of date' if check else 'wrote'}: {page.relative_to(ROOT)}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
