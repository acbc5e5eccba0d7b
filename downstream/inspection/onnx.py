"""Export of a fitted detector to one file for ONNX Runtime, which maps images to scores and maps without torch.

Shapes: B images (any number), S = the network's input side, L levels, T tokens per image, N_l reference tokens,
Q = B * T queries.
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
from torch import Tensor, nn

from adpretrain import __version__
from adpretrain.extractor import ADExtractor
from adpretrain.extras import need
from adpretrain.files import atomic_path, check_writable
from adpretrain.progress import Progress
from adpretrain.projector import FixedKeyValueProjector, LearnableKeyValueProjector
from adpretrain.references import ReferenceBank
from adpretrain.residual import SearchIndex, as_map, residual_tokens, similarities, tokens
from downstream.calibration import Calibration
from downstream.detectors.aligned import AlignedFeatureNorm
from downstream.detectors.featurenorm import FeatureNorm
from downstream.inspection import DEFAULTS, Options
from downstream.inspection.inspector import Inspector
from downstream.inspection.photos import Unreadable, find_images
from downstream.inspection.run import pick_device
from downstream.terminal import no_progress

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET, OPSETS = 20, range(18, 24)  # 20: ONNX Runtime 1.17 or newer
ANY_BATCH = {"images": {0: torch.export.Dim("batch", max=2**31 - 1)}}  # torch 2.6 refuses a size without a bound
CHECKED = 16  # `export_folder` verifies the file on at most this many photographs
TOLERANCE = 1e-4
ROUNDING = 1e-6  # float32 error of a similarity, relative to the lengths of query and reference
LARGEST_FILE = 2**31 - 2**24  # bytes: the 2 GiB limit of protobuf, less some room for the graph itself
NOTICE = (
    "This file contains features of the reference photographs it was made from. They belong to whoever made the "
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
    detector: FeatureNorm,
    path: str | os.PathLike[str],
    check_batches: Iterable[Tensor],
    calibration: Calibration | None = None,
    threshold: float | None = None,
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a fitted detector to ``path`` (input "images" [B, 3, S, S], outputs "scores" [B] and "maps" [B, S, S]).

    The file is kept only if ONNX Runtime gives the same results as torch on ``check_batches`` (see `verify`). Its
    metadata describe how to prepare a photograph, the ``threshold`` (by default that of ``calibration``) and the
    origin of the extractor.

    Raises ValueError if packages are missing, if ``opset`` is not in `OPSETS`, if the detector cannot be exported (see
    `DetectorGraph`), is not on the CPU or is too large for one file, or if the results differ.
    """
    check_possible(opset)
    graph = DetectorGraph(detector)
    held = [*graph.parameters(), *graph.buffers()]
    if devices := {str(tensor.device) for tensor in held} - {"cpu"}:
        raise ValueError(f"the extractor is on {', '.join(sorted(devices))}: export it from the CPU, extractor.cpu()")
    if (size := sum(tensor.nbytes for tensor in held)) > LARGEST_FILE:
        raise ValueError(
            f"the detector's {size / 2**30:.1f} GiB of weights exceed the 2 GiB that one ONNX file can hold: export "
            "one with a smaller backbone"
        )
    if threshold is None and calibration is not None:
        threshold = calibration.threshold
    program = _trace(graph, opset)
    program.model.metadata_props.update(metadata(detector, calibration, threshold))
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
    side = graph.backbone.preprocess.image_size
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


