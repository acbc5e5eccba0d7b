"""The folder of a fitted detector: config.json, model.safetensors, a model card and, if it uses an `ADExtractor`,
extractor/. A detector made of others has one folder per member.

A fitted detector contains features of the customer's product: memory banks, means, and the references of its
extractor. Share the folder only with people who may see the product; `push_folder` makes a private repository by
default.

The folder never contains pickles or photographs, nor weights of a backbone but of a copy that a detector trained. It
names the backbone and the commit of its weights; its features of a fixed picture are saved too, so that a wrong
backbone is found when the detector is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from adpretrain._version import __version__
from adpretrain.backbones import Backbone, Extract
from adpretrain.config import BackboneConfig
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path
from adpretrain.hub.download import Located, locate
from adpretrain.parsing import from_dict, read_json
from adpretrain.preprocess import Preprocess
from adpretrain.references import ReferenceBank
from adpretrain.saved import (
    CARD_NAME,
    CONFIG_NAME,
    PLACEHOLDER,
    backbone_config,
    read_config,
    read_folder_config,
    read_weights,
    saved_backbone,
    write_folder,
)
from downstream.extracts import Adapted, device_of, fixed_picture, probe, refuse_other_features

if TYPE_CHECKING:
    from adpretrain.hub.upload import Published

FORMAT_VERSION = 2  # 1 knows no region of interest; a detector without one is still written as 1
EXTRACTOR = "extractor"
REFERENCES, INSIDE = "references.", "inside."  # of each level: features; which of them are in the region of interest
ROI, ROI_EACH = "roi", "roi_each"
MOST_MEMBERS = 64
DTYPES = ("float32", "float64", "float16", "bfloat16")
NOTICE = (
    "A fitted detector holds features of the photographs it was fitted on: memory banks, means, references. Anyone "
    "who can read it may learn much about the product. Share it only with people who may see the product."
)
_USAGE = """```python
from downstream import detector_from_pretrained

detector = detector_from_pretrained("{repo_id}")
prediction = detector.predict(images)  # [B, 3, {side}, {side}], prepared by detector.extract.preprocess
print(prediction.scores)  # one score per image; prediction.maps holds one map each
```"""


@dataclass(frozen=True)
class DetectorConfig:
    """The content of a detector's config.json.

    Args:
        detector: name of the detector, a key of `downstream.detectors.DETECTORS`.
        options: options of the detector.
        extract: source of its features: a raw "backbone", an "extractor" (saved in the folder), or another function
            ("given"), which must be passed again on loading; "members" for a detector made of others.
        image_size: side of the images it was fitted on, in pixels.
        tensors: shapes of the tensors in model.safetensors, checked on loading.
        facts: further numbers of the fitted state.
        probe: features of a fixed picture, a few averages per level.
        backbone: the network, if ``extract`` is "backbone".
        preprocess: preprocessing of photographs, if known; for "backbone", that of the backbone.
        images: preprocessing of photographs if the backbone is given another network's images (`Adapted`).
        dtype: precision of the network.
        photographs: digests of the photographs that it was fitted on and of its references (`Photo.digest`), so that
            it is not calibrated on them; empty if it was fitted on tensors in Python, or by an old version.
        full_scale: full scale of those photographs, if they have more than 8 bits (`adpretrain.photographs`).
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
    format_version: int = 1
    library_version: str = __version__


class HubOptions(TypedDict, total=False):
    """``revision`` and access ``token`` of a detector that is "org/name" on the Hugging Face Hub."""

    revision: str | None
    token: str | bool | None


