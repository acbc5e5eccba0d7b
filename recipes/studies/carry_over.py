"""Does pretraining on real defects carry over to another product? Leave one set out, train on the others, score it.

  python recipes/studies/carry_over.py --sets ../shared/data/mtd ../shared/data/board/* --seeds 3 --out runs/carry-over

Every set whose defects have masks is left out once; other sets are never trained on and scored in every fold. The
features are the embedded extractor's (Lite0, local scale); their residuals against other normals of the same set are
cached once, two views of every photograph. A variant of carry_over.yaml trains a projector on them with the losses of
ADPretrain, through the library's own objective. table.md, which is also printed, has the gain of a detector
(--detector) on its features over the same detector on those of the extractor without a projector, with the same
references and photographs: mean over sets, and the standard deviation of that mean over seeds. A finished run is never
repeated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from adpretrain import ADExtractor
from adpretrain.backbones import FeatureMaps
from adpretrain.config import LossConfig, ProjectorConfig
from adpretrain.data import Sample, index_dataset, index_with_bare
from adpretrain.data.products import draw_shots, normals
from adpretrain.files import atomic_path
from adpretrain.parsing import from_dict, parse_flags, read_yaml
from adpretrain.projector import FeatureProjector
from adpretrain.training.batches import label, thin
from adpretrain.training.cache import CachedBatches
from adpretrain.training.dataset import PretrainingSet
from adpretrain.training.objective import Objective, measure_centers
from downstream.detectors import DETECTORS
from downstream.evaluation.comparison import PRETRAINED, SCALED
from downstream.evaluation.few_shot import FeatureSet, encode_samples, measure, score
from downstream.evaluation.networks import Contender, Networks, Remembered
from downstream.evaluation.protocol_options import ProtocolOptions
from downstream.evaluation.protocols import trials
from downstream.evaluation.trial import Settings, run_trial

VARIANTS = Path(__file__).with_suffix(".yaml")
METRICS = ("image_auroc", "pixel_auroc", "aupro")
SHOTS, DRAWS, CACHED, BATCH, TOKENS = 4, 1, 1, 16, 24
NORMALS, DEFECTS = 50, 50  # images of a set, spread evenly over it
MAP_SIDE = 112  # of scored maps; a quarter of the work, and differences between rows hardly change


@dataclass(frozen=True)
class Variant:
    """A row: changes of the paper's settings. ``drawn``: the share of every batch that comes from drawn products."""

    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lr: float = 1e-4
    steps: int = 150
    drawn: float = 0.0


def evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most ``count`` of the samples, evenly over their order."""
    return [samples[round(at)] for at in np.linspace(0, len(samples) - 1, min(count, len(samples)))]


def thinned(samples: Sequence[Sample]) -> list[Sample]:
    """A subset of one set: some normals to learn from, some normals to test, and some defects."""
    train = [samples[index] for index in normals(samples)]
    test = [sample for sample in samples if not sample.anomalous and sample not in train]
    defects = [sample for sample in samples if sample.anomalous]
    return evenly(train, NORMALS) + evenly(test, DEFECTS) + evenly(defects, DEFECTS)


def steps_of(rows: dict[str, list[tuple[int, bool]]], variant: Variant, seed: int) -> Iterator[list[tuple[int, int]]]:
    """(draw, index) pairs of every step, from random sets; half of the images are defective."""
    rng = np.random.default_rng(seed)
    pools = {name: ([i for i, bad in part if bad], [i for i, bad in part if not bad]) for name, part in rows.items()}
    real, drawn = [name for name in pools if name != "drawn"], [name for name in pools if name == "drawn"]
    for step in range(variant.steps):
        names = [str(name) for name in rng.choice(real, BATCH)] if real else drawn * BATCH
        if drawn and real:
            names = [
                "drawn" if from_drawn else name
                for name, from_drawn in zip(names, rng.random(BATCH) < variant.drawn, strict=True)
            ]
        chosen = [pools[name][number % 2] for number, name in enumerate(names)]
        yield [(step, int(rng.choice(pool))) for pool in chosen]


def train(
    extractor: ADExtractor, cache: CachedBatches, rows: dict[str, list[tuple[int, bool]]], variant: Variant, seed: int
) -> ADExtractor:
    """A projector trained on the rows of the cache: batch -> residuals -> projector -> losses -> step."""
    torch.manual_seed(seed)
    projector = FeatureProjector(extractor.channels, variant.projector)
    trained = ADExtractor(extractor.backbone, projector, extractor.local_scale)
    good = [(0, index) for part in rows.values() for index, bad in part if not bad]
    measure_centers(trained, cache([good[start : start + BATCH] for start in range(0, len(good), BATCH)]))
    objective = Objective(variant.loss, trained)
    optimizer = torch.optim.Adam(projector.parameters(), lr=variant.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.7 * variant.steps), int(0.9 * variant.steps)])
    projector.train()
    for batch in cache(steps_of(rows, variant, seed)):
        labelled = thin(label(batch), batch.keys, TOKENS, seed)
        together: FeatureMaps = projector([torch.cat(level) for level in zip(*labelled.views, strict=True)])
        views = [list(view) for view in zip(*(level.chunk(2) for level in together), strict=True)]
        losses = objective(views, labelled)
        losses.share.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    losses.values()  # raises if one was not finite
    return trained.eval()


def gains(trained: ADExtractor, images: FeatureSet, detector: str) -> list[float]:
    """Metrics with the projector minus those without, in points, mean over draws of the references."""
    found = []
    for trial in trials(images.samples, ProtocolOptions("few-shot", shots=(SHOTS,), draws=DRAWS)):
        if detector == "featurenorm":  # reuses the features
            both = score_both(trained, images, trial.draw)
        else:
            networks = Networks(trained.backbone, (trained,))
            rows = (Contender(detector, SCALED), Contender(detector, PRETRAINED))
            both = [run_trial(trial, row, networks, Settings(pictures=0))[0]["metrics"] for row in rows]
        without, with_ = (np.array([metrics[name] for name in METRICS], float) for metrics in both)  # None is nan
        found.append(100 * (with_ - without))
    return np.mean(found, 0).tolist()


def score_both(trained: ADExtractor, images: FeatureSet, draw: int) -> list[dict[str, Any]]:
    """Metrics of FeatureNorm without and with the projector."""
    references, queries = draw_shots(images.samples, SHOTS, seed=draw)
    both = score([trained.without_projector(), trained], images, references, queries, MAP_SIDE)
    return [asdict(measure(prediction, images, queries)) for prediction in both]


def coarse(images: FeatureSet) -> FeatureSet:
    """The same photographs with masks of the maps' size, marked if any of their pixels is."""
    masks = torch.nn.functional.adaptive_max_pool2d(images.masks[:, None].float(), MAP_SIDE)[:, 0] > 0
    return FeatureSet(images.samples, images.features, masks)


def run_fold(
    extractor: ADExtractor,
    cache: CachedBatches,
    sets: dict[str, FeatureSet],
    left_out: str,
    variant: Variant,
    seed: int,
    detector: str,
) -> dict[str, list[float]]:
    """Train on all sets but one; returns the gains on that set and on those that are never trained on."""
    rows: dict[str, list[tuple[int, bool]]] = {}
    for index, sample in enumerate(cache.data.samples):
        name = owner(sample, sets)
        wanted = name != left_out and (name != "drawn" or variant.drawn > 0) and (name == "drawn" or variant.drawn < 1)
        if wanted:
            rows.setdefault(name, []).append((index, sample.anomalous))
    trained = train(extractor, cache, rows, variant, seed)
    never = [name for name, images in sets.items() if not trainable(images.samples)]
    return {name: gains(trained, sets[name], detector) for name in [left_out, *never]}


def owner(sample: Sample, sets: dict[str, FeatureSet]) -> str:
    """The set of a training sample; "drawn" if it belongs to none."""
    return next((name for name, images in sets.items() if sample in images.samples), "drawn")


def trainable(samples: Sequence[Sample]) -> bool:
    """Whether every defect has a mask."""
    return all(sample.mask is not None for sample in samples if sample.anomalous)


