"""Pretrain a feature projector on residual features (ADPretrain).

  python recipes/pretrain.py --config recipes/configs/demo.yaml
  accelerate launch recipes/pretrain.py --config recipes/configs/dinov2-base.yaml --data.root /data/Real-IAD

Flags override the file's keys. The same command resumes an interrupted run; Ctrl-C saves first. The run's folder gets
config.yaml, metrics.jsonl, curves.png, checkpoints and, at the end, the extractor (ADExtractor.from_pretrained).
"""

from __future__ import annotations

import dataclasses
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import torchvision
from accelerate import Accelerator
from panels import save_panels
from rich.console import Console
from run_folder import git_commit
from run_setup import Run, make_batches, progress_bar, set_up

from adpretrain._version import __version__
from adpretrain.backbones import FeatureMaps, References
from adpretrain.batches import LabelledBatch, ResidualBatch, label, thin
from adpretrain.config import PretrainConfig
from adpretrain.data.pairs import StepBatches
from adpretrain.extractor import ADExtractor
from adpretrain.objective import Losses, measure_centers
from adpretrain.parsing import parse_command_line
from adpretrain.references import random_references
from downstream.evaluation.evaluate import FeatureSet, few_shot, score

CENTER_STEPS = 8  # batches that measure the centres
EXAMPLES = 3  # held-out products whose heatmaps are drawn at the end


class Interruption:
    """Set by Ctrl-C or SIGTERM; the loop then saves and leaves. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all must leave at the same step."""
        if accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)


def evaluate_held_out(extractor: ADExtractor, held_out: list[FeatureSet], shots: int) -> dict[str, float]:
    """Mean FeatureNorm image AUROC and AUPRO over held-out products."""
    results = [few_shot(extractor, images, shots) for images in held_out]
    means = {name: [getattr(result, name) for result in results] for name in ("image_auroc", "aupro")}
    return {name: float(torch.tensor(values).nanmean()) for name, values in means.items()}


def prepare(run: Run, batch: ResidualBatch) -> LabelledBatch:
    """Token labels, and as many tokens per image as the configuration asks for."""
    labelled = label(batch, run.config.loss.token_label, run.config.loss.token_pixels)
    return thin(labelled, batch.keys, run.config.tokens, run.config.seed) if run.config.tokens else labelled


def project(run: Run, view: FeatureMaps, contexts: Sequence[tuple[int, References]]) -> FeatureMaps:
    """One view's residuals through the projector; with cross attention, group by group, each with its context."""
    if not contexts:
        return run.model(view)
    parts = zip(*(level.split([count for count, _ in contexts]) for level in view), strict=True)
    projected = [run.model(list(part), context) for part, (_, context) in zip(parts, contexts, strict=True)]
    return [torch.cat(level) for level in zip(*projected, strict=True)]


def training_step(run: Run, batch: LabelledBatch) -> Losses:
    """Forward, backward, update. Raises FloatingPointError naming the level if a loss is not finite."""
    with run.accelerator.autocast():
        projected = [project(run, view, batch.contexts) for view in batch.views]
    losses = run.objective(projected, batch)
    run.accelerator.backward(losses.total)
    if run.config.optim.clip:
        run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.optim.clip)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return losses


def after_step(run: Run, step: int, losses: Losses, images_per_s: float, stopping: bool) -> None:
    """Log, evaluate and save where the configuration asks for it; ``step`` counts finished steps."""
    config, last = run.config, step == run.steps
    if run.accelerator.is_main_process and (step % config.log_every == 0 or last):
        line = {
            "loss": float(losses.total.detach()),
            "angle": float(losses.angle),
            "norm": float(losses.norm),
        }
        line |= {"lr": run.scheduler.get_last_lr()[0], "images_per_s": round(images_per_s, 2)}
        run.folder.log({"step": step, **line})
        run.accelerator.log(line, step=step)
    if run.held_out and (last or (config.eval.every and step % config.eval.every == 0)):
        report_held_out(run, step)
    if run.accelerator.is_main_process and (stopping or last or step % config.checkpoint_every == 0):
        run.folder.save_checkpoint(step, run.state())
        run.folder.plot()


def report_held_out(run: Run, step: int) -> None:
    """Score the held-out products, log the result and say it."""
    run.extractor.eval()
    shots = run.config.eval.shots
    if not run.baseline:
        raw = evaluate_held_out(run.extractor.without_projector(), run.held_out, shots)
        run.baseline.update({f"raw_{name}": value for name, value in raw.items()})
    line = {**evaluate_held_out(run.extractor, run.held_out, shots), **run.baseline}
    run.model.train()
    reached = (line["image_auroc"] + line["aupro"]) / 2
    if run.config.eval.keep == "best" and reached > run.best.get("score", -1.0):
        weights = run.accelerator.unwrap_model(run.model).state_dict()
        run.best = {"step": step, "score": reached, "weights": {k: v.clone() for k, v in weights.items()}}
    run.folder.log({"step": step, **line})
    run.accelerator.log(line, step=step)
    percent = {key: f"{100 * value:.1f}" for key, value in line.items()}
    run.console.print(
        f"step {step}: held-out image AUROC {percent['image_auroc']} "
        f"(without the projector {percent['raw_image_auroc']}), "
        f"AUPRO {percent['aupro']} ({percent['raw_aupro']})"
    )


