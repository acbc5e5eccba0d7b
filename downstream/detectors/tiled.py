"""Any detector on photographs that have more pixels than a network takes: it is fitted on and scores their tiles.

With positions "local" there is one detector for every place, fitted on the normal tiles of that place: a Gaussian, a
bank or references that know what belongs there. With "global" one detector is fitted on all tiles.

Memory: the fitted detectors; while fitting, one row of tiles of all photographs; while scoring, one row of tiles and
the photograph's map. With local places every photograph is read again for each row.

Shapes: n photographs, H x W their pixels, P places (tiles of a photograph), S side of the network's input, H' x W' the
stitched map.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from adpretrain.progress import Progress
from adpretrain.references import ReferenceBank
from downstream.detector import Detector, Prediction
from downstream.detectors import build_detector
from downstream.detectors.featurenorm import FeatureNorm
from downstream.extracts import device_of, fixed_picture
from downstream.saved import REFERENCES
from downstream.tiles import Box, Tiling

BATCH = 16  # tiles that go through a network at a time


@dataclass(frozen=True)
class TiledConfig:
    """Options of a `Tiled` detector.

    Args:
        tiling: size, overlap and places of the tiles.
        detector: name of the detector that is fitted on tiles.
        options: options that override that detector's defaults.
    """

    tiling: Tiling = field(default_factory=lambda: Tiling(256))
    detector: str = "featurenorm"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tiling.tile:
            raise ValueError("a tiled detector needs the side of its tiles in pixels, such as tiling.tile=256")


DEFAULT = TiledConfig()


class Tiled(Detector):
    """Photographs, uint8 [B, 3, H, W] without any preparation -> tiles -> a detector -> one map for each photograph.

    The score of a photograph is the highest score of its tiles. ``size`` is (W, H) of the photographs it was fitted on,
    which with local places all photographs must have.
    """

    name = "tiled"
    options = TiledConfig
    references_are: ClassVar[Literal["given", "fitted", "chosen"]] = "fitted"

    def __init__(self, extract: Extract, config: TiledConfig = DEFAULT) -> None:
        super().__init__(extract, config)
        preprocess = getattr(extract, "preprocess", None)
        if not isinstance(preprocess, Preprocess):
            raise ValueError("a tiled detector needs an extract that says how its images are prepared (.preprocess)")
        self.preprocess = dataclasses.replace(preprocess, crop_from=None)
        self.size = (0, 0)
        self.places: list[Detector] = []  # P, row by row, or one with positions "global"
        self._one()  # finds wrong options now

    def _one(self, references: ReferenceBank | None = None) -> Detector:
        """An unfitted detector of tiles, on an extractor with these references."""
        extract = self._given
        if references is not None:
            assert isinstance(extract, ADExtractor)
            extract = copy.copy(extract).set_references(references)
        return build_detector(self.config.detector, extract, self.config.options)

    @property
    def tiling(self) -> Tiling:
        """Size, overlap and places of the tiles."""
        tiling: Tiling = self.config.tiling
        return tiling

    @property
    def local(self) -> bool:
        """Whether every place has a detector of its own."""
        return self.tiling.positions == "local"

    def fit(
        self,
        normal_batches: Iterable[Tensor],
        progress: Progress | None = None,
        references: Iterable[Tensor] | None = None,
    ) -> Self:
        """Fit on batches of photographs, uint8 [b, 3, H, W], which are iterated once for every row of tiles.

        ``references``: other photographs, whose tiles become the references of an `ADExtractor` (not for FeatureNorm,
        whose references are what it is fitted on). Raises ValueError if photographs are malformed, smaller than a tile,
        or, with local places, of different sizes.
        """
        first = next(iter(normal_batches), None)
        if first is None:
            raise ValueError("no normal photographs to fit on")
        _check(first)
        self.size, self.places = (int(first.shape[3]), int(first.shape[2])), []
        rows = self.tiling.rows(*self.size)
        total = sum(map(len, rows)) if self.local else 1
        chosen: list[list[Box] | None] = [*rows] if self.local else [None]
        for boxes in chosen:
            normal = self._tiles(normal_batches, boxes)
            given = None if references is None else self._tiles(references, boxes)
            for column in range(len(normal)):
                self.places.append(self._fitted(normal[column], None if given is None else given[column]))
                if progress is not None:
                    progress("fitting the tiles", len(self.places), total)
        self.side = self.preprocess.image_size
        return self

    def _fitted(self, tiles: Tiles, references: Tiles | None) -> Detector:
        if references is None:
            return self._one().fit(tiles)
        assert isinstance(self._given, ADExtractor)
        parts = [self._given.encode(batch) for batch in references]
        return self._one(self._given.bank_of([torch.cat(level) for level in zip(*parts, strict=True)])).fit(tiles)

    def _tiles(self, photographs: Iterable[Tensor], boxes: Sequence[Box] | None) -> list[Tiles]:
        """The tiles of a row, for each of its places those of all photographs; without ``boxes`` all tiles together."""
        cut: list[list[Tensor]] = [[] for _ in range(1 if boxes is None else len(boxes))]
        for batch in photographs:
            _check(batch)
            self._check_size(batch)
            for photograph in batch:
                if boxes is None:
                    cut[0] += [_crop(photograph, box) for row in self._rows(photograph) for box in row]
                else:
                    for place, box in zip(cut, boxes, strict=True):
                        place.append(_crop(photograph, box))
        return [Tiles(place, self.preprocess, device_of(self._given)) for place in cut]

    def _rows(self, photograph: Tensor) -> list[list[Box]]:
        return self.tiling.rows(photograph.shape[2], photograph.shape[1])

    def _check_size(self, photographs: Tensor) -> None:
        width, height = self.size
        if self.local and photographs.shape[2:] != (height, width):
            raise ValueError(
                f"a photograph of {photographs.shape[3]}x{photographs.shape[2]} pixels, but the normal ones have "
                f"{width}x{height}: with --positions local every photograph must have the same size; choose global"
            )

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """uint8 [B, 3, H, W] -> scores [B], maps [B, H', W']. Errors as in `fit`, and ValueError before it."""
        self.check_fitted()
        _check(images)
        self._check_size(images)
        scores, maps = zip(*map(self._photograph, images), strict=True)
        return Prediction(torch.stack(scores), torch.stack(maps))

    def _photograph(self, photograph: Tensor) -> tuple[Tensor, Tensor]:
        place, stitched, highest = 0, None, -math.inf
        for boxes in self._rows(photograph):
            tiles = Tiles([_crop(photograph, box) for box in boxes], self.preprocess, device_of(self._given))
            for number, prediction in enumerate(self._row(tiles, place)):
                if stitched is None:
                    stitched = Stitched(self.tiling, photograph.shape[2], photograph.shape[1], prediction.maps.shape[1])
                stitched.add(boxes[number], prediction.maps[0])
                highest = max(highest, float(prediction.scores[0]))
            place += len(boxes)
        assert stitched is not None
        return torch.tensor(highest), stitched.map()

    def _row(self, tiles: Tiles, place: int) -> Iterator[Prediction]:
        """The predictions of the tiles of a row, whose first has the number ``place``, one by one."""
        for batch in tiles:
            if self.local:
                yield from (self.places[place + i].predict(batch[i : i + 1]) for i in range(len(batch)))
                place += len(batch)
            else:
                found = self.places[0].predict(batch)
                yield from (Prediction(*one) for one in zip(found.scores.split(1), found.maps.split(1), strict=True))

    def leave_one_out(self) -> Prediction:
        """Score each of the K photographs it was fitted on against the other K - 1, as if it were new.

        Raises ValueError if K < 2, or if the detector of the tiles is not FeatureNorm.
        """
        rows = self.tiling.rows(*self.size)
        found = self._left_out(sum(map(len, rows)))
        scores_K, stitched = torch.empty(0), list[Stitched]()
        for box in (box for row in rows for box in row):
            one = next(found)
            stitched = stitched or [Stitched(self.tiling, *self.size, one.maps.shape[1]) for _ in one.maps]
            for whole, map_SS in zip(stitched, one.maps, strict=True):
                whole.add(box, map_SS)
            scores_K = torch.maximum(scores_K, one.scores.cpu()) if len(scores_K) else one.scores.cpu()
        return Prediction(scores_K, torch.stack([whole.map() for whole in stitched]))

    def _left_out(self, places: int) -> Iterator[Prediction]:
        """For every place, the predictions of the K photographs' tiles there, each without its own photograph."""
        for detector in self.places:
            if not isinstance(detector, FeatureNorm) or not isinstance(detector.extract, ADExtractor):
                raise ValueError(f"leave-one-out needs featurenorm on an extractor, not {self.config.detector}")
            if self.local:
                yield detector.leave_one_out()
                continue
            bank = detector.extract.references
            assert bank is not None
            found, features = [list[Prediction]() for _ in range(places)], bank.photographs()
            for first in range(0, bank.shots, places):  # the tiles of one photograph
                others = bank.without(range(first, first + places))
                for number, tile in enumerate(found, start=first):
                    encoded = [level[number : number + 1] for level in features]
                    tile.append(detector.from_features(detector.extract.from_encoded(encoded, others)))
            for tile in found:
                scores, maps = zip(*((one.scores, one.maps) for one in tile), strict=True)
                yield Prediction(torch.cat(scores), torch.cat(maps))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state of every place, and the references there, which are FEATURES OF THE PRODUCT."""
        tensors, facts = dict[str, Tensor](), list[dict[str, Any]]()
        for number, place in enumerate(self.places):
            own, told = place.state()
            if isinstance(place.extract, ADExtractor) and place.extract.references is not None:
                own |= {f"{REFERENCES}{i}": level for i, level in enumerate(place.extract.references.levels)}
            tensors |= {f"place.{number}.{name}": value for name, value in own.items()}
            facts.append(told)
        return tensors, {"size": list(self.size), "places": facts}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore every place."""
        self.size = (int(facts["size"][0]), int(facts["size"][1]))
        for number, told in enumerate(facts["places"]):
            mark = f"place.{number}."
            own = {name.removeprefix(mark): value for name, value in tensors.items() if name.startswith(mark)}
            levels = [own.pop(name) for name in sorted(own) if name.startswith(REFERENCES)]
            place = self._one(ReferenceBank(levels, self._grids()) if levels else None)
            place.restore(own, told)
            place.side = self.side
            self.places.append(place)

    def _grids(self) -> list[tuple[int, int]]:
        """H_l x W_l tokens of a tile on every level of an extractor."""
        assert isinstance(self._given, ADExtractor)
        features = self._given.encode(fixed_picture(self.preprocess.image_size, device_of(self._given)))
        return [(level.shape[2], level.shape[3]) for level in features]

    def _try(self, device: torch.device) -> None:
        self.places[0].predict(fixed_picture(self.side, device))


