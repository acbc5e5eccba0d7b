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
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
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
from downstream.roi import RegionOfInterest, bank_within
from downstream.saved import REFERENCES
from downstream.tiles import Box, Tiling

Tile = tuple[Box, Tensor | None]  # where it is, and its region of interest [S, S]; None = all of it
SCALES = "scales."  # of each level of the references
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
        self._plan: list[list[Tile]] = []  # the tiles of a photograph of that size
        self._one()  # finds wrong options now

    def _one(self, references: ReferenceBank | None = None) -> Detector:
        """An unfitted detector of tiles, on an extractor with these references."""
        extract = self._given
        if references is not None:
            assert isinstance(extract, ADExtractor)
            extract = copy.copy(extract).set_references(references)
        one = build_detector(self.config.detector, extract, self.config.options)
        one.workplace = None if self.local else self.workplace  # one checkpoint cannot hold those of many places
        return one

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
        roi: Tensor | None = None,
        references: Iterable[Tensor] | None = None,
    ) -> Self:
        """Fit on batches of photographs, uint8 [b, 3, H, W], which are iterated once for every row of tiles.

        ``roi``: the region of interest, bool [H, W], of all photographs, which must then have one size; tiles in which
        it covers half of no cell of the features are left out. ``references``: other photographs, whose tiles become
        the references of an `ADExtractor` (not for FeatureNorm, whose references are what it is fitted on).

        Raises ValueError if photographs are malformed, smaller than a tile or, with local places or a region, of
        different sizes, and if the region fits no tile.
        """
        first = next(iter(normal_batches), None)
        if first is None:
            raise ValueError("no normal photographs to fit on")
        _check(first)
        self.size, self.roi, self.places = (int(first.shape[3]), int(first.shape[2])), roi, []
        self._plan = self._inspected()
        rows = self._plan if self.local else [[tile for row in self._plan for tile in row]]
        total = sum(map(len, rows)) if self.local else 1
        for row in rows:
            normal = self._cut(normal_batches, row)
            given = None if references is None else self._cut(references, row)
            for column, tiles in enumerate(normal):
                self.places.append(self._fitted(tiles, None if given is None else given[column]))
                if progress is not None:
                    progress("fitting the tiles", len(self.places), total)
        self.side = self.preprocess.image_size
        return self

    def _fitted(self, tiles: Tiles, references: Tiles | None) -> Detector:
        roi = tiles.roi
        if roi is not None and self.local:
            roi = roi[0]  # one for all photographs
        if references is None:
            return self._one().fit(tiles, roi=roi)
        assert isinstance(self._given, ADExtractor)
        parts = [self._given.encode(batch) for batch in references]
        bank = self._given.bank_of([torch.cat(level) for level in zip(*parts, strict=True)])
        return self._one(bank).fit(tiles, roi=roi)

    def _inspected(self) -> list[list[Tile]]:
        """The tiles of a photograph of the fitted size, row by row, without those outside the region of interest."""
        (width, height), roi = self.size, self.roi
        rows = self.tiling.rows(width, height)
        if roi is None:
            return [[(box, None) for box in row] for row in rows]
        if roi.dtype != torch.bool or roi.shape != (height, width):
            raise ValueError(
                f"the region of interest of tiled photographs must be one bool tensor [H, W] for all, {height} x "
                f"{width} pixels, got {tuple(roi.shape)} of {roi.dtype}"
            )
        grids, plan = self._grids(), list[list[Tile]]()
        for row in rows:
            masks = [self.preprocess.mask(Image.fromarray(_crop(roi[None], box)[0].numpy())) for box in row]
            plan.append([(box, mask) for box, mask in zip(row, masks, strict=True) if _covers(mask, grids)])
        if not any(plan):
            raise ValueError("the region of interest covers half of no cell of the features in any tile: enlarge it")
        return [row for row in plan if row]

    def _cut(self, photographs: Iterable[Tensor], row: Sequence[Tile]) -> list[Tiles]:
        """For each place of a row the tiles of all photographs; with global places, all tiles together."""
        cut: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in (row if self.local else [None])]
        for batch in photographs:
            _check(batch)
            self._check_size(batch)
            for photograph in batch:
                tiles = row if self.local or self.roi is not None else list(chain(*self._tiles_of(photograph)))
                for place, (box, mask) in enumerate(tiles):
                    cut[place if self.local else 0].append((_crop(photograph, box), mask))
        return [Tiles(place, self.preprocess, device_of(self._given)) for place in cut]

    def _tiles_of(self, photograph: Tensor) -> list[list[Tile]]:
        if self.local or self.roi is not None:
            return self._plan
        return [[(box, None) for box in row] for row in self.tiling.rows(photograph.shape[2], photograph.shape[1])]

    def _check_size(self, photographs: Tensor) -> None:
        width, height = self.size
        if (self.local or self.roi is not None) and photographs.shape[2:] != (height, width):
            why = "with --positions local" if self.local else "with a region of interest"
            raise ValueError(
                f"a photograph of {photographs.shape[3]}x{photographs.shape[2]} pixels, but the normal ones have "
                f"{width}x{height}: {why} every photograph must have the same size"
            )

    @torch.no_grad()
    def predict(self, images: Tensor, roi: Tensor | None = None) -> Prediction:
        """uint8 [B, 3, H, W] -> scores [B], maps [B, H', W'], NaN outside the region of interest of `fit`.

        Errors as in `fit`; ValueError before it, and for another region, ``roi``.
        """
        self.check_fitted()
        _check(images)
        self._check_size(images)
        if roi is not None and (self.roi is None or not torch.equal(roi, self.roi)):
            raise ValueError("tiles have the region of interest they were fitted with: give it to fit, not to predict")
        scores, maps = zip(*map(self._photograph, images), strict=True)
        return Prediction(torch.stack(scores), torch.stack(maps))

    def _photograph(self, photograph: Tensor) -> tuple[Tensor, Tensor]:
        place, stitched, highest = 0, None, -math.inf
        for row in self._tiles_of(photograph):
            cut = [(_crop(photograph, box), mask) for box, mask in row]
            tiles = Tiles(cut, self.preprocess, device_of(self._given))
            for (box, _), one in zip(row, self._row(tiles, place), strict=True):
                if stitched is None:
                    stitched = Stitched(self.tiling, photograph.shape[2], photograph.shape[1], one.maps)
                stitched.add(box, one.maps)
                highest = max(highest, float(one.scores[0]))
            place += len(row)
        assert stitched is not None
        return torch.tensor(highest), stitched.maps()[0]

    def _row(self, tiles: Tiles, place: int) -> Iterator[Prediction]:
        """The predictions of the tiles of a row, whose first has the number ``place``, one by one."""
        done = 0
        for batch in tiles:
            if self.local:
                yield from (self.places[place + done + i].predict(batch[i : i + 1]) for i in range(len(batch)))
            else:
                roi = None if tiles.roi is None else tiles.roi[done : done + len(batch)]
                found = self.places[0].predict(batch, roi)
                yield from (Prediction(*one) for one in zip(found.scores.split(1), found.maps.split(1), strict=True))
            done += len(batch)

    def of_tiles(self) -> Detector:
        """The detector of all tiles. Raises ValueError with local places, where every place has one of its own."""
        if self.local:
            raise ValueError(
                f"tiles are compared with the same place, by {len(self.places)} detectors, but one is exported: fit "
                "with --positions global"
            )
        return self.places[0]

    def tiles(self, photograph: Tensor) -> Tiles:
        """All tiles of a photograph, uint8 [3, H, W], prepared for the network."""
        cut = [(_crop(photograph, box), mask) for box, mask in chain(*self._tiles_of(photograph))]
        return Tiles(cut, self.preprocess, device_of(self._given))

    def leave_one_out(self) -> Prediction:
        """Score each of the K photographs it was fitted on against the other K - 1, as if it were new.

        Raises ValueError if K < 2, or if the detector of the tiles is not FeatureNorm.
        """
        tiles, stitched, scores = list(chain(*self._plan)), None, list[Tensor]()
        for (box, _), one in zip(tiles, self._left_out(tiles), strict=True):
            if stitched is None:
                stitched = Stitched(self.tiling, *self.size, one.maps)
            stitched.add(box, one.maps)
            scores.append(one.scores.cpu())
        assert stitched is not None
        return Prediction(torch.stack(scores).amax(0), stitched.maps())

    def _left_out(self, tiles: Sequence[Tile]) -> Iterator[Prediction]:
        """For every place, the predictions of the K photographs' tiles there, each without its own photograph."""
        for detector in self.places:
            if not isinstance(detector, FeatureNorm) or not isinstance(detector.extract, ADExtractor):
                raise ValueError(f"leave-one-out needs featurenorm on an extractor, not {self.config.detector}")
            if self.local:
                yield detector.leave_one_out()
                continue
            bank = detector.extract.references
            assert bank is not None
            found, features = [list[Prediction]() for _ in tiles], bank.photographs()
            for first in range(0, bank.shots, len(tiles)):  # the tiles of one photograph
                others = bank.without(range(first, first + len(tiles)))
                for number, (_, mask) in enumerate(tiles):
                    encoded = [level[first + number : first + number + 1] for level in features]
                    projected = detector.extract.from_encoded(encoded, others)
                    found[number].append(detector.inside(projected, None if mask is None else RegionOfInterest(mask)))
            for tile in found:
                scores, maps = zip(*((one.scores, one.maps) for one in tile), strict=True)
                yield Prediction(torch.cat(scores), torch.cat(maps))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state of every place, and the references there, which are FEATURES OF THE PRODUCT."""
        tensors, facts = dict[str, Tensor](), list[dict[str, Any]]()
        for number, place in enumerate(self.places):
            own, told = place.state()
            if isinstance(place.extract, ADExtractor) and (bank := place.extract.references) is not None:
                own |= {f"{REFERENCES}{i}": level for i, level in enumerate(bank.levels)}
                own |= {f"{SCALES}{i}": scale for i, scale in enumerate(bank.scales or ())}  # they take long to compute
            tensors |= {f"place.{number}.{name}": value for name, value in own.items()}
            facts.append(told)
        return tensors, {"size": list(self.size), "places": facts}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore every place."""
        self.size = (int(facts["size"][0]), int(facts["size"][1]))
        self._plan = self._inspected()
        masks = [mask for _, mask in chain(*self._plan)]
        for number, told in enumerate(facts["places"]):
            mark = f"place.{number}."
            own = {name.removeprefix(mark): value for name, value in tensors.items() if name.startswith(mark)}
            levels = [own.pop(name) for name in sorted(own) if name.startswith(REFERENCES)]
            scales = [own.pop(name) for name in sorted(own) if name.startswith(SCALES)]
            roi = masks[number] if self.local else None
            if roi is None and masks[0] is not None:  # the tiles of all photographs, one after the other
                roi = torch.stack([mask for mask in masks if mask is not None])
            place = self._one(self._bank(levels, scales, roi) if levels else None)
            place.keep_roi(roi)
            place.restore(own, told)
            place.side = self.side
            self.places.append(place)

    def _bank(self, levels: list[Tensor], scales: list[Tensor], roi: Tensor | None) -> ReferenceBank:
        assert isinstance(self._given, ADExtractor)
        bank = ReferenceBank(levels, self._grids(), self._given.config.matching, self._given.local_scale)
        if roi is not None:
            each = roi if roi.ndim == 2 else roi.repeat(bank.shots // len(roi), 1, 1)
            bank = bank_within(bank, RegionOfInterest(each))
        if scales:
            bank.scales = scales
        return bank

    def _grids(self) -> list[tuple[int, int]]:
        """H_l x W_l tokens of a tile on every level of the features."""
        encode = self._given.encode if isinstance(self._given, ADExtractor) else self._given
        with torch.no_grad():
            features = encode(fixed_picture(self.preprocess.image_size, device_of(self._given)))
        return [(level.shape[2], level.shape[3]) for level in features]

    def _try(self, device: torch.device) -> None:
        self.places[0]._try(device)


def _covers(mask_SS: Tensor, grids: Sequence[tuple[int, int]]) -> bool:
    """Whether a region covers half of a cell on every level."""
    return all(float(F.adaptive_avg_pool2d(mask_SS[None].float(), grid).max()) >= 0.5 for grid in grids)


class Stitched:
    """The maps of photographs of ``width`` x ``height`` pixels, made of the maps [B, S, S] of their tiles, ``like``.

    They have S cells for the side of a tile: [B, H', W'] with H' = height S / tile. Where tiles overlap they are their
    average, weighted by the distance from the border of each, where the network sees only one side: there are no seams.
    """

    def __init__(self, tiling: Tiling, width: int, height: int, like: Tensor) -> None:
        side = like.shape[1]
        self.zoom = side / tiling.tile  # map cells for a pixel of the photograph
        shape = max(side, round(height * self.zoom)), max(side, round(width * self.zoom))
        self.total, self.weight = torch.zeros(len(like), *shape), torch.zeros(shape)
        ramp = ((torch.arange(side) + 0.5) / max(1.0, tiling.overlap * side)).clamp_max(1.0)
        ramp = torch.minimum(ramp, ramp.flip(0))
        self.ramp_SS = ramp[:, None] * ramp

    def add(self, box: Box, maps_BSS: Tensor) -> None:
        """Add the maps of the tile at ``box``; cells that are NaN, in all photographs, do not count."""
        side, (height, width) = len(self.ramp_SS), self.weight.shape
        top, left = min(round(box[1] * self.zoom), height - side), min(round(box[0] * self.zoom), width - side)
        rows, columns = slice(top, top + side), slice(left, left + side)
        maps_BSS = maps_BSS.float().cpu()
        weight_SS = self.ramp_SS * ~maps_BSS[0].isnan()
        self.total[:, rows, columns] += maps_BSS.nan_to_num(0.0) * weight_SS
        self.weight[rows, columns] += weight_SS

    def maps(self) -> Tensor:
        """The maps [B, H', W']; NaN where no tile was added. This ends the stitching."""
        return self.total.div_(self.weight)


class Tiles:
    """Batches [b, 3, S, S], prepared for the network, of tiles, each uint8 [3, tile, tile] with its region of interest.

    ``roi``: the regions of all tiles, bool [n, S, S]; None = all of them are inspected.
    """

    def __init__(
        self, cut: Sequence[tuple[Tensor, Tensor | None]], preprocess: Preprocess, device: torch.device
    ) -> None:
        self.tiles, self.preprocess, self.device = [tile for tile, _ in cut], preprocess, device
        masks = [mask for _, mask in cut if mask is not None]
        self.roi = torch.stack(masks) if masks else None

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