def train(run: Run) -> bool:
    """Train to the last step, or to an interruption; returns whether the training is complete."""
    checkpoint = run.folder.load_checkpoint()
    start = 0
    if checkpoint is not None:
        run.restore(checkpoint)
        start = checkpoint["step"]
        run.console.print(f"resuming {run.folder.path} at step {start} of {run.steps}")
    if run.accelerator.is_main_process:
        run.folder.drop_metrics_after(start)
    batches = make_batches(run)
    if start == 0 and run.config.loss.lambda_ and run.config.loss.center == "residual":
        first = StepBatches(len(run.data), run.config.optim.batch_size, 0, CENTER_STEPS, run.config.seed)
        # The same batches on every process, so that all have the same centres.
        measure_centers(run.extractor, (prepare(run, batch) for batch in batches(first)))
    if start == 0 and run.held_out:
        report_held_out(run, 0)
    run.model.train()
    interruption = Interruption()  # only from here on is there something to save
    source = iter(batches(run.schedule(start, run.steps)))
    global_batch = run.config.optim.batch_size * run.accelerator.num_processes
    with progress_bar(run.console) as bar:
        task = bar.add_task("pretraining", total=run.steps, completed=start)
        for step in range(start + 1, run.steps + 1):
            began = time.perf_counter()
            with run.accelerator.autocast():
                batch = next(source)
            try:
                losses = training_step(run, prepare(run, batch))
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}") from None
            stopping = interruption.agreed(run.accelerator)
            rate = global_batch / (time.perf_counter() - began)
            after_step(run, step, losses, rate, stopping)
            text = f"norm {float(losses.norm):.3f}  angle {float(losses.angle):.3f}  {rate:.0f} images/s"
            bar.update(task, completed=step, description=text)
            if stopping and step < run.steps:
                run.console.print(f"stopped at step {step}; the same command resumes")
                return False
    return True


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
            "categories": len({sample.category for sample in run.data.samples}),
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
        "training": {key: config[key] for key in ("loss", "optim", "eval", "shots", "augment")},
        "held_out_metrics": held_out[-1] if held_out else {},
    }


def draw_examples(run: Run) -> None:
    """Heatmaps of a few held-out products, for whoever looks at the run or at its page on the Hub."""
    shots = max(2, run.config.eval.shots)  # two, at least, give a colour scale
    for images in [images for images in run.held_out if len(images.normals()) >= shots][:EXAMPLES]:
        pool = images.normals()
        references = [pool[index] for index in random_references(len(pool), shots)]
        queries = images.queries(references)
        prediction = score([run.extractor], images, references, queries)[0]
        folder = run.folder.path / "heatmaps" / quote(images.samples[0].category, safe="")
        save_panels(folder, run.extractor, images, references, queries, prediction, kinds=1)


def finish(run: Run) -> None:
    """Save the extractor with its provenance."""
    if run.best:
        run.accelerator.unwrap_model(run.model).load_state_dict(run.best["weights"])
        run.console.print(f"keeping the projector of step {run.best['step']}, the best on held-out categories")
    config = dataclasses.replace(run.extractor.config, provenance=provenance(run))
    run.extractor.config = config
    run.extractor.eval().save_pretrained(run.folder.extractor_path)
    run.folder.plot()
    draw_examples(run)
    run.console.print(f"extractor saved: ADExtractor.from_pretrained({str(run.folder.extractor_path)!r})")


def main(argv: Sequence[str] | None = None) -> int:
    """0 = finished or stopped on request (resumable), 1 = the training failed, 2 = a mistake in what was asked, 130 =
    stopped before training began."""
    console = Console(stderr=True)
    try:
        config = parse_command_line(PretrainConfig, argv, __doc__)
        tracker = {"log_with": "tensorboard", "project_dir": config.run} if config.tracker else {}
        accelerator = Accelerator(mixed_precision=config.optim.precision, **tracker)
        console.quiet = not accelerator.is_main_process
        run = set_up(config, console, accelerator)
        if config.tracker:
            accelerator.init_trackers("tensorboard")
        complete = train(run)
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that is not writable
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("stopped before the training began; the same command starts again")
        return 130
    except FloatingPointError as error:
        console.print(f"[red]training failed:[/] {error}", highlight=False)
        return 1
    if complete and accelerator.is_main_process:
        finish(run)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
