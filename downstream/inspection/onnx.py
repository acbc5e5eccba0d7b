"""Export of a fitted detector to one file for ONNX Runtime, which maps images to scores and maps without torch.

Shapes: B images (any number), S = the network's input side.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adpretrain import __version__
from adpretrain.backbones import Backbone, Extract
from adpretrain.extractor import ADExtractor
from adpretrain.extras import need
from adpretrain.files import atomic_path, check_writable
from adpretrain.preprocess import Preprocess
from adpretrain.progress import Progress
from adpretrain.saved import backbone_config
from downstream.calibration import Calibration
from downstream.detector import Detector, Prediction
from downstream.detectors import detector_from_pretrained
from downstream.detectors.tiled import Tiled
from downstream.extracts import Adapted
from downstream.inspection import DEFAULTS, Options
from downstream.inspection.graph import TOLERANCE, DetectorGraph, difference, largest
from downstream.inspection.inspector import Inspector
from downstream.inspection.photos import Unreadable, find_images
from downstream.inspection.run import pick_device
from downstream.inspection.set_up import inspector_from_detector, inspector_from_folder
from downstream.saved import locate_model
from downstream.terminal import no_progress

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET, OPSETS = 20, range(18, 24)  # 20: ONNX Runtime 1.17 or newer
ANY_BATCH = {"images": {0: torch.export.Dim("batch", max=2**31 - 1)}}  # torch 2.6 refuses a size without a bound
CHECKED = 16  # `export_folder` verifies the file on at most this many photographs
LARGEST_FILE = 2**31 - 2**24  # bytes: the 2 GiB limit of protobuf, less some room for the graph itself
NOTICE = (
    "This file contains features of the normal photographs it was made from. They belong to whoever made the "
    "photographs: share the file only with people who may see the product."
)


@dataclass(frozen=True)
class Agreement:
    """The result of `verify`: the largest difference, not counting images where ties were broken differently."""

    images: int  # images compared, including mirrored ones
    difference: float  # largest relative difference of the images that are not counted in ``ties``
    ties: int  # images that differ because ties were broken differently
    tie_difference: float  # largest relative difference of these


@dataclass(frozen=True)
class Exported:
    """An exported file that was written and verified."""

    path: Path
    size: int  # bytes
    agreement: Agreement


def export_onnx(
    detector: Detector,
    path: str | os.PathLike[str],
    check_batches: Iterable[Tensor],
    calibration: Calibration | None = None,
    threshold: float | None = None,
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
    further: Mapping[str, str] | None = None,
) -> Exported:
    """Write any fitted detector to ``path`` (input "images" [B, 3, S, S], outputs "scores" [B] and "maps" [B, S, S]).

    The file is kept only if ONNX Runtime gives the same results as torch on ``check_batches`` (see `verify`). Its
    metadata describe how to prepare a photograph, the ``threshold`` (by default that of ``calibration``), the detector
    with its options, the origin of its network, and ``further`` entries.

    Raises ValueError if packages are missing, if ``opset`` is not in `OPSETS`, if the detector cannot be exported (see
    `DetectorGraph`), is not on the CPU or is too large for one file, or if the results differ.
    """
    check_possible(opset)
    graph = DetectorGraph(detector)
    held = list(graph.held())
    if devices := {str(tensor.device) for tensor in held} - {"cpu"}:
        raise ValueError(
            f"the detector is on {', '.join(sorted(devices))}: export it from the CPU (save_pretrained, then "
            "detector_from_pretrained with device='cpu')"
        )
    if (size := sum(tensor.nbytes for tensor in held)) > LARGEST_FILE:
        raise ValueError(
            f"the detector's {size / 2**30:.1f} GiB of weights exceed the 2 GiB that one ONNX file can hold: export "
            "one with a smaller backbone, or one that keeps fewer features"
        )
    if threshold is None and calibration is not None:
        threshold = calibration.threshold
    program = _trace(graph, opset)
    entries = metadata(detector, graph.preprocess, calibration, threshold) | dict(further or {})
    program.model.metadata_props.update(entries)
    with atomic_path(path) as temporary:
        program.save(str(temporary), external_data=False)
        agreement = verify(temporary, detector, check_batches, tolerance)
        size = temporary.stat().st_size
    return Exported(Path(path), size, agreement)


def check_possible(opset: int = OPSET) -> None:
    """Raise ValueError if a package is missing or ``opset`` is not one of `OPSETS`."""
    if opset not in OPSETS:
        raise ValueError(f"opset {opset} is not supported; choose one of {OPSETS.start}..{OPSETS.stop - 1}")
    need("export", *PACKAGES)


def _trace(graph: DetectorGraph, opset: int) -> Any:
    """Trace the detector to a `torch.onnx.ONNXProgram` that takes any number of images."""
    side = graph.preprocess.image_size
    with torch.no_grad():
        return torch.onnx.export(
            graph,
            (torch.zeros(2, 3, side, side),),
            input_names=["images"],
            output_names=["scores", "maps"],
            dynamic_shapes=ANY_BATCH,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )


def metadata(
    detector: Detector, preprocess: Preprocess, calibration: Calibration | None, threshold: float | None
) -> dict[str, str]:
    """Return the metadata of the file: texts, which are JSON unless they are one number or sentence."""
    entries = {
        "preprocess": json.dumps(dataclasses.asdict(preprocess)),
        "detector": json.dumps(_described(detector)),
        "library_version": __version__,
        "notice": NOTICE,
    }
    if not detector.members:
        entries |= {name: json.dumps(network) for name, network in _network(detector.extract).items()}
    if threshold is not None:  # a score above it is anomalous
        entries["threshold"] = repr(float(threshold))
        if calibration is not None and threshold == calibration.threshold:
            entries["promised_false_alarm_rate"] = repr(calibration.rate)
    return entries


def _described(detector: Detector) -> dict[str, Any]:
    """The detector's name and options; those of its members, with their networks."""
    options = {} if detector.options is None else dataclasses.asdict(detector.config)
    found: dict[str, Any] = {"name": detector.name, "options": options}
    if detector.members:
        own = [{} if member.members else _network(member.extract) for member in detector.members]
        found["members"] = [_described(m) | network for m, network in zip(detector.members, own, strict=True)]
    return found


