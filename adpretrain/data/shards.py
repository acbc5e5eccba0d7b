"""A pretraining set as Parquet shards, in a folder or a repository of the Hugging Face Hub.

``data/train-00000-of-00192.parquet`` ... hold every photograph once, in random order; the shards' numbers of every
category, view and defect differ by at most one. ``data/references-00000-of-00001.parquet`` holds some normal
photographs of every category and view again, from which references are drawn until the stream has brought others.
``data/held_out-00000-of-00001.parquet``, if any, holds whole categories that are never trained on. A row is an image's
file (unchanged bytes), its mask's file or null, category, defect ("good" = normal), view, split, of_defective_part and
key, its former path, used only as a name. ``index.json`` has all counts, so that no file must be scanned.

No code of a repository is run, nothing is unpickled, and no name in a row is used as a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adpretrain.data.huggingface import address, stored_files
from adpretrain.data.layouts.detect import HUB
from adpretrain.data.samples import GOOD, Sample
from adpretrain.extras import need
from adpretrain.parsing import LARGEST, from_dict

INDEX = "index.json"
FORMAT = 2  # format 1 trained on unmarked views of defective parts
PARTS = ("train", "references", "held_out")
FILE = re.compile(rf"data/({'|'.join(PARTS)})-\d{{5}}-of-\d{{5}}\.parquet")


@dataclass(frozen=True)
class Photograph:
    """One row: files as bytes, still encoded."""

    image: bytes
    mask: bytes | None
    category: str
    defect: str
    view: str | None
    split: str
    of_defective_part: bool
    key: str

    @property
    def normal(self) -> bool:
        return self.defect == GOOD

    @property
    def size(self) -> int:
        """Bytes of its image and mask files."""
        return len(self.image) + len(self.mask or b"")

    @property
    def group(self) -> str:
        """The group that shares references: "category/view", or the category if there are no views."""
        return group_name(self.category, self.view)

    @property
    def index(self) -> int:
        """A number below 2^60 that is derived from the key, to identify the photograph."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") >> 4


COLUMNS = [field.name for field in dataclasses.fields(Photograph)]


def schema() -> Any:
    """The schema of the files; only mask and view may be null."""
    import pyarrow as pa

    kinds = dict.fromkeys(COLUMNS, pa.string()) | dict.fromkeys(("image", "mask"), pa.binary())
    kinds["of_defective_part"] = pa.bool_()
    return pa.schema([pa.field(name, kind, nullable=name in ("mask", "view")) for name, kind in kinds.items()])


def group_name(category: str, view: str | None) -> str:
    return f"{category}/{view}" if view else category


@dataclass(frozen=True)
class ShardIndex:
    """The content of index.json.

    ``files``: rows and bytes of each file. ``normals``: number of normal photographs of each group. ``largest``: bytes
    of the largest of these. ``longest``: bytes of the largest photograph of all, mask included. ``references``:
    photographs set aside per group. ``categories`` are trained on, ``held_out`` are not. ``seed`` gives the order.
    ``full_scales``: `Sample.full_scale` of the groups that have one.
    """

    format: int
    seed: int
    files: dict[str, dict[str, int]]
    normals: dict[str, int]
    largest: dict[str, int]
    longest: int
    references: int
    categories: list[str]
    held_out: list[str]
    full_scales: dict[str, float] = field(default_factory=dict)


