"""A board: data sets x extractors x detectors, as one YAML file.

  sets:
    - {name: tiles, root: data/mtd}
    - {name: solar cells, root: data/elpv, products: [poly], optional: true}
  extractors:
    ours: embedded                                # a folder, org/name of the Hub, or embedded
    its residuals: {extractor: embedded, features: residual}
    raw: {backbone: lite0, image_size: 320}  # a network's own features
  detectors:
    - featurenorm
    - patchcore: {amount: 0.1}
  shots: [4, all]
  draws: 3

Folders are relative to the file. `board_run` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adpretrain.data.layouts.detect import HUB
from adpretrain.hub import EMBEDDED
from adpretrain.parsing import from_dict, read_yaml
from downstream.evaluation.contenders import Kind

FIXED = ("image_size", "levels", "resize", "crop_from", "finest")  # an extractor brings its own
ALL = "all"


@dataclass(frozen=True)
class SetRow:
    """A data set, scored product by product.

    Args:
        name: what the tables call it.
        root: its folder, or "hf://org/name".
        layout: a name of `adpretrain.data.DATASETS`, or "auto".
        split: a listing of the set's own, such as "realiad_jsons".
        columns: of a Hugging Face set, those that are not guessed.
        products: categories to score; [] = all.
        optional: whether the board goes on without it where ``root`` is absent.
    """

    name: str
    root: str
    layout: str = "auto"
    split: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    products: list[str] = field(default_factory=list)
    optional: bool = False


@dataclass(frozen=True)
class ExtractorRow:
    """Features that detectors work on.

    Args:
        extractor: a folder written by save_pretrained, "org/name[@revision]" on the Hub, or "embedded"; or
        backbone: a name of `adpretrain.backbones.BACKBONES`, or timm/<model name>.
        features: raw = the backbone's own, residual = feature minus nearest reference, scaled = the extractor without
            its projector, pretrained = the extractor's own; null = pretrained of an extractor, raw of a backbone.
        weights: a local file or folder of the backbone's weights.
        image_size: side of a backbone's input in pixels; null = 224.
        levels: of a backbone; null = the paper's.
        resize: "squeeze" (null) or "crop", of a backbone.
        crop_from: for "crop", the shorter side before it.
        finest: stride in pixels to which a backbone's finer maps are averaged; null = as the network gives them.
    """

    extractor: str | None = None
    backbone: str | None = None
    features: Kind | None = None
    weights: str | None = None
    image_size: int | None = None
    levels: list[int] | None = None
    resize: Literal["squeeze", "crop"] | None = None
    crop_from: int | None = None
    finest: int | None = None

    def __post_init__(self) -> None:
        if (self.extractor is None) == (self.backbone is None):
            raise ValueError(f"extractor {self.extractor}, backbone {self.backbone}: name one of the two")
        if self.extractor and (given := [name for name in FIXED if getattr(self, name) is not None]):
            raise ValueError(f"{' and '.join(given)} cannot be given with an extractor: it was trained with its own")
        if self.backbone and self.features in ("scaled", "pretrained"):
            raise ValueError(f"features {self.features!r} need an extractor; of a backbone there are raw and residual")

    @property
    def kind(self) -> Kind:
        """`features`, or what they are where none are named."""
        return self.features or ("pretrained" if self.extractor else "raw")


@dataclass(frozen=True)
class Board:
    """What is compared.

    Args:
        sets: data sets.
        extractors: features by name.
        detectors: names of `downstream.detectors.DETECTORS`, with the options that differ from the default.
        shots: numbers of normal images that a detector is fitted on and features are compared with; 0 = all of the
            training split.
        draws: how often they are drawn anew; of all images there is one draw.
        seed: of the first draw; every further one has the next number, so boards whose seeds are ``draws`` apart share
            none.
        settings: detectors' own default options, or those of ADPretrain's evaluation.
    """

    sets: list[SetRow]
    extractors: dict[str, ExtractorRow]
    detectors: dict[str, dict[str, Any]]
    shots: tuple[int, ...] = (4,)
    draws: int = 3
    seed: int = 0
    settings: Literal["default", "adpretrain"] = "default"


@dataclass(frozen=True)
class _File:
    """The keys of the file; `Board` explains them."""

    sets: list[dict[str, Any]]
    extractors: dict[str, Any]
    detectors: list[Any]
    shots: list[int | Literal["all"]] = field(default_factory=lambda: [4])
    draws: int = 3
    seed: int = 0
    settings: Literal["default", "adpretrain"] = "default"


def read_board(path: Path) -> Board:
    """The board of a YAML file, with folders as they are seen from here.

    Raises ValueError, naming the file, for unknown keys, values of a wrong type, and what is empty or named twice.
    """
    content = from_dict(_File, read_yaml(str(path)), str(path))
    empty = [name for name in ("sets", "extractors", "detectors", "shots") if not getattr(content, name)]
    if empty:
        raise ValueError(f"{path}: {' and '.join(empty)} must not be empty")
    sets = [_set(row, path, f"{path}, sets[{number}]") for number, row in enumerate(content.sets)]
    extractors = {name: _extractor(row, path, f"{path}, extractors.{name}") for name, row in content.extractors.items()}
    detectors: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(content.detectors):
        name, options = _detector(entry, f"{path}, detectors[{number}]")
        if name in detectors:
            raise ValueError(f"{path}: detector {name} is there twice; write a second board for other options")
        detectors[name] = options
    names = [row.name for row in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: sets {', '.join(twice)} are there twice; each needs a name of its own")
    shots = tuple(dict.fromkeys(0 if count == ALL else int(count) for count in content.shots))
    if content.draws < 1 or content.seed < 0 or min(shots) < 0:
        raise ValueError(
            f"{path}: draws {content.draws} must be at least 1, seed {content.seed} at least 0, shots {content.shots} "
            'numbers of images (0 or "all" = all of the training split)'
        )
    return Board(sets, extractors, detectors, shots, content.draws, content.seed, content.settings)


def _set(row: Mapping[str, Any], path: Path, where: str) -> SetRow:
    read = from_dict(SetRow, row, where)
    return from_dict(SetRow, {**row, "root": _beside(path, read.root)}, where)


def _extractor(row: Any, path: Path, where: str) -> ExtractorRow:
    given = {"extractor": row} if isinstance(row, str) else row
    try:
        read = from_dict(ExtractorRow, given, where)
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from error
    found = {
        name: _beside(path, value)
        for name in ("extractor", "weights")
        if (value := getattr(read, name)) and value != EMBEDDED and (path.parent / value).exists()
    }
    return from_dict(ExtractorRow, {**given, **found}, where)


def _detector(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """A name, or a mapping of one name to its options."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, options),) = entry.items()
        if isinstance(options, dict):
            return str(name), options
    raise ValueError(f"{where} is {entry!r}; expected a detector's name, or its options, such as padim: {{sigma: 4.0}}")


def _beside(path: Path, name: str) -> str:
    """A folder of the file, as seen from here."""
    return name if name.startswith(HUB) else str(path.parent / Path(name).expanduser())
