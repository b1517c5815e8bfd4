"""The documentation is true: its code runs and prints what it says, its tables are the registry's,
its links lead somewhere.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sdeflow
from sdeflow import grid, registry, sampling
from sdeflow.models.checkpoint import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"^(<!-- needs: (?P<needs>\w+)"
    r" -->\n)?```python\n(?P<code>.*?)^```$(\n\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------- the code


def run_block(code: str, names: dict[str, Any], where: str) -> str:
    """Run a block statement by statement, and return what it printed.

    What a `print(...)  # text` prints must be the text, or begin with it where the text ends in
    "...".
    """
    lines, everything = code.splitlines(), ""
    for statement in ast.parse(code).body:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module([statement], []), where, "exec", dont_inherit=True), names)
        everything += printed.getvalue()
        line = lines[(statement.end_lineno or 1) - 1]
        if line.lstrip().startswith("print(") and "  # " in line:
            said, got = line.split("  # ", 1)[1], printed.getvalue().strip()
            same = got.startswith(said[:-3]) if said.endswith("...") else got == said
            assert same, f"{where}: {line}\nprinted: {got}"
    return everything


def blocks(page: Path) -> Iterator[tuple[str | None, str, str | None]]:
    for match in BLOCK.finditer(page.read_text()):
        yield match["needs"], match["code"], match["output"]


def run_page(page: Path, ready: frozenset[str] = frozenset()) -> int:
    """Run a page's blocks in one namespace, and say how many ran."""
    names: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    module = ModuleType(names["__name__"])  # dataclasses look their module up
    module.__dict__.update(names)
    sys.modules[names["__name__"]] = module
    ran = 0
    try:
        for needs, code, output in blocks(page):
            if needs is None or needs in ready:
                printed = run_block(code, module.__dict__, name_of(page))
                assert output is None or printed.strip() == output.strip(), (
                    f"{name_of(page)} shows another output"
                )
                ran += 1
    finally:
        del sys.modules[names["__name__"]]
    return ran


