"""Runs on several machines, which here are processes of this one: shards, accelerate's configurations, SLURM.

`srun` and `scontrol` are stand-ins that start the tasks with SLURM's variables; rendezvous and training are real.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from hub_server import Hub
from hub_server.fixture import environment, settings
from huggingface_hub import constants
from processes import output, start, wait
from running import ROOT, finish, pretrain, train, until

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
SBATCH = ROOT / "recipes" / "slurm" / "pretrain.sbatch"
SCORE = ROOT / "recipes" / "slurm" / "score.sbatch"
FLAGS = ["--data.name", "shards", "--data.reservoir_mb", "8", "--data.workers", "0", "--cache.draws", "0"]
FLAGS += ["--optim.batch_size", "2", "--backbone.image_size", "64", "--eval.every", "0"]
SRUN = r"""#!/bin/bash
# Two nodes with one task each, logs as asked for; the tasks' ids are noted, for a test to signal them as SLURM does.
for option in "$@"; do
  case $option in
  --output=*) log=${option#--output=} ;;
  bash) break ;;
  esac
  shift
done
log=${log//%x/adpretrain} log=${log//%j/$SLURM_JOB_ID}
for task in 0 1; do
  SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 "$@" >>"${log//%t/$task}" 2>&1 &
  pids[task]=$!
done
echo "${pids[@]}" >"$TASKS"
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) echo localhost; echo elsewhere ;;
*) echo "$@" >>"$REQUEUED" ;;
esac
"""


def pretrain_on_hub(rank: int, known: dict[str, object], given: dict[str, str], argv: list[str]) -> int:
    """The process was forked from one that had the client imported."""
    vars(constants).update(known)
    os.environ.update({name: value for name, value in given.items() if name.startswith("HF_")})
    return pretrain(rank, argv)


def write(rank: int, argv: list[str]) -> int:
    from write_shards import main

    return main(argv)


@pytest.fixture(scope="session")
def shards(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set as six shards, one of its six products held out."""
    folder = tmp_path_factory.mktemp("sharded")
    argv = ["--data.root", str(tiny_set), "--data.held_out", '["p??0_*"]', "--shards", "6", "--references", "4"]
    wait(start(1, folder / "log", write, [*argv, "--out", str(folder / "shards")]), folder / "log")
    assert "50 images in 6 shards, 10 held out" in output(folder / "log")
    return folder / "shards"


@pytest.fixture
def argv(arguments: Callable[..., list[str]], shards: Path) -> Callable[..., list[str]]:
    """Pretraining's flags for the shards."""
    return lambda run, *flags: [*arguments(run), *FLAGS, "--data.root", str(shards), *flags]


