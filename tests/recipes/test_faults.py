"""A run that is killed, finds its disk full or its checkpoint torn ends with the bytes of one that was not."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import output, start, wait
from running import ROOT, pretrain, train, until

Arguments = Callable[..., list[str]]
STEPS = 24
BOUND = 300  # seconds in which a job that lost a process must be over, also on a busy machine


@pytest.fixture(scope="session")
def residuals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("residuals")


@pytest.fixture(scope="session")
def quick(arguments: Arguments, residuals: Path) -> Arguments:
    """Flags of a run of a few milliseconds a step, with both losses and a checkpoint every other step."""

    def build(run: Path, *flags: str) -> list[str]:
        fixed = ["--augment", "once", "--loss.lambda_", "1.0", "--loss.center", "projected", "--tokens", "16"]
        fixed += ["--local_scale", "null", "--backbone.image_size", "64", "--data.held_out", "[]"]
        fixed += ["--cache.folder", str(residuals), "--optim.steps", str(STEPS), "--checkpoint_every", "2"]
        return arguments(run, *fixed, "--projector.references", "512", "--log_every", "5", *flags)

    return build


def made(run: Path) -> tuple[bytes, dict[str, Any]]:
    """The extractor's weights and configuration, whatever is committed to this checkout meanwhile."""
    config = json.loads((run / "extractor" / "config.json").read_bytes())
    del config["provenance"]["git_commit"]
    return (run / "extractor" / "model.safetensors").read_bytes(), config


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*.pt"))


