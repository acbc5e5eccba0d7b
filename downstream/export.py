"""A fitted detector as one file for ONNX Runtime: photographs in, scores and maps out, no torch needed.

Shapes: B images (any number), S = the network's input side, L levels, T tokens per image, N_l reference tokens.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adpretrain import __version__
from adpretrain.backbones import References
from adpretrain.extractor import ADExtractor, images_in_bank
from adpretrain.files import atomic_path
from adpretrain.projector import FixedKeyValueProjector, LearnableKeyValueProjector
from adpretrain.residual import SearchIndex, as_map, residual_tokens, search_index, tokens
from downstream.aligned import AlignedFeatureNorm
from downstream.basis import DEFAULTS, Basis, Options, Progress, prepare, silent
from downstream.calibration import Calibration
from downstream.featurenorm import FeatureNorm
from downstream.photos import Unreadable, find_images, read_batches
from downstream.score import pick_device

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET, OPSETS = 20, range(18, 24)  # 20: ONNX Runtime 1.17 or newer
CHECKED = 16  # photographs that a folder's export is verified on
TOLERANCE = 1e-4
LARGEST_FILE = 2**31 - 2**24  # protobuf's 2 GiB, less some room for the graph itself
NOTICE = (
    "This file contains features of the reference photographs it was made from. They belong to whoever made the "
    "photographs: share the file only with those who may see the product."
)


class Inspector(nn.Module):
    """A fitted `FeatureNorm` whose forward is one graph: all that does not depend on the image is a constant.

    The references, their search indices and scales and the projector's keys and values are buffers. Backbone and
    layers are the extractor's own, not copies; a later `set_references` does not reach the inspector. Similarities of
    a whole batch, B * T * max N_l floats, are held at once.

    Raises ValueError without an extractor, without references, or if every image has references of its own.
    """

    def __init__(self, detector: FeatureNorm) -> None:
        super().__init__()
        extractor = detector.extract
        if isinstance(detector, AlignedFeatureNorm):
            raise ValueError("an inspector has one set of references for all images; aligned ones cannot be exported")
        if not isinstance(extractor, ADExtractor) or extractor.references is None:
            raise ValueError("only a FeatureNorm of an ADExtractor can be exported, after fit(normal_images)")
        if (banks := extractor.references[0].shape[0]) != 1:
            raise ValueError(f"an inspector has one set of references for all images, not {banks}")
        self.from_features, self.metric = detector.from_features, extractor.config.matching
        self.backbone, self.conditioning = extractor.backbone, extractor.conditioning
        self.projectors = nn.ModuleList(map(_fixed, extractor.projector.levels)) if extractor.projector else None
        with torch.no_grad():
            self._register(extractor, extractor.references)
        self.eval()

    def _register(self, extractor: ADExtractor, references: References) -> None:
        side = extractor.preprocess.image_size
        features = extractor.encode(torch.zeros(1, 3, side, side, device=references[0].device))  # for their sizes
        scales = extractor.scales(features, references)
        contexts: Sequence[Tensor | None] = [None] * len(references)
        if extractor.projector is not None and extractor.projector.needs_reference_residuals:
            contexts = extractor.reference_residuals(references, images_in_bank(features, references), scales)
        for level, (bank_1NC, context) in enumerate(zip(references, contexts, strict=True)):
            rows_NC, shift_C = search_index(bank_1NC[0], self.metric)
            # Clones: what the extractor made in inference mode cannot be part of a graph.
            self.register_buffer(f"bank_{level}", bank_1NC.clone())
            self.register_buffer(f"scale_{level}", scales[level].clone() if scales else None)
            self.register_buffer(f"rows_{level}", rows_NC)
            self.register_buffer(f"shift_{level}", shift_C)
            self.register_buffer(f"context_{level}", context)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] float32, normalised -> scores [B], maps [B, S, S]: what the detector's `predict` gives."""
        features = self.backbone(images)
        if self.conditioning is not None:
            features = self.conditioning.standardise(features)
        projected = []
        for level, feature in enumerate(features):
            bank, scale = getattr(self, f"bank_{level}"), getattr(self, f"scale_{level}")
            index = SearchIndex(getattr(self, f"rows_{level}"), getattr(self, f"shift_{level}"))
            x_BTC = residual_tokens(tokens(feature), bank, self.metric, None, scale, index)
            if self.projectors is not None:
                x_BTC = self.projectors[level](x_BTC, getattr(self, f"context_{level}"))
            projected.append(as_map(x_BTC, feature))
        prediction = self.from_features(projected)
        return prediction.scores, prediction.maps


def _fixed(level: nn.Module) -> nn.Module:
    return FixedKeyValueProjector(level) if isinstance(level, LearnableKeyValueProjector) else level


@dataclass(frozen=True)
class Exported:
    """A written and verified file; ``difference`` is the largest one found, see `verify`."""

    path: Path
    size: int  # bytes
    difference: float
    images: int  # how many it was verified on, mirrored ones included


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
        difference, images = verify(temporary, detector, check_batches, tolerance)
        size = temporary.stat().st_size
    return Exported(Path(path), size, difference, images)


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
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
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
        "detector": json.dumps({"norm": detector.norm, "sigma": detector.sigma, "top": detector.top}),
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
) -> tuple[float, int]:
    """Run ``path`` in ONNX Runtime (CPU) and the detector in torch on the same images: (difference, images).

    Every batch [b, 3, S, S] is compared as it is, mirrored, and its first image alone: mirrored, a reference does not
    meet itself, where the map is rounding noise about zero. The difference is the larger of |map - map'| and
    |score - score'| over all, relative to the largest map value and score.

    Raises ValueError that names the difference if it exceeds ``tolerance``, and without images.
    """
    session = _import("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    errors, largest, images = torch.zeros(2), torch.zeros(2), 0
    for batch in batches:
        for variant in (batch, batch.flip(-1), batch[:1]):
            expected = detector.predict(variant)
            scores, maps = map(torch.from_numpy, session.run(["scores", "maps"], {"images": variant.numpy()}))
            pairs = ((expected.scores, scores), (expected.maps, maps))
            found = [(theirs - ours).abs().max() if theirs.shape == ours.shape else torch.inf for ours, theirs in pairs]
            errors = errors.maximum(torch.tensor([float(e) for e in found]).nan_to_num(torch.inf))
            largest = largest.maximum(torch.stack([ours.abs().max() for ours, _ in pairs]))
            images += len(variant)
    if not images:
        raise ValueError("no images to verify the exported file on")
    relative_scores, relative_maps = (errors / largest).nan_to_num(0.0, posinf=torch.inf).tolist()
    difference = max(relative_scores, relative_maps)
    if not difference <= tolerance:
        raise ValueError(
            f"the exported file disagrees with torch on {images} images: scores by {relative_scores:.2g}, maps by "
            f"{relative_maps:.2g} of their largest value, more than the tolerance {tolerance:.2g}; it was not kept"
        )
    return difference, images


def export_folder(
    extractor: Path,
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
    paths = find_images(check or normal)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):  # before any work: can files be made there?
        pass
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
    for batch in read_batches(paths, basis.preprocess, batch_size):
        pixels = []
        for photo in batch:
            if isinstance(photo, Unreadable):
                raise ValueError(f"cannot verify on {photo.path}: {photo.reason}")
            pixels.append(photo.pixels)
        yield torch.stack(pixels)
