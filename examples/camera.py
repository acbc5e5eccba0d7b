"""Inspect every frame of a camera, or of a video file: python examples/camera.py lid/ line.mp4

lid/ is an inspector that adpretrain inspector new --at lid/ --normal shots/ has made; 0 is the first camera. Needs
pip install opencv-python-headless.
"""

import sys

import cv2

from downstream.inspection.inspector import Inspector


def main(product: str, source: str) -> int:
    inspector = Inspector.load(product)
    camera = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not camera.isOpened():
        sys.exit(f"cannot open {source}: give a video file, or the number of a camera")
    number = anomalous = 0
    while (frame := camera.read()[1]) is not None:
        verdict = inspector(frame[..., ::-1])  # OpenCV's colours are blue, green, red
        number += 1
        if verdict.verdict == "anomalous":
            anomalous += 1
            verdict.heatmap.save(f"frame-{number:06}.png")
            print(f"frame {number}: score {verdict.score:.2f}, {verdict.reason or verdict.regions}")
    print(f"{anomalous} of {number} frames are anomalous")
    return 1 if anomalous else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
