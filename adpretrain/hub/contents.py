"""The files of a published model: which names are ours, what they must hold, and their digests."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adpretrain.parsing import read_json
from adpretrain.saved import (
    CARD_NAME,
    CONFIG_NAME,
    PICTURE_SUFFIX,
    WEIGHTS_NAME,
    read_config,
    read_weights,
    saved_tensors,
)

PICTURE = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.png"
PART = re.compile(r"[a-z0-9][a-z0-9_-]*")  # a model within a model, e.g. the extractor of a detector
OURS = re.compile(rf"(?:{PART.pattern}/)*(?:config\.json|model\.safetensors|README\.md)|(?:assets/)?{PICTURE}")
HOUSEKEEPING = re.compile(r"\.gitattributes|\.gitignore|LICENSE(?:\.[a-z]+)?|[A-Za-z0-9_-]+\.md")
SPACE = re.compile(r"(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+\.(?:py|md|txt|png|css)")
GIT_SHA1, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class LocalFile:
    """A file to be published: its size in bytes and the two digests under which the Hub may know it."""

    path: Path
    size: int
    sha256: str
    git_sha1: str


def is_ours(name: str) -> bool:
    """Whether ``name``, a path with "/" relative to the repository, is a file that we write."""
    return OURS.fullmatch(name) is not None


def digest(path: Path, kind: str) -> str:
    """The hexadecimal "sha256" of a file, or its "git_sha1": that of git's header and the content."""
    if kind == "sha256":
        found = hashlib.sha256()
    else:
        found = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def has_digest(path: Path, expected: str) -> bool:
    """Whether a file has the content of a digest: SHA-256 (64 digits, large files) or git's SHA-1 (40, the rest)."""
    return digest(path, "sha256" if SHA256.fullmatch(expected) else "git_sha1") == expected


def files_to_publish(folder: str | os.PathLike[str]) -> dict[str, LocalFile]:
    """The files of a saved model by their path in the repository, checked.

    Raises ValueError if the folder is no saved model, or holds links, files that we do not write, or files that are
    not what their names say, or weights that are not finite or not those that their config describes: whatever is
    published stays in the repository's history.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder: publish a folder written by save_pretrained")
    names = sorted(_names(root))
    if strange := [name for name in names if not is_ours(name)]:
        raise ValueError(
            f"{folder} holds files that are not part of a saved model: {some(strange)}. Published are {CONFIG_NAME}, "
            f"{WEIGHTS_NAME}, {CARD_NAME} and {PICTURE_SUFFIX} pictures; move the rest out of the folder"
        )
    parts = {name.rpartition("/")[0] for name in names if name.endswith((CONFIG_NAME, WEIGHTS_NAME))} | {""}
    for part in sorted(parts):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if (f"{part}/{name}" if part else name) not in names:
                raise ValueError(f"{root / part} has no {name}: publish a folder written by save_pretrained")
    for name in names:
        _check_content(root / name)
    for part in sorted(parts):
        read_weights(root / part, _expected(root / part))
    return {name: _local_file(root / name) for name in names}


def files_of_space(folder: str | os.PathLike[str]) -> dict[str, LocalFile]:
    """The files of a Space by their path in the repository. Raises ValueError if there are others than it needs."""
    root = Path(folder)
    if not (root / "app.py").is_file() or not (root / CARD_NAME).is_file():
        raise ValueError(f"{folder} has no app.py and {CARD_NAME}: publish the folder of a Space")
    names = sorted(name for name in _names(root) if "__pycache__/" not in name)
    if strange := [name for name in names if not SPACE.fullmatch(name)]:
        raise ValueError(f"{folder} holds files that no Space needs: {some(strange)}; move them out of the folder")
    return {name: _local_file(root / name) for name in names}


def differences(files: dict[str, LocalFile], remote: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Paths of which ``remote`` (the client's `RepoFile`s by path) lacks the content, and paths that only it has."""
    changed = [name for name, file in files.items() if name not in remote or not _same(file, remote[name])]
    return changed, sorted(remote.keys() - files.keys())


def some(names: Iterable[str]) -> str:
    """The first few of the names, for a message."""
    shown = list(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _names(root: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ValueError(f"{path} is a link or no regular file; only copies of files are published")
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return found


def _check_content(path: Path) -> None:
    wrong: str | Exception = ""
    try:
        if path.name == CONFIG_NAME and not isinstance(read_json(path), dict):
            wrong = "not a JSON object"
        if path.name == WEIGHTS_NAME:
            with safe_open(path, framework="pt"):
                pass
        if path.name == CARD_NAME:
            path.read_text(encoding="utf-8")
        if path.suffix == PICTURE_SUFFIX and path.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
            wrong = "not a PNG picture"
    except (OSError, ValueError, SafetensorError) as error:
        wrong = error
    if wrong:
        raise ValueError(f"{path} is not what its name says ({wrong}): save the model again") from None


def _expected(folder: Path) -> dict[str, Tensor]:
    """The weights that a config.json describes: a detector's lists their shapes, an extractor's its networks' sizes."""
    content = read_json(folder / CONFIG_NAME)
    if "tensors" not in content:
        config = read_config(folder)
        training = config.provenance.get("training")
        if isinstance(training, dict) and training.get("learns") == "backbone":
            raise ValueError(
                f"{folder} is on a backbone that was trained with it (learns: backbone), whose weights are not in the "
                "folder: nobody could load what would be published"
            )
        return saved_tensors(config, folder)
    try:
        return {name: torch.empty(shape, device="meta") for name, shape in content["tensors"].items()}
    except (TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: tensors are no shapes by name ({error}): save it again") from error


def _local_file(path: Path) -> LocalFile:
    return LocalFile(path, path.stat().st_size, digest(path, "sha256"), digest(path, "git_sha1"))


def _same(file: LocalFile, remote: Any) -> bool:
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == file.sha256)
    return bool(remote.blob_id == file.git_sha1)
