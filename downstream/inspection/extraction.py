"""Write the feature maps of a folder's photographs to disk, to be read repeatedly or by other programs.

A run writes either a folder of shards, one per batch, or one .safetensors file; each holds level_0, level_1, ... of
shape [images, C_l, H_l, W_l]. index.json (or the file's name with .json) says which row is which image. At most two
batches are in memory, whatever the number of images.

Shapes: B images of a batch, L levels, C_l channels, H_l x W_l tokens.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adpretrain import ADExtractor, __version__
from adpretrain.backbones import Backbone, FeatureMaps
from adpretrain.extractor import backbone_config
from adpretrain.files import atomic_folder, atomic_path
from adpretrain.progress import Progress
from adpretrain.saved import save_tensors
from downstream.inspection.photos import (
    Photo,
    PhotoReader,
    Unreadable,
    find_images,
    printable,
    relative_name,
)
from downstream.terminal import no_progress

INDEX = "index.json"
SHARD = "features-{:05d}.safetensors"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Extraction:
    """A finished run: the content of its index, and the path ``out`` of the features."""

    index: dict[str, Any]
    out: Path

    @property
    def exit_code(self) -> int:
        """3 if images were unreadable, else 0."""
        return 3 if self.index["unreadable"] else 0


def extract_folder(
    model: Backbone | ADExtractor,
    images: Path,
    out: Path,
    reader: PhotoReader,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> Extraction:
    """Write the feature maps of every readable image below ``images``, in path order.

    ``out`` is a folder, or one file if it ends in .safetensors; it is created, or replaces an earlier run's, only when
    complete. The index lists unreadable images. Raises ValueError if there are no images, none can be read, or ``out``
    holds files that are not an earlier run's; OSError if it cannot be written.
    """
    paths, single = find_images(images, exclude=out), out.suffix == SUFFIX
    refuse_others(out, single)
    with contextlib.ExitStack() as stack:
        if single:
            listed, joined = (stack.enter_context(atomic_path(path)) for path in (out.with_suffix(".json"), out))
            temporary = tempfile.mkdtemp(prefix=f".{out.stem}.", suffix=".tmp", dir=out.parent)
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            folder = Path(temporary)
        else:
            folder = stack.enter_context(atomic_folder(out))
        index = write_shards(model, images, paths, folder, reader, device, progress)
        if not index["images"]:
            reasons = [entry["reason"] for entry in index["unreadable"]]
            raise ValueError(f"none of the {len(paths)} images could be read, the first because: {reasons[0]}")
        if single:
            shards = list(dict.fromkeys(entry["file"] for entry in index["images"]))
            for row, entry in enumerate(index["images"]):
                entry |= {"file": out.name, "row": row}
            join([folder / shard for shard in shards], joined)
            _write_json(listed, index)  # index and features are both written, or neither
        else:
            _write_json(folder / INDEX, index)
    return Extraction(index, out)


def refuse_others(out: Path, single: bool) -> None:
    """Raise ValueError if writing ``out`` would replace anything but an earlier run's features."""
    if single:
        if out.is_dir():
            raise ValueError(f"{printable(out)} is a folder: name a file, or a folder without {SUFFIX}")
        beside = out.with_suffix(".json")
        for path in (out, beside):
            if path.exists() and not _is_index(beside):
                raise ValueError(
                    f"{printable(path)} exists and was not written by an earlier run ({printable(beside)} is no index "
                    "of features): name another file"
                )
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{printable(out)} is a file: name a folder, or a file ending in {SUFFIX}")
    ours = _is_index(out / INDEX)
    others = [
        path.name
        for path in (out.iterdir() if out.is_dir() else ())
        if not ours or (path.name != INDEX and not (path.name.startswith("features-") and path.suffix == SUFFIX))
    ]
    if others:
        raise ValueError(f"{printable(out)} holds other files ({printable(sorted(others)[0])} ...): name a new folder")


def _is_index(path: Path) -> bool:
    """Say whether a file is the index of an earlier run and not some other JSON file."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return isinstance(content, dict) and {"images", "unreadable", "levels", "images_folder"} <= content.keys()
    return False


def write_shards(
    model: Backbone | ADExtractor,
    images: Path,
    paths: Sequence[Path],
    folder: Path,
    reader: PhotoReader,
    device: torch.device | str,
    progress: Progress,
) -> dict[str, Any]:
    """Write one safetensors file per batch to ``folder`` and return the index."""
    rows, unreadable, levels = list[dict[str, Any]](), list[dict[str, str]](), list[dict[str, Any]]()
    done = 0
    for batch in reader.batches(paths):
        unreadable += [
            {"path": printable(relative_name(images, item.path)), "reason": item.reason}
            for item in batch
            if isinstance(item, Unreadable)
        ]
        photos = [item for item in batch if isinstance(item, Photo)]
        if photos:
            maps = model(torch.stack([photo.pixels for photo in photos]).to(device))
            shard = SHARD.format(done // reader.batch_size)
            save_tensors({f"level_{level}": feature.cpu() for level, feature in enumerate(maps)}, folder / shard)
            levels = levels or _levels(model, maps)
            names = [printable(relative_name(images, photo.path)) for photo in photos]
            rows += [{"path": name, "file": shard, "row": row} for row, name in enumerate(names)]
        done += len(batch)
        progress("extracting", done, len(paths))
    return {
        "images": rows,
        "unreadable": unreadable,
        "levels": levels,
        "backbone": asdict(backbone_config(model if isinstance(model, Backbone) else model.backbone)),
        "features": "backbone" if isinstance(model, Backbone) else "extractor",
        "preprocess": model.preprocess.to_dict(),
        "images_folder": printable(images),
        "library_version": __version__,
    }


def _levels(model: Backbone | ADExtractor, maps: FeatureMaps) -> list[dict[str, Any]]:
    numbers = (model if isinstance(model, Backbone) else model.backbone).levels
    return [
        {
            "tensor": f"level_{level}",
            "number": number,
            "channels": feature.shape[1],
            "grid": list(feature.shape[2:]),
            "dtype": str(feature.dtype).removeprefix("torch."),
        }
        for level, (number, feature) in enumerate(zip(numbers, maps, strict=True))
    ]


def join(shards: Sequence[Path], target: Path) -> None:
    """Write the rows of all shards, in order, to one safetensors file, one tensor of one shard at a time.

    The file has 8 bytes of header length, a JSON header of dtypes, shapes and offsets, then the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    with safe_open(shards[0], "pt") as first:
        names = list(first.keys())
    for name in names:
        slices = []
        for shard in shards:
            with safe_open(shard, "pt") as file:
                slices.append(file.get_slice(name))
                shape, dtype = slices[-1].get_shape(), slices[-1].get_dtype()
                rows = shape[0] + (header[name]["shape"][0] if name in header else 0)
                header[name] = {"dtype": dtype, "shape": [rows, *shape[1:]]}
    for name in names:
        with safe_open(shards[0], "pt") as first:
            size = first.get_tensor(name)[:1].nbytes
        start, end = end, end + size * header[name]["shape"][0]
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors must start at a multiple of 8 bytes
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for shard in shards:
                with safe_open(shard, "pt") as source:
                    file.write(source.get_tensor(name).view(torch.uint8).numpy().tobytes())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
