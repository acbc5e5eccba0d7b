"""The folder of a detector made of detectors: config.json, model.safetensors and one folder per member.

Like every fitted detector it holds features of the product; see `downstream.saved`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from adpretrain.backbones import Extract
from adpretrain.saved import write_folder
from downstream.card import detector_card
from downstream.detector import Detector
from downstream.detectors import detector_from_pretrained
from downstream.fitting_together import part, put_together
from downstream.pretrained import Shared
from downstream.saved import (
    DetectorConfig,
    HubOptions,
    locate_model,
    member,
    parts_of,
    read_detector_config,
    read_tensors,
)


def save_composite(
    folder: str | os.PathLike[str],
    name: str,
    options: Any,
    members: Sequence[Detector],
    tensors: Mapping[str, Tensor],
    image_size: int,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write fitted members and what joins them; the folder appears, or is replaced, only when complete.

    ``options``: a dataclass, or None. Raises ValueError if ``folder`` holds other files, or a member cannot be saved.
    """
    config = DetectorConfig(
        detector=name,
        options={} if options is None else dataclasses.asdict(options),
        extract="members",
        image_size=image_size,
        tensors={key: list(value.shape) for key, value in tensors.items()},
        facts={"members": len(members), **(facts or {})},
    )
    parts = {member(number): detector.save_pretrained for number, detector in enumerate(members)}
    return write_folder(folder, config, tensors, "detector", detector_card(config), parts)


@dataclass(frozen=True)
class LoadedComposite:
    """What `save_composite` wrote, read again; ``tensors`` on the device, or the CPU."""

    folder: Path
    config: DetectorConfig
    members: list[Detector]
    tensors: dict[str, Tensor]


class Composite(Shared):
    """What a detector that `save_composite` saves gets: `from_pretrained`. ``saved_as``: its name; ``members``: what it
    is made of."""

    saved_as: ClassVar[str]
    members: list[Detector]

    @classmethod
    def of(cls, extract: Extract, options: Any) -> Self:
        """From its options alone, with its members unfitted: what `downstream.detectors.building` calls."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        extract: Extract | Sequence[Extract] | None = None,
        device: str | torch.device | None = None,
        weights: str | os.PathLike[str] | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Load what `save_pretrained` wrote.

        ``extract``: used by every member instead of loading its own, or a list with one for each. The rest as in
        `downstream.saved.load_detector`, for every member; errors as there.
        """
        folder = locate_model(folder, **hub).folder
        config = read_detector_config(folder)
        if config.detector != cls.saved_as:
            message = f"{folder} holds a {config.detector!r} detector, not {cls.saved_as!r}: load it with its own class"
            raise ValueError(message)
        count = len(parts_of(vars(config)))
        extracts = list(extract) if isinstance(extract, Sequence) else [extract] * count
        if len(extracts) != count:
            raise ValueError(
                f"{len(extracts)} extracts for the {count} members of {folder}; give one for each, or one for all"
            )
        members = [
            detector_from_pretrained(part(folder, member(number)), one, device, weights)
            for number, one in enumerate(extracts)
        ]
        tensors = {key: value.to(device or "cpu") for key, value in read_tensors(folder, config).items()}
        with put_together(folder):
            return cls._restored(LoadedComposite(folder, config, members, tensors))

    @classmethod
    def _restored(cls, loaded: LoadedComposite) -> Self:
        """The detector from what was read."""
        raise NotImplementedError
