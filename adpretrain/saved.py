"""The files of a saved model: config.json and model.safetensors, written whole and read strictly."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adpretrain._version import __version__
from adpretrain.backbones import Backbone, load_backbone
from adpretrain.backbones.weights import fingerprint, same_weights, some
from adpretrain.config import BackboneConfig, LocalScaleConfig, ProjectorConfig
from adpretrain.files import atomic_folder, sha256
from adpretrain.local_scale import LocalScale
from adpretrain.parsing import from_dict, read_json
from adpretrain.preprocess import Preprocess
from adpretrain.projector import FeatureProjector

T = TypeVar("T")
FORMAT_VERSION = 1
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool)
NORMS = ("l2", "released")
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
CARD_NAME, ASSETS, PICTURE_SUFFIX = "README.md", "assets", ".png"  # other files that may lie beside them
PLACEHOLDER = "ORG/NAME"  # in the card of a folder that is not published (yet)


@dataclass(frozen=True)
class ExtractorConfig:
    """What config.json holds: everything needed to rebuild the extractor, and where it came from.

    Args:
        backbone: the frozen network.
        fingerprint: fingerprint of its weights (`adpretrain.backbones.weights`), checked on loading; empty = unknown.
        channels: its feature widths, checked on loading.
        preprocess: how photographs become its input.
        projector: the projector's sizes; null = none (raw residual features).
        matching: metric of the nearest reference.
        norm: the norm that scores a feature: "l2" = ||x||, or "released" = sqrt(||x|| + 1) - 1 (the authors' code).
        local_scale: how residuals are scaled (`adpretrain.local_scale`); null = not at all.
        licence: licence of the backbone's weights (`adpretrain.licences`); null = unknown.
        provenance: data, steps, seed, commit, versions, losses, metrics of the training run.
        format_version: version of this file's format.
        library_version: version of adpretrain that wrote it.
    """

    backbone: BackboneConfig
    channels: list[int]
    preprocess: Preprocess
    projector: ProjectorConfig | None = None
    matching: str = "l2"
    norm: str = "l2"
    local_scale: LocalScaleConfig | None = None
    licence: str | None = None
    fingerprint: list[float] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    library_version: str = __version__


def backbone_config(backbone: Backbone) -> BackboneConfig:
    """The configuration that loads the same backbone elsewhere: no local paths, the weights' commit if known."""
    prepared, levels = backbone.preprocess, list(backbone.levels)
    config = BackboneConfig(
        backbone.name,
        prepared.image_size,
        revision=backbone.revision,
        levels=levels,
        finest=backbone.finest,
        patch=backbone.patch if max(backbone.patch) > 1 else [],
    )
    if prepared.crop_from is None:
        return config
    return dataclasses.replace(config, resize="crop", crop_from=prepared.crop_from)


def saved_backbone(config: BackboneConfig, weights: str | os.PathLike[str] | None) -> Backbone:
    """The backbone of a saved extractor, at its commit, or with local ``weights`` given by the caller."""
    if weights is None:
        given = dataclasses.replace(config, weights=None)  # no path from somebody else's config is ever opened
    else:
        given = dataclasses.replace(config, weights=os.fspath(weights), revision=None)
    try:
        return load_backbone(**dataclasses.asdict(given))
    except ValueError as error:
        if given.revision or given.weights:
            raise
        # A network that the user wrote, or random weights, cannot be told from published ones.
        raise ValueError(
            f"{error}. In a program, the network itself can be given: as backbone= for an extractor, extract= for a "
            "detector"
        ) from error


def provenance_of(config: ExtractorConfig, part: str) -> Mapping[str, Any]:
    """A part of the provenance, which may hold anything; empty if that part is not a mapping."""
    found = config.provenance.get(part)
    return found if isinstance(found, Mapping) else {}


def with_image_size(config: ExtractorConfig, image_size: int) -> ExtractorConfig:
    """The config of the same extractor on inputs of another side in pixels; a crop keeps its share of the photograph.

    A projector was trained on the patches of its own size: at another it sees the product larger or smaller.
    """
    crop_from = config.preprocess.crop_from
    if crop_from is not None:
        crop_from = round(crop_from * image_size / config.preprocess.image_size)
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, image_size=image_size, crop_from=crop_from),
        preprocess=dataclasses.replace(config.preprocess, image_size=image_size, crop_from=crop_from),
    )


