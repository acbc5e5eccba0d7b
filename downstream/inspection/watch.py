"""Score the photographs that appear in a folder, each exactly once, also across restarts and kills.

A file is taken when its size and time have not changed for a moment and all of it can be decoded. Its heatmaps are
written first, then one line of journal.jsonl, which is on the disk before anything else happens: a file with a line has
been scored, one without has not. scores.csv follows from the journal and is written anew when a watch begins.

A file that is written again under the same name is a new photograph if its pixels are others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from typing_extensions import Self

from adpretrain.data.samples import is_image
from adpretrain.files import sweep
from downstream.inspection.camera import take
from downstream.inspection.entry import result_from
from downstream.inspection.inspector import Inspector
from downstream.inspection.photos import Photo, each_page, files_below, printable, relative_name
from downstream.inspection.picture_names import HEATMAPS, picture_name
from downstream.inspection.results import COLUMNS, Result
from downstream.inspection.resume import Stamp, stamp
from downstream.inspection.spreadsheet import csv_row, write_table
from downstream.visualise import save_png

JOURNAL, SCORES = "journal.jsonl", "scores.csv"
LOOK_S = 0.1  # seconds between two looks at the folder, or as long as a look takes
SETTLED_S = 0.3  # seconds without a change after which a file is opened
TRY_S = 1.0  # seconds between two attempts at a file that cannot be decoded
PATIENCE_S = 30.0


@dataclass
class _Waiting:
    """A file that has not been taken yet."""

    stamp: Stamp
    since: float  # when it was first seen as it is
    tried: float = -TRY_S  # when it could last not be decoded


@dataclass(frozen=True)
class _Taken:
    """A file with a line in the journal, as it was when it was taken, and the digests of its photographs."""

    stamp: Stamp
    digests: tuple[str | None, ...]


class FolderWatch:
    """Watches ``folder`` and writes to ``out``: scores.csv, heatmaps/ and journal.jsonl; used in a ``with`` statement.

    patience: seconds after the last change until a file that cannot be decoded counts as unreadable. Nothing below
    ``out`` and no hidden file is looked at. Raises ValueError if there is no such folder, if it lies in ``out``, if
    ``out`` holds results of something else, or if another process watches there; OSError if ``out`` cannot be written.
    """

    def __init__(self, inspector: Inspector, folder: Path, out: Path, patience: float = PATIENCE_S) -> None:
        if not folder.is_dir():
            raise ValueError(f"no such folder: {printable(folder)}")
        if folder.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{printable(folder)} lies in the output folder {printable(out)}: give another --out")
        if not patience >= 0:
            raise ValueError(f"patience {patience}: expected 0 seconds or more")
        self.inspector, self.folder, self.out, self.patience = inspector, folder, out, patience
        self.waiting: dict[str, _Waiting] = {}

    def __enter__(self) -> Self:
        self.journal = Journal(self.out, self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.journal.close()

    def __iter__(self) -> Iterator[Result]:
        """Yield the result of every photograph, once it is in the journal, for ever."""
        while True:
            began = time.monotonic()
            ready = self.ready()
            looked = time.monotonic() - began  # a folder of very many files must not keep a processor busy
            for file in ready:
                yield from self.taken(file)
            time.sleep(max(LOOK_S, looked))

    def ready(self) -> list[Path]:
        """Look at the folder once and return the files to open now, the oldest first."""
        now, found, waiting = time.monotonic(), list[tuple[int, str, Path]](), dict[str, _Waiting]()
        for file in files_below(self.folder, self.out):
            seen = stamp(self.folder, file)
            name, size, changed = seen
            if not is_image(file) or self.journal.holds(seen) or (size, changed) == (0, 0):  # or it is gone
                continue
            before = self.waiting.get(name)
            waiting[name] = one = before if before and before.stamp == seen else _Waiting(seen, now)
            if now - one.since >= SETTLED_S and now - one.tried >= TRY_S:
                found.append((changed, name, file))
        self.waiting = waiting
        return [file for _, _, file in sorted(found)]

    def taken(self, file: Path) -> list[Result]:
        """Score the photographs in a file and write them down; none if it must be tried again later."""
        one = self.waiting[relative_name(self.folder, file)]
        results, digests, pictures = list[Result](), list[str | None](), set(self.journal.pictures)
        before = self.journal.digests(one.stamp[0])
        for page in each_page(file):
            read = take(page, self.inspector.reader)
            digests.append(read.digest if isinstance(read, Photo) else None)
            if digests[-1] is None and time.monotonic() - one.since < self.patience:
                one.tried = time.monotonic()
                return []
            if digests[-1] is not None and digests[-1] in before:  # what was added to the file was no photograph
                continue
            verdict = self.inspector.verdict(read, relative_name(self.folder, page))
            result, picture = verdict.result, verdict.panel()
            if picture is not None:
                result = dataclasses.replace(result, heatmap=picture_name(result.path, pictures))
                save_png(picture, self.out / str(result.heatmap))
            results.append(result)
        if stamp(self.folder, file) != one.stamp:  # it has changed, or it is gone, while it was read
            return []
        self.journal.add(_Taken(one.stamp, tuple(digests)), results)
        return results


class Journal:
    """What has been taken from ``folder``: one line of journal.jsonl for each file. Errors as in `FolderWatch`."""

    def __init__(self, out: Path, folder: Path) -> None:
        self.path = out / JOURNAL
        if out.exists() and not out.is_dir():
            raise ValueError(f"{printable(out)} is a file: --out names a folder")
        if (out / SCORES).exists() and not self.path.exists():
            raise ValueError(f"{printable(out)} holds the results of another command: give another --out")
        out.mkdir(parents=True, exist_ok=True)
        self._taken: dict[str, _Taken] = {}
        self.pictures = set[str]()  # names of heatmaps, without case
        self._file: BinaryIO = self.path.open("a+b")
        try:
            self._hold()
            sweep(out)
            sweep(out / HEATMAPS)
            earlier = self._replay({"version": 1, "folder": printable(folder.resolve())})
            write_table(out / SCORES, (COLUMNS, earlier))
        except BaseException:
            self._file.close()
            raise
        self._scores = (out / SCORES).open("ab")

    def _hold(self) -> None:
        """Keep other processes from watching there; the system lets go when this process ends, however it ends."""
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                where = printable(self.path.parent)
                raise ValueError(f"another process watches with --out {where}: end it, or give another --out") from None

    def _replay(self, settings: dict[str, Any]) -> Iterator[Result]:
        """Yield the results of all lines, and cut off a last line that a kill has torn."""
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
                if not whole:
                    self._compare(content, settings)
                else:
                    yield from self._remember(content)
            except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"cannot read {printable(self.path)} ({error}): give another --out") from error
            whole += len(line)
        self._file.truncate(whole)
        if not whole:
            self._write(settings)

    def _compare(self, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
        if earlier != settings:
            where = printable(self.path.parent)
            raise ValueError(f"{where} holds the results of {earlier['folder']}: give another --out for another folder")

    def _remember(self, line: dict[str, Any]) -> list[Result]:
        name, size, changed = line["file"]
        digests = tuple(None if digest is None else str(digest) for digest in line["digests"])
        self._taken[name] = _Taken((str(name), int(size), int(changed)), digests)
        results = [result_from(entry) for entry in line["results"]]
        self.pictures |= {result.heatmap.casefold() for result in results if result.heatmap}
        return results

    def holds(self, seen: Stamp) -> bool:
        """Whether a file was taken as it is now."""
        taken = self._taken.get(seen[0])
        return taken is not None and taken.stamp == seen

    def digests(self, name: str) -> tuple[str | None, ...]:
        """The digests of the photographs that the file of this name held when it was last taken."""
        taken = self._taken.get(name)
        return () if taken is None else taken.digests

    def add(self, taken: _Taken, results: list[Result]) -> None:
        """Write a file down, whose heatmaps are written."""
        line: dict[str, Any] = {"file": taken.stamp, "digests": taken.digests}
        line |= {"results": [dataclasses.asdict(result) for result in results]}
        self._write(line)
        self._remember(line)
        self._scores.writelines(csv_row(getattr(result, name) for name in COLUMNS) for result in results)
        self._scores.flush()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let other processes watch."""
        self._scores.close()
        self._file.close()
