"""Score new photographs against a few good ones: python examples/few_shot.py shots/ line3/"""

import sys
from pathlib import Path

import torch

from adpretrain import ADExtractor, read_image
from downstream import FeatureNorm, calibrate


def main(good: str, new: str) -> None:
    extractor = ADExtractor.from_pretrained("embedded")
    references, images = (
        torch.stack([extractor.preprocess(read_image(path)) for path in sorted(Path(folder).iterdir())])
        for folder in (good, new)
    )
    detector = FeatureNorm(extractor).fit([references])
    calibration = calibrate(detector.leave_one_out().scores.tolist(), rate=0.05)
    prediction = detector.predict(images)  # prediction.maps holds a heatmap for each photograph
    for path, score in zip(sorted(Path(new).iterdir()), prediction.scores.tolist(), strict=True):
        print(f"{path.name}  {score:.3f}  {'anomalous' if score > calibration.threshold else 'normal'}")
    print(f"threshold {calibration.threshold:.3f}: at most {calibration.rate:.0%} of good photographs exceed it")


if __name__ == "__main__":
    main(*sys.argv[1:3]) if len(sys.argv) == 3 else sys.exit(__doc__)
