"""The folder of an evaluation: one file for every finished trial of every contender, written once, never again.

config.json holds all that the numbers depend on. A folder of another configuration is refused: its files would be
taken for results of this one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adpretrain.files import atomic_path
from downstream.evaluation.contenders import ALIGNED, RAW, Contender
from downstream.evaluation.protocols import Trial

PATIENCE = 120  # seconds that the other processes wait for the first one's config.json


@dataclass(frozen=True)
class Job:
    """One contender on one trial; ``order`` is its place in the tables."""

    trial: Trial
    contender: Contender
    order: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its file, without the suffix: safe on every disk, different for every job."""
        contender = self.contender
        inner = f"{self.trial.setting} draw {self.trial.draw} {contender.detector} {contender.features}"
        return f"{quote(self.trial.name, safe='')}/{quote(inner, safe='=,')}-{contender.extractor}"


def jobs_of(trials: Sequence[Trial], contenders: Sequence[Contender]) -> list[Job]:
    """Every contender on every trial, but those that use no drawn references once where only these differ."""
    settings = list(dict.fromkeys(trial.setting for trial in trials))
    detectors = list(dict.fromkeys(contender.detector for contender in contenders))
    features = list(dict.fromkeys(contender.features for contender in contenders))
    return [
        Job(
            trial,
            contender,
            (
                settings.index(trial.setting),
                detectors.index(contender.detector),
                features.index(contender.features),
                contender.extractor,
                trial.draw,
            ),
        )
        for trial in trials
        for contender in contenders
        if not (
            trial.only_references and trial.draw > 0 and (contender.features == RAW or contender.detector == ALIGNED)
        )
    ]


def shares(jobs: Sequence[Job], processes: int) -> list[list[Job]]:
    """Jobs of every process: whole products, the largest first to whoever has least; single jobs of a lone product."""
    groups: dict[str, list[Job]] = {}
    lone = len({job.trial.name for job in jobs}) == 1
    for job in jobs:
        groups.setdefault(job.name if lone else job.trial.name, []).append(job)
    out: list[list[Job]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for group in sorted(groups.values(), key=lambda group: -sum(job.trial.images for job in group)):
        least = loads.index(min(loads))
        out[least] += group
        loads[least] += sum(job.trial.images for job in group)
    return out


class Cells:
    """The finished jobs in a folder. Raises ValueError if it holds another configuration's, or files of others."""

    def __init__(self, folder: Path, configuration: dict[str, Any], main: bool) -> None:
        self.folder = folder
        saved = folder / "config.json"
        deadline = time.monotonic() + PATIENCE
        while not (main or saved.is_file() or time.monotonic() > deadline):
            time.sleep(0.1)  # the first process writes it, and must meet an empty folder
        plain = json.loads(json.dumps(configuration))
        if saved.is_file():
            found = json.loads(saved.read_text(encoding="utf-8"))
            if changed := sorted(key for key in {*found, *plain} if found.get(key) != plain.get(key)):
                key = changed[0]
                raise ValueError(
                    f"{folder} holds results of another configuration ({', '.join(changed)} differ; {key} was "
                    f"{_short(found.get(key))}, is {_short(plain.get(key))}): give another --out, or the same settings"
                )
        elif not main:
            raise ValueError(f"the first process did not write {saved} within {PATIENCE} s: see its own message")
        elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"{folder} holds files but no config.json of an evaluation: give another --out")
        else:
            with atomic_path(saved) as temporary:
                temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    def path(self, job: Job) -> Path:
        return self.folder / "cells" / f"{job.name}.json"

    def done(self, jobs: Sequence[Job]) -> int:
        """How many are finished, by any process."""
        return sum(self.path(job).is_file() for job in jobs)

    def write(self, job: Job, records: Sequence[dict[str, Any]]) -> None:
        with atomic_path(self.path(job)) as temporary:
            temporary.write_text(json.dumps(list(records), allow_nan=False) + "\n", encoding="utf-8")

    def read(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The records of all jobs, with their place in the tables. Raises ValueError naming a file that is damaged."""
        records = []
        for job in jobs:
            try:
                found = json.loads(self.path(job).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{self.path(job)} is damaged ({error}): delete it, and it is computed again"
                ) from error
            records += [{**record, "order": list(job.order)} for record in found]
        return records


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
