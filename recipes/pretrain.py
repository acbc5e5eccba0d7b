"""Pretrain a feature projector on residual features (ADPretrain).

  python recipes/pretrain.py --config recipes/configs/demo.yaml
  accelerate launch recipes/pretrain.py --config recipes/configs/dinov2-base.yaml --data.root /data/Real-IAD

Flags override the file's keys. The same command resumes an interrupted run; Ctrl-C saves first. The run's folder gets
config.yaml, metrics.jsonl, curves.png, checkpoints and, at the end, the extractor (ADExtractor.from_pretrained).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from finishing import finish
from held_out import report_held_out
from launch import Interruption, complain, start
from lifeline import Lifeline
from progress import progress_bar
from rich.console import Console
from run_setup import Run, make_batches, set_up

from adpretrain.backbones import FeatureMaps
from adpretrain.batches import LabelledBatch, ResidualBatch, label, thin
from adpretrain.config import PretrainConfig
from adpretrain.distributed import copy_from_first, sum_gradients
from adpretrain.objective import Losses, measure_centers
from adpretrain.parsing import parse_command_line

CENTER_STEPS = 8  # steps whose batches measure the centres
PLOT_EVERY = 60.0  # seconds


def prepare(run: Run, batch: ResidualBatch) -> LabelledBatch:
    """Token labels, and as many tokens per image as the configuration asks for."""
    labelled = label(batch, run.config.loss.token_label, run.config.loss.token_pixels)
    return thin(labelled, batch.keys, run.config.tokens, run.config.seed) if run.config.tokens else labelled


def project(run: Run, batch: LabelledBatch) -> list[FeatureMaps]:
    """All views' residuals through the projector, at once: keys and values do not depend on the images. With cross
    attention view by view and group by group, each with its context."""
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
    """Forward, backward, update. Raises FloatingPointError naming the level if a loss is not finite."""
    watch = run.speed.watch
    watch("projector")
    with run.accelerator.autocast():
        projected = project(run, batch)
    for level in projected[-1]:  # what was made last is differentiated first: from here on it is the projector's turn
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


def advance(run: Run, batch: ResidualBatch, first: bool) -> Losses:
    """One step of the training, counted."""
    run.speed.watch("loss")
    labelled = prepare(run, batch)
    if first:
        side = run.extractor.preprocess.image_size
        blank = torch.zeros(1, 3, side, side, device=run.accelerator.device)
        with torch.no_grad(), run.accelerator.autocast():
            run.speed.count(lambda: run.extractor.backbone(blank), lambda: project(run, labelled))
    run.speed.add(run.global_batch, batch.encoded)
    return training_step(run, labelled)


def log(run: Run, step: int, losses: Losses) -> str:
    """Write a line of metrics since the last one; its gist for the progress bar."""
    speed = run.speed.line()
    line = {"loss": float(losses.total), "angle": float(losses.angle), "norm": float(losses.norm)}
    line |= {"lr": run.scheduler.get_last_lr()[0], **{key: float(f"{value:.4g}") for key, value in speed.items()}}
    if run.accelerator.is_main_process:
        run.folder.log({"step": step, **line})
        run.accelerator.log(line, step=step)
    return f"norm {line['norm']:.3f}  angle {line['angle']:.3f}  {line['images_per_s']:.3g} images/s"


def after_step(run: Run, step: int, stopping: bool) -> None:
    """Evaluate and save where the configuration asks for it; ``step`` counts finished steps."""
    config, last = run.config, step == run.steps
    if run.held_out and (last or (config.eval.every and step % config.eval.every == 0)):
        report_held_out(run, step)
    if run.accelerator.is_main_process and (stopping or last or step % config.checkpoint_every == 0):
        run.folder.save_checkpoint(step, run.state())
        run.folder.plot(every=PLOT_EVERY)


def begin(run: Run) -> int:
    """Restore the newest checkpoint, or measure the centres; returns the number of steps already done."""
    checkpoint, done = run.folder.load_checkpoint(), 0
    if checkpoint is not None:
        run.restore(checkpoint)
        done = checkpoint["step"]
        run.console.print(f"resuming {run.folder.path} at step {done} of {run.steps}", markup=False)
    if run.accelerator.is_main_process:
        run.folder.drop_metrics_after(-1 if checkpoint is None else done)  # without one, step 0 is scored again
    return done


def train(run: Run) -> bool:
    """Train to the last step, or to an interruption; returns whether the training is complete."""
    done = begin(run)
    batches = make_batches(run)
    if done == 0 and run.config.loss.lambda_ and run.config.loss.center == "residual":
        first = batches(run.schedule(0, CENTER_STEPS))
        measure_centers(run.extractor, (prepare(run, batch) for batch in first), dist.group.WORLD)
    if done == 0 and run.held_out:
        report_held_out(run, 0)
    # They are equal already, unless the machines compute differently.
    copy_from_first(run.trained_state().values(), dist.group.WORLD)
    run.model.train()
    interruption = Interruption()  # only from here on is there something to save
    source = iter(batches(run.schedule(done, run.steps)))
    run.speed.restart()
    with progress_bar(run.console) as bar:
        task = bar.add_task("pretraining", total=run.steps, completed=done)
        for step in range(done + 1, run.steps + 1):
            with run.accelerator.autocast():
                batch = next(source)
            try:
                losses = advance(run, batch, first=step == done + 1)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}") from None
            stopping = interruption.agreed(run.accelerator.device)
            with run.folder.writing():
                if step % run.config.log_every == 0 or step == run.steps:
                    bar.update(task, description=log(run, step, losses))
                run.speed.watch("evaluation")
                after_step(run, step, stopping)
            bar.update(task, completed=step)
            if stopping and step < run.steps:
                run.console.print(f"stopped at step {step}; the same command resumes")
                return False
    if done < run.steps:
        run.console.print(run.speed.summary())
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """0 = finished or stopped on request (resumable), 1 = the training failed, 2 = a mistake in what was asked, 130 =
    stopped at once, before training began or at a second Ctrl-C."""
    console = Console(stderr=True)
    try:
        config = parse_command_line(PretrainConfig, argv, __doc__)
        accelerator = start(config)
        lifeline = Lifeline(accelerator.process_index, accelerator.num_processes)
        console.quiet = not accelerator.is_main_process
        run = set_up(config, console, accelerator)
        if config.tracker:
            accelerator.init_trackers("tensorboard")
        if train(run) and accelerator.is_main_process:
            with run.folder.writing():
                finish(run)
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that is not writable
        complain(console, "error", error)
        return 2
    except KeyboardInterrupt:
        console.print("stopped at once; the same command goes on from the newest checkpoint, if there is one")
        return 130
    except FloatingPointError as error:
        complain(console, "training failed", error)
        return 1
    accelerator.end_training()
    lifeline.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