def _network(extract: Extract) -> dict[str, Any]:
    """The configuration of an extractor, or of a backbone; nothing for a module of another program."""
    if isinstance(extract, ADExtractor):
        config = dataclasses.asdict(extract.config)
        del config["preprocess"]  # an entry of its own
        return {"extractor": config}
    backbone = extract.backbone if isinstance(extract, Adapted) else extract
    return {"backbone": dataclasses.asdict(backbone_config(backbone))} if isinstance(backbone, Backbone) else {}


def verify(
    path: str | os.PathLike[str], detector: Detector, batches: Iterable[Tensor], tolerance: float = TOLERANCE
) -> Agreement:
    """Compare ``path`` in ONNX Runtime (CPU) with the detector in torch.

    Every batch [b, 3, S, S] is compared as it is, mirrored, and with its first image alone. (A mirrored reference is
    not compared with itself, which would give only rounding noise about zero.) An image's difference is the larger of
    |map - map'| and |score - score'|, relative to the largest map value and score of all. A difference above
    ``tolerance`` is accepted only if `DetectorGraph.ties` explains it, and in less than half of the images.

    Raises ValueError with the difference if it is not accepted, and ValueError if there are no images.
    """
    need("export", "onnxruntime")
    session = importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    errors, tied, unit_2 = [], [], torch.zeros(2)
    for batch in batches:
        for images in (batch, batch.flip(-1), batch[:1]):
            expected = detector.predict(images)
            found = Prediction(*map(torch.from_numpy, session.run(["scores", "maps"], {"images": images.numpy()})))
            errors.append(difference(found, expected, torch.ones(2)))
            close = bool((difference(found, expected, largest(expected)) <= tolerance).all())
            untied = torch.zeros(len(images), dtype=torch.bool)
            tied.append(untied if close else DetectorGraph(detector).ties(images, tolerance))
            unit_2 = unit_2.maximum(largest(expected))
    if not errors:
        raise ValueError("no images to verify the exported file on")
    return _judge(torch.cat(errors, 1) / unit_2[:, None], torch.cat(tied), tolerance)


