"""What all fitted detectors share: the way to the Hugging Face Hub and back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from typing_extensions import Self, Unpack

from adpretrain.backbones import Extract
from adpretrain.hub import Published, publish
from downstream.fitting_together import put_together
from downstream.publishing import named_card, warn_of_features
from downstream.saved import HubOptions, Loaded, fixed_picture, load_detector, locate_model


class _Saves(Protocol):
    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path: ...


class Shared:
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


class Pretrained(Shared):
    """What a detector that `downstream.saved.save_detector` saves gets: `from_pretrained`.

    ``saved_as``: its name and the dataclass of its options.
    """

    saved_as: ClassVar[tuple[str, type]]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        extract: Extract | None = None,
        device: str | torch.device | None = None,
        weights: str | os.PathLike[str] | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Load what `save_pretrained` wrote. Arguments and errors as in `downstream.saved.load_detector`."""
        folder = locate_model(folder, **hub).folder
        loaded: Loaded[Any] = load_detector(folder, *cls.saved_as, extract, device, weights)
        with put_together(folder):
            detector = cls._restored(loaded)
            detector.predict(fixed_picture(loaded.image_size, loaded.device))  # type: ignore[attr-defined]
        return detector

    @classmethod
    def _restored(cls, loaded: Loaded[Any]) -> Self:
        """The detector from what was read."""
        raise NotImplementedError
