"""Tables and plots of what `accuracy.py` found: who is best where, by how much, and which of ours
to take.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import table

OURS = "sdeflow"
BANDS = ((4, 6), (7, 10), (12, 20), (25, 50), (70, 100))
CSV_BYTES = 900_000  # for the repository
MEASURES = ("median", "rms")

Name = tuple[str, str, str]  # family, name, grid
Panel = tuple[str, str]  # process, target


class Results:
    """Everything in a file of results."""

    def __init__(self, path: Path):
        self.headers: list[dict[str, Any]] = []
        self.errors: dict[Panel, dict[Name, dict[int, list[float]]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self.laws: dict[Panel, dict[Name, dict[int, float]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self.defaults: set[tuple[str, Name]] = set()  # process, name
        failures: dict[tuple[Any, ...], str] = {}
        skipped: set[tuple[Any, ...]] = set()
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "settings" in row:
                self.headers.append(row)
                continue
            name, panel = tuple(row["method"]), (row["process"], row["target"])
            if row.get("default"):
                self.defaults.add((row["process"], name))
            for budget, value in row["cells"].items():
                nfe, where = int(budget), (name, panel, budget)
                failures.pop(where, None)
                if isinstance(value, str):
                    if value.startswith("skip"):
                        skipped.add(where)
                    else:
                        failures[where] = value.removeprefix("error: ")
                    self.errors[panel][name].pop(nfe, None)
                elif row.get("law"):
                    self.laws[panel][name][nfe] = value[0]
                else:
                    self.errors[panel][name][nfe] = value
        self.cells = sum(
            len(n)
            for kind in (self.errors, self.laws)
            for names in kind.values()
            for n in names.values()
        )
        self.skipped = len(skipped)
        self.failures = Counter((name, panel[0], why) for (name, panel, _), why in failures.items())
        self.floors: dict[str, float] = {}
        for header in self.headers:
            self.floors.update(header.get("floors", {}))
            self._share(header.get("refused", {}))

    def _share(self, refused: dict[str, dict[str, str]]) -> None:
        """Grids that are another one on some process were run once there: those runs stand for
        both.
        """
        for process, reasons in refused.items():
            for grid, why in reasons.items():
                if not why.startswith("the same as "):
                    continue
                twin = why.removeprefix("the same as ")
                for kind in (self.errors, self.laws):
                    for panel, names in kind.items():
                        same = [
                            name
                            for name in names
                            if panel[0] == process and (name[0], name[2]) == (OURS, twin)
                        ]
                        for name in same:
                            names.setdefault((name[0], name[1], grid), names[name])  # type: ignore[arg-type]

    def panels(self) -> list[Panel]:
        return sorted(panel for panel, names in self.errors.items() if names)

    def budgets(self) -> list[int]:
        return sorted(
            {nfe for names in self.errors.values() for cells in names.values() for nfe in cells}
        )

    def best(self, panel: Panel, nfe: int, measure: int, ours: bool) -> tuple[float, Name] | None:
        """The least error of ours (but what chooses among them), or of the peers."""
        found = [
            (cells[nfe][measure], name)
            for name, cells in self.errors[panel].items()
            if nfe in cells and (name[0] == OURS) == ours and name[1] not in ("auto", "(default)")
        ]
        return min(found) if found else None

    def of(self, panel: Panel, nfe: int, measure: int, title: str) -> float | None:
        """The error of ours under a title, `auto` say."""
        cells = self.errors[panel].get((OURS, title, title), {})
        return cells[nfe][measure] if nfe in cells else None


def show(name: Name) -> str:
    return f"{name[1]} · {name[2]}" if name[0] == OURS else f"{name[0]} {name[1]} · {name[2]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(max(value, 1e-300)) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)] if values else math.nan


# ------------------------------------------------------------------------------------------- tables


def duel(results: Results) -> tuple[str, list[dict[str, Any]], str]:
    """Best of ours against best of the peers: a summary, the cells, and the tables."""
    cells: list[dict[str, Any]] = []
    tables = []
    for panel in results.panels():
        rows = []
        for nfe in results.budgets():
            row: list[Any] = [nfe]
            for index, measure in enumerate(MEASURES):
                mine, theirs = (results.best(panel, nfe, index, ours) for ours in (True, False))
                ratio = mine[0] / theirs[0] if mine and theirs else None
                auto = results.of(panel, nfe, index, "auto")
                cells.append(
                    {
                        "process": panel[0],
                        "target": panel[1],
                        "nfe": nfe,
                        "measure": measure,
                        "ours": mine and [mine[0], *mine[1][1:]],
                        "peer": theirs and [theirs[0], *theirs[1]],
                        "ratio": ratio and round(ratio, 4),
                        "auto": auto and mine and round(auto / mine[0], 4),
                    }
                )
                row += [f"{_number(mine[0])} {show(mine[1])}" if mine else "-"]
                row += [f"{_number(theirs[0])} {show(theirs[1])}" if theirs else "-"]
                row += [_number(ratio) if ratio is None or ratio <= 1 else f"**{ratio:.2f}**"]
            auto = results.of(panel, nfe, 0, "auto")
            mine = results.best(panel, nfe, 0, True)
            row.append(_number(auto / mine[0]) if auto and mine else "-")
            rows.append(row)
        head = [
            "NFE",
            *(f"{m}: {who}" for m in MEASURES for who in ("ours", "best peer", "ratio")),
            "auto / best",
        ]
        tables.append(f"#### {panel[1]}, {panel[0]}\n\n{table(head, rows)}")
    lines = []
    for low, high in ((5, 50), (4, 100)):
        for measure in MEASURES:
            ratios = [
                c["ratio"]
                for c in cells
                if c["measure"] == measure and low <= c["nfe"] <= high and c["ratio"]
            ]
            lost = sum(ratio > 1.0 for ratio in ratios)
            lines.append(
                f"- {measure}, NFE {low} to {high}: ours is as accurate or better in"
                f" {len(ratios) - lost} of {len(ratios)} cells; geometric mean of the ratio ours /"
                f" peer {_mean(ratios):.2f}, worst {max(ratios, default=math.nan):.2f}"
            )
    lost_rows = [
        [
            *(c[key] for key in ("process", "target", "nfe", "measure")),
            f"{c['ratio']:.2f}",
            f"{_number(c['ours'][0])} {c['ours'][1]} · {c['ours'][2]}",
            f"{_number(c['peer'][0])} {show(tuple(c['peer'][1:]))}",
        ]
        for c in cells
        if c["ratio"] and c["ratio"] > 1.0
    ]
    summary = "\n".join(lines)
    if lost_rows:
        head = ["process", "target", "NFE", "measure", "ours / peer", "ours", "peer"]
        summary += f"\n\nWhere a peer is more accurate ({len(lost_rows)} cells):\n\n" + table(
            head, lost_rows
        )
    return summary, cells, "\n\n".join(tables)


def choosers(results: Results) -> str:
    """What the library takes on its own, against the best of the catalogue."""
    rows = []
    for low, high in BANDS:
        for measure, label in enumerate(MEASURES):
            ratios = {
                f"{panel[1]}, {panel[0]}, NFE {nfe}": error / best[0]
                for panel in results.panels()
                for nfe in results.budgets()
                if low <= nfe <= high
                and (error := results.of(panel, nfe, measure, "auto")) is not None
                and (best := results.best(panel, nfe, measure, True))
            }
            if ratios:
                within = sum(ratio <= 1.25 for ratio in ratios.values())
                where = max(ratios, key=lambda cell: ratios[cell])
                spread = (
                    f"{_quantile([*ratios.values()], 0.5):.2f}",
                    f"{_mean(ratios.values()):.2f}",
                )
                rows.append(
                    [
                        f"{low}-{high}",
                        label,
                        *spread,
                        f"{within} of {len(ratios)}",
                        f"{ratios[where]:.2f} ({where})",
                    ]
                )
    head = ["NFE", "error", "median ratio", "geometric mean", "within 1.25", "worst"]
    return table(head, rows) if rows else "No automatic choice was measured."


def reachable(results: Results, measure: int = 0) -> str:
    """How near to the best of every cell one choice of solver and grid can come at all, made in
    hindsight.
    """
    rows = []
    for nfe in results.budgets():
        ratios: dict[Name, dict[Panel, float]] = defaultdict(dict)
        panels = []
        for panel in results.panels():
            if best := results.best(panel, nfe, measure, True):
                panels.append(panel)
                for name, cells in results.errors[panel].items():
                    if name[0] == OURS and nfe in cells:
                        ratios[name][panel] = cells[nfe][measure] / best[0]

        def least(
            some: list[Panel], ratios: dict[Name, dict[Panel, float]] = ratios
        ) -> list[float]:
            """The ratios of the pair with the least geometric mean over some cells."""
            pairs = [
                name
                for name, of in ratios.items()
                if name[1] not in ("auto", "(default)") and {*some} <= {*of}
            ]
            return min(([ratios[name][p] for p in some] for name in pairs), key=_mean, default=[])

        apiece = [
            r
            for process in sorted({p[0] for p in panels})
            for r in least([p for p in panels if p[0] == process])
        ]
        auto = [*ratios[(OURS, "auto", "auto")].values()]
        shown = [
            f"{_quantile(r, 0.5):.2f} / {_mean(r):.2f}" if r else "-"
            for r in (auto, least(panels), apiece)
        ]
        rows.append([nfe, *shown])
    return table(
        ["NFE", "auto", "the best pair at that NFE", "the best pair of each process at that NFE"],
        rows,
    )


def ranking(results: Results, measure: int = 0) -> tuple[dict[str, list[Any]], str]:
    """Ours by the geometric mean, over cells, of their error over the least of ours; all processes,
    and each.
    """
    best = {
        (panel, nfe): found[0]
        for panel in results.panels()
        for nfe in results.budgets()
        if (found := results.best(panel, nfe, measure, True))
    }
    ratios: dict[tuple[str, tuple[int, int], Name], list[float]] = defaultdict(list)
    possible: dict[tuple[str, tuple[int, int], Name], set[int]] = defaultdict(set)
    panels: dict[tuple[str, tuple[int, int], Name], set[Panel]] = defaultdict(set)
    for panel in results.panels():
        for name, cells in results.errors[panel].items():
            if name[0] != OURS:
                continue
            for nfe, value in cells.items():
                for band in BANDS:
                    if band[0] <= nfe <= band[1] and (panel, nfe) in best:
                        for scope in ("all", panel[0]):
                            key = scope, band, name
                            ratios[key].append(value[measure] / best[panel, nfe])
                            possible[key].add(nfe)
                            panels[key].add(panel)
    everywhere = {"all": len(results.panels())}
    for panel in results.panels():
        everywhere[panel[0]] = everywhere.get(panel[0], 0) + 1
    top: dict[str, list[Any]] = {}
    tables = []
    for scope, count in everywhere.items():
        rows = []
        for band in BANDS:
            # Those that ran wherever others did, and at more than one budget in three.
            asked = len({n for n in results.budgets() if band[0] <= n <= band[1]})
            fit = [
                (_mean(values), max(values), name)
                for (where, which, name), values in ratios.items()
                if where == scope and which == band and len(panels[where, which, name]) == count
                and 3 * len(possible[where, which, name]) > asked
            ]  # fmt: skip
            fit.sort()
            key = f"{scope} {band[0]}-{band[1]}"
            top[key] = [
                [round(mean, 3), round(worst, 3), *name[1:]] for mean, worst, name in fit[:25]
            ]
            for mean, worst, name in fit[: 8 if scope == "all" else 3]:
                rows.append([f"{band[0]}-{band[1]}", show(name), f"{mean:.2f}", f"{worst:.1f}"])
        tables.append(
            f"#### {scope}\n\n" + table(["NFE", "solver · grid", "geometric mean", "worst"], rows)
        )
    return top, "\n\n".join(tables)


def by_solver(results: Results, measure: int = 0) -> str:
    """Each solver of ours on the best grid for it: how far it is from the best, band by band."""
    best = {
        (panel, nfe): found[0]
        for panel in results.panels()
        for nfe in results.budgets()
        if (found := results.best(panel, nfe, measure, True))
    }
    least: dict[tuple[str, tuple[int, int], Panel, int], float] = {}
    for panel in results.panels():
        for name, cells in results.errors[panel].items():
            for nfe, value in cells.items():
                for band in BANDS:
                    if name[0] == OURS and band[0] <= nfe <= band[1] and (panel, nfe) in best:
                        key = name[1], band, panel, nfe
                        least[key] = min(
                            least.get(key, math.inf), value[measure] / best[panel, nfe]
                        )
    grouped: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for (solver, band, _, _), ratio in least.items():
        grouped[solver][band].append(ratio)
    order = sorted(
        grouped, key=lambda solver: _mean(r for values in grouped[solver].values() for r in values)
    )
    rows = [
        [
            solver,
            *(
                f"{_mean(grouped[solver][band]):.2f}" if grouped[solver].get(band) else "-"
                for band in BANDS
            ),
        ]
        for solver in order
    ]
    return table(["solver, on its best grid", *(f"NFE {low}-{high}" for low, high in BANDS)], rows)


def defaults(results: Results) -> str:
    """What users of the peers get by default: error over the best of ours."""
    rows = []
    titles = sorted({name for _, name in results.defaults if name[0] != OURS})
    for name in titles:
        row: list[Any] = [show(name)]
        for band in BANDS:
            ratios = [
                cells[nfe][0] / best[0]
                for panel in results.panels()
                for cells in [results.errors[panel].get(name, {})]
                for nfe in cells
                if band[0] <= nfe <= band[1] and (best := results.best(panel, nfe, 0, True))
            ]
            row.append(f"{_mean(ratios):.1f}" if ratios else "-")
        if any(entry != "-" for entry in row[1:]):
            rows.append(row)
    return table(["peer's default", *(f"NFE {low}-{high}" for low, high in BANDS)], rows)


def laws(results: Results) -> tuple[str, list[dict[str, Any]]]:
    """Stochastic solvers: sliced W2, best of ours and of the peers."""
    rows, cells, ranks = [], [], defaultdict(list)
    for panel in sorted(results.laws):
        names = results.laws[panel]
        for nfe in sorted({nfe for found in names.values() for nfe in found}):
            mine, theirs = (
                min(
                    (
                        (found[nfe], n)
                        for n, found in names.items()
                        if nfe in found and (n[0] == OURS) == ours
                    ),
                    default=None,
                )
                for ours in (True, False)
            )
            cells.append(
                {"process": panel[0], "target": panel[1], "nfe": nfe, "ours": mine, "peer": theirs}
            )
            rows.append([panel[1], panel[0], nfe, _number(results.floors.get(panel[1]))])
            rows[-1] += [
                f"{_number(best[0])} {show(best[1])}" if best else "-" for best in (mine, theirs)
            ]
            rows[-1].append(f"{mine[0] / theirs[0]:.2f}" if mine and theirs else "-")
            for name, found in names.items():
                if mine and nfe in found and name[0] == OURS:
                    ranks[nfe, name].append(found[nfe] / mine[0])
    text = table(["target", "process", "NFE", "two exact sets", "ours", "best peer", "ratio"], rows)
    top = []
    for nfe in sorted({nfe for nfe, _ in ranks}):
        most = max(len(values) for (n, _), values in ranks.items() if n == nfe)
        fit = sorted(
            (_mean(v), max(v), name)
            for (n, name), v in ranks.items()
            if n == nfe and len(v) == most
        )
        top += [[nfe, show(name), f"{mean:.2f}", f"{worst:.1f}"] for mean, worst, name in fit[:6]]
    text += "\n\nOver the best of ours, all targets and processes:\n\n"
    return text + table(["NFE", "solver · grid", "geometric mean", "worst"], top), cells


def failures(results: Results) -> str:
    rows = [
        [show(name), process, why.replace("|", "/"), n]
        for (name, process, why), n in results.failures.most_common(40)
    ]
    if not rows:
        return "None."
    return table(["method", "process", "why", "cells"], rows)


# -------------------------------------------------------------------------------------------- files


def spreadsheet(results: Results) -> str:
    """Median and rms by budget, of the methods that come nearest to the best in each panel, and of
    all defaults.
    """
    budgets = results.budgets()
    for keep in (400, 300, 200, 150, 100, 60, 30):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["process", "target", "family", "solver", "grid", "error", *budgets])
        for panel in results.panels():
            names = results.errors[panel]
            least: Mapping[int, float] = {
                n: min((cells[n][0] for cells in names.values() if n in cells), default=math.inf)
                for n in budgets
            }
            near = sorted(
                (min((c[n][0] / max(least[n], 1e-300) for n in c), default=math.inf), name)
                for name, c in names.items()
            )
            chosen = {name for _, name in near[:keep]}
            chosen |= {name for name in names if (panel[0], name) in results.defaults}
            for name in sorted(chosen):
                for index, measure in enumerate(MEASURES):
                    figures = [
                        f"{names[name][n][index]:.2g}" if n in names[name] else "" for n in budgets
                    ]
                    writer.writerow([*panel, *name, measure, *figures])
        if len(out.getvalue()) <= CSV_BYTES:
            break
    return out.getvalue()


def plots(results: Results, path: Path) -> None:
    """Error against NFE, a panel a target and process."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = results.panels()
    processes = sorted({process for process, _ in panels})
    targets = sorted({target for _, target in panels})
    figure, axes = plt.subplots(
        len(targets),
        len(processes),
        figsize=(3.4 * len(processes), 2.8 * len(targets)),
        squeeze=False,
        sharex=True,
    )
    lines: list[tuple[str, Any, dict[str, Any]]] = [
        ("best of sdeflow", None, {"color": "#1b6ca8", "lw": 2}),
        ("best of all peers", None, {"color": "#d1495b", "lw": 2}),
        ("sdeflow, auto", (OURS, "auto", "auto"), {"color": "#2a9d5c", "lw": 1.2, "ls": "--"}),
        (
            "k-diffusion dpmpp_2m, karras",
            ("k-diffusion", "dpmpp_2m", "karras rho=7"),
            {"color": "#edae49", "lw": 1},
        ),
        (
            "k-diffusion heun, karras",
            ("k-diffusion", "heun", "karras rho=7"),
            {"color": "#8d6a9f", "lw": 1},
        ),
        ("DDIM, uniform_t", (OURS, "ddim", "uniform_t"), {"color": "#888888", "lw": 1}),
    ]
    for i, target in enumerate(targets):
        for j, process in enumerate(processes):
            axis, panel = axes[i][j], (process, target)
            for index, (label, name, style) in enumerate(lines):
                if name is None:
                    found = [(n, results.best(panel, n, 0, index == 0)) for n in results.budgets()]
                    points = [(n, best[0]) for n, best in found if best]
                else:
                    points = [
                        (n, cell[0])
                        for n, cell in sorted(results.errors[panel].get(name, {}).items())
                    ]
                if points:
                    axis.plot(*zip(*points, strict=True), label=label, marker=".", ms=3, **style)
            axis.set(xscale="log", yscale="log", title=f"{target}, {process}")
            axis.grid(alpha=0.3, which="both", lw=0.3)
            axis.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
            axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("NFE")
    for row in axes:
        row[0].set_ylabel("median relative error")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.02 + 0.12 / len(targets), 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _coverage(results: Results) -> str:
    """Which budgets are not done yet."""
    done: Counter[int] = Counter()
    for methods in results.errors.values():
        for budgets in methods.values():
            done.update(budgets.keys())
    most = max(done.values(), default=1)
    behind = [f"{nfe} ({n / most:.0%})" for nfe, n in sorted(done.items()) if n < 0.9 * most]
    if not behind:
        return ""
    return (
        "**Not complete yet**, in cells over those of the fullest budget: NFE"
        f" {', '.join(behind)}. "
    )


