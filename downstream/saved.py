"""The folder of a fitted detector: config.json, model.safetensors and, around an `ADExtractor`, extractor/.

A fitted detector holds features of the customer's product: memory banks, means, and the reference banks of its
extractor. Whoever has the folder has them. Share it only with those who may see the product: `downstream.publishing`
makes a private repository unless told otherwise.

Never inside: the weights of a backbone, pickles, photographs. The backbone is named with the commit of its weights;
its answer to a fixed picture finds a wrong one when the detector is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from adpretrain._version import __version__
from adpretrain.backbones import Backbone, Extract
from adpretrain.config import BackboneConfig
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path
from adpretrain.hub import Located, locate
from adpretrain.parsing import from_dict
from adpretrain.preprocess import LARGEST_SIDE, Preprocess
from adpretrain.references import ReferenceBank
from adpretrain.saved import (
    CONFIG_NAME,
    backbone_config,
    read_folder_config,
    read_weights,
    saved_backbone,
    write_folder,
)
from downstream.card import detector_card
from downstream.detectors.adapted import Adapted
from downstream.fitting_together import part, put_together

FORMAT_VERSION = 1
EXTRACTOR = "extractor"
REFERENCES = "references."
MOST_MEMBERS = 64
DTYPES = ("float32", "float64", "float16", "bfloat16")
PARTS, TOLERANCE = 8, 0.05  # numbers per level of the probe, and how much they may differ (devices, precisions)

C = TypeVar("C")


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector's config.json holds.

    Args:
        detector: name of the detector, a key of `downstream.detectors.DETECTORS`.
        options: its options.
        extract: what its features come from: a raw "backbone", an "extractor" (saved beside), or another function
            ("given"), which whoever loads the detector must give again; "members" for a detector made of others
            (`downstream.composite`).
        image_size: side of the images it was fitted on, in pixels.
        tensors: shapes of the tensors in model.safetensors, checked on loading.
        facts: what else the detector remembers, in numbers.
        probe: the features of a fixed picture, a few averages per level.
        backbone: the network, for "backbone".
        preprocess: how photographs become images, if known; for "backbone", its own.
        images: how they do where a backbone is fed with another network's images (`downstream.detectors.adapted`).
        dtype: precision of the network.
        photographs: digests of the photographs that it was fitted on and of its references (`Photo.digest`), so that
            it is not calibrated on them; empty where a program fitted it on tensors, and before this was remembered.
        full_scale: of those photographs, where they have more than 8 bits (`adpretrain.photographs`).
        format_version: version of this file's format.
        library_version: version of adpretrain that wrote it.
    """

    detector: str
    options: dict[str, Any]
    extract: Literal["backbone", "extractor", "given", "members"]
    image_size: int
    tensors: dict[str, list[int]]
    facts: dict[str, Any] = field(default_factory=dict)
    probe: list[list[float]] = field(default_factory=list)
    backbone: BackboneConfig | None = None
    preprocess: Preprocess | None = None
    images: Preprocess | None = None
    dtype: str = "float32"
    photographs: list[str] = field(default_factory=list)
    full_scale: float | None = None
    format_version: int = FORMAT_VERSION
    library_version: str = __version__


class HubOptions(TypedDict, total=False):
    """For a detector that is "org/name" on the Hugging Face Hub: which ``revision`` of it, and whose ``token``."""

    revision: str | None
    token: str | bool | None


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A detector's folder, read: ``options`` as its own dataclass, tensors on the device, the extract ready."""

    options: C
    extract: Extract
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    image_size: int
    device: torch.device


