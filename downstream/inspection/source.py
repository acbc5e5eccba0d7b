"""The photographs of a run: those below a folder, or those in Parquet shards (`adpretrain.data.shards`).

Both are numbered in the order in which they are scored, N in all, and named as scores.csv names them. Of each only its
name is in memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from downstream.inspection.photos import Stored, find_images, printable, relative_name
from downstream.inspection.resume import Stamp, stamp


class Photographs(Protocol):
    """What a run asks of its photographs."""

    @property
    def names(self) -> Sequence[str]:
        """Their names, N different ones."""

    @property
    def order(self) -> Sequence[int]:
        """Their numbers in the order of their names, in which the results are written."""

    def stamp(self, number: int) -> Stamp:
        """What tells a photograph from a later one of the same name."""

    def files(self, batches: Iterable[Sequence[int]]) -> Iterator[Sequence[Path | Stored]]:
        """The files of the photographs of each batch."""


def photographs_of(images: Path, exclude: Path | None = None) -> Photographs:
    """The photographs in a folder of shards, in another folder, or in a file. Errors as in `find_images` and `Shards`;
    nothing below ``exclude`` is found."""
    if (images / "index.json").is_file() and (images / "data").is_dir():
        return InShards(images)
    return InFolder(images, find_images(images, exclude))


class InFolder:
    """The photographs in ``paths`` below ``root``, in this order."""

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.root, self._base = root, root.parent if root.is_file() else root
        self.names = [relative_name(self._base, path) for path in paths]
        self.order = range(len(paths))

    def stamp(self, number: int) -> Stamp:
        return stamp(self._base, self._base / self.names[number])

    def files(self, batches: Iterable[Sequence[int]]) -> Iterator[list[Path | Stored]]:
        for batch in batches:
            yield [self._base / self.names[number] for number in batch]


class InShards:
    """The photographs in the shards at ``root``, in the order of their rows, without the references, which are copies.

    Their names are their keys. One row group is in memory at a time. Raises ValueError if a key occurs twice, and as
    `Shards` does.
    """

    def __init__(self, root: Path) -> None:
        from adpretrain.data.shards import Shards  # most runs need none of it

        self._shards = Shards(root)
        self.names, self._starts, self._groups = list[str](), list[int](), list[tuple[str, int]]()
        for file in (*self._shards.names("train"), *self._shards.names("held_out")):
            for group, keys in enumerate(self._shards.keys(file)):
                self._starts.append(len(self.names))
                self._groups.append((file, group))
                self.names += keys
        # A folder's paths are sorted part by part: a slash comes before every other character.
        by_name = sorted(range(len(self.names)), key=lambda number: self.names[number].replace("/", "\0"))
        for one, following in pairwise(by_name):
            if self.names[one] == self.names[following]:
                raise ValueError(f"{root} holds {printable(self.names[one])} twice: write the shards again")
        self.order = array("q", by_name)
        stamps = {file: stamp(root, root / file) for file, _ in self._groups}
        self._stamps = [stamps[file][1:] for file, _ in self._groups]
        self._held, self._images = -1, list[bytes]()

    def stamp(self, number: int) -> Stamp:
        return self.names[number], *self._stamps[self._group(number)]

    def _group(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1

    def files(self, batches: Iterable[Sequence[int]]) -> Iterator[list[Path | Stored]]:
        for batch in batches:
            yield [self._file(number) for number in batch]

    def _file(self, number: int) -> Stored:
        if (group := self._group(number)) != self._held:
            self._held, self._images = group, self._shards.images(*self._groups[group])
        return Stored(self.names[number], self._images[number - self._starts[group]])
