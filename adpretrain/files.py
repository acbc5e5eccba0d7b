"""Atomic writing: every file and folder appears under its final name only when it is complete. Digests of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.[^.]+)?", re.DOTALL)  # the names that atomic_path makes
_CHUNK = 1 << 20  # bytes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make an OSError about the temporary file, or about a full disk (which may name no file), name ``path``."""
    try:
        yield
    except OSError as error:
        if (error.errno in _FULL and error.filename is None) or f"/.{path.stem}." in f"/{error.filename}":
            error.filename, error.filename2 = str(path), None
        raise


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "this is a file, but a folder is needed", str(folder)) from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make the folder of ``path``. Raises OSError if it cannot be written to, so that long work fails at its start."""
    path = Path(path)
    with _naming(path):
        _make(path.parent)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent):
            pass


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success rename it to ``path``, on failure delete it.

    The parent folder is created. The suffix is kept, so writers that choose a format by suffix work. An OSError about
    the temporary file names ``path``.
    """
    path = Path(path)
    _make(path.parent)
    # A random number, because containers that share a disk often have equal process ids.
    temporary = path.with_name(f".{path.stem}.{secrets.randbelow(10**12)}.tmp{path.suffix}")
    with _naming(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files of killed processes in ``folder``, to which no other process may be writing."""
    for path in Path(folder).glob(".*.tmp*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on success it replaces ``path`` as a whole.

    An existing ``path`` stays untouched until the new folder is complete. If ``path`` is a link, the folder that it
    points to is replaced. An OSError about the temporary folder names ``path``.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    with _naming(path), _atomic_folder(path) as temporary:
        yield temporary


@contextlib.contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    _make(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes private folders; a saved artefact is shared like any other file
        if path.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            try:
                os.replace(path, previous / path.name)
                try:
                    os.replace(temporary, path)
                except BaseException:
                    os.replace(previous / path.name, path)
                    raise
            finally:
                shutil.rmtree(previous, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(*files: Path) -> str:
    """The hexadecimal SHA-256 of files, one after the other, which may be larger than the memory."""
    return _digest(hashlib.sha256(), files)


def git_sha1(file: Path) -> str:
    """The hexadecimal SHA-1 by which git, and the Hub, know a file: that of a header and its content."""
    return _digest(hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False), [file])


def _digest(found: hashlib._Hash, files: Iterable[Path]) -> str:
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
    return found.hexdigest()