def table(variants: dict[str, Variant], results: dict[str, dict[str, list[float]]], folds: Sequence[str]) -> str:
    """Markdown: a line for every variant, gains in points as image AUROC / pixel AUROC / AUPRO."""
    lines = [
        "| variant | seeds | left-out sets, mean ± std over seeds | " + " | ".join(folds) + " | never trained on |"
    ]
    lines.append("| --- " * (len(folds) + 4) + "|")
    for name in variants:
        seeds = sorted({int(key.rsplit("/", 1)[1]) for key in results if key.startswith(f"{name}/")})
        if not seeds:
            continue
        left = np.array([[results[f"{name}/{fold}/{seed}"][fold] for fold in folds] for seed in seeds])  # [S, F, 3]
        others = [
            values
            for key, found in results.items()
            if key.startswith(f"{name}/")
            for own, values in found.items()
            if own != key.split("/")[1]
        ]
        mean, spread = np.nanmean(left, (0, 1)), np.nanmean(left, 1).std(0, ddof=1 if len(seeds) > 1 else 0)
        cells = [" / ".join(f"{a:+.1f} ± {b:.1f}" for a, b in zip(mean, spread, strict=True))]
        cells += [" / ".join(f"{value:+.1f}" for value in fold) for fold in left.mean(0).round(1)]
        cells.append(f"{np.mean([values[0] for values in others]):+.1f}" if others else "")
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Options:
    """Options of the study.

    Args:
        sets: folders of data sets, one product each.
        products: names of the products to take (all by default).
        drawn: a set of drawn products, for variants that use them.
        variants: YAML file of the variants.
        only: names of the variants to run (all by default).
        detector: name of the detector that is fitted on the features.
        seeds: number of runs of every variant and fold.
        out: folder of results.json and table.md.
    """

    sets: list[Path]
    products: list[str] = field(default_factory=list)
    drawn: Path | None = None
    variants: Path = VARIANTS
    only: list[str] = field(default_factory=list)
    detector: str = "featurenorm"
    seeds: int = 3
    out: Path = Path("runs/carry-over")


def products(folders: Sequence[Path], chosen: Sequence[str]) -> dict[str, list[Sample]]:
    """Thinned samples by category."""
    found: dict[str, list[Sample]] = {}
    for folder in folders:
        if folder.is_dir():
            for sample in index_with_bare("auto", folder)[0]:
                found.setdefault(sample.category, []).append(sample)
    return {name: thinned(samples) for name, samples in found.items() if not chosen or name in chosen}


def main() -> None:
    options, console = parse_flags(Options, description=__doc__), Console(stderr=True)
    if options.detector not in DETECTORS:
        sys.exit(f"error: --detector {options.detector} is unknown; choose one of {', '.join(DETECTORS)}")
    variants = {
        str(name): from_dict(Variant, keys, f"{options.variants}, {name}")
        for name, keys in read_yaml(str(options.variants)).items()
        if not options.only or name in options.only
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    extractor = ADExtractor.from_pretrained("embedded")
    Remembered(extractor.backbone)
    samples = products(options.sets, options.products)
    sets = {
        name: coarse(encode_samples(part, extractor.backbone))
        for name, part in track(samples.items(), "features", console=console)
    }
    folds = [name for name, part in samples.items() if trainable(part)]
    learnt = [sample for name in folds for sample in samples[name]]
    if options.drawn:
        learnt += [sample for sample in index_dataset("auto", options.drawn) if sample.view in ("", "C1", None)]
    data = PretrainingSet(learnt, extractor.preprocess, shots=[1, 2, 4], seed=0, augment="once")
    cache = CachedBatches(
        extractor,
        data,
        torch.device("cpu"),
        CACHED,
        str(options.out),
        1,
        lambda items, total: track(items, "residuals", total),
    )
    jobs = [(name, fold, seed) for seed in range(options.seeds) for name in variants for fold in folds]
    for name, fold, seed in track(jobs, "runs", console=console):
        if (key := f"{name}/{fold}/{seed}") in results:
            continue
        results[key] = run_fold(extractor, cache, sets, fold, variants[name], seed, options.detector)
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(results, indent=1))
        console.print(key, {own: [round(value, 1) for value in values] for own, values in results[key].items()})
    settings = "\n".join(f"- {name}: {json.dumps(asdict(variant), default=str)}" for name, variant in variants.items())
    (options.out / "table.md").write_text(f"{table(variants, results, folds)}\n{settings}\n", encoding="utf-8")
    print(table(variants, results, folds))


if __name__ == "__main__":
    main()
