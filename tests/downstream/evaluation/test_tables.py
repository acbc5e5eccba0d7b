"""Means and spreads against a hand calculation, and every written format read back."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from downstream.evaluation.means import SPRO, TITLES, in_order, summarise
from downstream.evaluation.tables import (
    COLUMNS,
    GAIN,
    all_notes,
    defect_tables,
    number,
    products_table,
    summary,
    write_means,
    write_tables,
)


def record(product: str, features: str, value: float | None, draw: int = 0, extractor: int = 0) -> dict[str, Any]:
    return {
        "product": product,
        "setting": "K=4",
        "draw": draw,
        "detector": "padim",
        "features": features,
        "kind": features,
        "extractor": extractor,
        "metrics": dict.fromkeys(TITLES, value) | dict.fromkeys(SPRO),
        "notes": ["no anomalous images"] if value is None else [],
        "trained_on": 4,
        "order": [0, 0, ["raw", "residual", "scaled", "pretrained"].index(features), extractor, draw],
        "seconds": {"fit": 1.0, "score": 2.0},
    }


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """Two products, two extractors, two draws; a metric that one product does not define; an awkward name."""
    rng = np.random.default_rng(0)
    found = [record(name, "raw", float(rng.random()), draw) for name in ("a_b & c|d", "nut") for draw in (0, 1)]
    found += [
        record(name, "pretrained", float(rng.random()), draw, extractor)
        for name in ("a_b & c|d", "nut")
        for draw in (0, 1)
        for extractor in (0, 1)
    ]
    found[0] = record("a_b & c|d", "raw", None)
    return in_order(found)


def test_means_spreads_and_gains_are_those_of_the_hand_calculation(records: list[dict[str, Any]]) -> None:
    raw, ours = summarise(records)
    value = {(r["product"][:1], r["features"], r["draw"], r["extractor"]): r["metrics"]["aupro"] for r in records}
    first, second = 100 * value["n", "raw", 0, 0], 50 * (value["a", "raw", 1, 0] + value["n", "raw", 1, 0])
    assert raw.mean["aupro"] == pytest.approx((first + second) / 2, abs=1e-12)
    assert raw.spread["aupro"] == pytest.approx(abs(first - second) / 2**0.5, abs=1e-9)
    assert raw.gain is None
    assert (raw.products, raw.repeats, ours.repeats) == (2, 2, 4)
    means = [50 * (value["a", "pretrained", d, e] + value["n", "pretrained", d, e]) for d, e in np.ndindex(2, 2)]
    assert ours.mean["aupro"] == pytest.approx(np.mean(means), abs=1e-9)
    assert ours.spread["aupro"] == pytest.approx(np.std(means, ddof=1), abs=1e-9)
    assert ours.gain is not None
    assert ours.gain["aupro"] == pytest.approx(ours.mean["aupro"] - raw.mean["aupro"], abs=1e-12)


def test_the_gain_is_over_the_best_row_without_training_draw_by_draw(tmp_path: Path) -> None:
    """Scaled residuals beat raw features in both draws: pretrained features gain 0.02 and 0.04 over them. A set's name
    for the features says nothing about their kind."""
    values = {"raw": (0.5, 0.6), "residual": (0.95, 0.05), "scaled": (0.6, 0.8), "pretrained": (0.62, 0.84)}
    found = [record("nut", kind, value, draw) for kind, both in values.items() for draw, value in enumerate(both)]
    for entry in found:
        entry |= {"features": f"my {entry['kind']}", "set": "nuts"}
    rows = summarise(found)
    assert [row.gain is None for row in rows] == [True, True, True, False]
    gain, spread = rows[-1].gain, rows[-1].gain_spread
    assert gain is not None
    assert spread is not None
    assert gain["aupro"] == pytest.approx(3)
    assert spread["aupro"] == pytest.approx(2**0.5)
    cells = [GAIN, "+3.0 ± 1.4", "+3.0 ± 1.4", "+3.0 ± 1.4"]
    assert summary(found)[1][-1][2:6] == cells
    assert " | ".join([GAIN, "", *cells[1:]]) in write_means(tmp_path, found, len(found), [])
    one_draw = summary([entry for entry in found if entry["draw"] == 0])[1][-1]
    assert one_draw[3] == "-33.0"  # over the residuals, which are the best of that draw


def test_the_order_does_not_depend_on_who_finished_first(records: list[dict[str, Any]]) -> None:
    shuffled = [records[index] for index in np.random.default_rng(1).permutation(len(records))]
    assert in_order(shuffled) == records
    assert [row.features for row in summarise(in_order(shuffled))] == ["raw", "pretrained"]


def test_every_format_is_read_back(records: list[dict[str, Any]], tmp_path: Path) -> None:
    assert [path.name for path in write_tables(tmp_path, records, {"seed": 1})] == [
        "table.json",
        "table.csv",
        "table.md",
        "table.tex",
    ]
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["configuration"] == {"seed": 1}
    assert [entry["metrics"] for entry in content["records"]] == [entry["metrics"] for entry in records]
    assert content["summary"][0]["mean"]["aupro"] == summarise(records)[0].mean["aupro"]

    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    for row, entry in zip(rows, records, strict=True):
        assert row["product"] == entry["product"]
        expected = entry["metrics"]["aupro"]
        assert row["aupro"] == "" if expected is None else float(row["aupro"]) == expected


def cells(line: str, separator: str) -> list[str]:
    return [cell.strip() for cell in re.split(rf"(?<!\\){separator}", line)]


def test_markdown_and_latex_hold_the_same_cells(records: list[dict[str, Any]], tmp_path: Path) -> None:
    write_tables(tmp_path, records, {})
    heading, lines = products_table(records, "aupro", "K=4")
    expected = [[str(line[0]), *(f"{value:.1f}" for value in line[1:])] for line in lines]
    assert expected[-1][0] == "mean"

    markdown = (tmp_path / "table.md").read_text().split("**AUPRO in %, K=4**")[1].split("**")[0].splitlines()
    table = [cells(line, r"\|")[1:-1] for line in markdown if line.startswith("|")]
    assert table[0] == heading
    assert [[cell.replace("\\|", "|") for cell in line] for line in table[2:]] == expected

    latex = (tmp_path / "table.tex").read_text()
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 1 + 3  # the summary and three metrics
    last = latex.split(r"\midrule")[-1].split(r"\bottomrule")[0].strip().splitlines()
    table = [cells(line.removesuffix(r" \\"), "&") for line in last]
    assert [[re.sub(r"\\([&%$#_{}])", r"\1", cell) for cell in line] for line in table] == expected
    first = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(first) == len(summary(records)[1])
    assert all((line.count("&") == 9 and r"$\pm$" in line) or "gain" in line for line in first)


def test_a_loss_too_small_to_be_shown_has_no_sign_of_one() -> None:
    assert [number(value, sign=True) for value in (-0.04, 0.04, -0.06, float("nan"))] == ["+0.0", "+0.0", "-0.1", "–"]


def test_an_undefined_metric_is_a_dash_never_a_number(tmp_path: Path) -> None:
    alone = [record("nut", "raw", None)]
    write_tables(tmp_path, alone, {})
    assert "| nut | – |" in (tmp_path / "table.md").read_text()
    assert "nut & -- " in (tmp_path / "table.tex").read_text()
    assert json.loads((tmp_path / "table.json").read_text())["summary"][0]["mean"]["aupro"] is None


def test_a_mean_that_is_not_of_all_products_says_of_how_many(tmp_path: Path) -> None:
    """Rows of the same table whose means are of one, two and three products."""
    values = {"raw": (0.5, 0.7, 0.9), "pretrained": (0.5, None, 0.7)}
    found = [record(name, kind, value) for kind in values for name, value in zip("abc", values[kind], strict=True)]
    found[0]["metrics"]["d_prime"] = found[1]["metrics"]["d_prime"] = None
    write_tables(tmp_path, found, {})
    _, (raw, ours, _) = summary(found)
    assert raw[3:9] == [*(["70.0"] * 5), "0.9 (1 of 3)"]
    assert ours[3:9] == [*(["60.0 (2 of 3)"] * 5), "0.6 (2 of 3)"]
    assert "Mean over 3 product(s)" in (tmp_path / "table.md").read_text()
    for name in ("table.md", "table.tex"):
        assert (tmp_path / name).read_text().count("60.0 (2 of 3)") == 5
    defined = [row["defined"] for row in json.loads((tmp_path / "table.json").read_text())["summary"]]
    assert [row["aupro"] for row in defined] == [3, 2]
    assert [row["d_prime"] for row in defined] == [1, 2]


def test_the_notes_stand_below_the_tables_of_every_format(tmp_path: Path) -> None:
    """Numbers are copied from these files: what limits them must lie beside them, and LaTeX must not print it."""
    found = [record(name, "raw", 0.5) for name in "abcde"]
    for entry in found:
        entry["notes"] = ["no test\nsplit"]
    found[2]["notes"] = ["no test\nsplit", "50 % less"]
    write_tables(tmp_path, found, {})
    expected = ["a, b, c and 2 more: no test split", "c: 50 % less"]
    assert (tmp_path / "table.md").read_text().splitlines()[-2:] == [f"- {note}" for note in expected]
    assert (tmp_path / "table.tex").read_text().splitlines()[-2:] == [f"% {note}" for note in expected]
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["notes"] for row in csv.DictReader(file)] == ["; ".join(entry["notes"]) for entry in found]


def test_a_note_of_some_settings_names_them() -> None:
    found = [{**record("nut", "raw", 0.5), "setting": f"K={shots}", "notes": ["old"]} for shots in (1, 2, 4)]
    found[0]["notes"] = ["old", "too few"]
    found[2]["notes"] = ["old", "dark"]
    found += [{**found[2], "setting": "K=1", "notes": ["dark"]}]
    assert all_notes(found) == ["nut: old", "nut, K=1: too few", "nut, K=4, K=1: dark"]


def test_views_of_a_category_are_averaged_and_weigh_alike_in_the_mean_of_all() -> None:
    values = {"cap/C1": 0.5, "cap/C2": 0.9, "nut": 0.4, "pin/C1": None, "pin/C2": 0.8}
    records = [{**record(name, "raw", value), "category": name.split("/")[0]} for name, value in values.items()]
    lines = dict(products_table(records, "aupro", "K=4")[1])
    assert lines["cap, mean of 2 views"] == pytest.approx(70)
    assert lines["pin, mean of 2 views"] == pytest.approx(80)
    assert lines["mean"] == pytest.approx(65)
    assert len(lines) == len(values) + 3  # a category of one product has no line of its own


def test_d_prime_is_no_percentage() -> None:
    found = [record("nut", "raw", 2.5), record("cap", "raw", 1.5)]
    assert summarise(found)[0].mean["d_prime"] == pytest.approx(2.0)
    heading, (line,) = summary(found)
    assert (heading[-2], line[-2]) == ("d'", "2.0")


def test_errors_are_counted_over_products(tmp_path: Path) -> None:
    """As PatchCore's 19 + 23 of all of MVTec; the mean of two draws; every file says where the threshold is from."""
    found = [record(name, "raw", 0.5, draw) for name in ("cap", "nut") for draw in (0, 1)]
    for entry, wrong, missed in zip(found, (1, 2, 18, 18), (3, 3, 20, 20), strict=True):
        entry["metrics"] |= {"false_positives_at_best_f1": wrong, "false_negatives_at_best_f1": missed}
    heading, (line,) = summary(found)
    assert (heading[-1], line[-1]) == ("errors at best F1", "19.5 + 23.0")
    assert summary(found[::2])[1][0][-1] == "19 + 23"
    found[0]["metrics"] |= {"false_positives_at_best_f1": None, "false_negatives_at_best_f1": None}
    assert summary(found[::2])[1][0][-1] == "18 + 20 (1 of 2)"
    write_tables(tmp_path, found, {})
    for name in ("table.md", "table.tex"):
        assert "that threshold has the best F1 on the labels of the scored images" in (tmp_path / name).read_text()
    assert "the labels of the scored images themselves" in json.loads((tmp_path / "table.json").read_text())["about"][0]
    assert "false_negatives_at_best_f1" in (tmp_path / "table.csv").read_text().splitlines()[0]