@pytest.fixture(autouse=True)
def quiet(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Training's progress bar is nobody's business here."""
    yield
    capsys.readouterr()


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs_and_prints_what_it_says(page: Path) -> None:
    assert run_page(page) > 0
    assert sum(needs is not None for needs, _, _ in blocks(page)) <= 1, (
        "a page has at most one block that is left out here"
    )


@pytest.mark.slow
def test_code_that_needs_the_checkpoint_runs() -> None:
    if not BUNDLED["cifar10"].is_file():
        pytest.skip("no bundled checkpoint")
    assert run_page(DOCS / "models.md", frozenset({"checkpoint"})) == len(
        list(blocks(DOCS / "models.md"))
    )


def test_a_wrong_comment_is_noticed() -> None:
    with pytest.raises(AssertionError):
        run_block("print(1 + 1)  # 3", {}, "here")
    assert run_block("print(1 + 1)  # 2", {}, "here") == "2\n"


def test_every_block_of_code_is_seen() -> None:
    for page in WITH_CODE:
        assert len(list(blocks(page))) == page.read_text().count("```python"), name_of(page)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem
)
def test_examples_run(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "import matplotlib" in path.read_text():
        pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.count("\n") >= 2
    assert f"python examples/{path.name}" in path.read_text()


# --------------------------------------------------------------------------------------- the README


def test_readme_commands_are_one_line_each() -> None:
    shell = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(shell) == 2
    for command, end in zip(
        shell, (".venv/bin/sdeflow sample", ".venv/bin/python -m pytest"), strict=True
    ):
        assert command.count("\n") == 1
        assert command.strip().endswith(end)
        assert "-c constraints.txt" in command
    assert "torch==" in (ROOT / "constraints.txt").read_text()


def test_readme_tour_is_short() -> None:
    tour = (ROOT / "README.md").read_text().split("<!-- tour -->")[1].split("<!-- /tour -->")[0]
    assert (
        len(
            [
                line
                for line in tour.splitlines()
                if line.strip() and not line.startswith(("```", "#"))
            ]
        )
        <= 40
    )


def test_readme_figures_are_those_of_the_results(hooks: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    assert hooks.refreshed(readme) == readme, "run: python docs/hooks.py"
    for name, rows in re.findall(r"<!-- measured: ([\w-]+) rows: (.+?) -->", readme):
        if (hooks.RESULTS / f"{name}.md").exists() and rows != "first table":
            assert all(f"| {row} |" in readme for row in rows.split(" | ")), name


def test_no_package_index_is_named() -> None:
    hosts = re.compile(
        r"pypi\.org|pythonhosted|npmjs|unpkg|jsdelivr|cdnjs|download\.pytorch|anaconda|index-url",
        re.IGNORECASE,
    )
    for path in [
        *PAGES,
        ROOT / "CHANGELOG.md",
        ROOT / "mkdocs.yml",
        DOCS / "hooks.py",
        DOCS / "assets" / "math.js",
    ]:
        assert not hosts.search(path.read_text()), path


def test_commands_that_pages_name_exist(hooks: ModuleType) -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`(?:\.venv/bin/)?sdeflow ([a-z]+)\b", text)) | set(
        re.findall(r"bin/sdeflow ([a-z]+)", text)
    )
    shown = hooks.command_line()
    assert named >= {"sample", "train", "info"}
    for command in named:
        assert f"## sdeflow {command}\n" in shown, f"there is no command {command!r}"


def test_the_worked_example_needs_one_line_more(
    hooks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of CONTRIBUTING and its line in the registry: names, table, budget and plan
    follow.
    """
    page = ROOT / "CONTRIBUTING.md"
    module = ModuleType("docs.example")
    monkeypatch.setitem(sys.modules, "docs.example", module)
    run_block(next(blocks(page))[1], module.__dict__, "CONTRIBUTING.md")
    line = next(line for line in page.read_text().splitlines() if line.startswith("Entry("))
    entry = eval(line.rstrip(","), {"Entry": registry.Entry, **module.__dict__})
    monkeypatch.setitem(registry.SOLVERS, entry.name, entry)
    row = next(
        line
        for line in hooks.solvers("multistep").splitlines()
        if line.startswith(f"| `{entry.name}` |")
    )
    assert f"`{entry.kind.__name__}`" in row
    assert f"`{entry.aliases[0]}`" in row
    target = sdeflow.Gaussian(torch.zeros(2, dtype=torch.float64), std=0.5, process=sdeflow.VP())
    solution = sdeflow.solve(
        target, solver=entry.aliases[0], nfe=20, n=3, seeds=0, dtype=torch.float64
    )
    assert solution.nfe == 20
    x = sdeflow.SeededNoise([0, 1, 2], (2,)).start().double() * float(sdeflow.VP().level(1.0).sigma)
    textbook = entry.make().textbook(sdeflow.Reverse(target), x, solution.times, None)
    torch.testing.assert_close(solution.x, textbook, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", registry.SOLVERS)
def test_every_solver_is_documented(name: str, hooks: ModuleType) -> None:
    solver = registry.solver(name)
    text = type(solver).__doc__ or ""
    for word in ("Source:", "Order:|order:|Order", "Cost:|Cost\\."):
        assert re.search(word, text), f"{type(solver).__name__}'s docstring has no {word}"
    assert solver.source
    assert solver.cost
    row = next(line for line in hooks.solvers().splitlines() if line.startswith(f"| `{name}` |"))
    assert type(solver).__name__ in row
    assert solver.source in row
    if solver.order:
        assert (
            f"| weak {solver.order} |" in row if solver.stochastic else f"| {solver.order} |" in row
        )


@pytest.mark.parametrize(
    ("table", "which"), [(registry.GRIDS, "grids"), (registry.PROCESSES, "processes")]
)
def test_every_grid_and_process_is_documented(
    table: dict[str, registry.Entry], which: str, hooks: ModuleType
) -> None:
    shown = hooks.tables(which)
    for name, entry in table.items():
        assert f"| `{name}` |" in shown
        assert len(entry.summary) > 10
        if which == "processes":
            assert "Source:" in (entry.kind.__doc__ or ""), f"{name} has no source"


def test_tables_have_as_many_cells_in_every_row(hooks: ModuleType) -> None:
    for shown in (hooks.solvers(), hooks.grids(), hooks.processes(), hooks.errors()):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in shown.splitlines()}
        assert len(cells) == 1, shown


def test_readme_says_of_accuracy_what_the_results_say() -> None:
    said = re.search(
        r"in (\d+) of (\d+) cells by the median over samples, and in (\d+) by",
        (ROOT / "README.md").read_text(),
    )
    cells = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())["cells"]
    cells = [cell for cell in cells if 5 <= cell["nfe"] <= 50]
    median, rms = (
        [cell["ratio"] <= 1 for cell in cells if cell["measure"] == measure]
        for measure in ("median", "rms")
    )
    assert said is not None
    assert [int(number) for number in said.groups()] == [sum(median), len(median), sum(rms)]


