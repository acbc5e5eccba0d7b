"""A saved extractor or fitted detector to the Hugging Face Hub, without loading it."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

from adpretrain.card import PLACEHOLDER, card
from adpretrain.hub import Published, publish
from adpretrain.hub.upload import files_to_publish
from adpretrain.parsing import read_json
from adpretrain.saved import CARD_NAME, CONFIG_NAME, read_config
from downstream.card import NOTICE, detector_card
from downstream.saved import read_detector_config


def warn_of_features(private: bool) -> None:
    """Say loudly what a fitted detector holds."""
    public = "" if private else " THE REPOSITORY IS PUBLIC: everybody can read it."
    warnings.warn(f"{NOTICE}{public}", stacklevel=3)


def named_card(folder: Path, repo_id: str) -> None:
    """Put the repository's name into the card that `save_pretrained` wrote."""
    readme = folder / CARD_NAME
    readme.write_text(readme.read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id), encoding="utf-8")


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    tag: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Published:
    """Publish what a `save_pretrained` wrote, without loading it: an extractor or a fitted detector.

    The folder is checked before anything is copied: it may hold links and pipes, or be far too large.

    ``private``: None = a detector is, an extractor is not. Raises ValueError, with the fix, if the folder is neither,
    and as `publish` does.
    """
    detector = is_detector(folder)
    files_to_publish(folder)
    text = detector_card(read_detector_config(folder)) if detector else card(read_config(folder))
    private = detector if private is None else private
    if detector:
        warn_of_features(private)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(shutil.copytree(folder, Path(scratch) / folder.resolve().name, symlinks=True))
        if not (staged / CARD_NAME).is_file():
            (staged / CARD_NAME).write_text(text, encoding="utf-8")
        named_card(staged, repo_id)
        try:
            return publish(staged, repo_id, private=private, tag=tag, message=message, dry_run=dry_run)
        except ValueError as error:
            raise ValueError(str(error).replace(str(staged), str(folder))) from error


def is_detector(folder: Path) -> bool:
    """Whether a saved model is a fitted detector; else it is taken for an extractor. Raises ValueError for neither."""
    if not (folder / CONFIG_NAME).is_file():
        what = f"has no {CONFIG_NAME}" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {what}: expected a folder written by save_pretrained")
    content = read_json(folder / CONFIG_NAME)
    return isinstance(content, dict) and "detector" in content