def _judge(differences_2B: Tensor, tied_B: Tensor, tolerance: float) -> Agreement:
    worst_B = differences_2B.nan_to_num(0.0, posinf=torch.inf).amax(0)  # 0 / 0 means that all values are zero in both
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
    progress: Progress = no_progress,
    detector: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> tuple[Exported, Inspector]:
    """Fit on the photographs in `normal` as `score_folder` does, on ``device``, and export the result to ``out``.

    If a fitted ``detector`` (a folder or a Hub id) is given, it is exported instead, and ``normal`` holds photographs
    that it was not fitted on, which only calibrate. ``weights`` are those of the backbone, for machines without a
    network. The file is verified on at most `CHECKED` photographs in ``check`` (default: ``normal``), evenly spaced in
    sorted order. Raises ValueError for input that `inspector_from_folder`, `inspector_from_detector` or `export_onnx`
    refuses; OSError if ``out`` cannot be written.
    """
    check_possible(opset)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the file to write, e.g. {out / 'model.onnx'}")
    if out.suffix != ".onnx":  # so that a photograph cannot be overwritten by mistake
        raise ValueError(f"{out} does not end in .onnx; name the file to write, e.g. {out.with_suffix('.onnx')}")
    paths = find_images(check or normal)
    check_writable(out)
    where = pick_device(device)
    if detector is None:
        model = ADExtractor.from_pretrained(extractor, where, weights)
        inspector = inspector_from_folder(model, where, normal, calibration, options, progress=progress)
        fitted = inspector.detector
        assert isinstance(fitted.extract, ADExtractor)
        fitted.extract.cpu()
    else:
        folder = locate_model(detector).folder
        given = normal, calibration, options
        inspector = inspector_from_detector(folder, where, *given, weights=weights, progress=progress)
        on_cpu = where.type == "cpu"
        fitted = inspector.detector if on_cpu else detector_from_pretrained(folder, device="cpu", weights=weights)
    count = min(len(paths), CHECKED)
    chosen = [paths[index * len(paths) // count] for index in range(count)]
    progress("exporting", 0, 1)
    limit = inspector.pixel_limit
    further = {} if limit is None else {"pixel_limit": repr(limit)}  # a map value above it belongs to a region
    if isinstance(fitted, Tiled):
        further["tiling"] = json.dumps(dataclasses.asdict(fitted.tiling))
    batches = _read(chosen, inspector)
    single = fitted.of_tiles() if isinstance(fitted, Tiled) else fitted
    done = export_onnx(single, out, batches, inspector.calibration, inspector.threshold, opset, further=further)
    progress("exporting", 1, 1)
    return done, inspector


def _read(paths: Sequence[Path], inspector: Inspector) -> Iterator[Tensor]:
    """Yield batches of photographs, or of the first tiles of each."""
    for batch in inspector.reader.batches(paths):
        pixels = []
        for photo in batch:
            if isinstance(photo, Unreadable):
                raise ValueError(f"the file cannot be verified on these photographs: {photo.reason}")
            pixels.append(photo)
        if isinstance(inspector.detector, Tiled):
            yield from (next(iter(inspector.detector.tiles(photo.whole))) for photo in pixels)
        else:
            yield torch.stack([photo.pixels for photo in pixels])
