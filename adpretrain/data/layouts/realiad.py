"""Real-IAD: five views of every part, JSON splits, four resolutions.

``realiad_{256|512|1024|raw}/{category}/{OK|NG/{defect}}/S####/`` holds
``{category}_####_{OK|NG}_[{defect}_]C{1-5}_{time}.jpg`` and, beside it, the mask as ``.png`` (some releases:
``_mask.png``). A view of a defective part without a mask is a normal view (``of_defective_part``), unless its category
has not a single mask: then defective views cannot be told from normal ones, and all are defects without a mask. A file
whose name has no view C1 to C5 is left out, with a warning that names it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adpretrain.data.layouts.tree import existing_folder, images_in, inside, subfolders
from adpretrain.data.samples import GOOD, LeftOut, Sample
from adpretrain.parsing import read_json

VIEWS = ("C1", "C2", "C3", "C4", "C5")
_VIEW = re.compile(r"_(C[1-5])_[^_]*$")


def index_realiad(
    root: str | Path,
    categories: Sequence[str] = (),
    resolution: str = "",
    protocol: str = "",
    views: Sequence[str] = VIEWS,
) -> list[Sample]:
    """Samples of Real-IAD below ``root``.

    ``resolution``: "256", "512", "1024" or "raw"; "" takes the only one present (the smallest of several).
    ``protocol``: a folder of realiad_jsons ("realiad_jsons", "realiad_jsons_sv", "realiad_jsons_fuiad_0.1" ...), whose
    train and test lists are then used; "" walks the folders instead, every image being of split "train".

    Raises ValueError for a missing folder, category, resolution or split, naming those that exist, and for a path
    in a JSON file that leaves the set's folder.
    """
    path = existing_folder(root, "Real-IAD folder")
    images = _images_folder(path, resolution)
    found = sorted(folder.name for folder in images.iterdir() if (folder / "OK").is_dir())
    if not found:
        raise ValueError(f"{images} holds no category in the Real-IAD layout: expected {{category}}/OK/S####/*.jpg")
    if unknown := [name for name in categories if name not in found]:
        raise ValueError(f"categories {unknown} are not in {images}; found: {', '.join(found)}")
    samples: list[Sample] = []
    for category in categories or found:
        if protocol:
            samples += _with_normal_views(_from_json(path, images, category, protocol))
        else:
            samples += _with_normal_views(_from_folders(images / category))
    if nameless := [sample.image for sample in samples if sample.view is None]:
        listing = "\n".join(f"  {image}" for image in nameless)
        warnings.warn(f"{len(nameless)} images name no view C1-C5 and are left out:\n{listing}", LeftOut, stacklevel=2)
    return [sample for sample in samples if sample.view in views]


def _images_folder(root: Path, resolution: str) -> Path:
    order = ["256", "512", "1024", "raw"]
    present = [name for name in order if (root / f"realiad_{name}").is_dir()]
    if not present or (resolution and resolution not in present):
        asked = f"resolution {resolution!r} is not in" if present else "no realiad_{256,512,1024,raw} folder in"
        raise ValueError(f"{asked} {root}" + (f"; present: {', '.join(present)}" if present else ""))
    return root / f"realiad_{resolution or present[0]}"


def view_of(image: Path) -> str | None:
    """ "C1" ... "C5" from the file's name, None if it has none."""
    match = _VIEW.search(image.stem)
    return match.group(1) if match else None


def _photographs(folder: Path) -> list[Path]:
    return [file for file in images_in(folder) if file.suffix.lower() != ".png"]


def _from_folders(category: Path) -> list[Sample]:
    """The samples of one category's folders; every view of a defective part counts as defective."""
    samples = [
        Sample(image, None, category.name, GOOD, view_of(image), "train")
        for part in subfolders(category / "OK")
        for image in _photographs(part)
    ]
    for kind in subfolders(category / "NG"):
        for part in subfolders(kind):
            masks = {file.stem: file for file in images_in(part) if file.suffix.lower() == ".png"}
            for image in _photographs(part):
                mask = masks.get(image.stem) or masks.get(f"{image.stem}_mask")
                samples.append(Sample(image, mask, category.name, kind.name, view_of(image), "train"))
    return samples


def _with_normal_views(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of one category, with unmarked views of defective parts made normal if any view has a mask."""
    if not any(sample.anomalous and sample.mask for sample in samples):
        return list(samples)
    found = [replace(s, defect=GOOD, of_defective_part=True) if s.anomalous and s.mask is None else s for s in samples]
    if any(file.is_file() for sample in found for file in sample.mask_files):
        return found
    return [replace(sample, mask=None) for sample in found]  # the listed masks were not downloaded


def _from_json(root: Path, images: Path, category: str, protocol: str) -> list[Sample]:
    file = root / "realiad_jsons" / protocol / f"{category}.json"
    if not file.is_file():
        present = sorted(folder.name for folder in (root / "realiad_jsons").glob("*/"))
        raise ValueError(f"split file not found: {file}; protocols present: {', '.join(present) or 'none'}")
    try:
        content = read_json(file)
        normal, prefix = content["meta"]["normal_class"], content["meta"].get("prefix", "")
        folder = inside(images, prefix, f"the split of {category}")
        entries = [(split, entry) for split in ("train", "test") for entry in content[split]]
        return [_entry(folder, category, normal, split, entry) for split, entry in entries]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a Real-IAD split file: {type(error).__name__} {error}") from error


def _entry(folder: Path, category: str, normal: str, split: str, entry: dict[str, Any]) -> Sample:
    where = f"the split of {category}"
    if not isinstance(entry["anomaly_class"], str):
        raise TypeError(f"anomaly_class {entry['anomaly_class']!r} is not a name")
    image = inside(folder, entry["image_path"], where)
    mask = inside(folder, entry["mask_path"], where) if entry["mask_path"] else None
    defect = GOOD if entry["anomaly_class"] == normal else entry["anomaly_class"]
    return Sample(image, mask, category, defect, view_of(image), split)
