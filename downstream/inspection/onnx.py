"""A fitted detector as one file for ONNX Runtime: photographs in, scores and maps out, no torch needed.

Shapes: B images (any number), S = the network's input side.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adpretrain import __version__
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path, check_writable
from downstream.calibration import Calibration
from downstream.detectors.featurenorm import FeatureNorm
from downstream.inspection.basis import DEFAULTS, Basis, Options, prepare
from downstream.inspection.finding import find_images
from downstream.inspection.graph import Inspector
from downstream.inspection.normals import Progress, silent
from downstream.inspection.photos import Unreadable, read_batches
from downstream.inspection.run import pick_device

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET, OPSETS = 20, range(18, 24)  # 20: ONNX Runtime 1.17 or newer
ANY_BATCH = {"images": {0: torch.export.Dim("batch", max=2**31 - 1)}}  # torch 2.6 refuses a size without a bound
CHECKED = 16  # photographs that a folder's export is verified on
TOLERANCE = 1e-4
LARGEST_FILE = 2**31 - 2**24  # protobuf's 2 GiB, less some room for the graph itself
NOTICE = (
    "This file contains features of the reference photographs it was made from. They belong to whoever made the "
    "photographs: share the file only with those who may see the product."
)


@dataclass(frozen=True)
class Agreement:
    """What `verify` found: the largest difference, and apart from it the images whose ties came out otherwise."""

    images: int  # compared in all, mirrored ones included
    difference: float
    ties: int  # images
    tie_difference: float  # the largest among them


@dataclass(frozen=True)
class Exported:
    """A written and verified file."""

    path: Path
    size: int  # bytes
    agreement: Agreement


def export_onnx(
    detector: FeatureNorm,
    path: str | os.PathLike[str],
    check_batches: Iterable[Tensor],
    calibration: Calibration | None = None,
    threshold: float | None = None,
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a fitted detector to ``path`` (input "images" [B, 3, S, S], outputs "scores" [B] and "maps" [B, S, S]).

    The file is kept only if ONNX Runtime gives what torch gives on ``check_batches`` (see `verify`). Its metadata
    tell how to prepare a photograph, the ``threshold`` (by default that of ``calibration``) and where the extractor
    comes from.

    Raises ValueError if packages are missing, ``opset`` is not in `OPSETS`, the detector cannot be exported (see
    `Inspector`), is not on the CPU or too large for one file, or if the results differ.
    """
    check_possible(opset)
    inspector = Inspector(detector)
    held = [*inspector.parameters(), *inspector.buffers()]
    if devices := {str(tensor.device) for tensor in held} - {"cpu"}:
        raise ValueError(f"the extractor is on {', '.join(sorted(devices))}: export it from the CPU, extractor.cpu()")
    if (size := sum(tensor.nbytes for tensor in held)) > LARGEST_FILE:
        raise ValueError(
            f"the detector's {size / 2**30:.1f} GiB of weights exceed the 2 GiB that one ONNX file can hold: export "
            "one with a smaller backbone"
        )
    if threshold is None and calibration is not None:
        threshold = calibration.threshold
    program = _trace(inspector, opset)
    program.model.metadata_props.update(metadata(detector, calibration, threshold))
    with atomic_path(path) as temporary:
        program.save(str(temporary), external_data=False)
        agreement = verify(temporary, detector, check_batches, tolerance)
        size = temporary.stat().st_size
    return Exported(Path(path), size, agreement)


def check_possible(opset: int = OPSET) -> None:
    """Raises ValueError if a package is missing or ``opset`` is not one of `OPSETS`."""
    if opset not in OPSETS:
        raise ValueError(f"opset {opset} is not supported; choose one of {OPSETS.start}..{OPSETS.stop - 1}")
    for package in PACKAGES:
        _import(package)


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"ONNX export needs {package} ({error}): pip install 'adpretrain[export]'") from None


def _trace(inspector: Inspector, opset: int) -> Any:
    """The inspector as a `torch.onnx.ONNXProgram`, for any number of images."""
    side = inspector.backbone.preprocess.image_size
    with torch.no_grad():
        return torch.onnx.export(
            inspector,
            (torch.zeros(2, 3, side, side),),
            input_names=["images"],
            output_names=["scores", "maps"],
            dynamic_shapes=ANY_BATCH,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )


def metadata(detector: FeatureNorm, calibration: Calibration | None, threshold: float | None) -> dict[str, str]:
    """What the file tells about itself; values are text, JSON where they are more than one number or sentence."""
    assert isinstance(detector.extract, ADExtractor)  # Inspector has refused others
    config = dataclasses.asdict(detector.extract.config)
    entries = {
        "preprocess": json.dumps(config.pop("preprocess")),
        "extractor": json.dumps(config),
        "detector": json.dumps({name: getattr(detector.config, name) for name in ("norm", "sigma", "top")}),
        "library_version": __version__,
        "notice": NOTICE,
    }
    if threshold is not None:  # a score above it is anomalous
        entries["threshold"] = repr(float(threshold))
        if calibration is not None and threshold == calibration.threshold:
            entries["promised_false_alarm_rate"] = repr(calibration.rate)
    return entries


