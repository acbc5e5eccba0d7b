"""Hugging Face data sets: Hub repositories, and folders of `save_to_disk`, of parquet files or of images.

A `Sample` is always a file. Images that a set holds as bytes are written, one at a time and unchanged, to files named
by the hash of their content (folder "adpretrain" of the datasets cache); images that are files are used in place.
No code of a repository is ever run.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from adpretrain.data.layouts.detect import HUB
from adpretrain.data.layouts.metadata import FIX, choose_columns, defect_of, index_metadata, metadata_files, split_of
from adpretrain.data.layouts.tree import existing_folder
from adpretrain.data.samples import GOOD, Sample, refuse_missing
from adpretrain.extras import need
from adpretrain.files import atomic_path

_REPOSITORY = re.compile(rf"{HUB}/?(?:datasets/)?(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@([\w./-]+))?")


def index_hf(
    root: str | Path, columns: Mapping[str, str] | None = None, cache: str | Path | None = None
) -> list[Sample]:
    """Samples of a local folder or of "hf://org/name" (or "hf://org/name@revision").

    ``columns`` maps image, mask, label, category and split to the set's own names ("" = not used); missing roles are
    guessed by usual names (`adpretrain.data.layouts.metadata.GUESSES`). Without a label column an image is anomalous if
    its mask has a marked pixel. Without a category column the category is the subset's name, or the set's if it has
    only one. A set without splits is of split "train". ``cache``: folder for images that are not files.

    Raises ValueError if the set cannot be loaded, a column is missing or of another type, a label is not understood,
    no image is normal, or a row's file lies outside the set; `MissingMasks` if a defect has no mask though others
    of its category have one.
    """
    if not str(root).startswith(HUB) and (listings := metadata_files(existing_folder(root))):
        found = [pair for file in listings for pair in index_metadata(Path(root), file, columns or {})]
    else:
        found = list(_index_tables(root, columns or {}, stored_files(root, cache)))
    samples = [sample for sample, _ in found]
    if not any(sample.defect == GOOD for sample in samples):
        kinds = ", ".join(sorted({sample.defect for sample in samples})[:10]) or "none, no rows"
        raise ValueError(f"no image of {root} is normal; labels found: {kinds}; name another column with columns.label")
    missing = {
        sample.image: f"{sample.image} is a defect without a mask: expected one in {where}"
        for sample, where in found
        if sample.anomalous and sample.mask is None
    }
    refuse_missing(samples, missing)
    return samples


def _index_tables(root: str | Path, columns: Mapping[str, str], files: _Files) -> Iterator[tuple[Sample, str]]:
    """(sample, its place in words) for every row of every subset and split."""
    for table in _tables(root):
        kinds = {name: _kind(feature) for name, feature in table.data.features.items()}
        chosen = choose_columns(kinds, columns, table.name)
        for role in ("image", "mask"):
            if role in chosen and kinds[chosen[role]] != "image":
                listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
                column = f"column {chosen[role]!r} of {table.name} holds no images but {kinds[chosen[role]]}"
                raise ValueError(f"{column}; columns found: {listing}; {FIX}")
        for number, row in enumerate(_rows(table, chosen)):
            where = f"row {number} of {table.name}"
            yield _sample(row, table, files, where), where


def _kind(feature: Any) -> str:
    """ "image" for columns that `datasets.Image` can read: encoded bytes, also as other libraries write them."""
    if isinstance(feature, dict) and {"bytes", "path"} <= set(feature):
        return "image"
    kind = str(getattr(feature, "dtype", type(feature).__name__))
    return "image" if type(feature).__name__ == "Image" or kind in ("binary", "large_binary") else kind


@dataclass(frozen=True)
class _Table:
    """One split of one subset, on disk."""

    category: str
    split: str
    data: Any  # datasets.Dataset

    @property
    def name(self) -> str:
        return f"{self.category}/{self.split}"


def _tables(root: str | Path) -> Iterator[_Table]:
    """Every subset and split; nothing is read into memory."""
    need("datasets", "datasets")
    import datasets

    path, revision = address(root)
    try:
        if any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            subsets = {"": datasets.load_from_disk(path)}
        else:
            names = datasets.get_dataset_config_names(path, revision=revision)
            subsets = {name: _load(path, name, revision) for name in names}
    except Exception as error:  # the library's exceptions have no common base
        raise ValueError(f"cannot load Hugging Face data set {root}: {type(error).__name__}: {error}") from error
    for name, subset in subsets.items():
        category = name if len(subsets) > 1 else Path(path).name
        lone = not isinstance(subset, datasets.DatasetDict)
        for split, data in ({str(subset.split or "train"): subset} if lone else subset).items():
            yield _Table(category, split_of(split, str(root)), data)


def _load(path: str, name: str, revision: str | None) -> Any:
    """`datasets.load_dataset`, without reading whole parquet files into memory (if the library is recent)."""
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    builder = datasets.load_dataset_builder(path, name, revision=revision)
    if "references" in (builder.config.data_files or ()):  # only `adpretrain.data.shards` has this split
        raise ValueError("these are shards for pretraining, which data.name shards streams")
    if hasattr(builder.config, "fragment_scan_options"):
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)
        builder.config.batch_size = 16
    builder.download_and_prepare()
    return builder.as_dataset()


def address(root: str | Path) -> tuple[str, str | None]:
    """The arguments of `load_dataset`: a local folder's absolute path, or a repository and its revision."""
    if not str(root).startswith(HUB):
        return str(existing_folder(root).resolve()), None  # a relative path could be taken for a repository
    match = _REPOSITORY.fullmatch(str(root))
    if match is None:
        raise ValueError(f"{str(root)!r} is not a Hub data set; expected hf://org/name or hf://org/name@revision")
    if Path(match[1]).exists():
        raise ValueError(
            f"{match[1]} is also a local folder, which would be read instead of the Hub's; start elsewhere"
        )
    return match[1], match[2]


