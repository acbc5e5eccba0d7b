"""A board for readers: Markdown, LaTeX, and one self-contained HTML page whose tables can be sorted and filtered."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from adpretrain.files import atomic_path
from downstream.board.cost_plot import cost_plot, points_of
from downstream.board.ranking import ALPHA, REPLICATES
from downstream.board.result import Result
from downstream.board.tasks import METRICS, Line, Task
from downstream.table_text import latex, markdown

TITLES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
HOW = (
    "Lines are sorted by place, then by mean rank in image AUROC. A place such as 2–5 says that one line is surely "
    "better, and that this one is surely better than all but five: differences of means are tested by a paired "
    f"bootstrap over photographs ({REPLICATES} replicates), Holm-corrected over all pairs of a table at {ALPHA:.0%}; "
    "ties stay ties. ± is the standard deviation between draws of references, which the test does not contain. ms: one "
    "photograph scored alone, network included, on the hardware of its result."
)


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, the text of a cell, and what it is sorted by (None last)."""

    title: str
    text: Callable[[Line], str]
    key: Callable[[Line], float | str | None]
    word: bool = False


def columns_of(task: Task, pairs: bool) -> list[Column]:
    """The columns of a task's table of pairs, or of features."""
    out = [
        Column("place", lambda line: line.standing.place if line.standing else "–", _place, word=True),
        Column("features", lambda line: line.features, lambda line: line.features, word=True),
    ]
    if pairs:
        out.append(Column("detector", lambda line: line.detector or "", lambda line: line.detector, word=True))
    out.append(Column("mean rank", lambda line: f"{line.standing.mean_rank:.1f}" if line.standing else "–", _rank))
    out += [_metric_column(metric) for metric in METRICS]
    if pairs:
        out.append(Column("ms", lambda line: _number(line.milliseconds, 0), lambda line: line.milliseconds))
    out += [
        Column("M parameters", lambda line: f"{line.parameters / 1e6:.1f}", lambda line: line.parameters),
        Column("in a product", lambda line: line.product, lambda line: line.product),
        Column("test seen in pretraining", lambda line: line.seen, lambda line: line.seen),
    ]
    if len(task.sets) > 1:
        out += [_set_column(name) for name in task.sets]
    return out


def _place(line: Line) -> float | None:
    return line.standing.best + line.standing.worst / 1000 if line.standing else None


def _rank(line: Line) -> float | None:
    return line.standing.mean_rank if line.standing else None


def _metric_column(metric: str) -> Column:
    def text(line: Line) -> str:
        value, spread, defined = line.mean(metric), line.spread(metric), line.defined(metric)
        if value is None and defined:  # such as pixel metrics where a set has no masks
            return f"{sum(defined) / len(defined):.1f} ({len(defined)} of {len({*line.results, *line.missing})})"
        return _number(value) + (f" ± {spread:.1f}" if value is not None and spread is not None else "")

    def key(line: Line) -> float | None:
        defined = line.defined(metric)
        return sum(defined) / len(defined) if defined else None

    return Column(TITLES[metric], text, key)


def _set_column(name: str) -> Column:
    return Column(name, lambda line: _number(line.of_set(name)), lambda line: line.of_set(name))


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def tables_of(task: Task) -> list[tuple[str, list[Column], tuple[Line, ...]]]:
    """The title, columns and lines of a task's tables."""
    found = []
    if task.features:
        found.append((f"{task.name}: features, over detectors", columns_of(task, False), task.features))
    found.append((f"{task.name}: features and detectors", columns_of(task, True), task.pairs))
    return found


def about(results: Sequence[Result]) -> list[str]:
    """Sentences about how the numbers came about."""
    machines = dict.fromkeys(
        f"{one.hardware.processor}, {one.hardware.threads} of {one.hardware.cores} threads, {one.hardware.device}"
        for one in results
    )
    versions = ", ".join(dict.fromkeys(one.library_version for one in results))
    sizes = {one.data.name: one.data.images for one in results}
    sets = ", ".join(f"{name} ({count} photographs)" for name, count in sorted(sizes.items()))
    commands = dict.fromkeys(one.command for one in results)
    return [
        HOW,
        f"Data sets: {sets}.",
        f"{len(results)} results, adpretrain {versions}; measured on {'; '.join(machines)}.",
        *(f"Measured with: {command}" for command in list(commands)[:8]),
    ]