@dataclass(frozen=True)
class Loaded:
    """The content of a detector's folder: ``options`` as the detector's dataclass, tensors on the device, and the
    loaded extract or members."""

    folder: Path
    options: Any
    extract: Any
    members: list[Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    image_size: int
    device: torch.device


def save_detector(
    folder: str | os.PathLike[str],
    name: str,
    options: dict[str, Any],
    made_of: Extract | Sequence[Callable[[Path], object]],
    tensors: Mapping[str, Tensor],
    image_size: int,
    facts: dict[str, Any],
) -> Path:
    """Write a fitted detector and return its path; the folder appears, or is replaced, only when complete.

    ``made_of`` is the extract, or the functions that save the members. THE FOLDER HOLDS FEATURES OF THE PRODUCT,
    including the references of an extractor; see the top of this file.

    Raises ValueError if ``folder`` holds other files, or an extractor has a bank of references for every image.
    """
    parts: dict[str, Callable[[Path], object]] = {}
    given: Any
    of: dict[str, Any] = {"extract": "given"}
    if isinstance(made_of, Sequence):
        parts = {member(number): save for number, save in enumerate(made_of)}
        of, facts = {"extract": "members"}, {"members": len(parts), **facts}
    else:
        tensors = {**tensors, **_references(made_of)}
        images, given = (made_of.preprocess, made_of.backbone) if isinstance(made_of, Adapted) else (None, made_of)
        if isinstance(given, ADExtractor):
            parts[EXTRACTOR] = given.save_pretrained
            of = {"extract": EXTRACTOR, "preprocess": given.preprocess, "dtype": _name(given.backbone.dtype)}
        elif isinstance(given, Backbone):
            of = {"extract": "backbone", "preprocess": given.preprocess, "dtype": _name(given.dtype)}
            of |= {"backbone": backbone_config(given), "images": images}
        of["probe"] = probe(made_of, image_size, device_of(made_of, tensors))
    shapes = {key: list(value.shape) for key, value in tensors.items()}
    version = FORMAT_VERSION if ROI in tensors or ROI_EACH in facts else 1
    config = DetectorConfig(
        name, options, image_size=image_size, tensors=shapes, facts=facts, format_version=version, **of
    )
    return write_folder(folder, config, tensors, "detector", detector_card(config), parts)


def _references(extract: Extract) -> dict[str, Tensor]:
    if not isinstance(extract, ADExtractor) or extract.references is None:
        return {}
    if (banks := extract.references.banks) != 1:
        raise ValueError(f"a saved detector has one set of references for all images, not {banks}")
    inside = {f"{INSIDE}{level}": mask_N for level, mask_N in enumerate(extract.references.inside or ())}
    return {f"{REFERENCES}{level}": bank_1NC for level, bank_1NC in enumerate(extract.references.levels)} | inside


def with_roi(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], roi: Tensor | None, each: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Add the region of interest that a detector was fitted with to its state."""
    return {**tensors, **({} if roi is None else {ROI: roi})}, {**facts, **({ROI_EACH: True} if each else {})}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def remember_photographs(folder: Path, digests: Iterable[str], full_scale: float | None) -> None:
    """Add the photographs that a saved detector was fitted on, and their full scale, to its config.json."""
    config = read_detector_config(folder)
    config = dataclasses.replace(config, photographs=sorted(set(digests)), full_scale=full_scale)
    with atomic_path(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")


def member(number: int) -> str:
    """Return the name of the folder of one member of a detector made of others."""
    return f"member-{number}"


def parts_of(config: Mapping[str, Any]) -> list[str]:
    """List the subfolders that belong to a model, each with its own config.json."""
    if config.get("extract") == EXTRACTOR:
        return [EXTRACTOR]
    facts = config.get("facts")
    count = facts.get("members", 0) if isinstance(facts, Mapping) else 0
    if not isinstance(count, int) or not 0 <= count <= MOST_MEMBERS:
        raise ValueError(f"a detector with {count!r} members; expected 0 to {MOST_MEMBERS}")
    return [member(number) for number in range(count)]


def locate_model(folder: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Located:
    """Find the folder of a fitted detector or an extractor, and its parts; see `adpretrain.hub.download.locate`."""
    return locate(folder, parts=parts_of, **hub)


def read_detector_config(folder: str | os.PathLike[str]) -> DetectorConfig:
    """Read config.json of a saved detector. Raises ValueError if it is not one, or if a newer library wrote it."""
    return read_folder_config(Path(folder), DetectorConfig, FORMAT_VERSION, "a detector's save_pretrained")


def part(folder: Path, name: str) -> Path:
    """Return the folder of a part of a model. Raises ValueError for a link, which could lead back to the folder."""
    if (folder / name).is_symlink():
        raise ValueError(f"{folder / name} is a link: a saved model holds copies of its parts")
    return folder / name


def load_detector(
    folder: str | os.PathLike[str],
    name: str,
    options: type | None,
    extract: Extract | Sequence[Extract] | None = None,
    device: str | torch.device | None = None,
    weights: str | os.PathLike[str] | None = None,
    load_member: Callable[..., Any] | None = None,
    **hub: Unpack[HubOptions],
) -> Loaded:
    """Read a folder written by `save_detector`, strictly.

    ``folder`` can also be "org/name" on the Hugging Face Hub, with ``revision`` and ``token`` as in
    `adpretrain.hub.download.locate`. ``extract`` is used instead of the saved one; an `ADExtractor` without references
    gets the saved ones. All members use it; a list gives one to each. ``device`` is that of everything loaded; None =
    that of ``extract``, or the CPU. ``weights`` is a local file or folder of the backbone's weights, for machines
    without a network. ``load_member(folder, extract, device, weights)`` loads the members of a detector made of others.
    Raises ValueError if the folder holds another detector, was written by a newer library, has other tensors than its
    config says, or if the features are not those it was fitted on.
    """
    folder = locate_model(folder, **hub).folder
    config = read_detector_config(folder)
    if config.detector != name:
        raise ValueError(f"{folder} holds a {config.detector!r} detector, not {name!r}: load it with its own class")
    chosen = from_dict(options, config.options, f"options in {folder / CONFIG_NAME}") if options else None
    if load_member is not None:
        members = _load_members(folder, config, extract, device, weights, load_member)
        where = torch.device(device or "cpu")
        tensors = _read_tensors(folder, config, where)
        return Loaded(folder, chosen, None, members, tensors, config.facts, config.image_size, where)
    given: Any = extract
    device = device if device is not None else device_of(given)
    tensors = _read_tensors(folder, config, device)
    with put_together(folder):
        numbered = {int(key.removeprefix(REFERENCES)): key for key in tensors if key.startswith(REFERENCES)}
        references = [tensors.pop(numbered[level]) for level in sorted(numbered)]
        inside = [tensors.pop(f"{INSIDE}{level}") for level in sorted(numbered) if f"{INSIDE}{level}" in tensors]
    given = given if given is not None else _load_extract(folder, config, device, weights)
    if isinstance(given, ADExtractor) and given.references is None and references:
        with put_together(folder):
            like = given.encode(fixed_picture(given.preprocess.image_size, device_of(given)))
            grids = [(m.shape[2], m.shape[3]) for m in like]
            given.set_references(ReferenceBank(references, grids, inside=inside or None))
    with put_together(folder):
        where = device_of(given, tensors, device)
        found = probe(given, config.image_size, where)
    refuse_other_features(found, config.probe, folder)
    return Loaded(folder, chosen, given, [], tensors, config.facts, config.image_size, where)


def _read_tensors(folder: Path, config: DetectorConfig, device: str | torch.device) -> dict[str, Tensor]:
    """Read the tensors that the config lists from model.safetensors. Raises ValueError if the file differs."""
    with put_together(folder):
        expected = {key: torch.empty(shape, device="meta") for key, shape in config.tensors.items()}
    return {key: value.to(device) for key, value in read_weights(folder, expected).items()}


def _load_members(
    folder: Path,
    config: DetectorConfig,
    extract: Extract | Sequence[Extract] | None,
    device: str | torch.device | None,
    weights: str | os.PathLike[str] | None,
    load: Callable[..., Any],
) -> list[Any]:
    names = parts_of(vars(config))
    extracts = list(extract) if isinstance(extract, Sequence) else [extract] * len(names)
    if len(extracts) != len(names):
        raise ValueError(
            f"{len(extracts)} extracts for the {len(names)} members of {folder}; give one for each, or one for all"
        )
    return [load(part(folder, name), one, device, weights) for name, one in zip(names, extracts, strict=True)]


def _load_extract(
    folder: Path, config: DetectorConfig, device: str | torch.device, weights: str | os.PathLike[str] | None
) -> Extract:
    if config.dtype not in DTYPES:
        raise ValueError(f"{folder / 'config.json'}: dtype {config.dtype!r} is unknown; choose one of {DTYPES}")
    dtype = getattr(torch, config.dtype)
    if config.extract == "extractor":
        return ADExtractor.from_pretrained(part(folder, EXTRACTOR), device, weights).to(dtype)
    if config.extract == "given" or config.backbone is None:
        raise ValueError(f"{folder} was fitted with a user's own function as extract: pass the same one as extract=")
    backbone = saved_backbone(config.backbone, weights)
    if config.preprocess is not None:
        backbone.preprocess = config.preprocess
    backbone.to(device, dtype)
    return Adapted(backbone, config.images) if config.images is not None else backbone


@contextlib.contextmanager
def put_together(folder: Path) -> Iterator[None]:
    """Raise a ValueError that names the folder if options, tensors and features of a saved detector do not match.

    Each file can be valid and still contradict another. The first use of such a detector would fail with an error about
    shapes, far from the cause.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{folder}: the detector's options, tensors and features do not fit together ({type(error).__name__}: "
            f"{reason}): fit it again"
        ) from error