def test_pages_show_what_the_registry_knows(hooks: ModuleType) -> None:
    assert "| `heun` |" in hooks.on_page_markdown((DOCS / "solvers.md").read_text())
    assert "| `karras` |" in hooks.on_page_markdown((DOCS / "grid.md").read_text())
    assert "| `rectified_flow` |" in hooks.on_page_markdown((DOCS / "process.md").read_text())
    for page in DOCS.rglob("*.md"):
        for marker in re.findall(r"^<!-- (\w+)", page.read_text(), re.MULTILINE):
            assert marker in hooks.MAKERS or marker == "needs", f"{page}: {marker}"
        left = hooks.MARKER.search(hooks.on_page_markdown(page.read_text()))
        assert left is None, left


def test_every_solver_stands_in_one_table_of_the_page(hooks: ModuleType) -> None:
    text = (DOCS / "solvers.md").read_text()
    assert all(f"<!-- table: solvers {kind} -->" in text for kind in hooks.KINDS)
    shown = hooks.on_page_markdown(text)
    for name in registry.SOLVERS:
        assert shown.count(f"\n| `{name}` |") == 1, name


def test_the_tables_count_calls_and_memory(hooks: ModuleType) -> None:
    rows = {line.split("`")[1]: line.split(" | ") for line in hooks.solvers().splitlines()[2:]}
    shown = {name: (cells[4], cells[5]) for name, cells in rows.items()}
    assert shown["ddim"] == ("1 a step", "2")
    assert shown["dpm_solver_3"][0] == "3 a step"
    assert shown["pndm"][0] == "1 a step, and 9 more"
    assert shown["rk45"] == ("6 a step, adaptive", "")


def test_names_that_pages_tell_are_registered() -> None:
    """What stands as `solver="name"` or `grid="name"` in the text of a page is a name, and so are
    the aliases it promises.
    """
    text = "\n".join(page.read_text() for page in PAGES)
    for solver in set(re.findall(r"solver=\"([\w:+]+)\"", text)) - {"huen"}:
        registry.solver(solver)
    for name in set(re.findall(r"grid=\"(\w+)\"", text)):
        registry.lookup(registry.GRIDS, "grid", name)


