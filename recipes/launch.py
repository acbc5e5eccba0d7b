"""How a run was started: in one process or in several, and whether those are the ones that were asked for."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console
from rich.markup import escape

from adpretrain.config import PretrainConfig
from adpretrain.training.distributed import everyone

# How long the processes wait for one that is still there but silent, as while it scores held-out products. That one has
# died is noticed otherwise (`lifeline`).
PATIENCE = timedelta(hours=1)
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_NTASKS")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
FIX = (
    "start them with `accelerate launch --multi_gpu --num_processes N recipes/pretrain.py ...` (--multi_gpu is right "
    "without GPUs too; --cpu gives one process) or `torchrun --nproc_per_node N`. If one process is what you want: "
    "--num_processes 1, or WORLD_SIZE=1 in the environment"
)


def start(config: PretrainConfig) -> Accelerator:
    """Join the processes of this run. Raises ValueError if fewer were started than were asked for, or if the launcher
    names another precision than the configuration."""
    refuse_rankless(os.environ)
    refuse_other_precision(config.optim.precision, os.environ)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; torch insists on it
        torch.use_deterministic_algorithms(True)
    several = any(int(os.environ.get(name, 1)) > 1 for name in COUNTS if name != "SLURM_NTASKS")
    options: dict[str, Any] = {"log_with": "tensorboard", "project_dir": config.run} if config.tracker else {}
    accelerator = Accelerator(
        # Without this, processes on a machine without a GPU would each train alone.
        cpu=several and not torch.accelerator.is_available(),
        mixed_precision=config.optim.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        **options,
    )
    refuse_lost(accelerator.num_processes, os.environ)
    return accelerator


def refuse_rankless(environment: Mapping[str, str]) -> None:
    """Raise ValueError for a WORLD_SIZE without ranks: all would be the first and wait for the others."""
    size = environment.get("WORLD_SIZE", "1")
    if int(size) > 1 and not any(name in environment for name in RANKS):
        raise ValueError(f"WORLD_SIZE={size} but no RANK: nothing tells the {size} processes apart; {FIX}")


def refuse_other_precision(configured: str, environment: Mapping[str, str]) -> None:
    """Raise ValueError if the launcher asks for another precision than the run computes in.

    ``accelerate launch`` says "no" also where nobody asked for anything, so that "no" leaves the configuration alone.
    """
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", configured):
        raise ValueError(
            f"the launcher asks for --mixed_precision {launched}, but this run computes in precision {configured!r}: "
            "give the launcher --mixed_precision no (the file that `accelerate config` wrote may say otherwise) and "
            "choose the precision of a pretraining with --optim.precision; evaluation has float32 only"
        )


def refuse_lost(processes: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError if the environment speaks of more processes or machines than train together."""
    named = {name: int(environment[name]) for name in COUNTS if name in environment}
    if "WORLD_SIZE" in named:  # says it best: SLURM's tasks may each be a launcher, or one may do for a while
        named = {"WORLD_SIZE": named["WORLD_SIZE"]}
    for name, asked in named.items():
        if asked > processes:
            raise ValueError(f"{name}={asked} processes were asked for, but this one trains with {processes}: {FIX}")
    if not named and "MASTER_ADDR" in environment:  # what accelerate's launcher of one process leaves of several
        raise ValueError(f"several processes were asked for (MASTER_ADDR is set), but one was started: {FIX}")
    machines = int(environment.get("SLURM_NNODES", 1))
    agents = int(environment.get("GROUP_WORLD_SIZE", machines))
    if agents < machines:
        raise ValueError(
            f"SLURM_NNODES={machines} machines, but {agents} train together: give the launcher of each --num_machines "
            f"{machines} (torchrun: --nnodes {machines}) and the address of the first"
        )


def complain(console: Console, what: str, error: Exception) -> None:
    """Say an error: the first process all of it, the others a line each, as most errors meet every process."""
    rank, text = int(os.environ.get("RANK", 0)), str(error)
    console.quiet = False
    where = f"process {rank}: " if rank else ""
    console.print(
        f"[red]{where}{what}:[/] {escape(text.splitlines()[0] if rank and text else text)}",
        highlight=False,
        soft_wrap=True,
    )


class Interruption:
    """Set by Ctrl-C or SIGTERM; the loop then saves and leaves. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop: all must leave at the same step."""
        return any(requested for (requested,) in everyone([int(self.requested)], dist.group.WORLD))
