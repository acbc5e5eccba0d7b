"""The search for the embedded extractor's settings: strength of the local scale, weights of the levels, scoring.

  python recipes/studies/choose_embedded.py --sets ../shared/data/mtd ../shared/data/board/* data/elpv --out search.csv

The sets are split into two halves by their origin. On each half the search finds the settings with the best mean of
image AUROC, pixel AUROC and AUPRO (those that a set has), with K = 4 and three draws of references, and reports their
result on the other half, which had no part in the choice. Every row of the search goes into the CSV file.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from carry_over import MAP_SIDE, METRICS, coarse, products
from rich.console import Console
from rich.progress import track
from torch import Tensor

from adpretrain import load_backbone
from adpretrain.config import LocalScaleConfig
from adpretrain.data.products import draw_shots
from adpretrain.files import atomic_path
from adpretrain.leave_one_out import leave_one_out_residuals
from adpretrain.local_scale import LocalScale
from adpretrain.parsing import parse_flags
from adpretrain.residual import nearest_reference, tokens
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.evaluation.few_shot import FeatureSet, encode_samples, measure

HALVES = (
    ("tile", "mono", "poly", "mpdd_metal_plate"),
    ("mvtec_bottle", "mvtec_metal_nut", "kolektorsdd", "cookies_aws"),
)
SHOTS, DRAWS = 4, 3
PATCHES = ((1, 1, 1), (1, 1, 3), (3, 3, 3))  # for strides 4 (averaged down to 8), 8 and 16
SHARES = (0.0, 0.2, 0.35, 0.5)
WEIGHTS = ((0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.5, 1.0, 2.0))
TOPS = (0.0, 0.01, 0.03)
NAMES = ("patch", "share", "weights", "top")
SETTINGS = list(itertools.product(PATCHES, SHARES, WEIGHTS, TOPS))


@dataclass(frozen=True)
class Options:
    """Options of the search.

    Args:
        sets: folders of data sets.
        out: CSV file with a row for every setting and set.
    """

    sets: list[Path]
    out: Path


def norms(images: FeatureSet, references: list[int], queries: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per level: residual norms [n, H, W], the matched rows [n, H, W], leave-one-out norms of the bank [N]."""
    for level in images.features:
        bank = tokens(level[references]).flatten(0, 1)[None]
        query_BTC, grid = tokens(level[queries]), level.shape[2:]
        matched_BT = nearest_reference(query_BTC, bank)
        norm_BT = (query_BTC - bank[0][matched_BT]).norm(dim=2)
        own_N = leave_one_out_residuals(bank, len(references))[0].norm(dim=1)
        yield norm_BT.unflatten(1, grid), matched_BT.unflatten(1, grid), own_N


def scored(images: FeatureSet, draw: int) -> np.ndarray:
    """Metrics on one set with one draw of references, in %: [settings of one PATCHES, metrics]."""
    references, queries = draw_shots(images.samples, SHOTS, seed=draw)
    found = list(norms(images, references, queries))
    scaled: dict[float, list[Tensor]] = {}
    for share in SHARES:
        rule = LocalScale(1, LocalScaleConfig(share))
        sizes = [rule.smoothed(own[None], *matched.shape[1:])[0] for _, matched, own in found]
        scaled[share] = [norm / size[matched] for (norm, matched, _), size in zip(found, sizes, strict=True)]
    rows = []
    for share, weights, top in itertools.product(SHARES, WEIGHTS, TOPS):
        detector = FeatureNorm(
            lambda batch: [batch], FeatureNormConfig(image_size=MAP_SIDE, sigma=4 * MAP_SIDE / 224, top=top)
        )
        levels = [level[:, None] * weight for level, weight in zip(scaled[share], weights, strict=True)]
        metrics = measure(detector.from_features(levels), images, queries)
        rows.append([100 * getattr(metrics, metric) for metric in METRICS])
    return np.array(rows)


def describe(setting: tuple[object, ...]) -> dict[str, object]:
    return dict(zip(NAMES, setting, strict=True))


def main() -> None:
    options, console = parse_flags(Options, description=__doc__), Console(stderr=True)
    results: dict[str, np.ndarray] = {}
    for name, samples in track(products(options.sets, []).items(), "sets", console=console):
        parts = []
        for patch in PATCHES:
            backbone = load_backbone("lite0", levels=[1, 2, 3], finest=8, patch=patch)
            images = coarse(encode_samples(samples, backbone))
            parts.append(np.mean([scored(images, draw) for draw in range(DRAWS)], 0))
        results[name] = np.concatenate(parts)
    with atomic_path(options.out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["set", *NAMES, *METRICS])
        for name, rows in results.items():
            for setting, row in zip(SETTINGS, rows, strict=True):
                writer.writerow([name, *describe(setting).values(), *(f"{value:.2f}" for value in row)])
    means = {name: np.nanmean(rows, 1) for name, rows in results.items()}  # [settings] of each set
    for number, half in enumerate(HALVES):
        own, other = ([name for name in results if (name in half) == inside] for inside in (True, False))
        if not own or not other:
            continue
        best = int(np.mean([means[name] for name in own], 0).argmax())
        reached = np.nanmean([results[name][best] for name in other], 0)
        print(f"chosen on half {number + 1} ({', '.join(own)}): {describe(SETTINGS[best])}")
        print(f"  on the other half: {' / '.join(f'{value:.1f}' for value in reached)}")
    overall = np.mean(list(means.values()), 0)
    for place in np.argsort(-overall)[:10]:
        reached = np.nanmean([rows[place] for rows in results.values()], 0)
        print(f"{describe(SETTINGS[int(place)])}: {' / '.join(f'{value:.2f}' for value in reached)}")


if __name__ == "__main__":
    main()
