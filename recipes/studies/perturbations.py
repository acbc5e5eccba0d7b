"""Draw one photograph under the most of each change that `--protocol robustness` makes (docs/perturbations.png).

  python recipes/draw_products.py --out data/drawn --products 10 --samples 4 --defects 4
  python recipes/studies/perturbations.py --out docs/perturbations.png \\
    --photograph data/drawn/realiad_256/p007_bolt/OK/S0002/p007_bolt_0002_OK_C1_20260101000000.jpg

The evaluation draws each amount anew for every photograph; this is the end of its range that changes most.
"""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from adpretrain.files import atomic_path
from adpretrain.parsing import parse_flags
from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess
from downstream.evaluation.perturbations import ANGLE, BLUR, LIGHT, NOISE, QUALITY, SHIFT, Perturbation

SIDE, COLOURS = 224, 128  # pixels of a panel; colours of the file, which noise would make large
TURNED = Perturbation(angle=ANGLE)
MOST = {
    "as photographed": Perturbation(),
    "light": Perturbation(brightness=1 - LIGHT, contrast=1 - LIGHT),
    "rotation": TURNED,
    "shift": Perturbation(shift=(SHIFT, SHIFT)),
    "blur": Perturbation(sigma=BLUR[1]),
    "noise": Perturbation(noise=NOISE[1]),
    "jpeg": Perturbation(quality=QUALITY[0]),
    "light + rotation + shift + blur": replace(
        TURNED, shift=(SHIFT, SHIFT), brightness=1 - LIGHT, contrast=1 - LIGHT, sigma=BLUR[1]
    ),
}


@dataclass(frozen=True)
class Options:
    """Options of the picture.

    Args:
        photograph: a photograph of a normal product.
        out: the picture to write, a PNG.
    """

    photograph: Path
    out: Path


def draw(photograph: Path, out: Path) -> None:
    """Write the picture: two rows of four panels."""
    pixels = Preprocess(SIDE).pixels(read_image(photograph)).float() / 255
    figure = Figure(figsize=(8, 4.6), dpi=112)
    for axis, (name, change) in zip(figure.subplots(2, 4).flat, MOST.items(), strict=True):
        shown = (255 * change.picture(pixels)).round().to(torch.uint8)
        axis.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(textwrap.fill(name, 18), fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with atomic_path(out) as temporary, Image.open(buffer) as picture:
        picture.convert("RGB").quantize(COLOURS).save(temporary, "PNG", optimize=True)


def main() -> None:
    options = parse_flags(Options, description=__doc__ or "")
    draw(options.photograph, options.out)


if __name__ == "__main__":
    main()
