"""Held-out products, scored with FeatureNorm while a run trains, with and without the projector."""

from __future__ import annotations

import math

import torch
from run_setup import Run

from adpretrain.extractor import ADExtractor
from downstream.evaluation.evaluate import FeatureSet, few_shot


def evaluate_held_out(extractor: ADExtractor, held_out: list[FeatureSet], shots: int) -> dict[str, float]:
    """Mean FeatureNorm image AUROC and AUPRO over held-out products."""
    results = [few_shot(extractor, images, shots) for images in held_out]
    means = {name: [getattr(result, name) for result in results] for name in ("image_auroc", "aupro")}
    return {name: float(torch.tensor(values).nanmean()) for name, values in means.items()}


def report_held_out(run: Run, step: int) -> None:
    """Score the held-out products, log the result, say it, and keep the projector if it is the best one so far."""
    run.extractor.eval()
    shots = run.config.eval.shots
    if not run.baseline:
        raw = evaluate_held_out(run.extractor.without_projector(), run.held_out, shots)
        if any(math.isnan(value) for value in raw.values()):
            raise ValueError(
                "no held-out product has a marked pixel where the network looks, so that AUPRO is not defined: choose "
                "other data.held_out, or []"
            )
        run.baseline.update({f"raw_{name}": value for name, value in raw.items()})
    line = {**evaluate_held_out(run.extractor, run.held_out, shots), **run.baseline}
    run.model.train()
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
