"""Tables of an evaluation: means over products, spreads over repeats, and the files they are written to.

`trial.run_trial` returns records. A repeat is one draw with one extractor; its mean over products is one number, and
the spread is the standard deviation (n - 1) of these numbers. Metrics in tables are in per cent, except d'. Wrongly
classified images are not averaged over products but counted, as in PatchCore Tab. 1.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adpretrain.card import METRICS
from adpretrain.files import atomic_path
from downstream.evaluation.board import RAW

FALSE_POSITIVES, FALSE_NEGATIVES = COUNTS = ("false_positives_at_best_f1", "false_negatives_at_best_f1")
TITLES = {
    **METRICS,
    "aupro_official": "AUPRO, 200 steps",
    "d_prime": "d'",
    FALSE_POSITIVES: "false positives at best F1",
    FALSE_NEGATIVES: "false negatives at best F1",
}
ERRORS = "errors at best F1"
UNITS = "in % (d' is a ratio, errors are images)"
ABOUT_ERRORS = (
    "errors at best F1: images of all products on the wrong side of each product's own threshold, false positives + "
    "false negatives. That threshold has the best F1 on the scored images themselves, as in PatchCore's paper: use it "
    "only to compare with that paper, not as a working threshold"
)
MEAN = "mean over sets"
D_PRIME = "d_prime"  # a ratio without an upper bound; all other metrics except the counts are shares
MAIN = ("image_auroc", "pixel_auroc", "aupro")  # the metrics that the paper reports
COLUMNS = ("product", "setting", "draw", "detector", "features", "extractor", *TITLES, "trained_on", "notes")

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the table. ``mean`` maps a metric to its mean over products and repeats, ``spread`` to its standard
    deviation between repeats (0 if there is one); errors are summed over products."""

    setting: str
    detector: str
    features: str
    products: int
    repeats: int
    defined: dict[str, int]  # number of products whose metric is defined; only they enter the mean
    mean: dict[str, float]
    spread: dict[str, float]
    gain: dict[str, float] | None  # difference from the same detector on raw features; None for raw features


def in_order(records: Sequence[Record]) -> list[Record]:
    """Sort records by the order of their cells, then by product, whichever process finished first."""
    return sorted(records, key=lambda r: (r["order"], r["product"]))


