"""`adpretrain export`: a few normal photographs and an extractor become one ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from downstream.commands.network import EMBEDDED, EXTRACTOR_HELP
from downstream.terminal import ProgressBars, plain

if TYPE_CHECKING:
    from adpretrain.preprocess import Preprocess

EXIT_CODES = """exit codes:
  0  the file was written, and ONNX Runtime gives the same scores and maps as torch
  2  wrong usage or input, a missing package, or results that differ: nothing was written
The file contains features of the normal photographs: share it only with those who may see the product."""


def export(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Write an inspector of one product as an ONNX file: extractor, references and threshold in one."""
    parser.epilog = EXIT_CODES
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--extractor", type=str, default=EMBEDDED, help=EXTRACTOR_HELP)
    parser.add_argument("--normal", type=str, required=True, help="folder of normal photographs, 2 to 8 or more")
    parser.add_argument("--out", type=str, required=True, help="the file to write, e.g. model.onnx")
    parser.add_argument(
        "--calibration",
        type=str | None,
        default=None,
        help="folder of further normal photographs, for the threshold only",
    )
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        help="share of normal images that may be called anomalous",
    )
    parser.add_argument("--shots", type=int, default=16, help="number of references K at most; the others calibrate")
    parser.add_argument(
        "--check",
        type=str | None,
        default=None,
        help="folder of photographs to compare ONNX Runtime with torch on, at most 16; default: the normal ones",
    )
    parser.add_argument("--opset", type=int, default=20, help="version of the ONNX operators, 18 or newer")
    parser.add_argument("--batch-size", type=int, default=16, help="images in memory at once")
    parser.add_argument("--device", type=str, default="auto", help="for fitting: auto, cpu, cuda, cuda:1, mps")
    return _export


def _export(options: Namespace) -> int:
    from downstream.inspection.basis import Options
    from downstream.inspection.onnx import export_folder

    with ProgressBars() as progress:
        done, basis = export_folder(
            options.extractor,
            Path(options.normal),
            Path(options.out),
            Path(options.calibration) if options.calibration else None,
            Path(options.check) if options.check else None,
            Options(options.false_alarm_rate, shots=options.shots, batch_size=options.batch_size),
            options.opset,
            options.device,
            progress,
        )
    threshold = "none" if basis.threshold is None else f"{basis.threshold:.4g}"
    print(f"{plain(done.path)}: {done.size / 2**20:.1f} MiB, {basis.references} references, threshold {threshold}")
    found = done.agreement
    same = found.images - found.ties
    views = "the photographs, mirrored ones and single ones"
    print(f"largest difference between ONNX Runtime and torch: {found.difference:.1e} on {same} images ({views})")
    if found.ties:
        print(
            f"note: {found.ties} more images hold a token that is equally near to two references, and differ by up to "
            f"{found.tie_difference:.1e} there: rounding decides which one is taken"
        )
    for warning in basis.warnings:
        print(f"note: {plain(warning)}")
    print(f"note: the file contains features of the photographs in {plain(options.normal)}")
    print("To run it on photographs without transparency, 8 bits a channel:\n")
    print(snippet(done.path, basis.preprocess))
    return 0


def snippet(path: Path, preprocess: Preprocess) -> str:
    """A few lines of Python that score photo.png with the exported file, without torch or adpretrain."""
    side, kind = preprocess.image_size, f"Image.Resampling.{preprocess.interpolation.upper()}"
    shape = f"photo = photo.resize(({side}, {side}), {kind})"
    if preprocess.crop_from is not None:  # as `Preprocess.seen`, in whole pixels of the resized photograph
        shape = f"""\
photo = photo.resize([{preprocess.crop_from} * length // min(photo.size) for length in photo.size], {kind})
left, top = (round((length - {side}) / 2) for length in photo.size)
photo = photo.crop((left, top, left + {side}, top + {side}))"""
    return f"""\
import json, numpy as np, onnxruntime; from PIL import Image, ImageOps
session = onnxruntime.InferenceSession({plain(path)!r}); told = session.get_modelmeta().custom_metadata_map
photo = ImageOps.exif_transpose(Image.open("photo.png")).convert("RGB")
{shape}
p = json.loads(told["preprocess"]); pixels = ((np.asarray(photo) / 255 - p["mean"]) / p["std"]).astype("float32")
scores, maps = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None]}}); print(scores, told.get("threshold"))"""
