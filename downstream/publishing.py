"""A fitted detector on the Hugging Face Hub: its card, and `push_to_hub` of every detector, private unless asked."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from huggingface_hub import ModelCardData

from adpretrain.artefact import CARD_NAME, CONFIG_NAME, read_config
from adpretrain.card import PLACEHOLDER, TAGS, card, table
from adpretrain.hub import Published, publish

if TYPE_CHECKING:
    from downstream.saving import DetectorConfig

NOTICE = (
    "A fitted detector holds features of the photographs it was fitted on: memory banks, means, references. Whoever "
    "can read it may learn much about the product from them. Share it only with those who may see the product."
)
_USAGE = """```python
from downstream.table import detector_from_pretrained

detector = detector_from_pretrained("{repo_id}")
prediction = detector.predict(images)  # [B, 3, {side}, {side}], through detector.extract's preprocess
print(prediction.scores)  # one score per image; prediction.maps holds one map each
```"""


class _Saves(Protocol):
    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path: ...


class Publishable:
    """What a detector with `save_pretrained` gets: `push_to_hub`."""

    def push_to_hub(
        self: _Saves,
        repo_id: str,
        *,
        private: bool = True,
        tag: str | None = None,
        branch: str = "main",
        message: str | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
    ) -> Published:
        """Publish what `save_pretrained` writes as one commit of a Hub repository; see `adpretrain.hub.publish`.

        PRIVATE by default, and a warning says why. Raises ValueError, with the fix, as `publish` and the detector's
        `save_pretrained` do.
        """
        warn_of_features(private)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "detector")
            named_card(folder, repo_id)
            message = message or f"Publish a fitted {type(self).__name__}"
            options: dict[str, Any] = {"tag": tag, "branch": branch, "message": message, "token": token}
            return publish(folder, repo_id, private=private, dry_run=dry_run, **options)


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

    ``private``: None = a detector is, an extractor is not. Raises ValueError, with the fix, if the folder is neither,
    and as `publish` does.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}: expected a folder written by save_pretrained")
    detector = is_detector(folder)
    private = detector if private is None else private
    if detector:
        warn_of_features(private)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(shutil.copytree(folder, Path(scratch) / folder.resolve().name, symlinks=True))
        if not detector and not (staged / CARD_NAME).is_file():
            (staged / CARD_NAME).write_text(card(read_config(staged)), encoding="utf-8")
        named_card(staged, repo_id)
        return publish(staged, repo_id, private=private, tag=tag, message=message, dry_run=dry_run)


def is_detector(folder: Path) -> bool:
    """Whether a saved model is a fitted detector; else it is taken for an extractor. Raises ValueError for neither."""
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {folder / CONFIG_NAME}: {error}") from error
    return isinstance(content, dict) and "detector" in content


def detector_card(config: DetectorConfig, repo_id: str = PLACEHOLDER) -> str:
    """README.md of a fitted detector."""
    data = ModelCardData(library_name="adpretrain", tags=[*TAGS, config.detector])
    network = {"extractor": "an extractor, saved beside", "given": "a function of its maker's"}.get(config.extract)
    if config.backbone is not None:
        network = f"the backbone `{config.backbone.name}`"
    facts = table(
        ("what", "value"),
        [
            ("detector", f"`{config.detector}`"),
            ("features", network or "those of its members"),
            ("input", f"{config.image_size} x {config.image_size} pixels"),
            ("options", f"`{json.dumps(config.options)}`"),
            ("tensors", ", ".join(f"`{name}` {shape}" for name, shape in config.tensors.items())),
            ("adpretrain", f"`{config.library_version}`"),
        ],
    )
    usage = _USAGE.format(repo_id=repo_id, side=config.image_size)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id}\n\n> **{NOTICE}**\n\n"
        f"An anomaly detector, fitted on photographs of one product. Made with `adpretrain`.\n\n"
        f"## Use\n\n{usage}\n\n## What it is\n\n{facts}\n"
    )