def summarise(records: Sequence[Record]) -> list[Row]:
    """Return a row for every setting, detector and kind of features, in the order of the records."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["setting"], record["detector"], record["features"]), []).append(record)
    means = {key: _repeats(group) for key, group in groups.items()}
    rows = []
    for (setting, detector, features), group in groups.items():
        values = means[setting, detector, features]
        mean = {name: _mean(column) for name, column in values.items()}
        raw = means.get((setting, detector, RAW))
        gain = None
        if features != RAW and raw is not None:
            gain = {name: mean[name] - _mean(raw[name]) for name in TITLES}
        rows.append(
            Row(
                setting,
                detector,
                features,
                products=len({record["product"] for record in group}),
                repeats=len({(record["draw"], record["extractor"]) for record in group}),
                defined={
                    name: len({record["product"] for record in group if record["metrics"].get(name) is not None})
                    for name in TITLES
                },
                mean=mean,
                spread={name: _spread(column) for name, column in values.items()},
                gain=gain,
            )
        )
    return rows


def _repeats(group: Sequence[Record]) -> dict[str, list[float]]:
    """Return for each metric its mean over products, as `shown`, in every repeat; undefined values are left out."""
    out: dict[str, list[float]] = {}
    for name in TITLES:
        by_repeat: dict[tuple[int, int], list[float]] = {}
        for record in group:
            value = record["metrics"].get(name)
            if value is not None:
                by_repeat.setdefault((record["draw"], record["extractor"]), []).append(shown(name, value))
        over_products = _sum if name in COUNTS else _mean
        out[name] = [over_products(values) for values in by_repeat.values()]
    return out


def shown(name: str, value: float) -> float:
    """Convert a metric to the unit of the tables: per cent, except for d' and errors."""
    return value if name in (D_PRIME, *COUNTS) else 100 * value


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _sum(values: Sequence[float]) -> float:
    return float(np.sum(values))


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def by_set(records: Sequence[Record]) -> list[tuple[str, Row]]:
    """Return the rows of the board for every data set and, if there are several, for their mean. Metrics are averaged
    over the products of a set first, then over repeats. The mean over sets is computed in each repeat, so that its
    spread is that of whole boards; every set has the same weight.
    """
    sets: dict[str, dict[tuple[Any, ...], list[Record]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("setting", "detector", "features", "draw", "extractor"))
        sets.setdefault(record["set"], {}).setdefault(key, []).append(record)
    means = {name: [_over_products(name, found) for found in cells.values()] for name, cells in sets.items()}
    out = [(name, row) for name, found in means.items() for row in summarise(found)]
    if len(sets) > 1:
        out += [(MEAN, row) for row in summarise([record for found in means.values() for record in found])]
    return out


def _over_products(name: str, records: Sequence[Record]) -> Record:
    """Merge the records of a set's products into one: each metric is averaged over the products that define it."""
    values = {
        metric: [r["metrics"][metric] for r in records if r["metrics"].get(metric) is not None] for metric in MAIN
    }
    metrics = {metric: sum(found) / len(found) if found else None for metric, found in values.items()}
    return {**records[0], "product": name, "metrics": metrics}


def products_table(records: Sequence[Record], metric: str, setting: str) -> tuple[list[str], list[list[Any]]]:
    """Return a table of one metric for every product (rows) and contender (columns), averaged over repeats, in %. Below
    are the mean of the views of every category that has several, and the mean of all products.
    """
    chosen = [record for record in records if record["setting"] == setting]
    columns = list(dict.fromkeys((record["detector"], record["features"]) for record in chosen))
    products = sorted({record["product"] for record in chosen})
    table: list[list[Any]] = []
    for product in products:
        cells = []
        for column in columns:
            values = [
                shown(metric, record["metrics"][metric])
                for record in chosen
                if record["product"] == product
                and (record["detector"], record["features"]) == column
                and record["metrics"].get(metric) is not None
            ]
            cells.append(_mean(values))
        table.append([product, *cells])
    views: dict[str, set[str]] = {}
    for record in chosen:
        views.setdefault(record.get("category") or record["product"], set()).add(record["product"])
    several = {name: found for name, found in sorted(views.items()) if len(found) > 1}
    means = [
        _column_means(f"{name}, mean of {len(v)} views", [r for r in table if r[0] in v]) for name, v in several.items()
    ]
    heading = ["product", *(f"{detector}, {features}" for detector, features in columns)]
    return heading, [*table, *means, _column_means("mean", table)]


def _column_means(name: str, lines: Sequence[Sequence[Any]]) -> list[Any]:
    columns = list(zip(*lines, strict=True))[1:]
    return [name, *(_mean([value for value in column if value == value]) for column in columns)]


def defect_tables(records: Sequence[Record]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, heading and lines of a table for every kind of defect that was measured separately."""
    kinds = dict.fromkeys(kind for record in records for kind in record.get("defects", {}))
    out = []
    for kind in kinds:
        own = [{**r, "metrics": r["defects"][kind]} for r in records if kind in r.get("defects", {})]
        products = len({record["product"] for record in own})
        heading, lines = summary_table(summarise(own), MAIN)
        title = f"Defects: {kind}, against all normal images; mean over {products} product(s), in %"
        out.append((title, heading[:-1], [line[:-1] for line in lines]))
    return out


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """Format a number; nan becomes a dash."""
    value = round(value, digits) + 0.0  # no "-0.0"
    return "–" if value != value else f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def summary_table(rows: Sequence[Row], metrics: Sequence[str] = (*MAIN, D_PRIME)) -> tuple[list[str], list[list[str]]]:
    """Return heading and lines of the summary, with a line of gains below each row that is not raw. A mean over some of
    the products shows their number, because rows with different products cannot be compared."""
    lines = []
    for row in rows:
        cells = (summary_cell(row, name) for name in metrics)
        lines.append([row.setting, row.detector, row.features, *cells, _errors_cell(row)])
        if row.gain is not None:
            lines.append(["", "", "gain over raw", *(number(row.gain[name], sign=True) for name in metrics), ""])
    return ["setting", "detector", "features", *(TITLES[name] for name in metrics), ERRORS], lines


def summary_cell(row: Row, name: str) -> str:
    """Format the mean, its spread if there are several repeats, and the number of products if not all define it."""
    spread = f" ± {number(row.spread[name])}" if row.repeats > 1 and row.defined[name] else ""
    return number(row.mean[name]) + spread + _partial(row, name)


def _errors_cell(row: Row) -> str:
    """Format false positives + false negatives, summed over products and averaged over repeats."""
    digits = 1 if row.repeats > 1 else 0
    wrong, missed = row.mean[FALSE_POSITIVES], row.mean[FALSE_NEGATIVES]
    if wrong != wrong:
        return number(wrong)
    return f"{number(wrong, digits)} + {number(missed, digits)}" + _partial(row, FALSE_POSITIVES)


def _partial(row: Row, name: str) -> str:
    return f" ({row.defined[name]} of {row.products})" if 0 < row.defined[name] < row.products else ""


def all_notes(records: Sequence[Record]) -> list[str]:
    """Return each note once, with the first products that have it and, unless all settings have it, the settings."""
    found: dict[str, list[Record]] = {}
    for record in records:
        for note in record["notes"]:
            found.setdefault(note, []).append(record)
    everything = {record["setting"] for record in records}
    lines = []
    for note, having in found.items():
        names = list(dict.fromkeys(record["product"] for record in having))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        settings = list(dict.fromkeys(record["setting"] for record in having))
        where = "" if len(settings) == len(everything) else f", {', '.join(settings)}"
        lines.append(f"{', '.join(names[:3])}{more}{where}: {note}")
    return lines


def write_board(folder: Path, records: Sequence[Record], planned: int, notes: Sequence[str]) -> str:
    """Write the means of every set to board.md and board.csv; return the text of board.md. ``planned`` is the number of
    records of the whole board."""
    found = by_set(records)
    text = _board(found, records, planned, notes)
    for name, content in (("board.md", text), ("board.csv", _board_csv(found))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return text


def _board(found: Sequence[tuple[str, Row]], records: Sequence[Record], planned: int, notes: Sequence[str]) -> str:
    title = "Means in %, ± standard deviation between draws"
    if len(records) < planned:
        title += f"; {len(records)} of {planned} cells are finished, and the means are over these"
    heading = ["set", "images", "detector", "features", "draws", *(TITLES[name] for name in MAIN)]
    rows = []
    for name, row in found:
        cells = [summary_cell(row, metric) for metric in MAIN]
        rows.append([name, row.setting, row.detector, row.features, str(row.repeats), *cells])
        if row.gain is not None:
            gains = [number(row.gain[metric], sign=True) for metric in MAIN]
            rows.append(["", "", "", "gain over raw", "", *gains])
    told = [f"- {' '.join(note.split())}" for note in (*notes, *all_notes(records))]
    return "\n".join([markdown(title, heading, rows), *told]).rstrip() + "\n"


def _board_csv(found: Sequence[tuple[str, Row]]) -> str:
    """Format the means as CSV, in per cent with all digits, or empty if undefined. ``_sets``: how many are defined."""
    columns = [f"{name}{part}" for name in MAIN for part in ("", "_spread", "_sets")]
    lines: list[Sequence[Any]] = [["set", "images", "detector", "features", "draws", *columns]]
    for name, row in found:
        cells: list[Any] = [name, row.setting, row.detector, row.features, row.repeats]
        for metric in MAIN:
            defined = row.defined[metric]
            cells += [row.mean[metric], row.spread[metric], defined] if defined else ["", "", 0]
        lines.append(cells)
    return _comma_separated(lines)


def write_tables(folder: Path, records: Sequence[Record], configuration: dict[str, Any]) -> list[Path]:
    """Write table.json (everything), table.csv (a line per record), table.md and table.tex (means, then every product,
    then notes, which are comments in LaTeX)."""
    rows = summarise(records)
    contents = {
        "table.json": _json(records, rows, configuration),
        "table.csv": _csv(records),
        "table.md": _document(records, rows, markdown, "- "),
        "table.tex": _document(records, rows, _latex, "% "),
    }
    for name, text in contents.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in contents]


def _json(records: Sequence[Record], rows: Sequence[Row], configuration: dict[str, Any]) -> str:
    kept = [
        {key: value for key, value in record.items() if key in (*COLUMNS, "metrics", "defects")} for record in records
    ]
    summary = [
        {**vars(row), **{part: _defined(getattr(row, part)) for part in ("mean", "spread", "gain")}} for row in rows
    ]
    content = {"configuration": configuration, "about": [ABOUT_ERRORS], "summary": summary, "records": kept}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _defined(values: dict[str, float] | None) -> dict[str, float | None] | None:
    if values is None:
        return None
    return {name: None if value != value else value for name, value in values.items()}


def _csv(records: Sequence[Record]) -> str:
    """Format records as CSV: metrics as shares of 1 with all digits; undefined ones are empty."""
    flat = [{**record, **record["metrics"], "notes": "; ".join(record["notes"])} for record in records]
    values = [["" if row.get(name) is None else row[name] for name in COLUMNS] for row in flat]
    return _comma_separated([COLUMNS, *values])


def _comma_separated(lines: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _document(records: Sequence[Record], rows: Sequence[Row], render: Any, bullet: str) -> str:
    """Render the summary, then a table of all products for each setting and metric, then the notes, one per line."""
    products = len({record["product"] for record in records})
    title = f"Mean over {products} product(s), {UNITS}"
    parts = [render(title, *summary_table(rows)), *(render(*table) for table in defect_tables(records))]
    for setting in dict.fromkeys(row.setting for row in rows):
        for metric in MAIN:
            heading, lines = products_table(records, metric, setting)
            text = [[line[0], *(number(value) for value in line[1:])] for line in lines]
            parts.append(render(f"{TITLES[metric]} in %, {setting}", heading, text))
    parts += [bullet + " ".join(note.split()) for note in (ABOUT_ERRORS, *all_notes(records))]
    return "\n".join(parts).rstrip() + "\n"


def markdown(title: str, heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Render a table below its title; numbers are right-aligned."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join(" --- " if index < _texts(heading) else " ---: " for index in range(len(heading))) + "|"
    return "\n".join([f"**{title}**", "", line(heading), rule, *(line(cells) for cells in lines), ""])


def _texts(heading: Sequence[str]) -> int:
    return 4 if heading[0] == "set" else 1 if heading[0] == "product" else 3


_ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$"}
_ESCAPES |= {character: "\\" + character for character in "&%$#_{}"}


def _latex(title: str, heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Render a table for the LaTeX package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_ESCAPES.get(character, character) for character in cell) for cell in cells) + r" \\"

    columns = "l" * _texts(heading) + "r" * (len(heading) - _texts(heading))
    body = [line(cells) for cells in lines]
    begin = [r"\begin{table}", r"\centering", rf"\caption{{{line([title])[:-3]}}}", rf"\begin{{tabular}}{{{columns}}}"]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*begin, r"\toprule", line(heading), r"\midrule", *body, *end])
