"""The tables of an evaluation, and the files they are written to: Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adpretrain.files import atomic_path
from downstream.evaluation.means import (
    AT_BEST_F1,
    COUNTS,
    D_PRIME,
    FALSE_POSITIVES,
    MAIN,
    TITLES,
    Record,
    Row,
    by_set,
    main_metrics,
    mean_of,
    shown,
    summarise,
)
from downstream.table_text import latex, markdown

ERRORS = "errors at best F1"
UNITS = "in % (d' is a ratio, errors are images)"
ABOUT_BEST_F1 = (
    "image max-F1, image accuracy at max-F1 and errors at best F1 (images of all products on the wrong side of each "
    "product's own threshold, false positives + false negatives): that threshold has the best F1 on the labels of the "
    "scored images themselves, as in the papers of PatchCore and ReContrast; use these numbers only to compare with "
    "such papers, not as a working threshold"
)
GAIN = "gain over best untrained"
COLUMNS = ("product", "setting", "draw", "detector", "features", "extractor", *TITLES, "trained_on", "notes")


def products_table(records: Sequence[Record], metric: str, setting: str) -> tuple[list[str], list[list[Any]]]:
    """Return a table of one metric for every product (rows) and contender (columns), averaged over repeats, in %. Below
    are the mean of the views of every category that has several, and the mean of all products.
    """
    chosen = [record for record in records if record["setting"] == setting]
    columns = list(dict.fromkeys((record["detector"], record["features"]) for record in chosen))
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    views: dict[str, dict[str, None]] = defaultdict(dict)
    for record in sorted(chosen, key=lambda record: record["product"]):
        views[record.get("category") or record["product"]][record["product"]] = None
        if (value := record["metrics"].get(metric)) is not None:
            found[record["product"], record["detector"], record["features"]].append(shown(metric, value))

    def means(products: Iterable[str]) -> list[float]:
        """The mean of each column over the products that define it; every product has the same weight."""
        cells = [[mean_of(found[name, detector, features]) for name in products] for detector, features in columns]
        return [mean_of(value for value in column if value == value) for column in cells]

    products = [name for category in views.values() for name in category]
    lines = [[name, *means([name])] for name in sorted(products)]
    several = [(name, list(own)) for name, own in sorted(views.items()) if len(own) > 1]
    lines += [[f"{name}, mean of {len(own)} views", *means(own)] for name, own in several]
    heading = ["product", *(f"{detector}, {features}" for detector, features in columns)]
    return heading, [*lines, ["mean", *means(products)]]


def details(records: Sequence[Record]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, heading and lines of the tables below the summary: of every kind of defect, then of the products
    for each setting and metric."""
    out = defect_tables(records)
    for setting in dict.fromkeys(record["setting"] for record in records):
        for metric in main_metrics(records):
            heading, lines = products_table(records, metric, setting)
            text = [[str(line[0]), *(number(value) for value in line[1:])] for line in lines]
            out.append((f"{TITLES[metric]} in %, {setting}", heading, text))
    return out