def write(path: Path, into: Path | None = None) -> None:
    """`accuracy.md`, `.json`, `.csv` and `.png` from a file of results."""
    results = Results(path)
    folder = report.RESULTS if into is None else into
    folder.mkdir(parents=True, exist_ok=True)
    summary, cells, panels = duel(results)
    top, ranked = ranking(results)
    law, law_cells = laws(results)
    run = results.headers[-1] if results.headers else {}
    peers = ", ".join(f"{name} {version}" for name, version in run.get("peers", {}).items())
    about = (
        f"{results.cells} cells; {results.skipped} more that a method cannot spend,"
        f" {sum(results.failures.values())} that failed. Peers: {peers}. {_coverage(results)}Runs,"
        " each going on where the last one ended:\n\n"
    )
    about += "\n".join(
        f"- `{one.get('command', '')}` on {one.get('machine', '')}, torch {one.get('torch', '')},"
        f" {one.get('date', '')}"
        for one in results.headers
    )
    markdown = "\n\n".join(
        [
            about,
            (
                "Errors are relative to the rms of the exact results; `median` and `rms` are over"
                " the starts."
            ),
            "### Ours against the peers\n\n" + summary,
            "### The library's own choice, over the best of its catalogue\n\n" + choosers(results),
            "Any choice is one of a few thousand pairs, judged by the luckiest of them in each"
            " cell. Chosen in hindsight, by the median error, the ratio to that is (median /"
            " geometric mean over cells):\n\n" + reachable(results),
            "### Which of ours\n\nMedian error over the least of ours in the same cell, by bands of"
            " NFE.\n\n" + ranked,
            "### What users of the peers get by default\n\nMedian error over the best of ours,"
            " geometric mean.\n\n" + defaults(results),
            "### Stochastic solvers: sliced Wasserstein-2 distance over the data's std\n\n" + law,
        ]
    )
    details = "\n\n".join(
        [
            "### Cell by cell\n\n" + panels,
            "### Solver by solver\n\nMedian error over the best of ours, geometric mean.\n\n"
            + by_solver(results),
            "### What failed\n\n" + failures(results),
        ]
    )
    (folder / "accuracy.csv").write_text(spreadsheet(results))
    plots(results, folder / "accuracy.png")
    out = {"run": run, "cells": cells, "laws": law_cells, "ranking": top}
    with contextlib.redirect_stdout(io.StringIO()):  # the tables are long
        report.write("accuracy", out, markdown, folder / "accuracy.json")
    (folder / "accuracy_cells.md").write_text(f"{details}\n\n*{about}*\n")
    print(summary, f"\nwritten to {folder}")
