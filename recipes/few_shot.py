"""The few-shot table of `evaluate.py`: FeatureNorm with and without the pretrained projector, on the same references.

Rows: the backbone's plain norm; the norm of raw residuals (feature minus nearest reference, nothing learnt); the
residuals over the local scale; FeatureNorm on the pretrained features. Several
extractors (seeds of one training) are averaged, and their spread is printed. References are drawn at random from the
normal training images; nothing is ever chosen on the scored images. Every product's features are kept in memory, so
that all numbers of references and draws share one pass of the backbone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from adpretrain.data import Sample
from adpretrain.data.products import about_bare, about_inverted, by_product, draw_shots
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path
from adpretrain.hub import locate
from downstream.evaluation.few_shot import FeatureSet, backbone_norm, encode_samples, measure, same_residuals, score
from downstream.evaluation.panels import product_folder, save_panels
from downstream.evaluation.protocols import ProtocolOptions, trials
from downstream.evaluation.tables import number

METRICS = ("image_auroc", "pixel_auroc", "aupro")
BACKBONE, RAW, SCALED = "backbone norm", "raw residual norm", "scaled residual norm"
PRETRAINED = "pretrained FeatureNorm"


@dataclasses.dataclass(frozen=True)
class Result:
    """One row's metrics (in %) on one product, K, draw of references, kind of defect and extractor."""

    row: str
    product: str
    shots: int
    draw: int
    defect: str
    seed: int
    values: tuple[float, ...]


def evaluate_product(
    name: str, images: FeatureSet, extractors: list[ADExtractor], options: argparse.Namespace
) -> Iterator[Result]:
    """Every row on one product."""
    size = extractors[0].preprocess.image_size
    raw = ADExtractor(extractors[0].backbone, matching=extractors[0].config.matching)
    rows = [(PRETRAINED, seed) for seed in range(len(extractors))]
    candidates = list(extractors)
    if extractors[0].local_scale is not None:
        rows.insert(0, (SCALED, 0))
        candidates.insert(0, extractors[0].without_projector())
    for shots in options.shots:
        for draw in range(options.draws):
            references, queries = draw_shots(images.samples, shots, seed=draw)
            predictions = [(BACKBONE, 0, backbone_norm(images, queries, size))]
            predictions.append((RAW, 0, score([raw], images, references, queries)[0]))
            scored = score(candidates, images, references, queries)
            predictions += [(row, seed, found) for (row, seed), found in zip(rows, scored, strict=True)]
            for defect, keep in _by_defect(images, queries, options.per_defect):
                for row, seed, prediction in predictions:
                    part = type(prediction)(prediction.scores[keep], prediction.maps[keep])
                    metrics = measure(part, images, [queries[index] for index in keep])
                    values = tuple(100 * getattr(metrics, metric) for metric in METRICS)
                    yield Result(row, name, shots, draw, defect, seed, values)
            if options.panels and draw == 0:
                folder = options.panels / product_folder(images.samples[0]) / f"K{shots}"
                save_panels(folder, extractors[0], images, references, queries, predictions[-len(extractors)][2])


def _by_defect(images: FeatureSet, queries: Sequence[int], each: bool) -> Iterator[tuple[str, list[int]]]:
    """("all", positions) and, if asked for, every kind of defect with all the normal images."""
    yield "all", list(range(len(queries)))
    kinds = [images.samples[query].defect for query in queries]
    for kind in sorted(set(kinds) - {"good"}) if each else ():
        yield kind, [position for position, found in enumerate(kinds) if found in ("good", kind)]


