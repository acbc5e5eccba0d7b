"""The folder of a pretraining run: resolved config, checkpoints, metrics as JSON lines, a plot.

run/config.yaml  run/metrics.jsonl  run/curves.png  run/checkpoints/step_*.pt  run/extractor/  run/tensorboard/
The first process writes; all read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from adpretrain.config import PretrainConfig
from adpretrain.files import atomic_path, sweep
from adpretrain.parsing import from_dict, read_yaml, to_yaml
from adpretrain.training.distributed import from_first

KEEP = 2  # number of checkpoints
FREE_KEYS = (
    "run",
    "tracker",
    "log_every",
    "checkpoint_every",
    "data.workers",
    "data.root",
    "data.licence",
    "references.cache_mb",
)  # may change on resuming


class RunFolder:
    """Paths and files of one run. Opening a folder that holds another configuration raises ValueError."""

    def __init__(self, config: PretrainConfig, console: Console, main: bool) -> None:
        self.path = Path(config.run)
        self.console, self.main = console, main
        self.metrics_path = self.path / "metrics.jsonl"
        self.extractor_path = self.path / "extractor"
        self.plotted = time.monotonic()
        written = self.path / "config.yaml"
        if main:
            for folder in (self.path, self.path / "checkpoints"):
                sweep(folder)  # delete the temporary files of killed processes
        if written.exists():
            _refuse_other(written, config)
        elif main:
            with atomic_path(written) as temporary:
                temporary.write_text(to_yaml(config), encoding="utf-8")

    def checkpoints(self) -> list[Path]:
        """The paths of all checkpoints, newest first."""
        return sorted((self.path / "checkpoints").glob("step_*.pt"), reverse=True)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest readable checkpoint, or None. An unreadable one is reported and the one before it is tried. The
        first process chooses, so that all load the same checkpoint.

        Raises OSError if this process cannot read the first one's choice.
        """
        state = self._newest_readable() if self.main else None
        chosen = from_first(None if state is None else state["step"], dist.group.WORLD)
        if chosen is None or self.main:
            return state
        path = self._checkpoint(chosen)
        try:
            return _read(path)
        except OSError as error:
            raise OSError(f"{path} was read by the first process but not here; all need it ({error})") from error

    def _newest_readable(self) -> dict[str, Any] | None:
        for path in self.checkpoints():
            try:
                return _read(path)
            except OSError as error:
                told = f"checkpoint {path} is unreadable ({error}); trying the one before it"
                self.console.print(told, style="yellow", markup=False)
        if self.checkpoints():
            self.console.print("[yellow]no checkpoint is readable: training starts again at step 0")
        return None

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:07d}.pt"

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write ``step_{step}.pt`` under a temporary name, rename it, then delete the oldest beyond `KEEP`."""
        content = io.BytesIO()  # on a full disk, torch.save's own error would not say so
        torch.save({"step": step, **state}, content)
        with atomic_path(self._checkpoint(step)) as temporary:
            temporary.write_bytes(content.getbuffer())
        before = [path for path in self.checkpoints() if path < self._checkpoint(step)]  # later ones are unreadable
        for old in before[KEEP - 1 :]:
            old.unlink()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A context in which every failed write raises an OSError that says what is saved and what to do."""
        try:
            yield
        except OSError as error:
            kept = next((path for path in self.checkpoints()), None)
            state = "there is no checkpoint yet" if kept is None else f"the checkpoint {kept.name} is whole"
            raise OSError(
                f"{error}\n{self.path} cannot be written to ({shutil.disk_usage(self.path).free >> 20} MiB are free); "
                f"{state}: make room or make the folder writable, and the same command resumes"
            ) from error

    def drop_metrics_after(self, step: int) -> None:
        """Delete what an interrupted run logged after its last checkpoint, because those steps are run again."""
        lines = [line for line in self.read_metrics() if line["step"] <= step]
        if self.metrics_path.exists():
            with atomic_path(self.metrics_path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines logged so far."""
        if not self.metrics_path.exists():
            return []
        lines = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # cut off by a kill in the middle of a write
                break
        return lines

    def plot(self, every: float = 0.0) -> None:
        """Draw loss and held-out curves to curves.png, unless that was done less than ``every`` seconds ago."""
        if time.monotonic() - self.plotted < every:
            return
        self.plotted = time.monotonic()
        from matplotlib.figure import Figure

        metrics = self.read_metrics()
        losses = [line for line in metrics if "loss" in line]
        held_out = [line for line in metrics if "image_auroc" in line]
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for key, label in (("norm", "norm loss"), ("angle", "angle loss")):
            if any(line[key] for line in losses):
                left.plot([line["step"] for line in losses], [line[key] for line in losses], label=label)
        left.set(title="training losses, summed over levels", xlabel="step")
        for key, label in (("image_auroc", "image AUROC"), ("aupro", "AUPRO")):
            steps = [line["step"] for line in held_out]
            (curve,) = right.plot(steps, [100 * line[key] for line in held_out], marker="o", label=label)
            if held_out:
                right.axhline(
                    100 * held_out[0][f"raw_{key}"],
                    ls=":",
                    color=curve.get_color(),
                    label=f"{label}, without projector",
                )
        right.set(title="held-out pretraining categories, FeatureNorm (%)", xlabel="step")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend(frameon=False, fontsize=8)
        with atomic_path(self.path / "curves.png") as temporary:
            figure.savefig(temporary, dpi=130)


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint, after its checksums are verified: torch.load would read a hole in the file, as a lost machine
    leaves it, as zero weights. Raises OSError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise OSError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch.load raise many kinds for a damaged file
        raise OSError(str(error)) from error


def _refuse_other(written: Path, config: PretrainConfig) -> None:
    before = from_dict(PretrainConfig, read_yaml(str(written)), str(written))  # newer keys get their default
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(config))
    changed = [key for key in new if key not in FREE_KEYS and old[key] != new[key]]
    if changed:
        listing = "; ".join(f"{key} was {old[key]!r}, now {new[key]!r}" for key in changed)
        raise ValueError(f"{written.parent} holds a run with another configuration ({listing}): choose another --run")


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
