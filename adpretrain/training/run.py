"""Pretraining, from a configuration to a saved extractor, around one `training_step`."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from rich.console import Console

from adpretrain._version import __version__
from adpretrain.backbones import FeatureMaps
from adpretrain.backbones.weights import fingerprint
from adpretrain.config import DataConfig, PretrainConfig
from adpretrain.data.layouts.detect import layout_of
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path
from adpretrain.licences import find_licence
from adpretrain.progress import progress_bar
from adpretrain.saved import save_tensors
from adpretrain.training.batches import LabelledBatch, ResidualBatch, label, thin
from adpretrain.training.distributed import copy_from_first, sum_gradients
from adpretrain.training.launch import Interruption, Lifeline, start
from adpretrain.training.monitor import log, published, report_held_out, settle, warn_of_lengths
from adpretrain.training.objective import Losses, measure_centers
from adpretrain.training.state import Evaluation, Run, make_batches, normal_batches, set_up

PLOT_EVERY = 60.0  # seconds
DRAWN = "synthetic.json"  # the file beside drawn products that says how they were drawn


def prepare(run: Run, batch: ResidualBatch) -> LabelledBatch:
    """Label the tokens of a batch, and keep as many per image as the configuration asks for."""
    loss = run.config.loss
    labelled = label(batch, loss.norm_label, loss.angle_label, loss.token_pixels)
    return thin(labelled, batch.keys, run.config.tokens, run.config.seed) if run.config.tokens else labelled


def project(run: Run, batch: LabelledBatch) -> list[FeatureMaps]:
    """Project the residuals of all views at once, as keys and values do not depend on the images. With cross attention,
    views and groups are projected one by one, each with its context. Without a projector, residuals are returned."""
    if run.extractor.projector is None:
        return batch.views
    if not batch.contexts:
        together = run.model([torch.cat(level) for level in zip(*batch.views, strict=True)])
        return [list(view) for view in zip(*(level.chunk(len(batch.views)) for level in together), strict=True)]
    sizes, views = [count for count, _ in batch.contexts], []
    for view in batch.views:
        parts = zip(*(level.split(sizes) for level in view), strict=True)
        projected = [run.model(list(part), context) for part, (_, context) in zip(parts, batch.contexts, strict=True)]
        views.append([torch.cat(level) for level in zip(*projected, strict=True)])
    return views


def training_step(run: Run, batch: LabelledBatch) -> Losses:
    """Forward, backward, update. Only fp16's scaler waits for the device here, to check for overflows."""
    watch = run.speed.watch
    watch("projector")
    with run.accelerator.autocast():
        projected = project(run, batch)
    for level in projected[-1]:  # the backward pass reaches the projector when its output has a gradient
        level.register_hook(lambda gradient: watch("projector"))
    watch("loss")
    losses = run.objective(projected, batch)
    run.accelerator.backward(losses.share)
    watch("other")
    sum_gradients(run.model.parameters(), dist.group.WORLD)
    if run.config.optim.clip:
        run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.optim.clip)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return losses


def advance(run: Run, batch: ResidualBatch, first: bool) -> tuple[LabelledBatch, Losses]:
    """Do one training step and count its images; returns the labelled batch and its losses."""
    run.speed.watch("loss")
    labelled = prepare(run, batch)
    if first:
        warn_of_lengths(run, labelled)
        side = run.extractor.preprocess.image_size
        blank = torch.zeros(1, 3, side, side, device=run.accelerator.device)
        with torch.no_grad(), run.accelerator.autocast():
            run.speed.count(lambda: run.extractor.backbone(blank), lambda: project(run, labelled))
    run.speed.add(run.global_batch, batch.encoded)
    return labelled, training_step(run, labelled)


def record(run: Run, step: int, stopping: bool, unread: list[tuple[int, Losses]], batch: LabelledBatch) -> str | None:
    """Log a line, score the held-out products and write a checkpoint, if each is due after ``step`` steps. Returns a
    summary of the line, or None. Nothing is saved before every unread loss is known to be finite."""
    config, last = run.config, step == run.steps
    logged = last or step % config.log_every == 0
    scored = run.held_out is not None and (last or bool(config.eval.every and step % config.eval.every == 0))
    saved = stopping or last or step % config.checkpoint_every == 0
    if not (logged or scored or saved):
        return None
    values = settle(unread)
    with run.folder.writing():
        gist = log(run, step, values, batch) if logged else None
        run.speed.watch("evaluation")
        if scored:
            report_held_out(run, step)
        if saved and run.accelerator.is_main_process:
            run.folder.save_checkpoint(step, run.state())
            run.folder.plot(every=PLOT_EVERY)
    return gist