def _rows(table: _Table, chosen: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Rows as {role: value}: images as {"bytes", "path"} instead of decoded, classes by name."""
    import datasets
    from datasets.utils import tqdm

    data = table.data
    for role in ("image", "mask"):
        if role in chosen:
            data = data.cast_column(chosen[role], datasets.Image(decode=False))
    names = {role: getattr(data.features[column], "names", None) for role, column in chosen.items()}
    for row in tqdm(data.select_columns(sorted(set(chosen.values()))), desc=f"reading {table.name}", disable=None):
        values = {role: row[column] for role, column in chosen.items()}
        for role, known in names.items():
            if known and values[role] is not None and 0 <= values[role] < len(known):
                values[role] = known[values[role]]
        yield values


def _sample(row: Mapping[str, Any], table: _Table, files: _Files, where: str) -> Sample:
    image, mask = files.of(row["image"], where), files.of(row.get("mask"), where)
    if image is None:
        raise ValueError(f"{where} has no image")
    split = split_of(str(row["split"]), where) if "split" in row else table.split
    return Sample(image, mask, str(row.get("category", table.category)), defect_of(row, mask, where), None, split)


@dataclass(frozen=True)
class _Files:
    """Provides images as files: those in the ``allowed`` folders in place, bytes as new files in ``store``."""

    allowed: tuple[Path, ...]
    store: Path

    def of(self, cell: Mapping[str, Any] | None, where: str) -> Path | None:
        if cell is None:
            return None
        content, name = cell["bytes"], cell["path"]
        if content is None:
            # A row may name any file of this computer, so only files inside the set are read.
            if not any(Path(name).resolve().is_relative_to(folder) for folder in self.allowed):
                fix = "move it inside, or write the set with save_to_disk, which embeds images"
                raise ValueError(f"path {name!r} in {where} leaves the data set; {fix}")
            return Path(name)
        digest = hashlib.sha256(content).hexdigest()
        path = self.store / digest[:2] / f"{digest}{_suffix(content)}"
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        return path


def stored_files(root: str | Path, cache: str | Path | None = None) -> _Files:
    """The folders in which the images of a set are read and written."""
    need("datasets", "datasets")
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    downloads = Path(datasets.config.HF_DATASETS_CACHE)
    folders = [downloads, Path(datasets.config.EXTRACTED_DATASETS_PATH), Path(HF_HUB_CACHE)]
    if not str(root).startswith(HUB):
        folders.append(Path(root))
    return _Files(tuple(folder.resolve() for folder in folders), Path(cache or downloads / "adpretrain"))


def _suffix(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return f".{(image.format or 'unknown').lower()}"
    except Exception:  # reading the file reports the error
        return ".unknown"