def summarise(results: Sequence[Result], shots: int, defect: str) -> dict[str, dict[str, np.ndarray]]:
    """Row -> mean over products, draws and seeds, spread between draws, spread between seeds, gain over raw residuals.

    Spreads are standard deviations of the mean over products (n - 1); 0 where there is only one draw or seed.
    """
    grouped: dict[str, dict[tuple[int, int], list[tuple[float, ...]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.shots == shots and result.defect == defect:
            grouped[result.row][result.seed, result.draw].append(result.values)
    out = {}
    for row, cells in grouped.items():
        table = {key: _means(values) for key, values in cells.items()}
        by_seed, by_draw = (
            np.array(
                [
                    np.mean([v for k, v in table.items() if k[axis] == i], axis=0)
                    for i in sorted({k[axis] for k in table})
                ]
            )
            for axis in (0, 1)
        )
        out[row] = {
            "mean": by_seed.mean(0),
            "between_draws": by_draw.std(0, ddof=1) if len(by_draw) > 1 else np.zeros(len(METRICS)),
            "between_seeds": by_seed.std(0, ddof=1) if len(by_seed) > 1 else np.zeros(len(METRICS)),
        }
    for cells in out.values():
        cells["gain"] = cells["mean"] - out[RAW]["mean"]
    return out


def _means(values: Sequence[tuple[float, ...]]) -> np.ndarray:
    """The mean of every metric over the products that define it; nan if none does."""
    defined = [[value for value in column if value == value] for column in zip(*values, strict=True)]
    return np.array([np.mean(column) if column else np.nan for column in defined])


def show(results: Sequence[Result], options: argparse.Namespace, console: Console) -> None:
    """The tables, one line per row and K."""
    defects = list(dict.fromkeys(result.defect for result in results))
    for defect in defects:
        shown = [result for result in results if result.defect == defect]
        products = len({result.product for result in shown})
        title = f"{products} product(s), defects: {escape(defect)}, mean of {options.draws} draw(s), in %"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("K", "features", "image AUROC", "pixel AUROC", "AUPRO"):
            table.add_column(column, justify="left" if column == "features" else "right")
        for shots in options.shots:
            for row, cells in summarise(results, shots, defect).items():
                spread = cells["between_draws"] if options.draws > 1 else cells["between_seeds"]
                marked = options.draws > 1 or (row == PRETRAINED and len(options.extractors) > 1)
                values = [
                    number(m) + (f" ± {number(s)}" if marked and m == m else "")
                    for m, s in zip(cells["mean"], spread, strict=True)
                ]
                table.add_row(str(shots), row, *values)
            cells = summarise(results, shots, defect)[PRETRAINED]
            gains = [number(gain, sign=True) for gain in cells["gain"]]
            table.add_row("", "  gain over raw residual", *gains)
            if len(options.extractors) > 1:
                seeds = [f"{spread:.2f}" for spread in cells["between_seeds"]]
                table.add_row("", f"  spread of {len(options.extractors)} training seeds", *seeds)
        console.print(table)
        bare = sorted({result.product for result in shown if any(value != value for value in result.values)})
        if 0 < len(bare) < products:
            told = f"some metrics are not defined for {', '.join(bare)}: their means are of the other products"
            console.print(told, highlight=False, markup=False)
        console.print()


def run(options: argparse.Namespace, samples: Sequence[Sample], console: Console) -> None:
    """Score every product, print the tables, write the JSON file if one is asked for."""
    options.shots, options.draws = options.shots or [4], options.draws or 1
    # Before hours of other products.
    trials(samples, ProtocolOptions("few-shot", shots=tuple(options.shots), draws=options.draws))
    device = options.device or "cpu"
    extractors = load_extractors(located(options.extractors), device, options.weights)
    results: list[Result] = []
    with Progress(console=console) as bar:
        for name, group in bar.track(list(by_product(samples).items()), description="products"):
            images = encode_samples(group, extractors[0].backbone, device)
            shares = images.masks.float().mean(dim=(1, 2)).tolist()
            for note in filter(None, [about_bare(group), about_inverted(group, shares)]):
                console.print(f"{name}: {note}", highlight=False, markup=False, soft_wrap=True)
            results += evaluate_product(name, images, extractors, options)
    show(results, options, Console(width=max(100, console.width)))
    if options.json:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps([_plain(result) for result in results], allow_nan=False), encoding="utf-8")


def _plain(result: Result) -> dict[str, Any]:
    """For JSON, which has no nan: null where a metric is undefined."""
    return {**dataclasses.asdict(result), "values": [value if value == value else None for value in result.values]}


def located(names: Sequence[str]) -> dict[str, Path]:
    """The folders of extractors that are given as folders, as org/name[@revision] of the Hub, or as "embedded"."""
    found = {}
    for name in names:
        source, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
        found[name] = locate(source, revision or None).folder
    return found


def load_extractors(folders: Mapping[str, Path], device: str, weights: str | None = None) -> list[ADExtractor]:
    """Extractors, given by name, that differ in their projectors only. ``weights``: a local file of the backbone's.

    Raises ValueError naming one that does not fit the first.
    """
    extractors = [ADExtractor.from_pretrained(folder, device, weights) for folder in folders.values()]
    for name, extractor in zip(folders, extractors, strict=True):
        if not same_residuals(extractors[0], extractor):
            raise ValueError(f"{name} and {next(iter(folders))} are not seeds of one training: score them apart")
    return extractors
