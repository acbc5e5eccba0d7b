"""A typed result: what one extractor's features give one detector on one data set by one setting of a protocol.

A file holds one result, with the scores of every photograph, so that whoever reads it can compute the image metrics
anew and compare two results photograph by photograph. `check` refuses a file whose digests, metrics or protocol are not
what it claims. The types below are the schema (`adpretrain board schema` prints it as JSON Schema).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adpretrain.backbones.table import licence_of
from adpretrain.files import atomic_path
from adpretrain.licences import LICENCES, UNKNOWN, find_licence, strictest
from adpretrain.passport import BACKBONE
from downstream.metrics import auroc, average_precision

FORMAT = 1
LARGEST = 64 << 20  # bytes of a file
CLOSE = 1e-9  # how far a metric may lie from the one that its scores give
PER_IMAGE = {"image_auroc": auroc, "image_ap": average_precision}

Kind = Literal["raw", "residual", "scaled", "pretrained"]
Product = Literal["yes", "with conditions", "no", "unknown"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32,64}$")]
Text = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00-\x1f\x7f\u2028\u2029]*$")]  # one line
Name = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x20\x7f\u2028\u2029][^\x00-\x1f\x7f\u2028\u2029]*$")]
Seconds = Annotated[float, Field(ge=0)]


class Typed(BaseModel):
    """A part of a result: unknown keys, numbers as text and NaN are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class LicenceLink(Typed):
    """One link of the chain that the features hang on: the weights of the backbone, the data of the pretraining."""

    part: Name
    name: Text
    licence: Text
    product: Product
    source: Text


class ExtractorInfo(Typed):
    """Whose features they are. ``digest`` is that of config.json and the weights, of all seeds of one training; None
    for a backbone without an extractor. ``weights`` is the digest of the backbone's weights, and ``product`` says
    whether the whole chain of ``licences`` allows a product."""

    name: Name
    revision: Name | None
    digest: Digest | None
    features: Kind
    backbone: Name
    weights: Name
    random_weights: int | None
    image_size: int
    parameters: int
    licences: tuple[LicenceLink, ...]
    product: Product

    @property
    def label(self) -> str:
        """What the board calls these features."""
        own = self.name if self.random_weights is None else f"{self.name}, random weights"
        return own if self.features == "pretrained" else f"{own}, {self.features}"


class DetectorInfo(Typed):
    name: Name
    options: dict[str, Any]
    digest: Digest


class DataInfo(Typed):
    """A labelled data set. ``digest`` is that of the listing of all its photographs, with labels, masks and sizes."""

    name: Name
    layout: Name
    digest: Digest
    images: int
    products: tuple[Name, ...]


class ProtocolInfo(Typed):
    """``setting`` names the variant, such as "K=4"; draws have the seeds ``seed``, ``seed`` + 1, ..."""

    name: Name
    setting: Name
    seed: int
    draws: Annotated[int, Field(ge=1)]


class Overlap(Typed):
    """Whether the pretraining saw photographs of the data set, and how that is known."""

    answer: Literal["none", "some", "unknown"]
    why: Text


class Measured(Typed):
    """One product in one draw with one seed of the training. ``images`` is the digest of the photographs fitted on,
    compared with and scored, in order; ``labels`` and ``scores`` are those of the scored ones."""

    product: Name
    draw: Annotated[int, Field(ge=0)]
    extractor: Annotated[int, Field(ge=0)]
    images: Digest
    labels: tuple[Literal[0, 1], ...]
    scores: tuple[float, ...]
    metrics: dict[str, float | None]
    notes: tuple[Text, ...]
    fit: Seconds
    score: Seconds


class Metric(Typed):
    """A metric's mean over products in every repeat (draw x seed), and the mean of these; None where no product
    defines it."""

    mean: float | None
    repeats: tuple[float | None, ...]


class Hardware(Typed):
    processor: Text
    cores: int
    threads: int
    device: Text
    torch: Text


class Result(Typed):
    """A result, ready to be shared. ``latency``: seconds to score one photograph alone, None where not measured."""

    format: Literal[1]
    extractor: ExtractorInfo
    detector: DetectorInfo
    data: DataInfo
    protocol: ProtocolInfo
    overlap: Overlap
    metrics: dict[str, Metric]
    measured: Annotated[tuple[Measured, ...], Field(min_length=1)]
    latency: Annotated[float, Field(gt=0)] | None
    library_version: Name
    hardware: Hardware
    command: Text
    digest: Digest

    @property
    def task(self) -> str:
        """The protocol and its setting, which results must share to be ranked together."""
        name = self.protocol.name
        parts = [part for part in self.protocol.setting.split(", ") if part != name]
        return ", ".join([name, *parts, *([f"seed {self.protocol.seed}"] if self.protocol.seed else [])])

    @property
    def row(self) -> tuple[str, str]:
        """What the result is about: features and detector."""
        return self.extractor.label, self.detector.name

    @property
    def identity(self) -> str:
        """A digest of what was measured, whatever came out: two results with one identity are the same experiment."""
        extractor = self.extractor.model_dump(include={"digest", "features", "backbone", "weights", "image_size"})
        own = [extractor, self.detector.digest, self.data.digest, self.protocol.model_dump()]
        return digest_of(own)[:32]