def weights(run: Path) -> bytes:
    return (run / "extractor" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_what_accelerate_takes_it_for(config: Path) -> None:
    """Every key is known (accelerate's loader refuses others), and its name tells the size."""
    loaded = load_config_from_file(str(config))
    counts = {"one_gpu": (1, 1), "one_node": (1, 8), "several_nodes": (8, 64), "cpu_two_processes": (1, 2)}
    assert (loaded.num_machines, loaded.num_processes) == counts[config.stem]
    parsed = launch_command_parser().parse_args(["--config_file", str(config), "recipes/pretrain.py"])
    validated, _, _ = _validate_launch_command(parsed)
    assert validated.multi_gpu == (loaded.num_processes > 1)  # else it would start one process without a word
    assert f"accelerate launch --config_file recipes/accelerate/{config.name}" in config.read_text(encoding="utf-8")


@pytest.mark.long
def test_two_machines_find_each_other_by_the_configuration(tmp_path: Path) -> None:
    """One launcher for each machine."""
    script = tmp_path / "meet.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "ranks = [None, None]\n"
        "dist.all_gather_object(ranks, dist.get_rank())\n"
        "print('met', ranks, flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    flags = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    flags += ["--main_process_port", str(10000 + os.getpid() % 20000)]
    command = [*LAUNCHER, "recipes/accelerate/several_nodes.yaml", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen([*command, "--machine_rank", rank, str(script)], cwd=ROOT, env=environment, **pipes)
        for rank in "01"
    ]
    assert [finish(machine).count("met [0, 1]") for machine in machines] == [1, 1]


@pytest.mark.slow
def test_a_stream_trained_by_two_processes_and_resumed_inside_an_epoch_is_bit_equal(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Twelve steps an epoch; the last two of 16 are run again. Both losses, local scale, new views every epoch."""
    log, run = tmp_path / "log", tmp_path / "run"
    command = argv(run, "--augment", "epoch", "--loss.lambda_", "1.0", "--optim.steps", "16", "--checkpoint_every", "7")
    train(log, command, 2)
    whole = weights(run)
    (run / "checkpoints" / "step_0000016.pt").unlink()
    (run / "extractor" / "model.safetensors").unlink()
    assert "at step 14 of 16" in train(log, command, 2)
    assert weights(run) == whole
    config = (run / "extractor" / "config.json").read_text()
    assert '"images": 50' in config
    assert '"categories": 5' in config
    assert '"processes": 2' in config


@pytest.mark.slow
def test_training_from_the_hub_is_training_from_the_folder_even_if_resumed_after_a_push(
    argv: Callable[..., list[str]], shards: Path, hub: Hub, tmp_path: Path
) -> None:
    """Two processes; the repository is spoiled before the run goes on. A wrong name is told by each in a line."""
    files = {path.relative_to(shards).as_posix(): path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    repository = hub.add("factory/parts", kind="dataset", private=True)
    repository.write(files)
    log, run = tmp_path / "log", tmp_path / "hub"
    steps = ["--optim.steps", "4", "--checkpoint_every", "3", "--data.held_out", '["p??0_*"]']
    there = settings(hub, tmp_path / "hf"), environment(hub, tmp_path / "hf")
    command = argv(run, *steps, "--data.root", "hf://factory/parts")
    wait(start(2, log, pretrain_on_hub, *there, command), log)
    (run / "checkpoints" / "step_0000004.pt").unlink()
    (run / "extractor" / "model.safetensors").unlink()
    repository.write(dict.fromkeys(files, b"{}"))
    wait(start(2, log, pretrain_on_hub, *there, command), log)
    assert "at step 3 of 4" in " ".join(output(log).split())
    train(log, argv(tmp_path / "folder", *steps), 2)
    assert weights(run) == weights(tmp_path / "folder")
    wait(start(2, log, pretrain_on_hub, *there, [*command, "--data.root", "hf://factory/bolts"]), log, expected=2)
    for rank in range(2):
        assert "cannot stream datasets/factory/bolts: it is neither" in output(log, rank)
        assert "Traceback" not in output(log, rank)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.held_out", '["p001*"]'], "in the training shards of .*: write them again with --data.held_out"),
        (["--data.held_out", '["screw"]'], "held-out category 'screw' matches none of"),
        (["--shots", "[9]"], "K = 9 references need 10 normal images"),
        (["--cache.draws", "1"], "a stream of shards is read once"),
        (["--data.root", "nowhere"], "nowhere holds no shards"),
        (["--data.reservoir_mb", "0"], "data.reservoir_mb 0 cannot hold"),
    ],
)
def test_mistakes_about_shards_are_named(
    argv: Callable[..., list[str]],
    tmp_path: Path,
    refusal: Callable[[list[str]], str],
    flags: list[str],
    words: str,
) -> None:
    assert re.search(words, refusal(argv(tmp_path / "run", *flags)))


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Run the batch script as a job of two nodes with one task each, in a folder of its own."""
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "recipes").symlink_to(ROOT / "recipes")
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NTASKS": "2"}
    job |= {"SLURM_NNODES": "2", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    job |= {"TASKS": str(tmp_path / "tasks"), "REQUEUED": str(tmp_path / "requeued")}

    def submit(*arguments: str, script: Path = SBATCH, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            cwd=tmp_path / "work",
            env={**os.environ, **job, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


def learns(run: Path) -> bool:
    """Whether it has got to its first step."""
    metrics = run / "metrics.jsonl"
    return metrics.exists() and '"loss"' in metrics.read_text()


def terminate(pids: list[int]) -> None:
    """SIGTERM to processes and to their loader workers, as SLURM sends it."""
    workers = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split() for pid in pids]
    assert all(workers)
    for pid in (*chain(*workers), *pids):
        os.kill(int(pid), signal.SIGTERM)


@pytest.mark.slow
def test_terminated_processes_save_and_end_with_the_same_bits(argv: Callable[..., list[str]], tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "cut"
    flags = ["--optim.steps", "12", "--checkpoint_every", "10", "--data.workers", "1"]
    train(log, argv(tmp_path / "whole", *flags), 2)
    processes = start(2, log, pretrain, argv(run, *flags))
    assert until(lambda: learns(run), processes[0].is_alive)
    terminate([process.pid or 0 for process in processes])
    wait(processes, log)
    assert "stopped at step" in " ".join(output(log).split())
    assert "resuming" in train(log, argv(run, *flags), 2)
    assert weights(run) == weights(tmp_path / "whole")


@pytest.mark.long
def test_a_preempted_job_saves_is_queued_again_and_ends_with_the_same_bits(
    argv: Callable[..., list[str]], slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """SIGTERM to both tasks; the uninterrupted run was started by accelerate's launcher."""
    flags = ["--optim.steps", "12", "--checkpoint_every", "10", "--data.workers", "1"]
    command = [*LAUNCHER, "recipes/accelerate/cpu_two_processes.yaml", "recipes/pretrain.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finish(subprocess.Popen([*command, *argv(tmp_path / "whole", *flags)], cwd=ROOT, env=environment, **pipes))

    run = tmp_path / "cut"
    given = argv(run, *flags)
    place = given.index("--run")  # the script's first argument instead
    job = [str(run), *given[:place], *given[place + 2 :]]
    process = slurm(*job)
    assert until(lambda: learns(run), lambda: process.poll() is None)
    terminate([int(pid) for pid in (tmp_path / "tasks").read_text().split()])
    assert "queued again" in finish(process)
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    logs = {path.name: path.read_text() for path in (tmp_path / "work" / "logs").iterdir()}
    assert sorted(logs) == [f"adpretrain-{os.getpid()}-rank{task}.log" for task in (0, 1)]
    assert "stopped at step" in logs[f"adpretrain-{os.getpid()}-rank0.log"]
    assert "finished" in finish(slurm(*job))
    assert weights(run) == weights(tmp_path / "whole")


def test_a_job_that_gets_nowhere_is_not_queued_again(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    said = finish(slurm(str(tmp_path / "run"), "--config", "x", PYTHON="false"), expected=1)
    assert "no progress since the start: not queued again" in said
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("script", "signal"), [(SBATCH, "TERM@300"), (SCORE, "TERM@60")])
def test_the_batch_scripts_are_sound(script: Path, signal: str) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(encoding="utf-8"), re.MULTILINE))
    assert directives["signal"] == signal  # without "B:", which would signal the shell instead of the tasks
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert {"requeue", "time", "cpus-per-task"} <= set(directives)
    assert "/" not in directives["output"]  # SLURM opens it before anything could make its folder


def test_every_task_knows_its_machine(slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """How many tasks share it, which the check of its memory multiplies by, and their processors, which read."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$LOCAL_WORLD_SIZE of $WORLD_SIZE: $@"\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "SLURM_NTASKS": "16", "SLURM_CPUS_PER_TASK": "12"}
    finish(slurm(str(tmp_path / "run"), "--config", "a b", **given), expected=1)
    log = tmp_path / "work" / "logs" / f"adpretrain-{os.getpid()}-rank0.log"
    wanted = f"8 of 16: recipes/pretrain.py --data.workers 11 --config a b --run {tmp_path / 'run'}"
    assert wanted in log.read_text()


def test_a_scoring_job_is_queued_again_while_it_makes_progress(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """A stand-in for Python leaves what the recipe leaves: a longer record, or a summary, or nothing."""
    python, out = tmp_path / "python", tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("that of an earlier run")
    os.utime(out / "summary.json", (1, 1))
    given = {"script": SCORE, "PYTHON": str(python)}

    def job(content: str, expected: int = 0) -> str:
        python.write_text(f'#!/bin/bash\necho "$RANK of $WORLD_SIZE, $OMP_NUM_THREADS thread: $@"\n{content}')
        python.chmod(0o755)
        return finish(slurm(str(out), "--at", "a b", **given), expected=expected)

    assert "no progress: not queued again" in job("exit 2", expected=2)
    assert not (tmp_path / "requeued").exists()
    assert "5 bytes recorded (exit code 143): queued again" in job(
        f"[ $RANK = 1 ] || printf 12345 >> {out}/scores.part.jsonl; exit 143"
    )
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert "finished" in job(f"sleep 0.1; [ $RANK = 1 ] || touch {out}/summary.json; exit 1")
    log = tmp_path / "work" / "logs" / f"adpretrain-{os.getpid()}-rank1.log"
    assert log.read_text().splitlines()[0] == f"1 of 2, 1 thread: recipes/score.py --resume --at a b --out {out}"
