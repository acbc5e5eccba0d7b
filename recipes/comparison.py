"""The comparison of `evaluate.py`: every detector on every kind of features, product after product, on all processes.

Processes share nothing but the folder: each writes the trials of its own products, and the first one, when all are
there, the tables and the report. There is no barrier that a slow product could let time out.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from accelerate import PartialState
from cells import Cells, Job, jobs_of, shares
from few_shot import load_extractors, located
from findings import draw_features, show, write_findings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adpretrain._version import __version__
from adpretrain.backbones import load_backbone
from adpretrain.backbones.weights import fingerprint
from adpretrain.data import Sample
from adpretrain.extractor import backbone_config
from adpretrain.parsing import read_yaml
from adpretrain.saved import folder_digest
from downstream.detectors import build_detector, find_detector
from downstream.evaluation.contenders import PRETRAINED, RAW, Networks, contenders
from downstream.evaluation.protocols import ProtocolOptions, trials
from downstream.evaluation.tables import in_order
from downstream.evaluation.trial import Settings, run_trial

POLL = 0.5  # seconds between looks at the folder, once the first process has nothing else to do


def run(options: argparse.Namespace, samples: Sequence[Sample], console: Console) -> None:
    """Evaluate this process's share; in the first process also write and print the tables of all."""
    state = PartialState(cpu=options.device == "cpu" or not torch.cuda.is_available())
    device = options.device or str(state.device)
    protocol = protocol_options(options)
    planned = trials(samples, protocol)  # a product with too few images is told before anything is loaded
    folders = located(options.extractors)
    networks = load_networks(options, folders, device)
    features = options.features or [RAW, *([PRETRAINED] if networks.extractors else [])]
    settings = Settings(
        settings=options.settings,
        options=detector_options(options.options),
        batch_size=options.batch_size,
        workers=options.workers,
        device=device,
        pictures=options.pictures,
    )
    rows = contenders(options.detectors, features, networks)
    for row in rows:  # a mistake in the options is told before anything is computed
        own = settings.options.get(row.detector, {})
        build_detector(row.detector, networks.extract(row), own, settings.settings)
    jobs = jobs_of(planned, rows)
    configuration = configuration_of(options, folders, samples, networks, protocol, settings, features)
    folder = options.out or default_folder(options, protocol, configuration)
    cells = Cells(folder, configuration, state.is_main_process)
    if state.num_processes > 1:
        place = f"process {state.process_index + 1} of {state.num_processes} on {device}"
        console.print(place, highlight=False, markup=False)
    own = shares(jobs, state.num_processes)[state.process_index]
    evaluate(own, jobs, cells, networks, settings, console, state.is_main_process)
    if not state.is_main_process:
        return
    records = in_order(cells.read(jobs))
    pictures = draw_features(folder, planned, networks, settings, options.embeddings)
    write_findings(folder, records, {**configuration, "command": options.command}, pictures)
    show(records, Console(width=max(110, console.width)))
    console.print(
        f"tables     {folder / 'table.md'} (.tex, .csv, .json)", highlight=False, markup=False, soft_wrap=True
    )
    console.print(f"report     {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def load_networks(options: argparse.Namespace, folders: Mapping[str, Path], device: str) -> Networks:
    """Backbone and extractors on the device; the backbone is the extractors' own where there are any."""
    if folders:
        extractors = load_extractors(folders, device, options.weights)
        name = extractors[0].backbone.name
        if options.backbone not in ("lite0", name):
            raise ValueError(f"--backbone {options.backbone}, but the extractor was trained on {name}: leave it out")
        return Networks(extractors[0].backbone, tuple(extractors))
    untrained = options.random_weights is not None
    if untrained:
        torch.manual_seed(options.random_weights)
    backbone = load_backbone(
        options.backbone,
        not untrained,
        weights=options.weights,
        image_size=options.image_size,
        levels=options.levels,
        resize=options.resize,
        crop_from=options.crop_from,
    )
    return Networks(backbone.to(device))


def protocol_options(options: argparse.Namespace) -> ProtocolOptions:
    given: dict[str, Any] = {"references": options.references, "share": options.share, "noise": options.noise}
    if options.shots:
        given["shots"] = tuple(options.shots)
    overlap = not options.no_overlap
    return ProtocolOptions(options.protocol or "full", draws=options.draws or 0, overlap=overlap, **given)


def detector_options(path: Path | None) -> dict[str, Any]:
    """A YAML file of options under detectors' names. Raises ValueError for a name that is none, or has no options."""
    content = read_yaml(str(path)) if path else {}
    for name, options in content.items():
        find_detector(name)
        if not isinstance(options, dict):
            raise ValueError(
                f"{path}: {name} is {options!r}; expected its options as a mapping, such as {{sigma: 4.0}}"
            )
    return content


def configuration_of(
    options: argparse.Namespace,
    folders: Mapping[str, Path],
    samples: Sequence[Sample],
    networks: Networks,
    protocol: ProtocolOptions,
    settings: Settings,
    features: Sequence[str],
) -> dict[str, Any]:
    """All that the numbers depend on: not where they are computed, nor in what batches."""
    listing = "\n".join(f"{s.image} {s.defect} {s.split} {s.view} {s.mask_files} {_sizes(s)}" for s in samples)
    return {
        "library_version": __version__,
        "dataset": options.dataset,
        "root": str(options.root),
        "split": options.split,
        "categories": sorted({sample.category for sample in samples}),
        "samples": {"count": len(samples), "sha256": hashlib.sha256(listing.encode("utf-8", "replace")).hexdigest()},
        "protocol": asdict(protocol),
        "detectors": list(options.detectors),
        "features": list(features),
        "backbone": asdict(backbone_config(networks.backbone)),
        "weights": options.weights,
        "fingerprint": fingerprint(networks.backbone.network),  # of the weights: a file can change under its name
        "random_weights": options.random_weights,
        "preprocess": networks.backbone.preprocess.to_dict(),
        "extractors": [{"folder": name, "sha256": folder_digest(folder)} for name, folder in folders.items()],
        "settings": settings.settings,
        "options": settings.options,
        "pictures": settings.pictures,
    }


def _sizes(sample: Sample) -> list[int]:
    """Bytes of its files: images that changed under their old names are other images."""
    return [file.stat().st_size for file in (sample.image, *sample.mask_files)]


def default_folder(options: argparse.Namespace, protocol: ProtocolOptions, configuration: dict[str, Any]) -> Path:
    """A folder for each configuration."""
    short = hashlib.sha256(repr(sorted(configuration.items())).encode()).hexdigest()[:8]
    return Path("runs") / f"evaluate-{Path(str(options.root)).name}-{protocol.protocol}-{short}"


def evaluate(
    own: Sequence[Job],
    everything: Sequence[Job],
    cells: Cells,
    networks: Networks,
    settings: Settings,
    console: Console,
    main: bool,
) -> None:
    """Run this process's jobs that are not finished yet; the first process then waits for those of the others."""
    columns = (TextColumn("{task.description:<44}", markup=False), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=not (main and console.is_terminal)) as bar:
        task = bar.add_task("evaluating", total=len(everything), completed=cells.done(everything))
        for job in own:
            if cells.path(job).is_file():
                continue
            bar.update(task, description=f"{job.trial.name}: {job.contender}")
            cells.write(job, with_pictures(job, cells, networks, settings))
            if main:
                bar.update(task, completed=cells.done(everything))
        while main and (done := cells.done(everything)) < len(everything):
            bar.update(task, completed=done, description="waiting for the other processes")
            time.sleep(POLL)


def with_pictures(job: Job, cells: Cells, networks: Networks, settings: Settings) -> list[dict[str, Any]]:
    """The records of a job, the maps to show saved as pictures (of the first draw and extractor)."""
    records = run_trial(job.trial, job.contender, networks, settings)
    for part, record in zip(job.trial.parts, records, strict=True):
        shown = record.pop("shown")
        record["pictures"] = []
        if job.trial.draw == 0 and job.contender.extractor == 0:
            setting, detector, kind = job.order[:3]
            folder = cells.folder / "pictures" / quote(part.product, safe="")
            saved = shown.save(folder, f"{setting}-{detector}-{kind}", part.test, networks.backbone.preprocess)
            record["pictures"] = [{**entry, "folder": str(folder.relative_to(cells.folder))} for entry in saved]
    return records
