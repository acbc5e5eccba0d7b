"""Monitor a run while it trains: losses, the projector's health, held-out products."""

from __future__ import annotations

import copy
import math

from adpretrain.extractor import ADExtractor
from adpretrain.losses import pseudo_huber_norm
from adpretrain.residual import tokens
from adpretrain.training.batches import LabelledBatch
from adpretrain.training.objective import Losses
from adpretrain.training.state import Run

ERASED = 0.1  # learnable references, whose standard deviation starts at 1, are all alike below this one
CONSTANT = 1e-3  # an attention output that varies over tokens by less than this share of its size is useless
EXPLODES = 8.0  # the norm loss of a token this far beyond the radius is in the thousands
VARIED = 1e-2  # an attention output that varies by more than this share is useful
SEEN = 4  # images of a batch whose attention is measured


def settle(steps: list[tuple[int, Losses]]) -> tuple[float, float, float]:
    """Read the losses of some steps, waiting for the device; returns (total, angle, norm) of the last step.

    Raises FloatingPointError naming the step and the level if a loss is not finite.
    """
    for step, losses in steps:
        try:
            values = losses.values()
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}") from None
    steps.clear()
    return values


def vitals(run: Run, batch: LabelledBatch) -> dict[str, float]:
    """Per level, the standard deviation of the learnable references, and how much the attention's output varies over
    tokens, as a share of its size. Warns once per level if the references have been erased, or an output that did vary
    has become a constant, because the references then add nothing."""
    if run.extractor.projector is None:
        return {}
    with run.accelerator.autocast():
        found = run.extractor.projector.vitals([level[:SEEN] for level in batch.views[0]]).tolist()
    line: dict[str, float] = {}
    for level, (deviation, spread, size) in enumerate(found):
        variation = spread / size if size else 0.0
        line |= {f"reference_std_{level}": deviation, f"attention_spread_{level}": variation}
        if variation > VARIED:
            run.varied.add(level)
        dead = deviation < ERASED or (level in run.varied and variation < CONSTANT)
        if dead and level not in run.warned:
            run.warned.add(level)
            advice = "; lower optim.weight_decay" if run.config.optim.weight_decay else ""
            run.console.print(
                f"[yellow]level {level}: the attention's output has become a constant (over tokens it varies by "
                f"{variation:.2g} of its size; the references' standard deviation is {deviation:.2g}, from 1): the "
                f"learnable references add nothing{advice}"
            )
    return line


def warn_of_lengths(run: Run, batch: LabelledBatch) -> None:
    """Warn if normal residuals, which a fresh projector returns unchanged, are so long that the norm loss explodes."""
    config = run.config.loss
    if not config.norm_weight or config.norm_form != "paper":  # the released form adapts its radius
        return
    means = []
    for level, marked in zip(batch.views[0], batch.labels, strict=True):
        normal_ND = tokens(level)[~marked.flatten(1).to(level.device)]
        means += [float(pseudo_huber_norm(normal_ND.float()).mean())] if len(normal_ND) else []
    if max(means, default=0.0) <= config.radius + EXPLODES:
        return
    run.console.print(
        f"[yellow]the normal residuals' mean lengths are {', '.join(f'{mean:.3g}' for mean in means)} (by level) where "
        f"loss.radius is {config.radius:g}: the norm loss grows exponentially beyond it, so a few tokens dominate the "
        "training, or it overflows; set local_scale (--local_scale.share 0.35) or --loss.norm_form released"
    )


def log(run: Run, step: int, values: tuple[float, float, float], batch: LabelledBatch) -> str:
    """Write a line of metrics since the last line; returns a summary of it for the progress bar."""
    measured = {**vitals(run, batch), **run.speed.line()}
    line = dict(zip(("loss", "angle", "norm"), values, strict=True))
    line["lr"] = float(run.scheduler.get_last_lr()[0])
    line |= {key: float(f"{value:.4g}") for key, value in measured.items()}
    if run.accelerator.is_main_process:
        run.folder.log({"step": step, **line})
        run.accelerator.log(line, step=step)
    return f"norm {line['norm']:.3f}  angle {line['angle']:.3f}  {line['images_per_s']:.3g} images/s"


def published(run: Run) -> ADExtractor:
    """The extractor as it would be saved, with float32 weights whatever the precision of training."""
    if run.config.optim.weights == "float32":
        return run.extractor
    return copy.deepcopy(run.extractor).float()


def report_held_out(run: Run, step: int) -> None:
    """Score the held-out products, log and print the result, and keep the projector if it is the best so far."""
    assert run.held_out is not None
    run.extractor.eval()
    extractor = published(run)
    if not run.baseline:
        raw = run.held_out.score(extractor.without_projector())
        if any(math.isnan(value) for value in raw.values()):
            raise ValueError(
                "no held-out product has a marked pixel where the network looks, so that AUPRO is not defined: choose "
                "other data.held_out, or []"
            )
        run.baseline.update({f"raw_{name}": value for name, value in raw.items()})
    line = {**run.held_out.score(extractor), **run.baseline}
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