def detector_card(config: DetectorConfig, repo_id: str = PLACEHOLDER) -> str:
    """Return the text of README.md of a fitted detector."""
    from huggingface_hub import ModelCardData

    from adpretrain.card import TAGS, table

    data = ModelCardData(library_name="adpretrain", tags=[*TAGS, config.detector])
    network = {"extractor": "an extractor (`extractor/`)", "given": "a user's own function"}.get(config.extract)
    if config.backbone is not None:
        network = f"the backbone `{config.backbone.name}`"
    prepared = config.images or config.preprocess
    facts = table(
        ("what", "value"),
        [
            ("detector", f"`{config.detector}`"),
            ("features", network or "those of its members"),
            ("input", f"{config.image_size} x {config.image_size} pixels" if prepared is None else prepared.in_words),
            ("options", f"`{json.dumps(config.options)}`"),
            ("tensors", ", ".join(f"`{name}` {shape}" for name, shape in config.tensors.items())),
            ("adpretrain", f"`{config.library_version}`"),
        ],
    )
    usage = _USAGE.format(repo_id=repo_id, side=config.image_size)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id}\n\n> **{NOTICE}**\n\n"
        f"An anomaly detector, fitted on photographs of one product. Made with `adpretrain`.\n\n"
        f"## Use\n\n{usage}\n\n## What it is\n\n{facts}\n"
    )


