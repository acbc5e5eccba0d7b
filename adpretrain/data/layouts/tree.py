"""Functions that walk a benchmark's folders, shared by the layouts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adpretrain.data.samples import GOOD, Junk, LeftOut, Sample, is_image, refuse_missing

SPLITS = ("train", "validation", "test")
TRUTH = "ground_truth"  # folder of masks
Masks = Mapping[str, Path | tuple[Path, ...]]  # image stem -> its mask, or the masks to be merged


def existing_folder(root: str | Path, what: str = "folder") -> Path:
    """``root`` as a Path. Raises ValueError naming it if it is not a folder."""
    path = Path(root)
    if not path.is_dir():
        raise ValueError(f"{what} not found: {path}" + (" is a file, not a folder" if path.is_file() else ""))
    return path


def subfolders(folder: Path) -> list[Path]:
    """The folders in ``folder``, sorted, hidden ones (.ipynb_checkpoints) left out; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def is_hidden(file: Path, root: Path) -> bool:
    """Whether a file below ``root``, or a folder between them, is hidden, as .ipynb_checkpoints is."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def images_in(folder: Path) -> list[Path]:
    """The image files in ``folder`` itself, sorted; none if it does not exist."""
    return sorted(path for path in folder.iterdir() if is_image(path)) if folder.is_dir() else []


def by_stem(folder: Path) -> dict[str, Path]:
    """The image files in ``folder`` by name without suffix, so that masks are found whatever their suffix."""
    return {path.stem: path for path in images_in(folder)}


def inside(root: Path, name: str, where: str) -> Path:
    """``root / name``, for a name from a listing.

    Raises ValueError if the name (absolute, with "..", or a symbolic link) leads out of ``root``: a listing from
    elsewhere must not make us read other files.
    """
    path = root / name
    try:
        within = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # circular links, a zero byte, a name that is too long
        raise ValueError(f"path {name[:200]!r} in {where} cannot be followed: {error}") from error
    if not within:
        raise ValueError(f"path {name!r} in {where} leaves {root}")
    return path


def category_folders(root: str | Path, marker: str, layout: str, categories: Sequence[str] = ()) -> dict[str, Path]:
    """Folder of every category (or of the named ones) by name; ``root`` may also be one category's own folder.

    A category is a folder that holds the folder ``marker``, such as "train/good". A folder without it that has another
    split, as an interrupted copy leaves, is left out, with a warning that names it. Raises ValueError if there
    is no category, or if a named one is absent.
    """
    path = existing_folder(root)
    if (path / marker).is_dir():
        found = {path.resolve().name: path}
    else:
        folders = subfolders(path)
        found = {folder.name: folder for folder in folders if (folder / marker).is_dir()}
        cut = [f for f in folders if f.name not in found and any((f / split).is_dir() for split in SPLITS)]
        if found and cut and not categories:
            _warn_left_out([f"{folder}: there is no {marker}" for folder in cut])
    if not found:
        raise ValueError(f"{path} is not in the {layout} layout: expected {{category}}/{marker}/ folders")
    if unknown := [name for name in categories if name not in found]:
        raise ValueError(f"categories {unknown} are not in {path}; found: {', '.join(found)}")
    return {name: found[name] for name in categories or found}


def index_splits(
    categories: Mapping[str, Path],
    find_masks: Callable[[Path, Path], Masks],
    expected: str,
    normal: str = GOOD,
    inner: str = "",
    test: str = "test",
) -> list[Sample]:
    """Samples of ``{category}/{train|validation|test}/{normal|defect}/{inner}/*``; ``test`` is the test split's folder.

    ``find_masks`` is called with a category's and a defect's folder; ``expected`` says in errors where a mask should
    have been, e.g. "ground_truth/{defect}/{stem}.png" below the category's folder.

    A category without an image, and junk among the masks, are named in warnings. Raises ValueError if there is no image
    at all, `MissingMasks` if a defect has no mask though others of its category have one.
    """
    samples: list[Sample] = []
    missing: dict[Path, str] = {}
    for category, folder in categories.items():
        for split in SPLITS:
            kinds = subfolders(folder / (test if split == "test" else split))
            for kind in (kind for kind in kinds if kind.name != TRUTH):
                defect = GOOD if kind.name == normal else kind.name
                masks = {} if defect == GOOD else find_masks(folder, kind)
                for image in images_in(kind / inner):
                    mask = masks.get(image.stem) or None  # an empty folder of masks is no mask
                    if defect != GOOD and mask is None:
                        place = expected.format(split=split, defect=kind.name, stem=image.stem)
                        missing[image] = f"{image} is a defect without a mask: expected {folder / place}"
                    samples.append(Sample(image, mask, category, defect, None, split))
    if not samples:
        raise ValueError(f"no images in {', '.join(str(folder) for folder in categories.values())}")
    if empty := sorted(set(categories) - {sample.category for sample in samples}):
        _warn_left_out([f"{categories[name]}: there are no images" for name in empty])
    if junk := [file for folder in categories.values() for file in _junk(folder)]:
        told = f"{len(junk)} hidden or foreign files among the masks are ignored, such as {junk[0]}"
        warnings.warn(told, Junk, stacklevel=3)
    refuse_missing(samples, missing)
    return samples


def _junk(category: Path) -> list[Path]:
    """Files below a category's folders of masks that are hidden, lie in a hidden folder (.ipynb_checkpoints) or no
    pictures."""
    found = []
    for masks in (*category.glob(TRUTH), *category.glob(f"*/{TRUTH}")):
        files = sorted(file for file in masks.rglob("*") if file.is_file())
        found += [file for file in files if is_hidden(file, masks) or not is_image(file)]
    return found


def _warn_left_out(lines: Sequence[str]) -> None:
    listing = "\n".join(f"  {line}" for line in lines)
    warnings.warn(f"{len(lines)} categories are left out:\n{listing}", LeftOut, stacklevel=4)
