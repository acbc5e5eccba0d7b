"""Run one detector on one trial: it is fitted and scored in batches streamed from disk, and measured per product.

Shapes: b images of a batch, S side in pixels, n images to score.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpretrain.data import ImageDataset, Sample
from adpretrain.data.products import about_bare, about_inverted
from adpretrain.preprocess import Preprocess
from adpretrain.references import TooFewImages
from downstream.detector import Detector
from downstream.detectors import build_detector
from downstream.detectors.aligned import AlignedFeatureNormConfig
from downstream.detectors.featurenorm import FeatureNorm
from downstream.detectors.glass import GLASS
from downstream.detectors.refined import Refined
from downstream.evaluation.comparison import RAW
from downstream.evaluation.few_shot import PIXEL_METRICS
from downstream.evaluation.means import COUNTS, TITLES
from downstream.evaluation.measured import finite, measured_at_once, measured_in_stream
from downstream.evaluation.networks import ALIGNED, ROOM, UNKNOWN, Contender, Networks, Withheld
from downstream.evaluation.perturbations import Change
from downstream.evaluation.pictures import Shown, choose_shown, median_images
from downstream.evaluation.protocols import Part, Trial
from downstream.metrics import d_prime, errors_at_best_f1
from downstream.streamed_metrics import StreamingMetrics

TIMED = 4  # photographs that are scored alone, to measure how long one takes
WHOLE = 150_000_000  # a product whose maps have more pixels is measured in a stream; others are measured at once
OWN = "one detector for all products, but every image is compared with references of its own product"
UNDRAWN = "this detector chooses its references itself: draws would change nothing, so there is only one"
ALONE = "the only reference is compared with itself: fitted on residuals of zero"


class PhotographCache:
    """A cache of up to ``room`` bytes of images and masks, because detectors, features and draws use the same ones."""

    def __init__(self, room: int = ROOM) -> None:
        self.room, self._held = room, 0
        self._items: dict[Any, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        """Empty the cache, before another product."""
        self._items, self._held = {}, 0

    def read(self, data: ImageDataset, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the image [3, S, S] and the mask [S, S] of every sample, in order."""
        keys = [(sample, data.preprocess) for sample in data.samples]
        missing = [index for index, key in enumerate(keys) if key not in self._items]
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, missing), batch_size, num_workers=workers)
        fresh = (pair for batch in loader for pair in zip(batch["image"], batch["mask"], strict=True))
        new = {keys[index] for index in missing}
        for key in keys:
            image, mask = next(fresh) if key in new else self._items[key]
            if key in new and self._held + image.nbytes + mask.nbytes <= self.room:
                self._items[key] = image.clone(), mask.clone()
                self._held += image.nbytes + mask.nbytes
            yield image, mask


@dataclass(frozen=True)
class Settings:
    """How trials are run: settings and options of detectors, how images are read, and what is kept besides metrics:
    ``pictures`` (how many kinds of defects), ``panels`` of median-scored images, metrics ``per_defect``."""

    settings: str = "default"
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_size: int = 8
    workers: int = 0
    device: str = "cpu"
    pictures: int = 2
    panels: bool = False
    per_defect: bool = False
    photographs: PhotographCache = field(default_factory=lambda: PhotographCache(0))