def save_detector(
    folder: str | os.PathLike[str],
    name: str,
    options: Any,
    extract: Extract,
    tensors: Mapping[str, Tensor],
    image_size: int,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write a fitted detector; the folder appears, or is replaced, only when complete. Returns its path.

    THE FOLDER HOLDS FEATURES OF THE PRODUCT, reference banks of an extractor included; see the top of this file.

    Raises ValueError if ``folder`` holds other files, or an extractor has a bank of references for every image.
    """
    tensors, parts = dict(tensors), {}
    kind: Literal["backbone", "extractor", "given"] = "given"
    backbone = preprocess = images = None
    network: Any = None
    given = extract
    if isinstance(extract, Adapted):
        images, given = extract.preprocess, extract.backbone
    if isinstance(extract, ADExtractor):
        kind, preprocess, network = "extractor", extract.preprocess, extract.backbone
        parts[EXTRACTOR] = extract.save_pretrained
        if extract.references is not None:
            if (banks := extract.references.banks) != 1:
                raise ValueError(f"a saved detector has one set of references for all images, not {banks}")
            tensors.update({f"{REFERENCES}{level}": bank for level, bank in enumerate(extract.references.levels)})
    elif isinstance(given, Backbone):
        kind, preprocess, network, backbone = "backbone", given.preprocess, given, backbone_config(given)
    config = DetectorConfig(
        detector=name,
        options=dataclasses.asdict(options),
        extract=kind,
        image_size=image_size,
        tensors={key: list(value.shape) for key, value in tensors.items()},
        facts=facts or {},
        probe=probe(extract, image_size, device_of(extract, tensors)),
        backbone=backbone,
        preprocess=preprocess,
        images=images,
        dtype=str(network.dtype).removeprefix("torch.") if network is not None else "float32",
    )
    return write_folder(folder, config, tensors, "detector", detector_card(config), parts)


def remember_photographs(folder: Path, digests: Iterable[str], full_scale: float | None) -> None:
    """Write into the config.json of a saved detector which photographs it was fitted on, and their full scale."""
    config = read_detector_config(folder)
    config = dataclasses.replace(config, photographs=sorted(set(digests)), full_scale=full_scale)
    with atomic_path(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")


def member(number: int) -> str:
    """Name of the folder of one member of a detector made of detectors."""
    return f"member-{number}"


def parts_of(config: Mapping[str, Any]) -> list[str]:
    """The folders beside a config.json that belong to the model, each with a config.json of its own."""
    if config.get("extract") == EXTRACTOR:
        return [EXTRACTOR]
    facts = config.get("facts")
    count = facts.get("members", 0) if isinstance(facts, Mapping) else 0
    if not isinstance(count, int) or not 0 <= count <= MOST_MEMBERS:
        raise ValueError(f"a detector of {count!r} members; expected 0 to {MOST_MEMBERS}")
    return [member(number) for number in range(count)]


def locate_model(folder: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Located:
    """Where a fitted detector (or an extractor) lies, with all that belongs to it; see `adpretrain.hub.locate`."""
    return locate(folder, parts=parts_of, **hub)


def read_detector_config(folder: str | os.PathLike[str]) -> DetectorConfig:
    """config.json of a saved detector. Raises ValueError if it is none, or of a newer library."""
    return read_folder_config(Path(folder), DetectorConfig, FORMAT_VERSION, "a detector's save_pretrained")


def load_detector(
    folder: str | os.PathLike[str],
    name: str,
    options: type[C],
    extract: Extract | None = None,
    device: str | torch.device | None = None,
    weights: str | os.PathLike[str] | None = None,
    **hub: Unpack[HubOptions],
) -> Loaded[C]:
    """Read what `save_detector` wrote, strictly.

    ``folder``: or "org/name" on the Hugging Face Hub, with ``revision`` and ``token`` as in `adpretrain.hub.locate`.
    ``extract``: use this instead of loading the saved one; an `ADExtractor` without references gets the saved ones.
    ``device``: of everything that is loaded; None = where ``extract`` is, or the CPU. ``weights``: a local file or
    folder of the backbone's weights, for machines without a network.

    Raises ValueError if the folder is not this detector's, was written by a newer library, holds other tensors than
    its config says, or if the features are not those it was fitted on.
    """
    folder = locate_model(folder, **hub).folder
    config = read_detector_config(folder)
    if config.detector != name:
        raise ValueError(f"{folder} holds a {config.detector!r} detector, not {name!r}: load it with its own class")
    chosen = from_dict(options, config.options, f"options in {folder / 'config.json'}")
    device = device if device is not None else device_of(extract)
    tensors = {key: value.to(device) for key, value in read_tensors(folder, config).items()}
    with put_together(folder):
        references = [tensors.pop(key) for key in _reference_keys(tensors)]
    extract = extract if extract is not None else _load_extract(folder, config, device, weights)
    if isinstance(extract, ADExtractor) and extract.references is None and references:
        with put_together(folder):
            like = extract.encode(fixed_picture(extract.preprocess.image_size, device_of(extract)))
            extract.set_references(ReferenceBank(references, [(m.shape[2], m.shape[3]) for m in like]))
    with put_together(folder):
        where = device_of(extract, tensors, device)
        found = probe(extract, config.image_size, where)
    _compare(found, config.probe, folder)
    return Loaded(chosen, extract, tensors, config.facts, config.image_size, where)


def read_tensors(folder: Path, config: DetectorConfig) -> dict[str, Tensor]:
    """model.safetensors of a saved detector: the tensors that its config lists. ValueError if they are others."""
    with put_together(folder):
        expected = {key: torch.empty(shape, device="meta") for key, shape in config.tensors.items()}
    return read_weights(folder, expected)


def _reference_keys(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted((key for key in tensors if key.startswith(REFERENCES)), key=lambda key: int(key.rpartition(".")[2]))


def device_of(
    extract: Extract | None, fitted: Mapping[str, Tensor] = {}, otherwise: str | torch.device = "cpu"
) -> torch.device:
    """Where an extract works: with its own tensors; a plain function, with those that were fitted on its features."""
    own = (*extract.parameters(), *extract.buffers()) if isinstance(extract, nn.Module) else ()
    for tensor in (*own, *fitted.values()):
        return tensor.device
    return torch.device(otherwise)


def _load_extract(
    folder: Path, config: DetectorConfig, device: str | torch.device, weights: str | os.PathLike[str] | None
) -> Extract:
    if config.dtype not in DTYPES:
        raise ValueError(f"{folder / 'config.json'}: dtype {config.dtype!r} is unknown; choose one of {DTYPES}")
    dtype = getattr(torch, config.dtype)
    if config.extract == "extractor":
        return ADExtractor.from_pretrained(part(folder, EXTRACTOR), device, weights).to(dtype)
    if config.extract == "given" or config.backbone is None:
        raise ValueError(f"{folder} was fitted on a function of its maker's: pass the same as extract=")
    backbone = saved_backbone(config.backbone, weights)
    if config.preprocess is not None:
        backbone.preprocess = config.preprocess
    backbone.to(device, dtype)
    return Adapted(backbone, config.images) if config.images is not None else backbone


def fixed_picture(side: int, device: torch.device) -> Tensor:
    """[1, 3, S, S] with values in 0..1. Raises ValueError for a side that no network takes."""
    if not 0 < side <= LARGEST_SIDE:
        raise ValueError(f"image_size {side}; expected 1 to {LARGEST_SIDE}")
    ramp = torch.linspace(0, 6, side)
    wave = torch.stack([(k * ramp[:, None]).sin() + ((4 - k) * ramp[None]).cos() for k in (1, 2, 3)])
    return (0.5 + wave / 4)[None].to(device)


@torch.no_grad()
def probe(extract: Extract, image_size: int, device: torch.device) -> list[list[float]]:
    """The features of the fixed picture, averaged over positions and groups of channels: up to `PARTS` per level."""
    picture = fixed_picture(image_size, device)
    encode = extract.encode if isinstance(extract, ADExtractor) and extract.references is None else extract
    features = encode(picture)
    means = [level[0].cpu().double().mean((1, 2))[None] for level in features]  # MPS has no float64
    return [F.adaptive_avg_pool1d(mean, min(PARTS, mean.shape[1]))[0].tolist() for mean in means]


def _compare(found: list[list[float]], saved: list[list[float]], folder: Path) -> None:
    if [len(level) for level in found] != [len(level) for level in saved]:
        raise ValueError(f"{folder} was fitted on features of {len(saved)} levels, these are of {len(found)} or others")
    for number, pair in enumerate(zip(found, saved, strict=True)):
        ours, theirs = (torch.tensor(values, dtype=torch.float64) for values in pair)
        difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-9))
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{folder} was fitted on other features: level {number} of a fixed picture differs by "
                f"{difference:.0%}. Were other weights loaded, or other references set?"
            )
