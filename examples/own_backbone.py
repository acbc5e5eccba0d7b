"""Any function that gives feature maps is enough for a detector: python examples/own_backbone.py good/ new/"""

import sys
from pathlib import Path

import torch
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from adpretrain import read_image
from adpretrain.preprocess import Preprocess
from downstream import PaDiM

# Random weights, so that nothing is downloaded; yours will be ResNet18_Weights.IMAGENET1K_V1, or a network of your own.
NETWORK = create_feature_extractor(resnet18(weights=None), ["layer1", "layer2", "layer3"]).eval()


@torch.no_grad()
def features(images: torch.Tensor) -> list[torch.Tensor]:
    """[B, 3, S, S] -> levels [B, C, H, W], the finest first."""
    return list(NETWORK(images).values())


def main(good: str, new: str) -> None:
    preprocess = Preprocess(image_size=224)  # ImageNet's mean and deviation
    normal, images = (
        torch.stack([preprocess(read_image(path)) for path in sorted(Path(folder).iterdir())]) for folder in (good, new)
    )
    detector = PaDiM(features).fit([normal])
    for path, score in zip(sorted(Path(new).iterdir()), detector.predict(images).scores.tolist(), strict=True):
        print(f"{score:<8.3f} {path.name}")


if __name__ == "__main__":
    main(*sys.argv[1:3]) if len(sys.argv) == 3 else sys.exit(__doc__)
