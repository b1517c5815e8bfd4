"""The documentation is true: its code runs and prints what it says, its tables are current, its
links lead somewhere.
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
def script() -> ModuleType:
    """docs/update.py, which writes the tables of the pages."""
    spec = importlib.util.spec_from_file_location("docs_update", DOCS / "update.py")
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
    page = DOCS / "reference" / "models.md"
    assert run_page(page, frozenset({"checkpoint"})) == len(list(blocks(page)))


def test_a_wrong_comment_is_noticed() -> None:
    with pytest.raises(AssertionError):
        run_block("print(1 + 1)  # 3", {}, "here")
    assert run_block("print(1 + 1)  # 2", {}, "here") == "2\n"


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_has_short_lines(page: Path) -> None:
    """At most 100 characters, but for what a line prints."""
    for _, code, _ in blocks(page):
        for line in code.splitlines():
            assert len(line) <= 100 or line.lstrip().startswith("print("), (
                f"{name_of(page)}: {line}"
            )


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


def test_commands_that_pages_name_exist(script: ModuleType) -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`(?:\.venv/bin/)?sdeflow ([a-z]+)\b", text)) | set(
        re.findall(r"bin/sdeflow ([a-z]+)", text)
    )
    shown = script.command_line()
    assert named >= {"sample", "train", "info"}
    for command in named:
        assert f"## sdeflow {command}\n" in shown, f"there is no command {command!r}"


ENTRY = re.compile(r"^# in (SOLVERS|GRIDS|PROCESSES)\n(Entry\(.*\)),$", re.MULTILINE)


def test_the_examples_of_contributing_need_one_line_more(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solver, the grid and the process of CONTRIBUTING, each with its line in the registry:
    names, tables, budget and plan follow.
    """
    page = ROOT / "CONTRIBUTING.md"
    module = ModuleType("docs.example")
    monkeypatch.setitem(sys.modules, "docs.example", module)
    for _, code, _ in blocks(page):
        run_block(code, module.__dict__, "CONTRIBUTING.md")
    made = {}
    for table, line in ENTRY.findall(page.read_text()):
        entry = eval(line, {"Entry": registry.Entry, **module.__dict__})
        monkeypatch.setitem(getattr(registry, table), entry.name, entry)
        made[table] = entry
    assert made.keys() == {"SOLVERS", "GRIDS", "PROCESSES"}
    shown = {"SOLVERS": script.solvers("multistep"), "GRIDS": script.grids()}
    shown["PROCESSES"] = script.processes()
    for table, entry in made.items():
        row = next(r for r in shown[table].splitlines() if r.startswith(f"| `{entry.name}` |"))
        assert entry.kind.__name__ in row
    alias, kind = made["SOLVERS"].aliases[0], made["SOLVERS"].make()
    target = sdeflow.Gaussian(torch.zeros(2, dtype=torch.float64), std=0.5, process=sdeflow.VP())
    solution = sdeflow.solve(target, solver=alias, nfe=20, n=3, seeds=0, dtype=torch.float64)
    assert solution.nfe == 20
    x = sdeflow.SeededNoise([0, 1, 2], (2,)).start().double() * float(sdeflow.VP().level(1.0).sigma)
    textbook = kind.textbook(sdeflow.Reverse(target), x, solution.times, None)
    torch.testing.assert_close(solution.x, textbook, rtol=1e-11, atol=1e-11)
    solution = sdeflow.solve(
        target,
        made["PROCESSES"].name,
        solver="heun",
        grid=made["GRIDS"].aliases[0],
        nfe=19,
        n=2000,
        seeds=0,
    )
    assert solution.nfe == 19
    assert abs(float(solution.x.std()) - 0.5) < 0.05


# ------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", registry.SOLVERS)
def test_every_solver_is_documented(name: str, script: ModuleType) -> None:
    solver = registry.solver(name)
    text = type(solver).__doc__ or ""
    for word in ("Source:", "Order:|order:|Order", "Cost:|Cost\\."):
        assert re.search(word, text), f"{type(solver).__name__}'s docstring has no {word}"
    assert solver.source
    assert solver.cost
    row = next(line for line in script.solvers().splitlines() if line.startswith(f"| `{name}` |"))
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
    table: dict[str, registry.Entry], which: str, script: ModuleType
) -> None:
    shown = script.tables(which, DOCS / "index.md")
    for name, entry in table.items():
        assert f"| `{name}` |" in shown
        assert len(entry.summary) > 10
        if which == "processes":
            assert "Source:" in (entry.kind.__doc__ or ""), f"{name} has no source"


def test_tables_have_as_many_cells_in_every_row(script: ModuleType) -> None:
    for shown in (script.solvers(), script.grids(), script.processes(), script.errors()):
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


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_the_tables_in_the_pages_are_current(page: Path, script: ModuleType) -> None:
    text = page.read_text()
    parts = script.PART.findall(text)
    assert text.count("<!-- begin: ") == text.count("<!-- end -->") == len(parts)
    assert all(body.strip() for _, _, body in parts), "a part is empty"
    assert script.updated(text, page) == text, "run: python docs/update.py"