def verify(
    path: str | os.PathLike[str], detector: FeatureNorm, batches: Iterable[Tensor], tolerance: float = TOLERANCE
) -> Agreement:
    """Compare ``path`` in ONNX Runtime (CPU) with the detector in torch.

    Every batch [b, 3, S, S] is compared as it is, mirrored, and its first image alone: mirrored, a reference does not
    meet itself, where the map is rounding noise about zero. An image's difference is the larger of |map - map'| and
    |score - score'|, relative to the largest map value and score of all. A difference above ``tolerance`` is accepted
    only where `Inspector.ties` explains it, and in less than half of the images.

    Raises ValueError that names the difference otherwise, and without images.
    """
    session = _import("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inspector = Inspector(detector)
    errors, tied, largest = [], [], torch.zeros(2)
    for batch in batches:
        for images in (batch, batch.flip(-1), batch[:1]):
            expected = detector.predict(images)
            scores, maps = map(torch.from_numpy, session.run(["scores", "maps"], {"images": images.numpy()}))
            error = torch.stack([(scores - expected.scores).abs(), (maps - expected.maps).abs().amax((1, 2))])
            errors.append(error.nan_to_num(torch.inf))  # NaN is never an agreement
            tied.append(inspector.ties(images))
            largest = largest.maximum(torch.stack([expected.scores.abs().max(), expected.maps.abs().max()]))
    if not errors:
        raise ValueError("no images to verify the exported file on")
    return _judge(torch.cat(errors, 1) / largest[:, None], torch.cat(tied), tolerance)


def _judge(differences_2B: Tensor, tied_B: Tensor, tolerance: float) -> Agreement:
    worst_B = differences_2B.nan_to_num(0.0, posinf=torch.inf).amax(0)  # 0 / 0: both are zero everywhere
    excused_B = (worst_B > tolerance) & tied_B
    strict, excused = worst_B[~excused_B], worst_B[excused_B]
    if len(excused) * 2 >= len(worst_B) or strict.max() > tolerance:
        count = int((worst_B > tolerance).sum())
        raise ValueError(
            f"the exported file disagrees with torch on {count} of {len(worst_B)} images, by up to "
            f"{float(worst_B.max()):.2g} of the largest value, more than the tolerance {tolerance:.2g}; it was not kept"
        )
    return Agreement(len(worst_B), float(strict.max()), len(excused), float(excused.max()) if len(excused) else 0.0)


def export_folder(
    extractor: str | os.PathLike[str],
    normal: Path,
    out: Path,
    calibration: Path | None = None,
    check: Path | None = None,
    options: Options = DEFAULTS,
    opset: int = OPSET,
    device: str = "auto",
    progress: Progress = silent,
) -> tuple[Exported, Basis]:
    """Fit the photographs in `normal` as `score_folder` does, on ``device``, and export the result to ``out``.

    It is verified on the photographs in ``check`` (default: ``normal``), at most `CHECKED` of them, evenly spaced in
    sorted order. Raises ValueError for input that makes no inspector, see `prepare` and `export_onnx`; OSError if
    ``out`` cannot be written.
    """
    check_possible(opset)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the file to write, e.g. {out / 'model.onnx'}")
    if out.suffix != ".onnx":  # so that no photograph is ever replaced
        raise ValueError(f"{out} does not end in .onnx; name the file to write, e.g. {out.with_suffix('.onnx')}")
    paths = find_images(check or normal)
    check_writable(out)
    model = ADExtractor.from_pretrained(extractor, device=pick_device(device))
    basis = prepare(model, pick_device(device), normal, calibration, options, progress=progress)
    model.cpu()
    count = min(len(paths), CHECKED)
    chosen = [paths[index * len(paths) // count] for index in range(count)]
    progress("exporting", 0, 1)
    batches = _read(chosen, basis, options.batch_size)
    done = export_onnx(basis.detector, out, batches, basis.calibration, basis.threshold, opset)
    progress("exporting", 1, 1)
    return done, basis


def _read(paths: Sequence[Path], basis: Basis, batch_size: int) -> Iterator[Tensor]:
    for batch in read_batches(paths, basis.preprocess, batch_size, basis.full_scale):
        pixels = []
        for photo in batch:
            if isinstance(photo, Unreadable):
                raise ValueError(f"the file cannot be verified on these photographs: {photo.reason}")
            pixels.append(photo.pixels)
        yield torch.stack(pixels)