def extractor_backbone(
    config: ExtractorConfig,
    folder: Path,
    weights: str | os.PathLike[str] | None = None,
    given: Backbone | None = None,
) -> Backbone:
    """The ``given`` backbone, or the one that the config of an extractor in ``folder`` names.

    Raises ValueError if its channels, weights or preprocessing are not those that the extractor was made with.
    """
    backbone = saved_backbone(config.backbone, weights) if given is None else given
    if backbone.channels != config.channels:
        raise ValueError(
            f"{folder} was made on features of {config.channels} channels; backbone {backbone.name!r} gives "
            f"{backbone.channels}: the extractor belongs to another backbone or version of it"
        )
    if not same_weights(config.fingerprint, fingerprint(backbone.network)):
        raise ValueError(
            f"{folder} was made with other weights of {backbone.name!r} than those found: give the file it was "
            "made with as weights=PATH, or the commit as revision in its config.json"
        )
    if given is not None and given.preprocess != config.preprocess:
        raise ValueError(
            f"{folder} was made on images of {config.preprocess}; the given backbone prepares them as "
            f"{given.preprocess}: give one with the same"
        )
    backbone.preprocess = config.preprocess
    return backbone


def place(network: nn.Module) -> torch.device:
    """The device of a network's first tensor, or the CPU if it has none."""
    return next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))


def saved_parts(config: ExtractorConfig, folder: Path) -> tuple[FeatureProjector | None, LocalScale | None]:
    """The projector and the local scale of a saved extractor, on the meta device until weights are assigned.

    So no size in a config takes memory before the weights file is known to hold it. Raises ValueError that names the
    folder for impossible sizes of the projector, or level weights that do not fit.
    """
    try:
        with torch.device("meta"):
            projector = FeatureProjector(config.channels, config.projector) if config.projector else None
            local_scale = LocalScale(len(config.channels), config.local_scale) if config.local_scale else None
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{folder}: {(str(error).splitlines() or [''])[0]}") from error
    return projector, local_scale


def saved_tensors(config: ExtractorConfig, folder: Path) -> dict[str, Tensor]:
    """Name, shape and type of every tensor in the model.safetensors of an extractor, without memory for the values:
    projector, local scale and centres. Raises ValueError as `saved_parts` does."""
    projector, local_scale = saved_parts(config, folder)
    saved = nn.Module()
    saved.add_module("projector", projector)
    saved.add_module("local_scale", local_scale)
    for level, width in enumerate(config.channels):
        saved.register_buffer(f"center_{level}", torch.zeros(width, device="meta"))
    return saved.state_dict()


def refuse_others(folder: str | os.PathLike[str], what: str, parts: Iterable[str] = ()) -> None:
    """Raise ValueError if ``folder`` holds other files than a saved ``what`` with these ``parts`` and its pictures:
    replacing the folder would delete them.
    """
    target = Path(folder)
    found = {path.name for path in target.iterdir()} if target.is_dir() else set()
    pictures = {name for name in found if name == ASSETS or name.endswith(PICTURE_SUFFIX)}
    others = found - {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, *parts} - pictures
    if others or (target.exists() and not target.is_dir()):
        problem = f"holds other files ({some(sorted(others))})" if others else "is a file"
        raise ValueError(f"{folder} {problem}: save into a new folder or over an earlier {what}")


