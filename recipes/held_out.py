"""Held-out products, scored with FeatureNorm while a run trains, with and without the projector."""

from __future__ import annotations

import copy
import math

import torch
from run_setup import Run

from adpretrain.extractor import ADExtractor
from downstream.evaluation.few_shot import FeatureSet, encode_samples, few_shot


def evaluate_held_out(extractor: ADExtractor, held_out: list[FeatureSet], shots: int) -> dict[str, float]:
    """Mean FeatureNorm image AUROC and AUPRO over held-out products."""
    results = [few_shot(extractor, images, shots) for images in held_out]
    means = {name: [getattr(result, name) for result in results] for name in ("image_auroc", "aupro")}
    return {name: float(torch.tensor(values).nanmean()) for name, values in means.items()}


def published(run: Run) -> ADExtractor:
    """The extractor as it would be saved: with float32 weights, whatever it is trained with."""
    if run.config.optim.weights == "float32":
        return run.extractor
    return copy.deepcopy(run.extractor).float()


def refreshed(run: Run, images: FeatureSet) -> FeatureSet:
    """The same images as today's backbone sees them; one that does not learn has seen them before."""
    backbone = run.extractor.backbone
    return images if backbone.frozen else encode_samples(images.samples, backbone, run.accelerator.device)


def report_held_out(run: Run, step: int) -> None:
    """Score the held-out products, log the result, say it, and keep the projector if it is the best one so far."""
    run.extractor.eval()
    shots, extractor = run.config.eval.shots, published(run)
    sets = [refreshed(run, images) for images in run.held_out]
    if not run.baseline:
        raw = evaluate_held_out(extractor.without_projector(), sets, shots)
        if any(math.isnan(value) for value in raw.values()):
            raise ValueError(
                "no held-out product has a marked pixel where the network looks, so that AUPRO is not defined: choose "
                "other data.held_out, or []"
            )
        run.baseline.update({f"raw_{name}": value for name, value in raw.items()})
    line = {**evaluate_held_out(extractor, sets, shots), **run.baseline}
    run.extractor.train()
    reached = (line["image_auroc"] + line["aupro"]) / 2
    if run.config.eval.keep == "best" and reached > run.best.get("score", -1.0):
        weights = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.best = {"step": step, "score": reached, "weights": weights}
    run.folder.log({"step": step, **line})
    run.accelerator.log(line, step=step)
    percent = {key: f"{100 * value:.1f}" for key, value in line.items()}
    run.console.print(
        f"step {step}: held-out image AUROC {percent['image_auroc']} "
        f"(without the projector {percent['raw_image_auroc']}), "
        f"AUPRO {percent['aupro']} ({percent['raw_aupro']})"
    )