def test_results_are_included_as_they_are(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    assert "Not measured yet" in hooks.result("speed")
    (tmp_path / "speed.md").write_text(
        "| a |\n|---|\n| 1 |\n\n![picture](speed.png)\n\n*`python speed.py` on a machine, today*\n"
    )
    (tmp_path / "speed.png").write_bytes(b"")
    shown = hooks.result("speed")
    assert "python speed.py" in shown
    assert shown.count("](results/speed.png)") == 1


def test_the_list_of_layers_has_every_file_once(hooks: ModuleType) -> None:
    lines = [line for line in hooks.layers().splitlines()[1:-1] if line]
    files = [line.split()[0] for line in lines]
    package = ROOT / "sdeflow"
    assert sorted(files) == sorted(p.relative_to(package).as_posix() for p in package.rglob("*.py"))
    order = [
        "sampling/api.py",
        "registry.py",
        "solvers/base.py",
        "plan/plan.py",
        "reverse.py",
        "process/base.py",
    ]
    assert sorted(order, key=files.index) == order, "the top of the stack comes first"
    assert all(len(line.split()) > 2 for line in lines), "every file says what it is"


# ------------------------------------------------------------------------------------------ the API


def test_every_public_name_is_documented_and_on_an_api_page() -> None:
    shown = {
        m
        for page in (DOCS / "api").glob("*.md")
        for m in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
    }
    for module in shown:
        assert importlib.import_module(module).__doc__, module
    for path in sorted((ROOT / "sdeflow").rglob("[!_]*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        private = {"cli", "_utils"} & {*path.parts}
        assert module in shown or private or path.stem == "tableaus", (
            f"{module} is on no page of docs/api"
        )
    for name in sdeflow.__all__:
        thing = getattr(sdeflow, name)
        if name == "__version__":
            continue
        assert (thing.__doc__ or "").strip(), f"sdeflow.{name} has no docstring"
        home = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
        assert home in shown, f"sdeflow.{name}, of {home}, is on no page of docs/api"


def test_changelog_names_every_public_class_and_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{sdeflow.__version__}]" in text
    for entry in [*registry.SOLVERS.values(), *registry.PROCESSES.values()]:
        if entry.kind.__module__.endswith("external"):
            continue
        assert f"`{entry.kind.__name__}`" in text, entry.name
    for name in registry.GRIDS:
        assert f"`{name}`" in text, name


def test_changelog_lists_the_numerical_defaults() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    lines = text.split("### Numerical defaults")[1].splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    for name, entry in registry.PROCESSES.items():
        process = entry.make()
        for part in (repr(process), process.default_grid, process.default_clock):
            assert f"`{part}`" in rows[name], f"{name}: {part}"
    for name, entry in registry.SOLVERS.items():
        assert f"`{entry.make()!r}`" in rows[name], name
    assert f"`{sdeflow.Preconditioned.default_grid}`" in rows["Preconditioned"]
    assert f"solver `{sampling.DEFAULT_SOLVER}`, `nfe={sampling.DEFAULT_NFE}`" in rows["sample"]
    assert f"`NSR_TOP = {grid.NSR_TOP:g}`" in text


# ---------------------------------------------------------------------------------------- the links


def slug(heading: str) -> str:
    return re.sub(
        r"[\s]+",
        "-",
        re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading)).strip().lower(),
    )


def anchors(text: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_resolve(page: Path, hooks: ModuleType) -> None:
    inside = page.is_relative_to(DOCS)
    text = hooks.on_page_markdown(page.read_text()) if inside else page.read_text()
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    ):
        if target.startswith(("http", "results/")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if path.name == "samples.png" and not path.exists():
            continue  # made when the checkpoint is trained
        assert path.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(hooks.on_page_markdown(path.read_text())), (
                f"{name_of(page)}: {target}"
            )


def test_navigation_holds_every_page() -> None:
    listed = set(
        re.findall(
            r"- (?:[\w ]+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
        )
    )
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_site_loads_nothing_from_elsewhere() -> None:
    assert not re.search(r"https?://", (ROOT / "mkdocs.yml").read_text())
    sheet = (DOCS / "assets" / "katex" / "katex.min.css").read_text()
    for font in re.findall(r"url\(([^)]+)\)", sheet):
        assert (DOCS / "assets" / "katex" / font).is_file(), font


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', home)
    assert (
        "sdeflow.solvers.ode.runge_kutta.Heun"
        in (tmp_path / "api" / "solvers" / "index.html").read_text()
    )