class Stitched:
    """The map of a photograph of ``width`` x ``height`` pixels, made of the maps [S, S] of its tiles.

    It has S cells for the side of a tile: [H', W'] with H' = height S / tile. Where tiles overlap it is their average,
    weighted by the distance from the border of each, where the network sees only one side: there are no seams.
    """

    def __init__(self, tiling: Tiling, width: int, height: int, side: int) -> None:
        self.zoom = side / tiling.tile  # map cells for a pixel of the photograph
        shape = max(side, round(height * self.zoom)), max(side, round(width * self.zoom))
        self.total, self.weight = torch.zeros(shape), torch.zeros(shape)
        ramp = ((torch.arange(side) + 0.5) / max(1.0, tiling.overlap * side)).clamp_max(1.0)
        ramp = torch.minimum(ramp, ramp.flip(0))
        self.ramp_SS = ramp[:, None] * ramp

    def add(self, box: Box, map_SS: Tensor) -> None:
        """Add the map of the tile at ``box``; cells that are NaN do not count."""
        side, (height, width) = len(self.ramp_SS), self.total.shape
        top, left = min(round(box[1] * self.zoom), height - side), min(round(box[0] * self.zoom), width - side)
        at = slice(top, top + side), slice(left, left + side)
        map_SS = map_SS.float().cpu()
        weight_SS = self.ramp_SS * ~map_SS.isnan()
        self.total[at] += map_SS.nan_to_num(0.0) * weight_SS
        self.weight[at] += weight_SS

    def map(self) -> Tensor:
        """The map [H', W']; NaN where no tile was added."""
        return self.total / self.weight


class Tiles:
    """Batches [b, 3, S, S], prepared for the network, of tiles, each uint8 [3, tile, tile]."""

    def __init__(self, tiles: Sequence[Tensor], preprocess: Preprocess, device: torch.device) -> None:
        self.tiles, self.preprocess, self.device = tiles, preprocess, device

    def __len__(self) -> int:
        return -(-len(self.tiles) // BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.tiles), BATCH):
            some = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in self.tiles[start : start + BATCH]]
            yield torch.stack([self.preprocess(tile) for tile in some]).to(self.device)


def _crop(photograph: Tensor, box: Box) -> Tensor:
    """The tile at ``box``, a copy, so that the photograph's memory can be freed."""
    left, top, right, bottom = box
    return photograph[:, top:bottom, left:right].contiguous()


def _check(photographs: Tensor) -> None:
    if photographs.ndim != 4 or photographs.shape[1] != 3 or photographs.dtype != torch.uint8 or not len(photographs):
        raise ValueError(
            f"photographs to be cut into tiles must be uint8 [B, 3, H, W], as they were taken, got "
            f"{tuple(photographs.shape)} of {photographs.dtype}"
        )
