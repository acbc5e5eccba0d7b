"""Pretrain a feature projector on residual features (ADPretrain).

  python recipes/pretrain.py --config recipes/configs/demo.yaml
  accelerate launch recipes/pretrain.py --config recipes/configs/dinov2-base.yaml --data.root /data/Real-IAD

Flags override the file's keys. The same command resumes an interrupted run; Ctrl-C saves first. The run's folder gets
config.yaml, metrics.jsonl, curves.png, checkpoints and, at the end, the extractor (ADExtractor.from_pretrained).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from finishing import finish
from held_out import report_held_out
from launch import Interruption, complain, start
from lifeline import Lifeline
from progress import progress_bar
from rich.console import Console
from run_setup import Run, make_batches, normal_batches, set_up

from adpretrain.backbones import FeatureMaps
from adpretrain.config import PretrainConfig
from adpretrain.parsing import parse_command_line
from adpretrain.training.batches import LabelledBatch, ResidualBatch, label, thin
from adpretrain.training.distributed import copy_from_first, sum_gradients
from adpretrain.training.objective import Losses, measure_centers

PLOT_EVERY = 60.0  # seconds
ERASED = 0.1  # standard deviation of learnable references, which start at 1, below which they are all alike
CONSTANT = 1e-3  # an attention output that varies less than this share of its own size over tokens says nothing
VARIED = 1e-2  # one that has varied more than this has had something to say
SEEN = 4  # images of a batch whose attention is looked at for this


def prepare(run: Run, batch: ResidualBatch) -> LabelledBatch:
    """Token labels, and as many tokens per image as the configuration asks for."""
    loss = run.config.loss
    labelled = label(batch, loss.norm_label, loss.angle_label, loss.token_pixels)
    return thin(labelled, batch.keys, run.config.tokens, run.config.seed) if run.config.tokens else labelled


def project(run: Run, batch: LabelledBatch) -> list[FeatureMaps]:
    """All views' residuals through the projector, at once: keys and values do not depend on the images. With cross
    attention view by view and group by group, each with its context. Where the backbone learns, nothing follows it."""
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
    """Forward, backward, update. Nothing here waits for the device (fp16 apart, whose scaler asks for overflows)."""
    watch = run.speed.watch
    watch("projector")
    with run.accelerator.autocast():
        projected = project(run, batch)
    for level in projected[-1]:  # the backward pass reaches the projector where the gradient of its output is known
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
    """One step of the training, counted: what it was made on, and its losses."""
    run.speed.watch("loss")
    labelled = prepare(run, batch)
    if first:
        side = run.extractor.preprocess.image_size
        blank = torch.zeros(1, 3, side, side, device=run.accelerator.device)
        with torch.no_grad(), run.accelerator.autocast():
            run.speed.count(lambda: run.extractor.backbone(blank), lambda: project(run, labelled))
    run.speed.add(run.global_batch, batch.encoded)
    return labelled, training_step(run, labelled)


def settle(steps: list[tuple[int, Losses]]) -> tuple[float, float, float]:
    """(total, angle, norm) of the last of some steps, whose losses are all read now: this waits for the device.

    Raises FloatingPointError naming the step and the level if one is not finite.
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
    tokens, as a share of its size. Warns once where the references have been erased, or an output that did vary has
    become a constant: they add nothing then."""
    if run.extractor.projector is None:
        return {}
    with run.accelerator.autocast():
        found = run.extractor.projector.vitals([level[:SEEN] for level in batch.views[0]]).tolist()
    line = {}
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


def log(run: Run, step: int, values: tuple[float, float, float], batch: LabelledBatch) -> str:
    """Write a line of metrics since the last one; its gist for the progress bar."""
    measured = {**vitals(run, batch), **run.speed.line()}
    line = dict(zip(("loss", "angle", "norm"), values, strict=True))
    line |= {"lr": run.scheduler.get_last_lr()[0], **{key: float(f"{value:.4g}") for key, value in measured.items()}}
    if run.accelerator.is_main_process:
        run.folder.log({"step": step, **line})
        run.accelerator.log(line, step=step)
    return f"norm {line['norm']:.3f}  angle {line['angle']:.3f}  {line['images_per_s']:.3g} images/s"


@dataclass(frozen=True)
class Due:
    """What follows a step; ``step`` counts finished ones."""

    log: bool
    evaluation: bool
    checkpoint: bool

    @classmethod
    def after(cls, run: Run, step: int, stopping: bool) -> Due:
        config, last = run.config, step == run.steps
        return cls(
            log=last or step % config.log_every == 0,
            evaluation=bool(run.held_out and (last or (config.eval.every and step % config.eval.every == 0))),
            checkpoint=stopping or last or step % config.checkpoint_every == 0,
        )


def evaluate_and_save(run: Run, step: int, due: Due) -> None:
    """Score the held-out products and write a checkpoint, where it is due."""
    run.speed.watch("evaluation")
    if due.evaluation:
        report_held_out(run, step)
    if due.checkpoint and run.accelerator.is_main_process:
        run.folder.save_checkpoint(step, run.state())
        run.folder.plot(every=PLOT_EVERY)


def begin(run: Run) -> int:
    """Restore the newest checkpoint; returns the number of steps already done."""
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
        with torch.no_grad(), run.accelerator.autocast():
            measure_centers(run.extractor, normal_batches(run), dist.group.WORLD)
    if done == 0 and run.held_out:
        report_held_out(run, 0)
    # They are equal already, unless the machines compute differently.
    copy_from_first(run.trained_state().values(), dist.group.WORLD)
    run.extractor.train()
    interruption = Interruption()  # only from here on is there something to save
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
            due = Due.after(run, step, stopping)
            if due.log or due.evaluation or due.checkpoint:  # nothing is saved before every loss is known to be finite
                values = settle(unread)
                with run.folder.writing():
                    if due.log:
                        bar.update(task, description=log(run, step, values, labelled))
                    evaluate_and_save(run, step, due)
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