def gaps(task: Task) -> list[str]:
    """Sentences about what is not ranked, because results are missing, and about different numbers of draws."""
    lines = [line for line in (*task.features, *task.pairs) if line.missing]
    draws = sorted({result.protocol.draws for line in task.pairs for result in line.results.values()})
    told = [f"{name} is not ranked: most lines have no result for it" for name in task.rare]
    if len(draws) > 1:
        told.append(f"the lines have {' or '.join(map(str, draws))} draws: a mean of more draws is surer")
    return told + [
        f"{line.features}{f' with {line.detector}' if line.detector else ''} is not ranked: it lacks "
        + ", ".join(" with ".join(unit) for unit in line.missing[:4])
        + (f" and {len(line.missing) - 4} more" if len(line.missing) > 4 else "")
        for line in lines
    ]


def as_text(tasks: Sequence[Task], results: Sequence[Result], form: str) -> str:
    """The board as ``markdown`` or ``latex``."""
    if form == "markdown":
        return _document(tasks, results, markdown, lambda text: "- " + _without_tags(text))
    return _document(tasks, results, latex, lambda text: "% " + text)


def _document(
    tasks: Sequence[Task], results: Sequence[Result], render: Callable[..., str], bullet: Callable[[str], str]
) -> str:
    parts = []
    for task in tasks:
        for title, columns, lines in tables_of(task):
            body = [[column.text(line) for column in columns] for line in lines]
            body = [[_without_tags(cell) for cell in cells] for cells in body] if render is markdown else body
            words = sum(column.word for column in columns)
            parts.append(render(f"{title}, in %", [column.title for column in columns], body, words))
        parts += [bullet(sentence) for sentence in gaps(task)] + [""]
    return "\n".join([*parts, *(bullet(sentence) for sentence in about(results))]) + "\n"


def _without_tags(text: str) -> str:
    """Markdown that a name of a result cannot turn into HTML."""
    return text.replace("<", "&lt;")


def as_page(tasks: Sequence[Task], results: Sequence[Result], title: str) -> str:
    """The board as one HTML page that needs nothing from elsewhere; its only script is named by its digest."""
    script = resources.files("downstream.board").joinpath("board.js").read_text(encoding="utf-8")
    style = resources.files("downstream.board").joinpath("board.css").read_text(encoding="utf-8")
    template = resources.files("downstream.board").joinpath("board.html").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = [
        {
            "name": task.name,
            "anchor": anchor(task.name),
            "tables": [
                _table(title.removeprefix(f"{task.name}: "), columns, lines)
                for title, columns, lines in tables_of(task)
            ],
            "plot": Markup(cost_plot(task.pairs)),
            "gaps": gaps(task),
        }
        for task in tasks
    ]
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    text: str = page.render(
        title=title,
        style=Markup(style),
        script=Markup(script),
        digest=digest,
        tasks=shown,
        about=about(results),
        results=len(results),
        sets=len({result.data.name for result in results}),
        features=len({result.extractor.label for result in results}),
    )
    return text


def _table(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> dict[str, object]:
    return {
        "title": title,
        "columns": [{"title": column.title, "word": column.word} for column in columns],
        "lines": [
            {
                "cells": [
                    {"text": column.text(line), "key": _key(column.key(line)), "word": column.word}
                    for column in columns
                ],
                "product": line.product,
                "ms": _key(line.milliseconds),
                "parameters": line.parameters / 1e6,
                "ranked": line.standing is not None,
            }
            for line in lines
        ],
    }


def _key(value: float | str | None) -> str:
    return "" if value is None else str(value)


def anchor(name: str) -> str:
    """A task's name as part of an address or a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_board(
    out: Path, tasks: Sequence[Task], results: Sequence[Result], title: str = "The board of anomaly detection features"
) -> list[Path]:
    """Write board.md, board.tex, index.html and, for each task, a plot cost-TASK.svg."""
    plots = {f"cost-{anchor(task.name)}.svg": cost_plot(task.pairs, alone=True) for task in tasks}
    contents = {name: plot for name, plot in plots.items() if plot} | {
        "board.md": _with_plots(as_text(tasks, results, "markdown"), [task for task in tasks if points_of(task.pairs)]),
        "board.tex": as_text(tasks, results, "latex"),
        "index.html": as_page(tasks, results, title),
    }
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [out / name for name in contents]


def _with_plots(text: str, tasks: Sequence[Task]) -> str:
    plots = [
        f"![{html.escape(task.name)}: time to score a photograph against image AUROC](cost-{anchor(task.name)}.svg)"
        for task in tasks
    ]
    return text + "\n" + "\n".join(plots) + "\n"
