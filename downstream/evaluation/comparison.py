"""What an evaluation compares: data sets x extractors x detectors by one protocol, from flags or a YAML file.

docs/evaluate.md has an example of the file; folders in it are relative to it. One data set, and extractors of one kind,
can be given as flags. `engine` computes the comparison. This module does not import torch, so that --help is fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from adpretrain.parsing import from_dict, read_yaml
from downstream.evaluation.protocol_options import FEW, Protocol, ProtocolOptions

Kind = Literal["raw", "residual", "scaled", "pretrained"]
RAW, RESIDUAL, SCALED, PRETRAINED = FEATURES = get_args(Kind)
ALL, DEFAULT_BACKBONE = "all", "lite0"
T = TypeVar("T")


@dataclass(frozen=True)
class DataChoice:
    """A labelled data set, scored product by product.

    Args:
        root: folder of a data set, or hf://org/name.
        dataset: layout of the data set; auto detects it (`adpretrain check-data` prints it).
        split: an official split of the data set, such as realiad_jsons or VisA's 1cls.
        columns: columns of a Hugging Face data set whose names cannot be guessed, such as mask=segmentation.
        products: categories to score, or patterns such as "p00*"; by default all.
        defects: kinds of defects to score; by default all.
    """

    root: str = ""
    dataset: str = "auto"
    split: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    products: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SetRow(DataChoice):
    """One of several data sets. ``name`` is its name in the tables ("" = name of its folder); an ``optional`` data set
    is left out if ``root`` does not exist."""

    name: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Network:
    """A backbone whose features are compared without an extractor.

    Args:
        backbone: network for raw features, a name listed by `adpretrain backbones` or timm/<model name>.
        weights: local file or folder with the backbone's weights, also for the backbone of an extractor.
        image_size: side of the square input image in pixels; by default 224.
        levels: blocks or stages whose features are used; by default those of the paper.
        resize: squeeze the whole photograph to a square (default), or crop its centre.
        crop_from: with crop, length of the shorter side before cropping, such as 256 for 224 pixels.
        finest: stride in pixels to which feature maps with a finer stride are averaged; by default they are kept.
        random_weights: use untrained weights with this seed, as a lower bound to compare with.
        seen_in_pretraining: whether the pretraining of an extractor saw photographs of the data sets: none, some or
            unknown (the default); it is written into the results that can be shared.
    """

    backbone: str | None = None
    weights: str | None = None
    image_size: int | None = None
    levels: list[int] | None = None
    resize: Literal["squeeze", "crop"] | None = None
    crop_from: int | None = None
    finest: int | None = None
    random_weights: int | None = None
    seen_in_pretraining: Literal["none", "some", "unknown"] | None = None


@dataclass(frozen=True)
class ExtractorRow(Network):
    """The features that detectors work on: those of an extractor or of a backbone.

    Args:
        extractor: a folder written by save_pretrained, "org/name[@revision]" on the Hub, or "embedded"; several must
            be seeds of one training, and their results are averaged.
        features: raw = backbone features, residual = feature minus nearest reference, scaled = residuals over the
            local scale, without a projector, pretrained = the whole extractor; null = pretrained for an extractor, raw
            for a backbone.
    """

    extractor: str | list[str] | None = None
    features: Kind | None = None

    def __post_init__(self) -> None:
        if bool(self.extractor) == (self.backbone is not None):
            raise ValueError(f"extractor {self.extractor}, backbone {self.backbone}: name one of the two")
        own = [f.name for f in fields(Network) if f.name not in ("backbone", "weights", "seen_in_pretraining")]
        if self.extractor and (given := [name for name in own if getattr(self, name) is not None]):
            raise ValueError(f"{' and '.join(given)} cannot be given with an extractor: it was trained with its own")
        if self.backbone and self.features == PRETRAINED:
            raise ValueError(f"features {self.features!r} need an extractor; a backbone has no learnt projector")
        if self.random_weights is not None and self.weights:
            raise ValueError(f"random_weights {self.random_weights} and weights {self.weights}: give one of the two")

    @property
    def kind(self) -> Kind:
        """`features`, or their default if they are None."""
        return self.features or ("pretrained" if self.extractor else "raw")

    @property
    def sources(self) -> list[str]:
        """The extractors, one for each seed."""
        return [self.extractor] if isinstance(self.extractor, str) else self.extractor or []


@dataclass(frozen=True)
class Comparison(ProtocolOptions, Network, DataChoice):
    """Everything that an evaluation compares.

    Args:
        draws: number of random draws; 0 = 3 draws where K images are drawn and for reference-sensitivity, else 1.
        sets: in a file, a list of several data sets, each a mapping with the keys of one set, name and optional.
        extractors: folders, org/name[@revision] on the Hub, or embedded (the default if no backbone is named); several
            must be seeds of one training and are averaged. In a file also a mapping from names to rows of features.
        features: raw, residual, scaled or pretrained; by default raw, and pretrained if there is an extractor.
        detectors: names of detectors (`adpretrain detectors`); in a file with options, as {patchcore: {amount: 0.1}}.
        settings: options of the detectors: their defaults (default), or those of ADPretrain's evaluation (adpretrain).
        pictures: number of heatmaps per product in the report, each of another kind of defect.
        panels: whether to draw the median-scored image of every kind of defect too.
        per_defect: whether to write a table for every kind of defect, against all normal images.
        embeddings: number of products whose patch features are drawn in two dimensions.
    """

    protocol: Protocol = "few-shot"
    sets: list[dict[str, Any]] = field(default_factory=list)
    extractors: dict[str, Any] | list[str] = field(default_factory=list)
    features: list[Kind] = field(default_factory=list)
    detectors: list[Any] = field(default_factory=lambda: ["featurenorm"])
    settings: Literal["default", "adpretrain"] = "default"
    pictures: int = 2
    panels: bool = False
    per_defect: bool = False
    embeddings: int = 0

    @property
    def repeats(self) -> int:
        few = self.protocol in FEW and bool(self.shots)
        return self.draws or (3 if few or self.protocol == "reference-sensitivity" else 1)


def read_comparison(values: Mapping[str, Any], file: Path | None = None) -> Comparison:
    """Read the comparison of a YAML file, whose folders are relative to the file; ``values`` (flags) override its keys.

    Raises ValueError, naming the file, for unknown keys, values of a wrong type, empty lists and duplicate names.
    """
    named = f"{file}: " if file else ""
    content = {**(_seen_from_here(read_yaml(str(file)), file.parent) if file else {}), **values}
    if isinstance(shots := content.get("shots"), list):
        content["shots"] = [0 if count == ALL else count for count in shots]
    if isinstance(one := content.get("extractors"), str):
        content["extractors"] = [one]
    if empty := [name for name in ("sets", "detectors", "shots") if content.get(name) == []]:
        raise ValueError(f"{named}{' and '.join(empty)} must not be empty")
    comparison = from_dict(Comparison, content, str(file) if file else "flags")
    try:
        set_rows(comparison), extractor_rows(comparison), detector_rows(comparison)
    except ValueError as error:
        raise ValueError(f"{named}{error}") from error
    return comparison


def set_rows(comparison: Comparison) -> list[SetRow]:
    """Return the data sets, each with a unique name. Raises ValueError for unknown keys, or if there is no data set."""
    rows = [from_dict(SetRow, row, f"sets[{number}]") for number, row in enumerate(comparison.sets)]
    if comparison.root:
        rows.insert(0, SetRow(**_shared(comparison, DataChoice)))
    if not rows:
        raise ValueError("needed: --root, the folder of a data set, or a file with sets")
    found = {row.name or Path(row.root).name: row for row in rows}
    if len(found) < len(rows):
        names = [row.name or Path(row.root).name for row in rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"sets {', '.join(twice)} are there twice; give each its own name")
    return [SetRow(**{**vars(row), "name": name}) for name, row in found.items()]


def extractor_rows(comparison: Comparison) -> dict[str, ExtractorRow]:
    """Return the rows of features by name; features given by flags are named after their kind. Raises ValueError for
    unknown keys, and for options that do not go together."""
    network = _shared(comparison, Network)
    if isinstance(comparison.extractors, dict):
        if given := [name for name, value in network.items() if value is not None] + ["features"] * bool(
            comparison.features
        ):
            raise ValueError(f"{' and '.join(given)} cannot be given beside named extractors: write them into a row")
        return {name: _extractor(row, f"extractors.{name}") for name, row in comparison.extractors.items()}
    sources: list[str] = comparison.extractors
    learnt = PRETRAINED in comparison.features
    named = [value for name, value in network.items() if name != "seen_in_pretraining" and value is not None]
    if not sources and (learnt or not named):
        sources = ["embedded"]
    elif not sources:
        network["backbone"] = comparison.backbone or DEFAULT_BACKBONE
    kinds = comparison.features or [RAW, *([PRETRAINED] if sources else [])]
    return {
        kind: ExtractorRow(**network, features=kind, extractor=sources if kind == PRETRAINED else sources[:1])
        for kind in kinds
    }


def detector_rows(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return the options of every detector that differ from its defaults. Raises ValueError for a malformed entry."""
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(comparison.detectors):
        row = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(row, dict) or len(row) != 1 or not all(isinstance(options, dict) for options in row.values()):
            expected = "expected a detector's name, or its options, such as padim: {sigma: 4.0}"
            raise ValueError(f"detectors[{number}] is {entry!r}; {expected}")
        if (name := next(iter(row))) in found:
            raise ValueError(f"detector {name} is there twice; write a second comparison for other options")
        found |= row
    return found


def _extractor(row: Any, where: str) -> ExtractorRow:
    given = {"extractor": row} if isinstance(row, str | list) else row
    try:
        return from_dict(ExtractorRow, given, where)
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from error


def _shared(comparison: Comparison, kind: type) -> dict[str, Any]:
    """Return the comparison's values for the fields that it inherits from ``kind``."""
    return {item.name: getattr(comparison, item.name) for item in fields(kind)}


def _seen_from_here(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a file's content with its folders, which are relative to ``folder``, relative to the working directory."""

    def seen(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [seen(key, item) for item in value]
        if isinstance(value, dict):  # of named extractors, each may be a mapping, one folder or several
            several = key == "extractors"
            return {n: seen(key if several and not isinstance(v, dict) else n, v) for n, v in value.items()}
        if not isinstance(value, str):
            return value
        if key == "root":
            return value if "://" in value else str(folder / Path(value).expanduser())
        beside = key in ("extractor", "extractors", "weights") and value != "embedded" and (folder / value).exists()
        return str(folder / value) if beside else value

    return {key: value if key == "detectors" else seen(key, value) for key, value in content.items()}