def test_no_page_is_filled_in_when_the_site_is_built() -> None:
    """Comments in pages are those of docs/update.py, of the tests, and of parts that others
    include.
    """
    known = {"begin", "end", "needs", "tour", "/tour", "run", "/run"}
    for page in PAGES:
        shown = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        assert set(re.findall(r"<!-- ([/\w]+)", shown)) <= known, name_of(page)


def test_every_result_is_on_a_page(script: ModuleType) -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"^<!-- begin: result (.+?) -->$", text, re.MULTILINE))
    assert shown == {path.stem for path in script.RESULTS.glob("*.md")}


def test_every_solver_stands_in_one_table_of_the_page(script: ModuleType) -> None:
    text = (DOCS / "reference" / "solvers.md").read_text()
    assert all(f"<!-- begin: table solvers {kind} -->" in text for kind in script.KINDS)
    for name in registry.SOLVERS:
        assert text.count(f"\n| `{name}` |") == 1, name


def test_the_tables_count_calls_and_memory(script: ModuleType) -> None:
    rows = {line.split("`")[1]: line.split(" | ") for line in script.solvers().splitlines()[2:]}
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
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    page = tmp_path.parent / "page.md"
    assert "Not measured yet" in script.result("speed", page)
    (tmp_path / "speed.md").write_text(
        "| a |\n|---|\n| 1 |\n\n![picture](speed.png)\n\n*`python speed.py` on a machine, today*\n"
    )
    (tmp_path / "speed.png").write_bytes(b"")
    shown = script.result("speed", page)
    assert "python speed.py" in shown
    assert shown.count(f"]({tmp_path.name}/speed.png)") == 1
    assert script.excerpt("speed: first table", page).startswith("| a |\n|---|\n| 1 |")


def test_the_list_of_layers_has_every_file_once(script: ModuleType) -> None:
    lines = [line for line in script.layers().splitlines()[1:-1] if line]
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


def test_the_architecture_draws_the_stack(script: ModuleType) -> None:
    text = (DOCS / "architecture.md").read_text()
    boxes = re.findall(r"^\+-+\+\n((?:\| .+ \|\n)+)", text, re.MULTILINE)
    drawn = [re.findall(r"^\| (\w+)", box, re.MULTILINE) for box in boxes]
    assert drawn == [line.split() for line in reversed(script.stack())]


def test_paths_of_pages_in_the_code_exist() -> None:
    files = [
        path
        for place in ("sdeflow", "tests", "benchmarks")
        for path in ROOT.joinpath(place).rglob("*.py")
    ]
    for path in files:
        for page in re.findall(r"docs/[\w/-]+\.md", path.read_text()):
            assert (ROOT / page).is_file(), f"{path}: {page}"


# ------------------------------------------------------------------------------------------ the API


def test_every_public_name_is_documented_and_on_an_api_page(script: ModuleType) -> None:
    for module in script.API:
        assert importlib.import_module(module).__doc__, module
    for path in sorted((ROOT / "sdeflow").rglob("[!_]*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert module in script.API or {"cli", "_utils"} & {*path.parts}, (
            f"{module} is on no page of docs/api: add it, or its folder, to one"
        )
    for name in sdeflow.__all__:
        thing = getattr(sdeflow, name)
        if name == "__version__":
            continue
        assert (thing.__doc__ or "").strip(), f"sdeflow.{name} has no docstring"
        if isinstance(thing, ModuleType):
            continue
        text = script.API[thing.__module__].read_text()
        assert f"| `{thing.__name__}` | `{thing.__module__}` |" in text, name


def test_changelog_names_every_public_class_and_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{sdeflow.__version__}]" in text
    for entry in [*registry.SOLVERS.values(), *registry.PROCESSES.values()]:
        if ".external." in entry.kind.__module__:
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
def test_links_resolve(page: Path, script: ModuleType) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name_of(page)}: {target}"
        if anchor.startswith("sdeflow."):  # a docstring; the strict build looks for it
            assert script.API[anchor if anchor in script.API else anchor.rpartition(".")[0]] == path
        elif anchor:
            assert anchor in anchors(path.read_text()), f"{name_of(page)}: {target}"


def test_navigation_holds_every_page() -> None:
    listed = set(
        re.findall(
            r"- (?:[\w ]+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
        )
    )
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert listed == pages | {"changelog.md", "contributing.md"}


def test_every_page_begins_with_what_it_is_for() -> None:
    for page in PAGES:
        if page.parent.name == "api":
            continue
        paragraph = page.read_text().split("\n\n")[1]
        assert re.match(r"[A-Z*`]", paragraph), f"{name_of(page)} begins with no sentence"


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
