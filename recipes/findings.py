"""What the first process makes of all finished trials: tables, pictures of the features, the report, the summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from adpretrain._version import __version__
from adpretrain.files import atomic_path
from adpretrain.preprocess import Preprocess
from downstream.evaluation.comparison_page import write_comparison
from downstream.evaluation.contenders import PRETRAINED, RAW, Contender, Networks
from downstream.evaluation.patches import in_two_dimensions, sampled_patches
from downstream.evaluation.plots import scatter
from downstream.evaluation.protocols import Part, Trial
from downstream.evaluation.tables import ABOUT_ERRORS, UNITS, summarise, summary_table, write_tables
from downstream.evaluation.trial import Images, Settings, give_references
from downstream.inspection.report import Fact

PER_KIND = 12  # scored images of each kind, normal and defective, whose patches are drawn


def write_findings(
    folder: Path,
    records: Sequence[dict[str, Any]],
    configuration: dict[str, Any],
    pictures: Sequence[Path],
) -> None:
    """table.json, .csv, .md, .tex and report.html."""
    write_tables(folder, records, configuration)
    protocol = configuration["protocol"]["protocol"]
    products = sorted({record["product"] for record in records})
    repeats = max(row.repeats for row in summarise(records))
    first = [record for record in records if record["order"] == records[0]["order"]]
    settings = list(dict.fromkeys(record["setting"] for record in records))
    extractors = len(configuration["extractors"])
    seconds = sum(sum(record["seconds"].values()) for record in records)
    facts = [
        Fact("Protocol", protocol, ", ".join(name for name in settings if name != protocol)),
        Fact("Products", str(len(products)), f"{sum(len(record['scores']) for record in first)} scored images"),
        Fact("Backbone", configuration["backbone"]["name"], Preprocess(**configuration["preprocess"]).in_words),
        Fact("Extractors", str(extractors), "seeds of one training, averaged" if extractors else "raw features only"),
        Fact("Repeats", str(repeats), "draws and extractors; ± is the standard deviation between them"),
        Fact("Computing time", f"{seconds / 60:.1f} min", "all processes together"),
    ]
    title = f"{Path(configuration['root']).name}: {', '.join(configuration['detectors'])}"
    footer = f"adpretrain {__version__}. Nothing was chosen on the scored images, but the thresholds of max-F1 and of "
    footer += ABOUT_ERRORS
    write_comparison(folder, records, title, configuration["root"], facts, pictures, footer)


def draw_features(
    folder: Path, trials: Sequence[Trial], networks: Networks, settings: Settings, number: int
) -> list[Path]:
    """Patch features of the first products in two dimensions, raw and pretrained; made once."""
    kinds = [RAW, *([PRETRAINED] if networks.extractors else [])]
    parts = {part.product: part for trial in trials for part in trial.parts if trial.draw == 0}
    paths = []
    for product, part in list(parts.items())[:number]:
        path = folder / "pictures" / quote(product, safe="") / "features.png"
        if not path.is_file():
            content = _scatter(part, kinds, networks, settings)
            if content is None:
                continue
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        paths.append(path)
    return paths


def _scatter(part: Part, kinds: Sequence[str], networks: Networks, settings: Settings) -> bytes | None:
    """None for a product with too few patches."""
    marked = [s for s in part.test if not s.anomalous or s.mask_files]  # else nobody knows which patches are defective
    groups = [[s for s in marked if s.anomalous == anomalous][:PER_KIND] for anomalous in (False, True)]
    images = Images([*groups[0], *groups[1]], networks.backbone.preprocess, settings)
    points, anomalous = {}, None
    for kind in kinds:
        extract = networks.extract(Contender("", kind))
        give_references(extract, part, settings)
        features, anomalous = sampled_patches(extract, images.with_masks())
        if len(features) < 5:
            return None
        points[f"{part.product}: {kind}"], method = in_two_dimensions(features)
    assert anomalous is not None
    return scatter(points, anomalous, method)


def show(records: Sequence[dict[str, Any]], console: Console) -> None:
    """The summary on the terminal."""
    heading, lines = summary_table(summarise(records))
    products = len({record["product"] for record in records})
    title = f"mean over {products} product(s), {UNITS}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for position, column in enumerate(heading):
        table.add_column(column, justify="left" if position < 3 else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)
