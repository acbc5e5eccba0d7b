"""A launch of fewer processes than were asked for is refused, with the way to start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from processes import output, start, wait
from running import pretrain


def left_by_accelerate(monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, str]:
    """The environment in which accelerate's launcher of one process starts it."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    options = launch_command_parser().parse_args([*flags, "--num_machines", "1", "recipes/pretrain.py"])
    options, _, _ = _validate_launch_command(options)
    return prepare_simple_launcher_cmd_env(options)[1]


@pytest.mark.parametrize("flags", [["--cpu", "--num_processes", "2"], ["--num_processes", "3"]])
def test_accelerate_that_started_one_of_several_is_noticed(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from adpretrain.training.launch import refuse_lost

    with pytest.raises(ValueError, match=r"several processes were asked for.*--multi_gpu --num_processes N"):
        refuse_lost(1, left_by_accelerate(monkeypatch, *flags))
    refuse_lost(1, left_by_accelerate(monkeypatch, "--cpu", "--num_processes", "1"))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "4", "RANK": "0"}, "WORLD_SIZE=4 processes were asked for, but this one trains with 1"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_NTASKS=2 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 processes"),
        ({"WORLD_SIZE": "1", "SLURM_NNODES": "2", "GROUP_WORLD_SIZE": "1"}, "SLURM_NNODES=2 machines, but 1 train"),
    ],
)
def test_lost_processes_are_named(environment: dict[str, str], words: str) -> None:
    from adpretrain.training.launch import refuse_lost

    with pytest.raises(ValueError, match=words):
        refuse_lost(1, environment)


@pytest.mark.parametrize(
    ("processes", "environment"),
    [
        (1, {}),
        (1, {"WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1", "SLURM_NTASKS": "4"}),  # one on purpose
        (8, {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}),
        (2, {"OMPI_COMM_WORLD_SIZE": "2", "SLURM_NTASKS": "2"}),
    ],
)
def test_complete_launches_are_not_refused(processes: int, environment: dict[str, str]) -> None:
    from adpretrain.training.launch import refuse_lost

    refuse_lost(processes, environment)


def test_a_size_without_ranks_is_refused_before_everybody_waits_for_everybody() -> None:
    from adpretrain.training.launch import refuse_rankless

    with pytest.raises(ValueError, match="WORLD_SIZE=2 but no RANK"):
        refuse_rankless({"WORLD_SIZE": "2"})
    refuse_rankless({"WORLD_SIZE": "2", "RANK": "1"})
    refuse_rankless({"WORLD_SIZE": "1"})


def test_the_launchers_precision_is_the_configurations_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from adpretrain.training.launch import refuse_other_precision

    one = ("--cpu", "--num_processes", "1")
    silent = left_by_accelerate(monkeypatch, *one)
    half = left_by_accelerate(monkeypatch, *one, "--mixed_precision", "bf16")
    for configured in ("no", "fp16"):
        refuse_other_precision(configured, silent)
        refuse_other_precision(configured, {})
        with pytest.raises(ValueError, match=rf"--mixed_precision bf16, but .* '{configured}': give"):
            refuse_other_precision(configured, half)
    refuse_other_precision("bf16", half)


def test_the_recipes_look_at_the_launchers_precision(
    arguments: Callable[..., list[str]],
    refusal: Callable[[list[str]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "--mixed_precision fp16" in refusal(arguments(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    import evaluate

    assert evaluate.main(["--root", str(tmp_path)]) == 2
    assert "--mixed_precision fp16" in " ".join(capfd.readouterr().err.split())


def pretrain_in(rank: int, environment: dict[str, str], argv: list[str]) -> int:
    os.environ.update(environment)
    return pretrain(rank, argv)


def test_the_recipe_refuses_to_be_one_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = left_by_accelerate(monkeypatch, "--cpu", "--num_processes", "2")
    argv = ["--run", str(tmp_path / "run"), "--tracker", "false"]
    wait(start(1, tmp_path / "log", pretrain_in, environment, argv), tmp_path / "log", expected=2)
    assert "several processes were asked for" in " ".join(output(tmp_path / "log").split())
    assert not (tmp_path / "run").exists()
