"""Convert a checkpoint released by the authors of ADPretrain into an extractor folder.

  python hub/convert_official.py checkpoints_pro_norm.pth --backbone dinov2-base --out dinov2-base-norm

The folder then loads with ADExtractor.from_pretrained. The checkpoint is read without unpickling any code, only its
projectors are taken, and the file's name and sha256 are kept in config.json. No backbone weights are needed or saved.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adpretrain.backbones import load_backbone
from adpretrain.convert import extractor_from_official
from adpretrain.files import sha256
from adpretrain.parsing import POSITIONAL, parse_flags


def read_checkpoint(path: Path) -> Any:
    """The content of a .pth file, tensors and plain containers only. Raises ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is refused: it is not a plain file of tensors, or holds code ({reason}). Expected a .pth file "
            "with a dict {'projectors': {...}, ...} as released by the authors of ADPretrain"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError ... for files that are not its own
        raise ValueError(f"{path} cannot be read as a .pth file: {error or type(error).__name__}") from error


def convert(path: Path, backbone: str, out: Path, image_size: int = 224, crop_from: int | None = None) -> Path:
    """Checkpoint file -> extractor folder, whose path is returned. Photographs are cropped from a shorter side of
    ``crop_from`` pixels, by default the authors' value for this ``image_size``. Raises ValueError as `read_checkpoint`
    and the conversion do.
    """
    checkpoint = read_checkpoint(path)
    with torch.device("meta"):  # widths and preprocessing are needed, weights are not
        frozen = load_backbone(backbone, pretrained=False, image_size=image_size, resize="crop", crop_from=crop_from)
    source = {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
    return extractor_from_official(checkpoint, frozen, source).save_pretrained(out)


@dataclass(frozen=True)
class Options:
    """Options of the conversion.

    Args:
        checkpoint: the authors' file checkpoints_{img,pix,pro}_{angle,norm}.pth.
        backbone: the backbone it was trained on: dinov2-base, ...
        out: folder of the extractor; must be new or an extractor.
        image_size: side of the network's input in pixels.
        crop_from: shorter side before the crop; by default the authors' value, 256 for 224 pixels.
    """

    checkpoint: Path = field(metadata=POSITIONAL)
    backbone: str
    out: Path
    image_size: int = 224
    crop_from: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_flags(Options, argv, __doc__)
    try:
        folder = convert(given.checkpoint, given.backbone, given.out, given.image_size, given.crop_from)
    except (ValueError, OSError) as error:
        print(f"convert_official: error: {error}", file=sys.stderr)
        return 2
    print(f"ADExtractor.from_pretrained({str(folder)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