def write_folder(
    folder: str | os.PathLike[str],
    config: Any,
    weights: Mapping[str, Tensor],
    what: str,
    card: str,
    parts: Mapping[str, Callable[[Path], object]] | None = None,
) -> Path:
    """Write a dataclass, tensors and a card; the folder appears, or is replaced, only when complete. Returns its path.

    ``what`` names the thing in errors. ``parts``: subfolders, each with the function that writes it. Pictures of the
    previous model are deleted with it, as they do not show the new one. Other files are refused (`refuse_others`).
    """
    target, parts = Path(folder), parts or {}
    refuse_others(target, what, parts)
    with atomic_folder(folder) as temporary:
        for name, write in parts.items():
            write(temporary / name)
        save_tensors(weights, temporary / WEIGHTS_NAME)
        text = json.dumps(dataclasses.asdict(config), indent=2)
        (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        (temporary / CARD_NAME).write_text(card, encoding="utf-8")
    return target


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read. OSError if it cannot be written."""
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (number := re.search(r"(?:os error|code:) (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(0o644)  # safetensors makes private files


def folder_digest(folder: Path) -> str:
    """SHA-256 of a saved model's configuration and weights, to record with which model numbers were measured.

    Raises ValueError if either is not a file.
    """
    files = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if missing := [path.name for path in files if not path.is_file()]:  # a pipe would wait for ever
        raise ValueError(f"{folder} has no file {missing[0]}: expected a folder written by ADExtractor.save_pretrained")
    return sha256(*files)


def read_config(folder: Path) -> ExtractorConfig:
    """config.json of a saved extractor. Raises ValueError if it is missing, invalid or from a newer library."""
    return read_folder_config(folder, ExtractorConfig, FORMAT_VERSION, "ADExtractor.save_pretrained")


def read_folder_config(folder: Path, cls: type[T], newest: int, writer: str) -> T:
    """config.json of a folder that ``writer`` wrote, as a dataclass; reads format versions up to ``newest``.

    Raises ValueError if it is missing, invalid or from a newer library.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {CONFIG_NAME}"
        raise ValueError(f"{folder} {what}: expected a folder written by {writer}")
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > newest:
        raise ValueError(
            f"{folder} has format version {version}, written by adpretrain {content.get('library_version')}; this is "
            f"adpretrain {__version__}, which reads up to version {newest}: upgrade adpretrain"
        )
    content = _upgraded(content, str(path))
    try:
        return from_dict(cls, content, str(path))
    except ValueError as error:
        raise ValueError(f"{error}; expected a folder written by {writer}") from error


def _upgraded(content: Any, where: str) -> Any:
    """The content of config.json in the current format. Version 0.1 squeezed every photograph to a side that it called
    ``resize``, and had ``conditioning``, which was removed."""
    if not isinstance(content, dict):
        return content
    if content.get("conditioning") is True:
        raise ValueError(
            f"{where} is of adpretrain 0.1, with conditioning: it centred every photograph on its own median, so that "
            "whatever was wrong everywhere looked normal. It was removed; pretrain again with local_scale, or use the "
            "extractor 'embedded'"
        )
    content = {name: value for name, value in content.items() if name != "conditioning"}
    for key in ("preprocess", "images"):  # of extractors and detectors
        old = content.get(key)
        if isinstance(old, dict) and "resize" in old:
            if old["resize"] != old.get("image_size"):
                raise ValueError(f"{where}: {key}.resize {old['resize']} is not image_size {old.get('image_size')}")
            content = {**content, key: {name: value for name, value in old.items() if name != "resize"}}
    return content


def read_weights(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """model.safetensors of a saved model: exactly the tensors of ``expected``, same shapes, all finite.

    They are copied out of the file, where their alignment is arbitrary: on some processors the last bits of a product
    depend on it, and results must be the same bits as with the tensors that were saved.

    Raises ValueError that names what differs, or a type of numbers that no saved model has.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"cannot read weights {path}: there is no such file")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read weights {path}: {error}") from error
    if missing := expected.keys() - weights.keys():
        raise ValueError(f"{path} lacks {some(sorted(missing))}: it is not the file this config describes")
    if surplus := weights.keys() - expected.keys():
        raise ValueError(
            f"{path} holds unknown weights {some(sorted(surplus))}: it is not the file this config describes"
        )
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            raise ValueError(f"{path}: {name} is {list(weights[name].shape)}, its config says {list(value.shape)}")
        if weights[name].dtype not in DTYPES:
            valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"{path}: {name} holds {weights[name].dtype}; expected one of {valid}")
        if not weights[name].isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
        weights[name] = weights[name].clone(memory_format=torch.contiguous_format)
    return weights