class Shards:
    """Shards found at ``root``: a folder, "hf://org/name" or "hf://org/name@revision".

    Raises ValueError if there are no shards, if index.json is not as `write_shards` writes it, or if a file is missing
    or has another size than index.json says.
    """

    def __init__(self, root: str | Path) -> None:
        need("datasets", "datasets", "pyarrow")
        import fsspec

        self.root = str(root)
        self.address = pinned(root).replace(HUB, f"{HUB}/datasets", 1) if _on_hub(root) else str(Path(root).resolve())
        try:
            self.files, self.path = fsspec.core.url_to_fs(self.address)
            if (size := self.files.size(f"{self.path}/{INDEX}")) > LARGEST:
                raise ValueError(f"{INDEX} has {size} bytes, more than {LARGEST}")
            found = json.loads(self.files.cat_file(f"{self.path}/{INDEX}"))
            listing = self.files.ls(f"{self.path}/data", detail=True)
            present = {file["name"].removeprefix(f"{self.path}/"): file["size"] for file in listing}
        except Exception as error:  # from a file system, a network, or the JSON parser
            reason = _reason(f"{self.address}/{INDEX} and data/", error)
            what = f"{root} holds no shards: {INDEX} and data/ cannot be read ({reason})"
            raise ValueError(f"{what}; recipes/write_shards.py writes them") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            version = found.get("format") if isinstance(found, dict) else None
            raise ValueError(f"{root}/{INDEX} is of format {version!r}, not {FORMAT}: write the shards again")
        self.index = from_dict(ShardIndex, found, f"{root}/{INDEX}")
        self._check(present)

    def _check(self, present: dict[str, int]) -> None:
        for name, expected in self.index.files.items():
            if not FILE.fullmatch(name):
                raise ValueError(f"{self.root}/{INDEX} names {name!r}, which is not a shard: write the shards again")
            if {"rows", "bytes"} - set(expected):
                raise ValueError(f"{self.root}/{INDEX} has no rows or bytes of {name}: write the shards again")
            size = present.get(name)
            if size != expected["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{self.root}/{name} {state}, {expected['bytes']} were written: copy it again")

    def names(self, part: str) -> list[str]:
        """The files of a part, sorted."""
        return sorted(name for name in self.index.files if name.startswith(f"data/{part}-"))

    def rows(self, names: Sequence[str], rank: int = 0, processes: int = 1) -> Iterator[Photograph]:
        """The rows of some files in this order, or this process's share of the files.

        One row group is in memory at a time. Raises ValueError naming a file that is damaged or has other columns.
        """
        import datasets
        from datasets.distributed import split_dataset_by_node

        urls = [f"{self.address}/{name}" for name in names]
        stream = datasets.IterableDataset.from_generator(_read, gen_kwargs={"urls": urls})
        if processes > 1:
            stream = split_dataset_by_node(stream, rank, processes)
        for row in stream:
            yield Photograph(**row)

    def keys(self, name: str) -> list[list[str]]:
        """The keys of a file, those of each row group in a list, read without the images. Errors as in `rows`."""
        with _opened(f"{self.address}/{name}") as parquet:
            groups = range(parquet.num_row_groups)
            return [parquet.read_row_group(group, ["key"]).column("key").to_pylist() for group in groups]

    def images(self, name: str, group: int) -> list[bytes]:
        """The image files of one row group of a file. Errors as in `rows`."""
        with _opened(f"{self.address}/{name}") as parquet:
            found: list[bytes] = parquet.read_row_group(group, ["image"]).column("image").to_pylist()
            return found

    def samples(self, part: str, per_group: int | None = None) -> list[Sample]:
        """The photographs of a part as samples on disk: the first ``per_group`` of every group, or all.

        They are written unchanged to files named by the hash of their content (`adpretrain.data.huggingface`).
        """
        store, taken, samples = stored_files(self.root), dict[str, int](), []
        for row in self.rows(self.names(part)) if self.names(part) else ():
            taken[row.group] = taken.get(row.group, 0) + 1
            if per_group is None or taken[row.group] <= per_group:
                image = store.of({"bytes": row.image, "path": None}, row.key)
                mask = store.of({"bytes": row.mask, "path": None}, row.key) if row.mask is not None else None
                assert image is not None
                labels = (row.category, row.defect, row.view, row.split, row.of_defective_part)
                samples.append(Sample(image, mask, *labels, self.index.full_scales.get(row.group)))
        return samples


def _read(urls: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of Parquet files. `datasets.load_dataset` would read whole files ahead of a slow consumer."""
    for url in urls:
        with _opened(url) as parquet:
            for group in range(parquet.num_row_groups):
                yield from parquet.read_row_group(group, COLUMNS).to_pylist()


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    """A Parquet file with our columns. Raises ValueError naming it if it, or what is read of it, is damaged."""
    import fsspec
    import pyarrow.parquet as pq

    try:
        with fsspec.open(url) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            if not parquet.schema_arrow.remove_metadata().equals(schema()):
                raise ValueError(f"columns {parquet.schema_arrow.names}, not {COLUMNS}, or of other types")
            yield parquet
    except Exception as error:  # from a file system, a network, or Arrow
        raise ValueError(f"{url} cannot be read ({_reason(url, error)}): copy it again") from error


def pinned(root: str | Path) -> str:
    """``root``, a Hub address, pinned to its present commit, because it may change while we read.

    Raises ValueError if it cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    from adpretrain.hub.download import TROUBLES, explain, persistently

    name, revision = address(root)
    if constants.HF_HUB_OFFLINE:
        fix = f"unset it, or fetch the set with `hf download --repo-type dataset {name}` and give the folder"
        raise ValueError(f"{root} is streamed, which HF_HUB_OFFLINE forbids: {fix}")
    try:
        commit = persistently(lambda: HfApi().dataset_info(name, revision=revision).sha)
    except TROUBLES as error:
        raise explain(error, f"datasets/{name}", f"stream {revision!r} of" if revision else "stream") from error
    return f"{HUB}/{name}@{commit}"


def _on_hub(root: str | Path) -> bool:
    return str(root).startswith(HUB)


def _reason(url: str, error: Exception) -> str:
    """An error's message in one line. Raises ValueError if the Hub failed and not the file."""
    from adpretrain.hub.download import ON_THE_WAY, explain, root

    if isinstance(root(error), ON_THE_WAY):
        repository, _, file = url.removeprefix(f"{HUB}/").partition("@")
        raise explain(error, repository, f"read {file.partition('/')[2]} of") from error
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
