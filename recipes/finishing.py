"""What a finished run leaves: the extractor with its provenance, and heatmaps of held-out products."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision
from held_out import published, refreshed
from panels import product_folder, save_panels
from run_data import count_categories
from run_folder import git_commit
from run_setup import Run

from adpretrain._version import __version__
from adpretrain.backbones.weights import fingerprint
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path
from adpretrain.saved import save_tensors
from downstream.evaluation.few_shot import draw_shots, score

EXAMPLES = 3  # held-out products whose heatmaps are drawn


def public_name(root: str) -> str:
    """Of a data set: its Hub name, or the last part of its path; the whole path is nobody's business."""
    return root if root.startswith("hf://") else Path(root).name


def provenance(run: Run) -> dict[str, Any]:
    """Where the extractor came from, for its config.json."""
    kept = run.best.get("step", run.steps)
    held_out = [line for line in run.folder.read_metrics() if "image_auroc" in line and line["step"] == kept]
    config = dataclasses.asdict(run.config)
    return {
        "data": {
            "name": run.config.data.name,
            "set": public_name(run.config.data.root),
            "images": len(run.data),
            "categories": count_categories(run.data),
            "held_out": run.config.data.held_out,
        },
        "steps": run.steps,
        "kept_step": kept,
        "processes": run.accelerator.num_processes,
        "seed": run.config.seed,
        "git_commit": git_commit(),
        "versions": {
            "adpretrain": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "training": {key: config[key] for key in ("learns", "loss", "optim", "eval", "shots", "augment")},
        "held_out_metrics": held_out[-1] if held_out else {},
    }


def draw_examples(run: Run, extractor: ADExtractor) -> None:
    """Heatmaps of a few held-out products, for whoever looks at the run or at its page on the Hub."""
    shots = max(2, run.config.eval.shots)  # two, at least, give a colour scale
    for images in [images for images in run.held_out if len(images.normals()) >= shots][:EXAMPLES]:
        images = refreshed(run, images)
        references, queries = draw_shots(images.samples, shots)
        prediction = score([extractor], images, references, queries)[0]
        folder = run.folder.path / "heatmaps" / product_folder(images.samples[0])
        save_panels(folder, extractor, images, references, queries, prediction, kinds=1)


def finish(run: Run) -> None:
    """Save the extractor with its provenance."""
    if run.best:
        run.model.load_state_dict(run.best["weights"])
        run.console.print(f"keeping the projector of step {run.best['step']}, the best on held-out categories")
    extractor, given = published(run).eval(), ""
    if not extractor.backbone.frozen:
        given = f", weights={str(save_backbone(run, extractor))!r}"
    extractor.config = dataclasses.replace(extractor.config, provenance=provenance(run))
    extractor.save_pretrained(run.folder.extractor_path)
    run.folder.plot()
    draw_examples(run, extractor)
    saved = f"extractor saved: ADExtractor.from_pretrained({str(run.folder.extractor_path)!r}{given})"
    run.console.print(saved, markup=False, soft_wrap=True)


def save_backbone(run: Run, extractor: ADExtractor) -> Path:
    """Write the weights of a backbone that has learnt beside the extractor, which names it but never holds it, and
    let the extractor know them. They are under the licence of the published ones they started from."""
    network, path = extractor.backbone.network, run.folder.path / "backbone.safetensors"
    assert network is not None
    with atomic_path(path) as temporary:
        save_tensors(network.state_dict(), temporary)
    backbone = dataclasses.replace(extractor.config.backbone, revision=None)
    extractor.config = dataclasses.replace(extractor.config, backbone=backbone, fingerprint=fingerprint(network))
    return path