def begin(run: Run) -> int:
    """Restore the newest checkpoint; returns the number of steps already done."""
    checkpoint, done = run.folder.load_checkpoint(), 0
    if checkpoint is not None:
        run.restore(checkpoint)
        done = checkpoint["step"]
        run.console.print(f"resuming {run.folder.path} at step {done} of {run.steps}", markup=False)
    if run.accelerator.is_main_process:
        run.folder.drop_metrics_after(-1 if checkpoint is None else done)  # step 0 is scored again without one
    return done


def train(run: Run) -> bool:
    """Train to the last step, or to an interruption; returns whether the training is complete."""
    done = begin(run)
    batches = make_batches(run)
    if done == 0 and run.config.loss.lambda_ and run.config.loss.center == "residual":
        with torch.no_grad(), run.accelerator.autocast():
            measure_centers(run.extractor, normal_batches(run), dist.group.WORLD)
    if done == 0 and run.held_out:
        report_held_out(run, 0)
    # The processes hold equal values already, unless the machines compute differently.
    copy_from_first(run.trained_state().values(), dist.group.WORLD)
    run.extractor.train()
    interruption = Interruption()  # before this there is nothing to save
    source = iter(batches(run.schedule(done, run.steps)))
    unread: list[tuple[int, Losses]] = []
    run.speed.restart()
    with progress_bar(run.console) as bar:
        task = bar.add_task("pretraining", total=run.steps, completed=done)
        for step in range(done + 1, run.steps + 1):
            with run.accelerator.autocast():
                batch = next(source)
            labelled, losses = advance(run, batch, first=step == done + 1)
            unread.append((step, losses))
            stopping = interruption.agreed()
            gist = record(run, step, stopping, unread, labelled)
            bar.update(task, completed=step, description=gist)
            if stopping and step < run.steps:
                run.console.print(f"stopped at step {step}; the same command resumes")
                return False
    if done < run.steps:
        run.console.print(run.speed.summary())
    return True


def pretrain(config: PretrainConfig, console: Console, evaluation: Evaluation | None = None) -> None:
    """Start or resume a run; every launched process calls this. ``evaluation`` scores the held-out products.

    Raises ValueError or OSError if the run is not possible as configured, FloatingPointError if a loss is not finite,
    and KeyboardInterrupt if it is stopped before there is something to save, or by a second Ctrl-C.
    """
    accelerator = start(config)
    lifeline = Lifeline(accelerator.process_index, accelerator.num_processes)
    console.quiet = not accelerator.is_main_process
    run = set_up(config, console, accelerator, evaluation)
    if config.tracker:
        accelerator.init_trackers("tensorboard")
    if train(run) and accelerator.is_main_process:
        with run.folder.writing():
            finish(run)
    accelerator.end_training()
    lifeline.release()


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
    if run.held_out is not None:
        run.held_out.draw(extractor, run.folder.path / "heatmaps")
    saved = f"extractor saved: ADExtractor.from_pretrained({str(run.folder.extractor_path)!r}{given})"
    run.console.print(saved, markup=False, soft_wrap=True)


def save_backbone(run: Run, extractor: ADExtractor) -> Path:
    """Write the weights of a trained backbone beside the extractor, which never contains them, and put their
    fingerprint into its config. They are under the licence of the published weights that training started from."""
    network, path = extractor.backbone.network, run.folder.path / "backbone.safetensors"
    assert network is not None
    with atomic_path(path) as temporary:
        save_tensors(network.state_dict(), temporary)
    backbone = dataclasses.replace(extractor.config.backbone, revision=None)
    extractor.config = dataclasses.replace(extractor.config, backbone=backbone, fingerprint=fingerprint(network))
    return path


def provenance(run: Run) -> dict[str, Any]:
    """Where the extractor came from, for its config.json."""
    kept = run.best.get("step", run.steps)
    held_out = [line for line in run.folder.read_metrics() if "image_auroc" in line and line["step"] == kept]
    config = dataclasses.asdict(run.config)
    return {
        "data": {
            "name": run.config.data.name,
            "set": public_name(run.config.data.root),
            "layout": layout_in(run.config.data),
            "licence": run.config.data.licence and find_licence(run.config.data.licence),
            "images": len(run.data),
            "categories": len(run.data.categories),
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


def layout_in(data: DataConfig) -> str | None:
    """The layout that the pretraining set lies in, "drawn" for what recipes/draw_products.py drew; None if it is gone
    by now."""
    if (Path(data.root) / DRAWN).is_file():
        return "drawn"
    if data.name != "auto":
        return data.name
    return "hf" if data.root.startswith("hf://") else layout_of(Path(data.root))


def public_name(root: str) -> str:
    """A data set's Hub name, or the last part of its path: the whole path is private."""
    return root if root.startswith("hf://") else Path(root).name


def git_commit() -> str | None:
    """The commit of the checkout that contains this file, or None outside a checkout of the toolkit."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an environment may lie in another project's checkout
        return None
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
