"""The report of an evaluation: one self-contained HTML page with tables, curves, histograms and maps, without scripts.

It shares the style of the report of `adpretrain score`. All pictures are inlined, so that no network is needed, and
everything that comes from names or messages is escaped.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, Template
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from adpretrain._version import __version__
from adpretrain.files import atomic_path
from adpretrain.preprocess import Preprocess
from downstream.evaluation import plots
from downstream.evaluation.comparison import PRETRAINED, RAW
from downstream.evaluation.means import Record, summarise
from downstream.evaluation.networks import Contender, Features
from downstream.evaluation.pictures import file_name, in_two_dimensions, sampled_patches
from downstream.evaluation.protocols import Part, Trial
from downstream.evaluation.tables import (
    ABOUT_BEST_F1,
    GAIN,
    all_notes,
    details,
    summary,
)
from downstream.evaluation.trial import Images, Settings, give_references
from downstream.inspection.photos import printable
from downstream.inspection.report import Fact, jpeg
from downstream.visualise import COLORMAP

MOST_PRODUCTS = 40  # at most this many products are shown with histograms and maps
MOST_NOTES = 8
FIRST = (("photograph", "photograph"), ("truth", "marked defect"))  # pictures of an image and their captions
PER_KIND = 12  # patches are drawn of at most this many normal and this many defective images
SCALE_NOTE = (
    "Heatmap colours: dark is a typical normal pixel; the middle of the scale (outlined) is the highest value of any "
    "normal image that was scored. Each detector has its own scale. The photographs were chosen before anything was "
    "scored: for each kind of defect, the middle one by file name."
)


def report(
    folder: Path,
    records: Sequence[Record],
    configuration: dict[str, Any],
    preprocess: Preprocess,
    drawn: Sequence[Path],
) -> Path:
    """Write the page of a finished evaluation and return its path; ``drawn`` holds pictures of the features."""
    protocol, extractors = configuration["protocol"], len(configuration["extractors"])
    images = {record["product"]: len(record["scores"]) for record in records}
    settings = list(dict.fromkeys(record["setting"] for record in records))
    detectors = ", ".join(dict.fromkeys(record["detector"] for record in records))
    repeats = max(row.repeats for row in summarise(records))
    seconds = sum(sum(record["seconds"].values()) for record in records)
    facts = [
        Fact("Protocol", protocol, ", ".join(name for name in settings if name != protocol)),
        Fact("Products", str(len(images)), f"{sum(images.values())} scored images"),
        Fact("Backbone", configuration["backbone"]["name"], preprocess.in_words),
        Fact("Extractors", str(extractors), "" if extractors else "raw features only"),
        Fact("Repeats", str(repeats), "draws and extractors; ± is the standard deviation between them"),
        Fact("Computing time", f"{seconds / 60:.1f} min", "all processes together"),
    ]
    title = f"{', '.join(dict.fromkeys(record['set'] for record in records))}: {detectors}"
    footer = f"adpretrain {__version__}. Nothing was chosen on the scored images but the threshold of "
    return write_comparison(folder, records, title, configuration["root"], facts, drawn, footer + ABOUT_BEST_F1)


def write_comparison(
    folder: Path,
    records: Sequence[Record],
    title: str,
    where: str,
    facts: Sequence[Fact],
    embeddings: Sequence[Path] = (),
    footer: str = "",
) -> Path:
    """Write report.html to an evaluation's folder, from which pictures are read, and return its path.

    Curves, histograms and maps show the first draw and extractor of the last setting.
    """
    last = records[-1]["setting"]
    shown = [r for r in records if r["setting"] == last and r["draw"] == 0 and r["extractor"] == 0]
    notes = all_notes(records)
    if len(notes) > MOST_NOTES:
        notes[MOST_NOTES:] = [f"and {len(notes) - MOST_NOTES} more notes, in table.md"]
    names = sorted({record["product"] for record in shown})
    products = [_product(folder, name, [r for r in shown if r["product"] == name]) for name in names[:MOST_PRODUCTS]]
    template = resources.files("downstream").joinpath("comparison.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, finalize=_printable)
    page = environment.from_string(template).render(
        style=_style(),
        title=title,
        where=where,
        facts=facts,
        notes=notes,
        summary=summary(records),
        last=last,
        gain=GAIN,
        curves=_base64(plots.curves(shown)),
        embeddings=[_base64(path.read_bytes()) for path in embeddings],
        tables=details(records),
        products=products,
        more=max(0, len(names) - MOST_PRODUCTS),
        scale_note=SCALE_NOTE,
        footer=footer,
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def _printable(text: object) -> str:
    return text if isinstance(text, Markup) else printable(text)


def _style() -> Markup:
    page = resources.files("downstream").joinpath("report.html").read_text(encoding="utf-8")
    found = re.search(r"<style>(.*?)</style>", page, flags=re.S)
    assert found is not None
    ramp = ",".join(to_hex(colormaps[COLORMAP](at)) for at in np.linspace(0, 1, 9))
    return Markup(Template(found[1]).render(ramp=ramp))


def _product(folder: Path, name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Collect a product's histograms and, for every chosen photograph, itself, the marked defect and all heatmaps."""
    images: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        for entry in record["pictures"]:
            base = folder / entry["folder"]
            first = [(base / f"{entry['number']}-{kind}.png", caption) for kind, caption in FIRST]
            image = {"defect": entry["defect"], "name": entry["image"], "files": first}
            image = images.setdefault((entry["folder"], entry["number"]), image)
            contender = f"{record['detector']}, {record['features']}"
            image["files"].append((base / f"{entry['number']}-{entry['map']}.png", contender))
    for image in images.values():
        image["pictures"] = [(_inlined(path), caption) for path, caption in image["files"]]
    return {"name": name, "histograms": _base64(plots.histograms(records)), "images": list(images.values())}


def _inlined(path: Path) -> str:
    with Image.open(path) as picture:
        return _base64(jpeg(picture.convert("RGB")))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def draw_features(
    folder: Path, trials: Sequence[Trial], rows: Sequence[Features], settings: Settings, number: int
) -> list[Path]:
    """Draw raw and pretrained patch features of the first ``number`` products in two dimensions, each only once."""
    parts = {part.product: part for trial in trials for part in trial.parts if trial.draw == 0}
    alike = [row for row in rows if row.networks.backbone is rows[0].networks.backbone]
    paths = []
    for product, part in list(parts.items())[:number]:
        path = folder / "pictures" / file_name(product) / "features.png"
        if not path.is_file():
            content = _scatter(part, [row for row in alike if row.kind in (RAW, PRETRAINED)] or alike, settings)
            if content is None:
                continue
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        paths.append(path)
    return paths


def _scatter(part: Part, rows: Sequence[Features], settings: Settings) -> bytes | None:
    """Draw the patch features of a product; None if it has too few patches."""
    marked = [s for s in part.test if not s.anomalous or s.mask_files]  # only masks tell which patches are defective
    groups = [[s for s in marked if s.anomalous == anomalous][:PER_KIND] for anomalous in (False, True)]
    points, anomalous, method = {}, np.zeros(0, bool), ""
    for row in rows:
        extract = row.networks.extract(Contender("", row.kind))
        images = Images([*groups[0], *groups[1]], row.networks.backbone.preprocess, settings)
        give_references(extract, part, settings)
        features, anomalous = sampled_patches(extract, images.with_masks())
        if len(features) < 5:
            return None
        points[f"{part.product}: {row.name}"], method = in_two_dimensions(features)
    return plots.scatter(points, anomalous, method)
