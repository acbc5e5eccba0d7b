"""`adpretrain export` turns an extractor and a few normal photographs, or a fitted detector, into one ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from downstream.commands.options import EMBEDDED, Command, refuse_beside_detector
from downstream.terminal import ProgressBars, plain

if TYPE_CHECKING:
    from adpretrain.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write an inspector of one product, with all that it needs but the preparation of photographs, as an ONNX file.

    Either --extractor and --normal: FeatureNorm is fitted on the normal photographs, as adpretrain score does. Or
    --detector and --normal: a detector that adpretrain fit has saved is exported, and --normal holds photographs that
    it was not fitted on, which calibrate the threshold. Every detector can be exported but aligned-featurenorm, which
    chooses its references for every image anew, and one fitted with search=ivfpq.

    exit codes:
      0  the file was written, and ONNX Runtime gives the same scores and maps as torch
      2  wrong usage or input, a missing package, or results that differ from torch: nothing was written
    The file contains features of the photographs it was fitted on: share it only with people who may see the product.

    Args:
        extractor: a folder written by save_pretrained, "org/name" on the Hugging Face Hub, or "embedded"
        detector: export a detector fitted by adpretrain fit instead (a folder or org/name); --normal must then hold
            photographs that it was not fitted on, all of which calibrate the threshold
        weights: local file with the backbone's weights, so that nothing is downloaded
        normal: folder of normal photographs; 2 to 8 are enough, more are better
        out: the file to write, e.g. model.onnx
        calibration: folder of further normal photographs, used only for the threshold
        false_alarm_rate: share of normal images that may be called anomalous
        shots: use at most this many normal photographs as references; the others calibrate the threshold
        check: folder of photographs, of which at most 16 are used to compare ONNX Runtime with torch; default: --normal
        opset: version of the ONNX operators, 18 or newer
        batch_size: number of images per batch
        device: device used for fitting: auto, cpu, cuda, cuda:1, mps
    """

    from_file = True
    extractor: str = EMBEDDED
    detector: str | None = None
    weights: Path | None = None
    normal: Path
    out: Path
    calibration: Path | None = None
    false_alarm_rate: float = 0.05
    shots: int = 16
    check: Path | None = None
    opset: int = 20
    batch_size: int = 16
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.detector is not None:
            given = ("extractor", "shots")
            refuse_beside_detector([f"--{name}" for name in given if getattr(self, name) != getattr(Export, name)])

    def run(self) -> int:
        from downstream.inspection import Options
        from downstream.inspection.onnx import export_folder

        options = Options(self.false_alarm_rate, shots=self.shots, batch_size=self.batch_size)
        folders = self.normal, self.out, self.calibration, self.check
        with ProgressBars() as progress:
            done, inspector = export_folder(
                self.extractor, *folders, options, self.opset, self.device, progress, self.detector, self.weights
            )
        limit = "none" if inspector.threshold is None else f"{inspector.threshold:.4g}"
        size = f"{done.size / 2**20:.1f} MiB"
        fitted = plain(inspector.description) if self.detector else f"{inspector.references} references"
        print(f"{plain(done.path)}: {size}, {fitted}, threshold {limit}")
        found = done.agreement
        same = found.images - found.ties
        views = "the photographs in batches, mirrored, and one at a time"
        print(f"largest difference between ONNX Runtime and torch: {found.difference:.1e} on {same} images ({views})")
        if found.ties:
            print(
                f"note: in {found.ties} more images a token or an image is equally near to two normal ones, so that "
                f"rounding decides which one is taken; these differ by up to {found.tie_difference:.1e}"
            )
        for warning in inspector.warnings:
            print(f"note: {plain(warning)}")
        source = "that the detector was fitted on" if self.detector else f"in {plain(self.normal)}"
        print(f"note: the file contains features of the photographs {source}")
        print("To run it on photographs without transparency and with 8 bits per channel:\n")
        print(snippet(done.path, inspector.reader.preprocess))
        return 0


def snippet(path: Path, preprocess: Preprocess) -> str:
    """Return a few lines of Python that score photo.png with the exported file, without torch or adpretrain."""
    side, kind = preprocess.image_size, f"Image.Resampling.{preprocess.interpolation.upper()}"
    shape = f"photo = photo.resize(({side}, {side}), {kind})"
    if preprocess.crop_from is not None:  # the crop of `Preprocess.seen`, in whole pixels of the resized photograph
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
