"""Real-IAD and Real-IAD Variety: five views of every part, JSON splits, several resolutions.

``realiad_{256|512|1024|raw}/{category}/{OK|NG/{defect}}/S####/`` holds
``{category}_####_{OK|NG}_[{defect}_]C{1-5}_{time}.jpg`` and, beside it, the mask as ``.png`` (some releases:
``_mask.png``). A view of a defective part without a mask is a normal view (``of_defective_part``), unless its category
has not a single mask: then defective views cannot be told from normal ones, and all are defects without a mask. A file
whose name has no view C1 to C5 is left out, with a warning that names it.

Real-IAD Variety (160 categories) differs in the name of its folder, ``realiadvariety_raw``, and its photographs are
``.png``, their masks ``_mask.png``.

The JSON splits lie in ``realiad_jsons/{protocol}/{category}.json``, or in any other folder whose name holds "_jsons".

The training lists of ``realiad_jsons_fuiad_{0.1|0.2|0.4}`` hold views of defective parts, to learn from normal
photographs among which nobody has looked for defects. They keep their labels, and are `Sample.noise`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adpretrain.data.layouts.tree import existing_folder, images_in, inside, subfolders
from adpretrain.data.samples import GOOD, LeftOut, Sample
from adpretrain.parsing import read_json

VIEWS = ("C1", "C2", "C3", "C4", "C5")
RESOLUTIONS = ("256", "512", "1024", "raw")
_VIEW = re.compile(r"_(C[1-5])_[^_]*$")


@dataclass(frozen=True)
class Release:
    """What differs between the two sets: how their folders of photographs begin, and whether these are .png, as masks
    are."""

    name: str
    prefix: str
    png: bool


REAL_IAD = Release("Real-IAD", "realiad", png=False)
VARIETY = Release("Real-IAD Variety", "realiadvariety", png=True)


def index_realiad(
    root: str | Path,
    categories: Sequence[str] = (),
    resolution: str = "",
    protocol: str = "",
    views: Sequence[str] = VIEWS,
    release: Release = REAL_IAD,
) -> list[Sample]:
    """Samples of Real-IAD below ``root``.

    ``resolution``: "256", "512", "1024" or "raw"; "" takes the only one present (the smallest of several).
    ``protocol``: the folder of lists ("realiad_jsons", "realiad_jsons_sv", "realiad_jsons_fuiad_0.1" ...) whose train
    and test lists are used; "" walks the folders instead, every image being of split "train".

    Raises ValueError for a missing folder, category, resolution or split, naming those that exist, and for a path
    in a JSON file that leaves the set's folder.
    """
    path = existing_folder(root, f"{release.name} folder")
    images = _images_folder(path, resolution, release)
    found = {folder.name: own for folder in subfolders(images) if (own := _parts_folder(folder))}
    if not found:
        raise ValueError(f"{images} holds no category in the {release.name} layout: expected {{category}}/OK/S####/*")
    if unknown := [name for name in categories if name not in found]:
        raise ValueError(f"categories {unknown} are not in {images}; found: {', '.join(found)}")
    samples: list[Sample] = []
    for category in categories or found:
        if protocol:
            samples += _with_normal_views(_from_json(path, images, category, protocol, release))
        else:
            samples += _with_normal_views(_from_folders(found[category], category, release))
    if nameless := [sample.image for sample in samples if sample.view is None]:
        listing = "\n".join(f"  {image}" for image in nameless)
        warnings.warn(f"{len(nameless)} images name no view C1-C5 and are left out:\n{listing}", LeftOut, stacklevel=2)
    return [sample for sample in samples if sample.view in views]


# Samples of Real-IAD Variety: arguments and errors as in `index_realiad`. ``protocol``: the folder that holds the set's
# own lists, "Real-IAD_Variety_jsons" or "realiadvariety_jsons".
index_realiad_variety = partial(index_realiad, release=VARIETY)


def _images_folder(root: Path, resolution: str, release: Release) -> Path:
    present = [name for name in RESOLUTIONS if (root / f"{release.prefix}_{name}").is_dir()]
    if not present or (resolution and resolution not in present):
        folders = f"{release.prefix}_{{{','.join(RESOLUTIONS)}}}"
        asked = f"resolution {resolution!r} is not in" if present else f"no {folders} folder in"
        raise ValueError(f"{asked} {root}" + (f"; present: {', '.join(present)}" if present else ""))
    return root / f"{release.prefix}_{resolution or present[0]}"


def _parts_folder(category: Path) -> Path | None:
    """The folder of a category that holds OK; some archives unpack into one more folder of the category's name."""
    return next((own for own in (category, category / category.name) if (own / "OK").is_dir()), None)