def defect_tables(records: Sequence[Record]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, heading and lines of a table for every kind of defect that was measured separately."""
    kinds = dict.fromkeys(kind for record in records for kind in record.get("defects", {}))
    out = []
    for kind in kinds:
        own = [{**r, "metrics": r["defects"][kind]} for r in records if kind in r.get("defects", {})]
        products = len({record["product"] for record in own})
        title = f"Defects: {kind}, against all normal images; mean over {products} product(s), in %"
        out.append((title, *summary_table(summarise(own), main_metrics(own))))
    return out


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """Format a number; nan becomes a dash."""
    value = round(value, digits) + 0.0  # no "-0.0"
    return "–" if value != value else f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def summary_table(rows: Sequence[Row], metrics: Sequence[str] = MAIN) -> tuple[list[str], list[list[str]]]:
    """Return heading and lines of a summary of ``metrics``."""
    lines = []
    for row in rows:
        lines += _lines(row, {"setting": row.setting, "detector": row.detector, "features": row.features}, metrics)
    return ["setting", "detector", "features", *(TITLES.get(name, name) for name in metrics)], lines


def summary(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return heading and lines of the first table, with everything that is measured of most sets."""
    return summary_table(summarise(records), (*main_metrics(records), *AT_BEST_F1, D_PRIME, ERRORS))


def _lines(row: Row, names: dict[str, str], metrics: Sequence[str]) -> list[list[str]]:
    """Return the cells of a row, the first of which are its ``names``, and a line of gains for pretrained features."""
    lines = [[*names.values(), *(summary_cell(row, name) for name in metrics)]]
    if row.gain is not None and row.gain_spread is not None:
        gains = [GAIN if column == "features" else "" for column in names]
        for name in metrics:
            spread = f" ± {number(row.gain_spread[name])}" if row.repeats > 1 and name in row.gain else ""
            gains.append(number(row.gain[name], sign=True) + spread if name in row.gain else "")
        lines.append(gains)
    return lines


def summary_cell(row: Row, name: str) -> str:
    """Format the mean (of errors: false positives + false negatives), its spread if there are several repeats, and the
    number of products if not all define it, because rows with different products cannot be compared."""
    defined, several = row.defined[FALSE_POSITIVES if name == ERRORS else name], row.repeats > 1
    if not defined:
        return number(float("nan"))
    if name == ERRORS:
        text = " + ".join(number(row.mean[kind], digits=int(several)) for kind in COUNTS)
    else:
        text = number(row.mean[name]) + (f" ± {number(row.spread[name])}" if several else "")
    return text + (f" ({defined} of {row.products})" if defined < row.products else "")


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


def write_means(folder: Path, records: Sequence[Record], planned: int, notes: Sequence[str]) -> str:
    """Write the means of every set to means.md and means.csv; return the text of means.md. ``planned`` is the number of
    records of the whole comparison."""
    found, metrics = by_set(records), main_metrics(records)
    title = "Means in %, ± standard deviation between draws"
    if len(records) < planned:
        title += f"; {len(records)} of {planned} cells are finished, and the means are over these"
    heading = ["set", "images", "detector", "features", "draws", *(TITLES[name] for name in metrics)]
    lines = []
    for name, row in found:
        names = {"set": name, "images": row.setting, "detector": row.detector, "features": row.features}
        lines += _lines(row, {**names, "draws": str(row.repeats)}, metrics)
    told = [f"- {' '.join(note.split())}" for note in (*notes, *all_notes(records))]
    text = "\n".join([markdown(title, heading, lines, _words(heading)), *told]).rstrip() + "\n"
    _write(folder, {"means.md": text, "means.csv": _means_csv(found, metrics)})
    return text


def _write(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _means_csv(found: Sequence[tuple[str, Row]], metrics: Sequence[str]) -> str:
    """Format the means as CSV, in per cent with all digits, or empty if undefined. ``_sets``: how many are defined."""
    columns = [f"{name}{part}" for name in metrics for part in ("", "_spread", "_sets")]
    lines: list[Sequence[Any]] = [["set", "images", "detector", "features", "draws", *columns]]
    for name, row in found:
        cells: list[Any] = [name, row.setting, row.detector, row.features, row.repeats]
        for metric in metrics:
            defined = row.defined[metric]
            cells += [row.mean[metric], row.spread[metric], defined] if defined else ["", "", 0]
        lines.append(cells)
    return _comma_separated(lines)


def write_tables(folder: Path, records: Sequence[Record], configuration: dict[str, Any]) -> list[Path]:
    """Write table.json (everything), table.csv (a line per record), table.md and table.tex (means, then every product,
    then notes, which are comments in LaTeX)."""
    contents = {
        "table.json": _json(records, summarise(records), configuration),
        "table.csv": _csv(records),
        "table.md": _document(records, markdown, "- "),
        "table.tex": _document(records, latex, "% "),
    }
    _write(folder, contents)
    return [folder / name for name in contents]


def _json(records: Sequence[Record], rows: Sequence[Row], configuration: dict[str, Any]) -> str:
    kept = [{key: record[key] for key in (*COLUMNS, "metrics", "defects") if key in record} for record in records]
    summary = [{name: _defined(value) for name, value in vars(row).items()} for row in rows]
    content = {"configuration": configuration, "about": [ABOUT_BEST_F1], "summary": summary, "records": kept}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _defined(value: Any) -> Any:
    """Replace nan in a mapping by None, for JSON."""
    if not isinstance(value, dict):
        return value
    return {name: None if number != number else number for name, number in value.items()}


def _csv(records: Sequence[Record]) -> str:
    """Format records as CSV: metrics as shares of 1 with all digits; undefined ones are empty."""
    flat = [{**record, **record["metrics"], "notes": "; ".join(record["notes"])} for record in records]
    values = [["" if row.get(name) is None else row[name] for name in COLUMNS] for row in flat]
    return _comma_separated([COLUMNS, *values])


def _comma_separated(lines: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _document(records: Sequence[Record], render: Any, bullet: str) -> str:
    """Render the summary, then a table of all products for each setting and metric, then the notes, one per line."""
    products = len({record["product"] for record in records})
    title = f"Mean over {products} product(s), {UNITS}"
    tables = [(title, *summary(records)), *details(records)]
    parts = [render(*table, _words(table[1])) for table in tables]
    parts += [bullet + " ".join(note.split()) for note in (ABOUT_BEST_F1, *all_notes(records))]
    return "\n".join(parts).rstrip() + "\n"


def _words(heading: Sequence[str]) -> int:
    """Return how many columns of a table are words."""
    return 4 if heading[0] == "set" else 1 if heading[0] == "product" else 3