def test_the_threshold_of_accuracy_and_max_f1_is_named_beside_them(tmp_path: Path) -> None:
    found = [record("nut", "raw", 0.75)]
    heading, (line,) = summary(found)
    shown = dict(zip(heading, line, strict=True))
    assert shown["image max-F1"] == shown["image accuracy at max-F1"] == "75.0"
    write_tables(tmp_path, found, {})
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["records"][0]["metrics"]["image_accuracy_at_best_f1"] == 0.75
    assert content["about"][0].startswith("image max-F1, image accuracy at max-F1 and errors at best F1")
    assert "not as a working threshold" in content["about"][0]


def test_spro_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    """Of two sets in one: the mean says that one product alone has it. Without it there is no column."""
    found = [{**record(name, "raw", 0.5), "set": "both"} for name in ("box", "nut")]
    assert "sPRO" not in write_means(tmp_path, found, 2, [])
    found[0]["metrics"] |= {"spro_05": 0.4, "spro_30": 0.8}
    text = write_means(tmp_path, found, 2, [])
    assert "| AUPRO | sPRO to FPR 0.05 | sPRO to FPR 0.3 |" in text
    assert text.rstrip().endswith("| 50.0 | 40.0 | 80.0 |")
    with (tmp_path / "means.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (float(row["spro_05"]), float(row["spro_30"])) == pytest.approx((40, 80))
    heading, (line,) = summary(found)
    assert line[heading.index("sPRO to FPR 0.05")] == "40.0 (1 of 2)"
    write_tables(tmp_path, found, {})
    assert "**sPRO to FPR 0.3 in %, K=4**" in (tmp_path / "table.md").read_text()


def test_tables_of_defects_say_whose_means_they_hold() -> None:
    """Of three products, one has no image AUROC of scratches, and one alone has dents."""
    found = [record(name, "raw", 0.5) for name in "abc"]
    for entry, value in zip(found, (0.6, 0.7, None), strict=True):
        entry["defects"] = {"scratch": {"image_auroc": value, "pixel_auroc": 0.5, "aupro": 0.4}}
    found[0]["defects"]["[bold]"] = dict.fromkeys(("image_auroc", "pixel_auroc", "aupro"))
    (title, heading, (line,)), (other, _, (empty,)) = defect_tables(found)
    assert title == "Defects: scratch, against all normal images; mean over 3 product(s), in %"
    assert heading[-3:] == ["image AUROC", "pixel AUROC", "AUPRO"]
    assert line[-3:] == ["65.0 (2 of 3)", "50.0", "40.0"]
    assert other.startswith("Defects: [bold], against all normal images; mean over 1 product(s)")
    assert empty[-3:] == ["–", "–", "–"]