def last(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max([0, *(int(path.stem[5:]) for path in checkpoints(run))])


def torn(run: Path) -> list[Path]:
    """Files that were being written."""
    return list((run / "checkpoints").glob(".step_*.tmp.pt"))


Whole = Callable[[int], tuple[bytes, dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(quick: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What a run of one or two processes makes that nothing happened to; it leaves its residuals to the others."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(count: int) -> tuple[bytes, dict[str, Any]]:
        train(folder / "log", quick(folder / str(count), *batch(count)), count)
        return made(folder / str(count))

    return run


def batch(count: int) -> list[str]:
    """The same images a step for any number of processes."""
    return ["--optim.batch_size", str(8 // count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "wanted"),
    [(1, 4), (2, 4), pytest.param(1, 20, marks=pytest.mark.long), pytest.param(2, 20, marks=pytest.mark.long)],
)
def test_killed_again_and_again_ends_with_the_same_bytes(
    quick: Arguments, whole: Whole, tmp_path: Path, count: int, wanted: int
) -> None:
    """SIGKILL to all processes, one after the other, at a moment drawn at random or while it saves: ``wanted`` times,
    and until it was hit in a save."""
    log, rng = tmp_path / "log", random.Random(count)
    expected = whole(count)
    began = time.perf_counter()
    train(log, quick(tmp_path / "again", *batch(count)), count)
    duration = time.perf_counter() - began
    assert made(tmp_path / "again") == expected  # the same seed, the same bytes

    kills = resumed = in_a_save = told = finished = 0
    while True:
        run = tmp_path / f"killed{finished}"
        stale = set(torn(run))  # left by the kill before, until the next run sweeps it away
        processes = start(count, log, pretrain, quick(run, *batch(count)))
        enough = kills >= wanted and (in_a_save or kills >= 5 * wanted)
        if enough:
            wait(processes, log)
        elif kills % 2 == 0:
            before = last(run) + 2 * rng.randrange(4)
            until(lambda: last(run) >= before and set(torn(run)) - stale, processes[0].is_alive)  # noqa: B023
        else:
            processes[0].join(rng.uniform(0, duration / 2))  # a resumed run is shorter
        for process in rng.sample(processes, count):
            process.kill()
        codes = wait(processes, log, expected=None)
        resumed += "resuming" in output(log)
        told += "is unreadable" in " ".join(output(log).split())
        if not any(codes):  # it was faster
            assert made(run) == expected
            finished += 1
            if enough:
                break
            continue
        assert -signal.SIGKILL in codes
        kills += 1
        in_a_save += bool(set(torn(run)) - stale)
        if kills >= wanted // 2 and not told and checkpoints(run):
            newest = checkpoints(run)[-1]
            newest.write_bytes(newest.read_bytes()[: rng.randrange(newest.stat().st_size)])
    print(f"{count} processes: {kills} kills, {in_a_save} in a save, {resumed} resumed, {finished} runs finished")
    assert resumed >= wanted // 3
    assert in_a_save
    assert told
    assert not torn(run)


Trouble = tuple[Path, Callable[[int], object], Callable[[], object], str]


@pytest.fixture(params=["full", "limit", "read-only"])
def trouble(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trouble]:
    """A folder, what makes writing to it impossible for a process, what mends it, and what the system says."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit":  # of the size of files: for who may not mount
        limit = (4096, 4096)
        yield folder, lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, limit), lambda: None, "File too large"
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")

    def fill(pid: int) -> None:
        with (folder / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 16))
                except OSError:
                    return

    def remount(how: str) -> None:
        command = ["mount", "-o", f"remount,{how}", str(folder)]
        # Refused while a file is open for writing.
        assert until(lambda: subprocess.run(command, capture_output=True).returncode == 0, lambda: True)

    if request.param == "full":
        yield folder, fill, (folder / "filler").unlink, "No space left on device"
    else:
        yield folder, lambda pid: remount("ro"), lambda: remount("rw"), "Read-only file system"
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_what_cannot_be_written_leaves_the_checkpoint_before_and_says_what_to_do(
    quick: Arguments, whole: Whole, tmp_path: Path, trouble: Trouble
) -> None:
    folder, strike, mend, words = trouble
    log, run, expected = tmp_path / "log", folder / "run", whole(1)
    (process,) = start(1, log, pretrain, quick(run))
    assert until(lambda: len(checkpoints(run)) == 2, process.is_alive)
    strike(process.pid or 0)
    wait([process], log, expected=2)
    said = " ".join(output(log).split())
    newest = checkpoints(run)[-1]
    assert words in said
    assert f"the checkpoint {newest.name} is whole: make room" in said
    assert "Traceback" not in said
    mend()
    assert f"at step {int(newest.stem[5:])} of" in train(log, quick(run))
    assert not torn(run)
    assert made(run) == expected


FAILING = """
import os, signal, sys
sys.path.insert(0, "recipes")
import pretrain

def fail(*_):
    raise RuntimeError("the network card of process 1 is on fire")

if os.environ["RANK"] == "1":
    signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 3)
sys.exit(pretrain.main())
"""


def launch(script: str | Path, argv: list[str]) -> subprocess.Popen[str]:
    """`accelerate launch` of two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.Popen(
        [*command, str(script), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def endless(quick: Arguments, tmp_path: Path) -> list[str]:
    return quick(tmp_path / "run", "--optim.batch_size", "4", "--optim.steps", "2000", "--checkpoint_every", "20")


@pytest.mark.long
def test_launched_processes_of_which_one_raises_end_together(endless: list[str], tmp_path: Path) -> None:
    """The job ends and says why."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    job = launch(script, endless)
    said = job.communicate(timeout=BOUND)[0]
    assert job.returncode not in (0, None)
    assert "RuntimeError: the network card of process 1 is on fire" in said


@pytest.mark.slow
def test_launched_processes_of_which_one_is_killed_end_together(endless: list[str], tmp_path: Path) -> None:
    """The job ends and says why, and its checkpoints are there to resume."""
    job = launch("recipes/pretrain.py", endless)
    assert until(lambda: checkpoints(tmp_path / "run"), lambda: job.poll() is None)
    workers = [int(child) for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)
    said = job.communicate(timeout=BOUND)[0]
    assert job.returncode not in (0, None)
    assert "Signal 9 (SIGKILL)" in said
    assert checkpoints(tmp_path / "run")
