"""What is published: the files of a saved model, of a Space or of a page, by their path in the repository, checked."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adpretrain.backbones.weights import some
from adpretrain.hub.download import PART
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
OURS = re.compile(rf"(?:{PART.pattern}/)*(?:config\.json|model\.safetensors|README\.md)|(?:assets/)?{PICTURE}")
SPACE = re.compile(r"(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+\.(?:py|md|txt|png|css)")
PAGE = "index.html"


def files_to_publish(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a saved model by their path in the repository, checked.

    Raises ValueError if the folder is not a saved model, or holds links, files that we do not write, files whose
    content does not fit their names, or weights that are not finite or do not fit their config: published files stay in
    the repository's history for ever.
    """
    top = Path(folder)
    if not top.is_dir():
        raise ValueError(f"{folder} is not a folder: publish a folder written by save_pretrained")
    files = _files(top)
    if strange := [name for name in files if not OURS.fullmatch(name)]:
        raise ValueError(
            f"{folder} holds files that are not part of a saved model: {some(strange)}. Published are {CONFIG_NAME}, "
            f"{WEIGHTS_NAME}, {CARD_NAME} and {PICTURE_SUFFIX} pictures; move the rest out of the folder"
        )
    parts = {name.rpartition("/")[0] for name in files if name.endswith((CONFIG_NAME, WEIGHTS_NAME))} | {""}
    for part in sorted(parts):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if (f"{part}/{name}" if part else name) not in files:
                raise ValueError(f"{top / part} has no {name}: publish a folder written by save_pretrained")
    for path in files.values():
        _check_content(path)
    for part in sorted(parts):
        read_weights(top / part, _expected(top / part))
    return files


def files_of_space(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a Space by their path in the repository. Raises ValueError for files that it does not need."""
    top = Path(folder)
    if not (top / "app.py").is_file() or not (top / CARD_NAME).is_file():
        raise ValueError(f"{folder} has no app.py and {CARD_NAME}: publish the folder of a Space")
    files = {name: path for name, path in _files(top).items() if "__pycache__/" not in name}
    if strange := [name for name in files if not SPACE.fullmatch(name)]:
        raise ValueError(f"{folder} holds files that no Space needs: {some(strange)}; move them out of the folder")
    return files


def files_of_page(folder: str | os.PathLike[str], card: str | os.PathLike[str]) -> dict[str, Path]:
    """index.html of ``folder`` and the ``card``, which becomes README.md; whatever else lies there is not published.

    Raises ValueError if either is missing, a link, or the page is not HTML.
    """
    page = Path(folder) / PAGE
    files = {PAGE: page, CARD_NAME: Path(card)}
    for path in files.values():
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is missing or no regular file: publish a page that adpretrain board rendered")
    if not page.read_bytes()[:100].lstrip().lower().startswith(b"<!doctype html"):
        raise ValueError(f"{page} is not a page: it does not begin with <!doctype html>")
    return files


def _files(top: Path) -> dict[str, Path]:
    paths = sorted(top.rglob("*"))
    for path in paths:
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path} is a link or not a regular file; only regular files are published")
    return {path.relative_to(top).as_posix(): path for path in paths if path.is_file()}


def _check_content(path: Path) -> None:
    try:
        if path.name == CONFIG_NAME and not isinstance(read_json(path), dict):
            raise ValueError("not a JSON object")
        if path.name == WEIGHTS_NAME:
            with safe_open(path, framework="pt"):
                pass
        if path.name == CARD_NAME:
            path.read_text(encoding="utf-8")
        if path.suffix == PICTURE_SUFFIX and path.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
            raise ValueError("not a PNG picture")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is not what its name says ({error}): save the model again") from None


def _expected(folder: Path) -> dict[str, Tensor]:
    """The weights that a config.json describes, by their shapes (detectors) or by its networks' sizes (extractors)."""
    content = read_json(folder / CONFIG_NAME)
    if "tensors" not in content:
        config = read_config(folder)
        training = config.provenance.get("training")
        if isinstance(training, dict) and training.get("learns") == "backbone":
            raise ValueError(
                f"{folder} uses a backbone that was trained with it (learns: backbone), whose weights are not in the "
                "folder: nobody could load what would be published"
            )
        return saved_tensors(config, folder)
    try:
        return {name: torch.empty(shape, device="meta") for name, shape in content["tensors"].items()}
    except (TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: tensors must map names to shapes ({error}): save again") from error