def view_of(image: Path) -> str | None:
    """ "C1" ... "C5" from the file's name, None if it has none."""
    match = _VIEW.search(image.stem)
    return match.group(1) if match else None


def _pairs(folder: Path, release: Release) -> list[tuple[Path, Path | None]]:
    """The photographs of one part, each with its mask or None."""
    files = images_in(folder)
    masks = {
        file.stem: file
        for file in files
        if file.suffix.lower() == ".png" and (file.stem.endswith("_mask") or not release.png)
    }
    photographs = [file for file in files if file not in masks.values()]
    return [(file, masks.get(file.stem) or masks.get(f"{file.stem}_mask")) for file in photographs]


def _from_folders(parts: Path, category: str, release: Release) -> list[Sample]:
    """The samples of one category's folders; every view of a defective part counts as defective."""
    samples = [
        Sample(image, None, category, GOOD, view_of(image), "train")
        for part in subfolders(parts / "OK")
        for image, _ in _pairs(part, release)
    ]
    return samples + [
        Sample(image, mask, category, kind.name, view_of(image), "train")
        for kind in subfolders(parts / "NG")
        for part in subfolders(kind)
        for image, mask in _pairs(part, release)
    ]


def _with_normal_views(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of one category, with unmarked views of defective parts made normal if any view has a mask."""
    if not any(sample.anomalous and sample.mask for sample in samples):
        return list(samples)
    found = [replace(s, defect=GOOD, of_defective_part=True) if s.anomalous and s.mask is None else s for s in samples]
    if any(file.is_file() for sample in found for file in sample.mask_files):
        return found
    return [replace(sample, mask=None) for sample in found]  # the listed masks were not downloaded


def _from_json(root: Path, images: Path, category: str, protocol: str, release: Release) -> list[Sample]:
    file = _list_file(root, category, protocol)
    try:
        content = read_json(file)
        meta = content.get("meta", {"normal_class": "OK", "prefix": category})
        folder = inside(images, meta.get("prefix", ""), f"the split of {category}")
        folder, normal = _parts_folder(folder) or folder, meta["normal_class"]
        entries = [(split, entry) for split in ("train", "test") for entry in content[split]]
        return [_entry(folder, category, normal, split, entry) for split, entry in entries]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a {release.name} split file: {type(error).__name__} {error}") from error


def _list_file(root: Path, category: str, protocol: str) -> Path:
    """The list of a category in the folder ``protocol``. Raises ValueError that names the folders that are there."""
    lists = sorted(root.glob(f"*_jsons*/**/{category}.json"))
    if found := [file for file in lists if file.parent.name == protocol]:
        return found[0]
    present = [file.parent.name for file in lists]
    raise ValueError(
        f"split file not found: {protocol}/{category}.json, in a folder of {root} with _jsons in its name; "
        f"protocols present: {', '.join(present) or 'none'}"
    )


def _entry(folder: Path, category: str, normal: str, split: str, entry: dict[str, Any]) -> Sample:
    where = f"the split of {category}"
    if not isinstance(entry["anomaly_class"], str):
        raise TypeError(f"anomaly_class {entry['anomaly_class']!r} is not a name")
    image = inside(folder, entry["image_path"], where)
    mask = inside(folder, entry["mask_path"], where) if entry["mask_path"] else None
    defect = GOOD if entry["anomaly_class"] == normal else entry["anomaly_class"]
    sample = Sample(image, mask, category, defect, view_of(image), split)
    if defect == GOOD and "NG" not in Path(entry["image_path"]).parts:
        return sample
    return replace(sample, of_defective_part=defect == GOOD, noise=split == "train")
