"""The photographs of a run, all checked once before training: an unreadable one found later costs what was trained."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from progress import progress_bar
from rich.console import Console
from rich.markup import escape

from adpretrain.config import DataConfig
from adpretrain.data import Sample, index_with_bare
from adpretrain.data.checking import check_samples
from adpretrain.files import atomic_path

STAMP = "checked.json"  # in the run's folder: what was checked, and what was wrong


def checked_samples(config: DataConfig, run: Path, console: Console, main: bool) -> list[Sample]:
    """The samples of a data set, `checked`."""
    return checked(config, *index_with_bare(config.name, config.root, config.columns), run, console, main)


def checked(
    config: DataConfig, samples: list[Sample], missing: Mapping[Path, str], run: Path, console: Console, main: bool
) -> list[Sample]:
    """Check images and masks as `adpretrain check-data` does; the first process does for all.

    A check is remembered in the run's folder and not repeated while paths, sizes, times and labels stay the same.
    Raises ValueError with the whole list of bad images, or leaves them out, as ``config.on_error`` says: they are
    listed when they are found, and counted when the run is resumed.
    """
    found = _problems(samples, missing, config.root, run, console) if main else (None, None)
    problems, remembered = broadcast_object_list(list(found))
    if not problems:
        return samples
    listing = "\n".join(reason for _, reason in problems)
    bad = {image for image, _ in problems}
    if config.on_error == "fail":
        raise ValueError(
            f"{len(bad)} of {len(samples)} images cannot be trained on:\n{listing}\n"
            "mend or remove them, or leave them out with --data.on_error skip"
        )
    told = f"[yellow]{len(bad)} of {len(samples)} images are left out[/]"
    told += f", as before; {escape(str(run / STAMP))} lists them" if remembered else f":\n{escape(listing)}"
    console.print(told, highlight=False, soft_wrap=True)
    return [sample for sample in samples if _relative(sample.image, config.root) not in bad]


def _problems(
    samples: Sequence[Sample], missing: Mapping[Path, str], root: str, run: Path, console: Console
) -> tuple[list[list[str]], bool]:
    """[image, reason] pairs, and whether they are those of the run's stamp: if not, the files were other ones, and the
    pairs are those of a new check."""
    stamp, digest = run / STAMP, _digest(samples, root)
    known = read_stamp(stamp)
    if known.get("files") == digest:
        return known["problems"], True
    if known:
        console.print("[yellow]the images have changed since this run last checked them")
    with progress_bar(console) as bar:
        task = bar.add_task("checking images")
        found = check_samples(
            samples, os.cpu_count() or 1, lambda _, done, total: bar.update(task, completed=done, total=total), missing
        )
    problems = [[_relative(problem.image, root), problem.reason] for problem in found if not problem.doubtful]
    if doubts := [problem.reason for problem in found if problem.doubtful]:
        told = f"[yellow]{len(doubts)} masks are doubtful[/] (`adpretrain check-data` lists all): {escape(doubts[0])}"
        console.print(told, highlight=False, soft_wrap=True)
    with atomic_path(stamp) as temporary:
        temporary.write_text(json.dumps({"files": digest, "problems": problems}), encoding="utf-8")
    return problems, False


def _digest(samples: Sequence[Sample], root: str) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for file in (sample.image, *sample.mask_files):
            state = file.stat() if file.exists() else None
            facts = [_relative(file, root), sample.defect, sample.split]
            digest.update(json.dumps([*facts, state and (state.st_size, state.st_mtime_ns)]).encode())
    return digest.hexdigest()


def _relative(file: Path, root: str) -> str:
    return os.path.relpath(file, root)


def read_stamp(stamp: Path) -> dict[str, Any]:
    """What a run has written down for when it is resumed."""
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or torn
        return {}