class Images:
    """Batches [b, 3, S, S] of samples on the device; can be iterated several times.

    ``perturbed`` says how images and masks are changed after they are read, so that a photograph is read once for all
    changes; None leaves them as they are.
    """

    def __init__(
        self, samples: Sequence[Sample], preprocess: Preprocess, settings: Settings, perturbed: Change | None = None
    ) -> None:
        self._settings, self._data = settings, ImageDataset(samples, preprocess)
        self._perturbed = perturbed

    def __len__(self) -> int:
        return -(-len(self._data) // self._settings.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.with_masks():
            yield images

    def with_masks(self) -> Iterator[tuple[Tensor, NDArray[np.bool_]]]:
        """Yield batches and their masks, bool [b, S, S]."""
        size = self._settings.batch_size
        rows = self._changed(self._settings.photographs.read(self._data, size, self._settings.workers))
        while batch := list(islice(rows, size)):
            images, masks = zip(*batch, strict=True)
            yield torch.stack(images).to(self._settings.device), torch.stack(masks).numpy()

    def _changed(self, rows: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        if self._perturbed is None:
            yield from rows
            return
        for index, (image, mask) in enumerate(rows):
            change = self._perturbed.of(index)
            yield change.network_input(image, self._data.preprocess), change.mask(mask)


class Training:
    """Batches of the training images of all parts. Before each product, the references of that product are set, and its
    images stay with them."""

    def __init__(self, parts: Sequence[Part], extract: Any, preprocess: Preprocess, settings: Settings) -> None:
        self.parts, self.extract, self.preprocess, self.settings = parts, extract, preprocess, settings
        self._batches = [Images(part.train, preprocess, settings) for part in parts]

    def __len__(self) -> int:
        return sum(len(batches) for batches in self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        several = len(self.parts) > 1 and isinstance(self.extract, Withheld)
        for part, batches in zip(self.parts, self._batches, strict=True):
            give_references(self.extract, part, self.settings)
            for images in batches:
                if several:
                    self.extract.keep_references_of(images)
                yield images
        if several:
            self.extract.refuse_others()


def give_references(extract: Any, part: Part, settings: Settings) -> None:
    """Set the references of a part, if the features need any."""
    if isinstance(extract, Withheld):
        extract.set_references(torch.cat(list(Images(part.references, extract.preprocess, settings))))


def run_trial(trial: Trial, contender: Contender, networks: Networks, settings: Settings) -> list[dict[str, Any]]:
    """Fit a detector once, score every part, and return a record for each, ready for JSON. Undefined metrics are null:
    all of them if there are too few training images for the detector, pixel metrics if a defect has no mask.

    Raises ValueError for wrong options, a detector that does not fit the trial, or an unreadable photograph.
    """
    extract, preprocess = networks.extract(contender), networks.backbone.preprocess
    options, adapted = _options(trial, contender, settings)
    detector = build_detector(contender.detector, extract, options, settings.settings)
    if len(trial.parts) > 1 and isinstance(extract, Withheld) and isinstance(detector, Refined | GLASS):
        raise ValueError(f"{contender}: {UNKNOWN}")
    began = time.perf_counter()
    try:
        detector.fit(Training(trial.parts, extract, preprocess, settings))
    except TooFewImages as error:  # the other detectors can go on
        return [_unfitted(trial, part, contender, str(error)) for part in trial.parts]
    fitted = time.perf_counter() - began
    records = []
    for part in trial.parts:
        give_references(extract, part, settings)
        if isinstance(extract, Withheld):
            extract.compare_with_all()
        began = time.perf_counter()
        images = Images(part.test, preprocess, settings, part.perturbed)
        scored = _scored(detector, part, images, settings, preprocess)
        records.append(
            {
                **_heading(trial, part, contender),
                **scored,
                "notes": [*part.notes, *adapted, *_about_references(trial, part, contender), *scored["notes"]],
                "trained_on": sum(len(each.train) for each in trial.parts),
                "seconds": {"fit": round(fitted, 3), "score": round(time.perf_counter() - began, 3)},
                "latency": _latency(detector, images) if trial.draw == 0 else None,
            }
        )
    return records


def _latency(detector: Detector, images: Images) -> float:
    """Return the seconds in which one photograph is scored alone, network included: the least of a few.

    Each is a little changed, so that a cache of features does not know it. On a CPU that others use too, a process
    waits for its turn: there its own CPU time counts, if that is less.
    """
    first = next(iter(images))[:1]
    found = []
    for number in range(1, TIMED + 1):
        changed = first + 1e-3 * number
        began, used = time.perf_counter(), time.process_time()
        detector.predict(changed).scores.tolist()  # waits for the device
        passed, used = time.perf_counter() - began, time.process_time() - used
        found.append(min(passed, used) if first.device.type == "cpu" else passed)
    return round(min(found), 5)


def _options(trial: Trial, contender: Contender, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """Return the options of the detector, and a note if its aligned references are reduced to the number of training
    images."""
    options = settings.options.get(contender.detector, {})
    pool = sum(len(part.train) for part in trial.parts)
    if contender.detector != ALIGNED or options.get("shots", AlignedFeatureNormConfig.shots) <= pool:
        return options, []
    return {**options, "shots": pool}, [f"{pool} aligned references: there are no more training images"]


def _heading(trial: Trial, part: Part, contender: Contender) -> dict[str, Any]:
    """Return the entries of a record that say what was measured."""
    own = {"product": part.product, "category": part.test[0].category}
    return {**own, "setting": trial.setting, "draw": trial.draw, **asdict(contender)}


def _about_references(trial: Trial, part: Part, contender: Contender) -> list[str]:
    """Return notes about the references for the reader of the tables."""
    if contender.features == RAW:
        return []
    if contender.detector == ALIGNED:
        return [UNDRAWN] if trial.setting == "reference-sensitivity" else []
    own = [*part.reference_notes, *([OWN] if len(trial.parts) > 1 else [])]
    return own + ([ALONE] if len(part.references) == 1 and contender.detector != FeatureNorm.name else [])


def _unfitted(trial: Trial, part: Part, contender: Contender, reason: str) -> dict[str, Any]:
    """Return a record without metrics, for a detector that could not be fitted because there are too few images."""
    return {
        **_heading(trial, part, contender),
        "metrics": dict.fromkeys(TITLES),
        "scores": [],
        "labels": [],
        "pro": None,
        "shown": Shown([]),
        "notes": [*part.notes, f"{contender}, not fitted: {reason}"],
        "trained_on": sum(len(each.train) for each in trial.parts),
        "seconds": {"fit": 0.0, "score": 0.0},
        "latency": None,
    }


def _scored(detector: Any, part: Part, images: Images, settings: Settings, preprocess: Preprocess) -> dict[str, Any]:
    """Score a part; return metrics (under "defects" also those of every kind of defect), image scores, the PRO curve
    and, under "shown", the maps to show (`Shown`)."""
    labels = np.array([sample.anomalous for sample in part.test])
    streaming = StreamingMetrics() if len(labels) * preprocess.image_size**2 > WHOLE else None
    # The map of a perturbed image would not match its photograph.
    shown = Shown(choose_shown(part.test, settings.pictures) if part.perturbed is None else [])
    maps, masks, scores, shares = [], [], [], []
    done = 0
    for batch, mask in images.with_masks():
        with torch.no_grad():
            prediction = detector.predict(batch)
        found = prediction.maps.float().cpu().numpy()
        scores.append(prediction.scores.float().cpu().numpy())
        shares += mask.mean(axis=(1, 2)).tolist()
        shown.add(done, found, labels[done : done + len(found)])
        if streaming is not None:
            streaming.add(found, mask, scores[-1], labels[done : done + len(found)])
        else:
            maps.append(found)
            masks.append(mask)
        done += len(found)
    all_scores = np.concatenate(scores)
    out: dict[str, Any] = {"scores": all_scores.tolist(), "labels": labels.astype(int).tolist()}
    if streaming is not None:
        measured = measured_in_stream(streaming, part.test)
    else:
        unchanged = part.perturbed is None
        all_maps, all_masks = np.concatenate(maps), np.concatenate(masks)
        measured = measured_at_once(
            part.test, all_maps, all_masks, all_scores, preprocess, settings.per_defect, unchanged
        )
        if settings.panels and unchanged:
            shown.typical = median_images(part.test, all_scores, all_maps, all_masks)
    values, notes, curve = measured.values, measured.notes, measured.curve
    values["d_prime"] = d_prime(out["scores"], labels)
    values |= dict(zip(COUNTS, errors_at_best_f1(out["scores"], labels) or (None, None), strict=True))
    if doubt := about_inverted(part.test, shares):
        notes.append(doubt)
    if bare := about_bare(part.test):
        notes = [*(note for note in notes if "pixel" not in note), bare]
        values, curve = {**values, **dict.fromkeys((*PIXEL_METRICS, "aupro_official"))}, None
    out |= {"metrics": {name: finite(value) for name, value in values.items()}, "notes": notes}
    out |= {"defects": measured.defects} if measured.defects else {}
    return {**out, "pro": curve, "shown": shown}
