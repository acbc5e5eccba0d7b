"""The typed results of a finished comparison (`downstream.board.result`): one file for each set, row of features,
detector and setting.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adpretrain._version import __version__
from adpretrain.backbones import Backbone
from adpretrain.data import Sample
from adpretrain.data.layouts.detect import detect_layout
from adpretrain.extractor import ADExtractor
from adpretrain.passport import BACKBONE, Link, in_a_product, passport
from adpretrain.saved import provenance_of
from downstream.board.result import digest_of, sealed, write_result
from downstream.evaluation.cells import Cell, listing_digest
from downstream.evaluation.comparison import PRETRAINED, SCALED, Comparison, ExtractorRow, SetRow
from downstream.evaluation.means import Record
from downstream.evaluation.networks import Features

FOLDER = "results"
ABSOLUTE = re.compile(r"(?<![\w.:/~-])/(?:[^\s/,:;'\"]+/)*([^\s/,:;'\"\]})]*)")  # a path within a word
LINK = ("name", "licence", "product", "source")
OMITTED = {"--out", "--device"}  # flags of a command that are no part of what was measured
NOTHING_LEARNT = "nothing was pretrained on top of the backbone"


@dataclass(frozen=True)
class DataSet:
    """A data set of a comparison: its row, and the samples that were chosen of it."""

    row: SetRow
    samples: Sequence[Sample]

    def described(self) -> dict[str, Any]:
        """The part of a result that says on which photographs it was measured."""
        root = Path(self.row.root)
        layout = detect_layout(self.row.root) if self.row.dataset == "auto" else self.row.dataset
        listing = sorted(self.samples, key=lambda sample: (str(sample.image), sample.view or ""))
        return {
            "name": self.row.name,
            "layout": layout,
            "digest": listing_digest([("", listing)], root),
            "images": len(listing),
        }


def write_results(
    out: Path,
    cells: Sequence[Cell],
    records: dict[str, list[Record]],
    sets: Sequence[DataSet],
    comparison: Comparison,
    rows: dict[str, ExtractorRow],
    command: str,
    device: str,
) -> list[Path]:
    """Write the results of finished cells, whose ``records`` are given by the cell's digest, below ``out``/results."""
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in cells:
        key = (cell.set_name, cell.features.name, cell.contender.detector, cell.trial.setting)
        groups.setdefault(key, []).append(cell)
    folder, data = out / FOLDER, {one.row.name: one.described() for one in sets}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (name, features, _, _), own in groups.items():
        content = {
            **_measured(own, records, data[name]),
            "extractor": extractor_info(own[0].features),
            "overlap": _overlap(own[0].features, rows[features].seen_in_pretraining, data[name]),
            "protocol": {
                "name": comparison.protocol,
                "setting": own[0].trial.setting,
                "seed": comparison.seed,
                "draws": len({cell.trial.draw for cell in own}),
            },
            "library_version": __version__,
            "hardware": hardware(device),
            "command": public_command(command),
        }
        written.append(write_result(folder, sealed(content)))
    for stale in {*folder.glob("*.json")} - {*written}:  # of an earlier, larger comparison in this folder
        stale.unlink()
    return written


def _measured(cells: Sequence[Cell], records: dict[str, list[Record]], data: dict[str, Any]) -> dict[str, Any]:
    """The parts of a result that hold what was measured, on which products, with which detector."""
    found, latencies = [], []
    for cell in cells:
        for record in records[cell.digest]:
            latencies += [record["latency"]] if record.get("latency") is not None else []
            found.append(
                {
                    "product": record["product"],
                    "draw": cell.trial.draw,
                    "extractor": cell.contender.extractor,
                    "images": cell.depends_on["images"],
                    **{key: record[key] for key in ("labels", "scores", "metrics", "notes")},
                    **record["seconds"],
                }
            )
    detector, options = cells[0].contender.detector, cells[0].depends_on["options"]
    return {
        "detector": {"name": detector, "options": options, "digest": digest_of([detector, options])},
        "data": {**data, "products": list(dict.fromkeys(one["product"] for one in found))},
        "measured": found,
        "latency": min(latencies, default=None),
    }


def extractor_info(features: Features) -> dict[str, Any]:
    """The part of a result that says whose features they are, with the licences that they hang on."""
    backbone, extractors = features.networks.backbone, features.networks.extractors
    digests = [*features.digests.values()]
    model = extractors[0] if extractors else backbone
    chain = _chain(features)
    return {
        "name": _public_name(next(iter(features.digests), backbone.name)),
        "revision": features.revision,
        "digest": digest_of(digests) if digests else None,
        "features": features.kind,
        "backbone": backbone.name,
        "weights": weights_digest(backbone),
        "random_weights": features.random_weights,
        "image_size": backbone.preprocess.image_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "licences": [{"part": link.what, **{key: getattr(link, key) for key in LINK}} for link in chain],
        "product": in_a_product(chain),
    }


def _public_name(source: str) -> str:
    """An extractor's name for others: org/name of the Hub, embedded, or that of a folder (of the run, if the
    folder is a run's)."""
    if not Path(source).is_dir():
        return source.partition("@")[0]
    parts = Path(source).resolve().parts
    return parts[-2] if parts[-1] == "extractor" and len(parts) > 2 else parts[-1]


def public_command(command: str) -> str:
    """A command for others to read: without what does not change the numbers (`OMITTED`), and of every absolute path
    only the last part, as the rest is private."""
    words = shlex.split(command)
    kept = [word for word, before in zip(words, ["", *words], strict=False) if not {word, before} & OMITTED]
    return shlex.join(Path(word).name if Path(word).is_absolute() else ABSOLUTE.sub(r"\1", word) for word in kept)


def weights_digest(backbone: Backbone) -> str:
    """SHA-256 of the weights of a backbone: names, shapes and bytes of its tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _overlap(features: Features, declared: str | None, data: dict[str, Any]) -> dict[str, Any]:
    """Whether the pretraining saw photographs of the data set: what is known by itself, else what was declared."""
    learnt = features.kind == PRETRAINED and any(one.projector for one in features.networks.extractors)
    if not learnt:
        return {"answer": "none", "why": NOTHING_LEARNT}
    own = provenance_of(features.networks.extractors[0].config, "data")
    if data["layout"] in (own.get("name"), own.get("set")) or data["name"] == own.get("set"):
        return {"answer": "some", "why": f"it was pretrained on {own.get('set') or own.get('name')}"}
    if declared not in (None, "unknown"):
        return {"answer": declared, "why": "declared by whoever measured it"}
    return {"answer": "unknown", "why": "not declared (adpretrain evaluate --seen-in-pretraining none, or some)"}


def _chain(features: Features) -> list[Link]:
    """The links of licences that the features hang on. Raw features and residuals hang on the backbone alone; weights
    that were drawn have no licence."""
    networks = features.networks
    whole = bool(networks.extractors) and features.kind in (SCALED, PRETRAINED)
    links = passport((networks.extractors[0] if whole else ADExtractor(networks.backbone)).config)
    drawn = features.random_weights is not None
    return [link for link in links if not (drawn and link.what == BACKBONE)]


def hardware(device: str) -> dict[str, Any]:
    """The part of a result that says on what it was measured."""
    on_gpu = device.startswith("cuda")
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name; Linux tells it in a file, other systems through Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