def publish_saved(folder: Path, repo_id: str, *, private: bool, detector: bool = True, **options: Any) -> Published:
    """Publish a folder that we may change: its card gets the repository's name. For a detector, a warning says what the
    folder holds."""
    from adpretrain.hub.upload import publish

    if detector:
        public = "" if private else " THE REPOSITORY IS PUBLIC: everybody can read it."
        warnings.warn(f"{NOTICE}{public}", stacklevel=3)
    readme = folder / CARD_NAME
    readme.write_text(readme.read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id), encoding="utf-8")
    return publish(folder, repo_id, private=private, **options)


def push_folder(folder: Path, repo_id: str, *, private: bool | None = None, **options: Any) -> Published:
    """Publish a saved extractor or fitted detector without loading it.

    The folder is checked before anything is copied, because it may hold links and pipes, or be far too large.

    ``private``: by default a detector is private and an extractor public. ``options`` are tag, message and dry_run of
    `publish`. Raises ValueError, with the fix, if the folder is neither, and the errors of `publish`.
    """
    from adpretrain.card import card
    from adpretrain.hub.contents import files_to_publish

    detector = is_detector(folder)
    files_to_publish(folder)
    text = detector_card(read_detector_config(folder)) if detector else card(read_config(folder))
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(shutil.copytree(folder, Path(scratch) / folder.resolve().name, symlinks=True))
        if not (staged / CARD_NAME).is_file():
            (staged / CARD_NAME).write_text(text, encoding="utf-8")
        try:
            private = detector if private is None else private
            return publish_saved(staged, repo_id, private=private, detector=detector, **options)
        except ValueError as error:
            raise ValueError(str(error).replace(str(staged), str(folder))) from error


def is_detector(folder: Path) -> bool:
    """Say whether a saved model is a fitted detector or else an extractor. Raises ValueError for any other folder."""
    if not (folder / CONFIG_NAME).is_file():
        what = f"has no {CONFIG_NAME}" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {what}: expected a folder written by save_pretrained")
    content = read_json(folder / CONFIG_NAME)
    return isinstance(content, dict) and "detector" in content