def metadata(detector: FeatureNorm, calibration: Calibration | None, threshold: float | None) -> dict[str, str]:
    """Return the metadata of the file: texts, which are JSON unless they are one number or sentence."""
    assert isinstance(detector.extract, ADExtractor)  # DetectorGraph has refused any other
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

    Every batch [b, 3, S, S] is compared as it is, mirrored, and with its first image alone. (A mirrored reference is
    not compared with itself, which would give only rounding noise about zero.) An image's difference is the larger of
    |map - map'| and |score - score'|, relative to the largest map value and score of all. A difference above
    ``tolerance`` is accepted only if `DetectorGraph.ties` explains it, and in less than half of the images.

    Raises ValueError with the difference if it is not accepted, and ValueError if there are no images.
    """
    need("export", "onnxruntime")
    session = importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph = DetectorGraph(detector)
    errors, tied, largest = [], [], torch.zeros(2)
    for batch in batches:
        for images in (batch, batch.flip(-1), batch[:1]):
            expected = detector.predict(images)
            scores, maps = map(torch.from_numpy, session.run(["scores", "maps"], {"images": images.numpy()}))
            error = torch.stack([(scores - expected.scores).abs(), (maps - expected.maps).abs().amax((1, 2))])
            errors.append(error.nan_to_num(torch.inf))  # NaN never counts as agreement
            tied.append(graph.ties(images))
            largest = largest.maximum(torch.stack([expected.scores.abs().max(), expected.maps.abs().max()]))
    if not errors:
        raise ValueError("no images to verify the exported file on")
    return _judge(torch.cat(errors, 1) / largest[:, None], torch.cat(tied), tolerance)


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
) -> tuple[Exported, Inspector]:
    """Fit on the photographs in `normal` as `score_folder` does, on ``device``, and export the result to ``out``.

    The file is verified on at most `CHECKED` photographs in ``check`` (default: ``normal``), evenly spaced in sorted
    order. Raises ValueError for input that `Inspector.from_folder` or `export_onnx` refuses; OSError if ``out`` cannot
    be written.
    """
    check_possible(opset)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the file to write, e.g. {out / 'model.onnx'}")
    if out.suffix != ".onnx":  # so that a photograph cannot be overwritten by mistake
        raise ValueError(f"{out} does not end in .onnx; name the file to write, e.g. {out.with_suffix('.onnx')}")
    paths = find_images(check or normal)
    check_writable(out)
    model = ADExtractor.from_pretrained(extractor, device=pick_device(device))
    inspector = Inspector.from_folder(model, pick_device(device), normal, calibration, options, progress=progress)
    assert isinstance(inspector.detector, FeatureNorm)
    model.cpu()
    count = min(len(paths), CHECKED)
    chosen = [paths[index * len(paths) // count] for index in range(count)]
    progress("exporting", 0, 1)
    batches = _read(chosen, inspector)
    done = export_onnx(inspector.detector, out, batches, inspector.calibration, inspector.threshold, opset)
    progress("exporting", 1, 1)
    return done, inspector


def _read(paths: Sequence[Path], inspector: Inspector) -> Iterator[Tensor]:
    for batch in inspector.reader.batches(paths):
        pixels = []
        for photo in batch:
            if isinstance(photo, Unreadable):
                raise ValueError(f"the file cannot be verified on these photographs: {photo.reason}")
            pixels.append(photo.pixels)
        yield torch.stack(pixels)


class DetectorGraph(nn.Module):
    """A fitted `FeatureNorm` as one graph, in which everything that does not depend on the image is constant.

    The references, their search indices and scales and the projector's keys and values are buffers. Backbone and
    layers are shared with the extractor, not copied; a later `set_references` does not change the graph. All
    similarities of a batch, B * T * max N_l floats, are in memory at once.

    Raises ValueError if there is no extractor, no references, or if every image has different references.
    """

    def __init__(self, detector: FeatureNorm) -> None:
        super().__init__()
        extractor = detector.extract
        if isinstance(detector, AlignedFeatureNorm):
            raise ValueError(
                "the exported detector has one set of references for all images: aligned references cannot be exported"
            )
        if not isinstance(extractor, ADExtractor) or extractor.references is None:
            raise ValueError("only a FeatureNorm of an ADExtractor can be exported, after fit(normal_images)")
        if (banks := extractor.references.banks) != 1:
            raise ValueError(f"the exported detector has one set of references for all images, not {banks}")
        self.from_features, self.local_scale = detector.from_features, extractor.local_scale
        self.metric = extractor.config.matching
        self.backbone = extractor.backbone
        self.projectors = nn.ModuleList(map(_fixed, extractor.projector.levels)) if extractor.projector else None
        with torch.no_grad():
            crossed = extractor.projector is not None and extractor.projector.needs_reference_residuals
            self._register(extractor.references, crossed)
        self.eval()

    def _register(self, bank: ReferenceBank, crossed: bool) -> None:
        assert bank.indices is not None
        for level, (bank_1NC, index) in enumerate(zip(bank.levels, bank.indices, strict=True)):
            # Clones are needed because tensors made in inference mode cannot be part of a graph.
            self.register_buffer(f"bank_{level}", bank_1NC.clone())
            self.register_buffer(f"scale_{level}", bank.scales[level].clone() if bank.scales else None)
            self.register_buffer(f"rows_{level}", index.rows.clone())
            self.register_buffer(f"shift_{level}", None if index.shift is None else index.shift.clone())
            self.register_buffer(f"context_{level}", bank.context[level].clone() if crossed else None)

    def _index(self, level: int) -> SearchIndex:
        return SearchIndex(getattr(self, f"rows_{level}"), getattr(self, f"shift_{level}"))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] float32, normalised -> scores [B], maps [B, S, S], as the detector's `predict` gives them."""
        projected = []
        for level, feature in enumerate(self.backbone(images)):
            bank, scale = getattr(self, f"bank_{level}"), getattr(self, f"scale_{level}")
            x_BTC = residual_tokens(tokens(feature), bank, self.metric, None, scale, self._index(level))
            if self.projectors is not None:
                x_BTC = self.projectors[level](x_BTC, getattr(self, f"context_{level}"))
            projected.append(as_map(x_BTC, feature))
        if self.local_scale is not None:
            projected = self.local_scale.weighted(projected)
        prediction = self.from_features(projected)
        return prediction.scores, prediction.maps

    @torch.no_grad()
    def ties(self, images: Tensor) -> Tensor:
        """Find the images [B, 3, S, S] that have a token whose two nearest references tie within rounding: bools [B].

        Which of the two is taken, and thus the residual, then depends on rounding: two correct programs may differ.
        """
        tied = torch.zeros(images.shape[0], dtype=torch.bool, device=images.device)
        for level, feature in enumerate(self.backbone(images)):
            index, query_QC = self._index(level), tokens(feature).flatten(0, 1)
            nearest, second = similarities(query_QC, index).topk(2, dim=1).values.unbind(1)
            length_Q = (query_QC if index.shift is None else query_QC - index.shift).norm(dim=1)
            rounding_Q = ROUNDING * length_Q * index.rows[:, :-1].norm(dim=1).max()
            tied |= (nearest - second <= rounding_Q).view(images.shape[0], -1).any(1)
        return tied


def _fixed(level: nn.Module) -> nn.Module:
    return FixedKeyValueProjector(level) if isinstance(level, LearnableKeyValueProjector) else level
