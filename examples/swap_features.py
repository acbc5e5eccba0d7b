"""PatchCore on raw features and on residuals of the same network: python examples/swap_features.py good/ new/"""

import sys
from pathlib import Path

import torch

from adpretrain import ADExtractor, read_image
from downstream import PatchCore


def read(folder: str, preprocess) -> torch.Tensor:
    return torch.stack([preprocess(read_image(path)) for path in sorted(Path(folder).iterdir())])


def main(good: str, new: str) -> None:
    extractor = ADExtractor.from_pretrained("embedded")
    normal, images = (read(folder, extractor.preprocess) for folder in (good, new))
    half = len(normal) // 2
    extractor.set_references(normal[:half])  # what the others are compared with
    without = PatchCore(extractor.backbone).fit([normal])
    with_residuals = PatchCore(extractor).fit([normal[half:]])
    scores = without.predict(images).scores.tolist(), with_residuals.predict(images).scores.tolist()
    print("raw      residual")
    for path, raw, residual in zip(sorted(Path(new).iterdir()), *scores, strict=True):
        print(f"{raw:<8.3f} {residual:<8.3f} {path.name}")


if __name__ == "__main__":
    main(*sys.argv[1:3]) if len(sys.argv) == 3 else sys.exit(__doc__)