def digest_of(content: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> Result:
    """Make a result from its content without the format, the means and the digest, which are added.

    Raises ValueError if it is not well-formed.
    """
    given = {**content, "format": FORMAT, "metrics": {}, "digest": "0" * 64}
    unsealed = _parsed(json.dumps(given), "the result")
    with_means = unsealed.model_copy(update={"metrics": means_of(unsealed.measured)})
    return with_means.model_copy(update={"digest": _own_digest(with_means)})


def _own_digest(result: Result) -> str:
    return digest_of(json.loads(result.model_dump_json(exclude={"digest"})))


def means_of(measured: Sequence[Measured]) -> dict[str, Metric]:
    """Return every metric's mean over products in each repeat, in the order of draws and seeds."""
    repeats = sorted({(one.draw, one.extractor) for one in measured})
    names = dict.fromkeys(name for one in measured for name in one.metrics)
    found = {}
    for name in names:
        means = [
            _mean([one.metrics.get(name) for one in measured if (one.draw, one.extractor) == repeat])
            for repeat in repeats
        ]
        found[name] = Metric(mean=_mean(means), repeats=tuple(means))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def write_result(folder: Path, result: Result) -> Path:
    """Write a result below a folder, under a name that tells what it is about."""
    words = (result.data.name, *result.row, result.task)
    name = "-".join("".join(c if c.isalnum() else "_" for c in word).strip("_") for word in words)
    path = folder / f"{name[:150]}-{result.identity[:8]}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(result.model_dump_json() + "\n", encoding="utf-8")
    return path


def read_result(path: Path) -> Result:
    """Read a result and check it. Raises ValueError, naming the file, if it is not what it claims to be."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: results are the .json files that adpretrain evaluate writes")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size >> 20} MiB: a result has at most {LARGEST >> 20}")
    result = _parsed(path.read_bytes(), str(path))
    if wrong := check(result):
        raise ValueError(f"{path} is not what it claims to be: {wrong}")
    return result


def _parsed(text: bytes | str, where: str) -> Result:
    try:
        return Result.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        given = "" if isinstance(first["input"], dict | list | bytes) else f", not {str(first['input'])[:60]!r}"
        more = f" (and {error.error_count() - 1} more mistakes)" if error.error_count() > 1 else ""
        raise ValueError(f"{where} is not a result of format {FORMAT}: {place}: {first['msg']}{given}{more}") from None


def check(result: Result) -> str | None:
    """Say what is wrong with a well-formed result; None if it is what it claims to be.

    Its own digest and that of the detector's options must be right; the chain of licences must be that of the table,
    and allow what it is said to; every product must have been measured in every
    repeat, and in as many draws as the protocol says; the image metrics must be those of the scores, and the means
    those of the products.
    """
    if _own_digest(result) != result.digest:
        return "its digest is another, so it was changed after it was written"
    if digest_of([result.detector.name, result.detector.options]) != result.detector.digest:
        return f"the digest of the options of {result.detector.name} is another"
    return _wrong_licences(result.extractor) or _wrong_repeats(result) or _wrong_metrics(result)


def _wrong_licences(extractor: ExtractorInfo) -> str | None:
    chain = extractor.licences
    if not chain or extractor.product != strictest([link.product for link in chain]):
        return f"it says {extractor.product!r} to use in a product, but its chain of licences says otherwise"
    for link in chain:
        key = find_licence(link.licence)
        if key is not None and link.product != LICENCES[key].product:
            return f"{link.licence} says {LICENCES[key].product!r} to use in a product, not {link.product!r}"
    known, weights = licence_of(extractor.backbone), [link for link in chain if link.part == BACKBONE]
    stated = {find_licence(link.licence) for link in weights}
    if extractor.random_weights is None and known not in (None, UNKNOWN) and stated != {known}:
        return f"the weights of {extractor.backbone} are under {known}"
    return None


def _wrong_repeats(result: Result) -> str | None:
    found = [(one.product, one.draw, one.extractor) for one in result.measured]
    draws = {draw for _, draw, _ in found}
    if draws != set(range(result.protocol.draws)):
        return f"the protocol has {result.protocol.draws} draws, but draws {sorted(draws)} were measured"
    if {product for product, _, _ in found} != {*result.data.products}:
        return "the products that were measured are not those of the data set"
    repeats = {(draw, extractor) for _, draw, extractor in found}
    if len(found) != len({*found}) or len(found) != len(repeats) * len(result.data.products):
        return "not every product was measured once in every draw"
    return None


def _wrong_metrics(result: Result) -> str | None:
    for one in result.measured:
        where = f"{one.product}, draw {one.draw}"
        if len(one.labels) != len(one.scores):
            return f"{where} has {len(one.labels)} labels and {len(one.scores)} scores"
        for name, metric in PER_IMAGE.items():
            claimed = one.metrics.get(name)
            computed = metric(one.scores, one.labels) if 0 < sum(one.labels) < len(one.labels) else None
            if _differ(claimed, computed):
                return f"{where} claims {name} {claimed}, but its scores give {computed}"
    for name, mean in means_of(result.measured).items():
        told = result.metrics.get(name)
        if told is None or len(told.repeats) != len(mean.repeats):
            return f"the means of {name} are not there for every draw"
        if any(map(_differ, (told.mean, *told.repeats), (mean.mean, *mean.repeats))):
            return f"the mean of {name} is not that of its products"
    if unknown := {*result.metrics} - {name for one in result.measured for name in one.metrics}:
        return f"{', '.join(sorted(unknown))} was measured of no product"
    return None


def _differ(claimed: float | None, computed: float | None) -> bool:
    if claimed is None or computed is None:
        return claimed is not computed
    return abs(claimed - computed) > CLOSE
