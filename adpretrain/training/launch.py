"""Start and stop the processes of a run together.

A run is refused if fewer processes were started than were asked for. All processes stop together: at the same step when
any of them is asked to stop, and soon after one of them has died, even if no launcher watches over them. To notice a
death, each holds a connection to the first process. When a process dies, the system closes its connection; when a
machine is lost, unanswered probes show it within half a minute. A process that is busy for an hour, or stopped in a
debugger, keeps its connection, so slow processes are not taken for dead ones.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from adpretrain.config import PretrainConfig
from adpretrain.training.distributed import PATIENCE, everyone, from_first

try:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
except ImportError as error:
    raise ImportError(f"training needs accelerate ({error}): pip install 'adpretrain[train]'") from None

COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_NTASKS")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
FIX = (
    "start them with `accelerate launch --multi_gpu --num_processes N recipes/pretrain.py ...` (--multi_gpu is right "
    "without GPUs too; --cpu gives one process) or `torchrun --nproc_per_node N`. If one process is what you want: "
    "--num_processes 1, or WORLD_SIZE=1 in the environment"
)
GRACE = 10.0  # seconds in which a survivor may end with its own error, which says more
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a lost machine is noticed after 25 s
JOINING = 60.0  # seconds to connect
RELEASED = b"."
SECRET = 16  # bytes that tell our processes from strangers that connect


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
    """Raise ValueError for a WORLD_SIZE without ranks: every process would be the first and wait for the others."""
    size = environment.get("WORLD_SIZE", "1")
    if int(size) > 1 and not any(name in environment for name in RANKS):
        raise ValueError(f"WORLD_SIZE={size} but no RANK: nothing tells the {size} processes apart; {FIX}")


def refuse_other_precision(configured: str, environment: Mapping[str, str]) -> None:
    """Raise ValueError if the launcher asks for another precision than the run computes in.

    ``accelerate launch`` passes "no" also if no precision was given, so "no" leaves the configuration unchanged.
    """
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", configured):
        raise ValueError(
            f"the launcher asks for --mixed_precision {launched}, but this run computes in precision {configured!r}: "
            "give the launcher --mixed_precision no (the file that `accelerate config` wrote may say otherwise) and "
            "choose the precision of a pretraining with --optim.precision; evaluation has float32 only"
        )


def refuse_lost(processes: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError if the environment announces more processes or machines than train together."""
    named = {name: int(environment[name]) for name in COUNTS if name in environment}
    if "WORLD_SIZE" in named:  # it is reliable; a SLURM task may be a launcher, and not all may be used
        named = {"WORLD_SIZE": named["WORLD_SIZE"]}
    for name, asked in named.items():
        if asked > processes:
            raise ValueError(f"{name}={asked} processes were asked for, but this one trains with {processes}: {FIX}")
    if not named and "MASTER_ADDR" in environment:  # the only sign of several, if accelerate launched one
        raise ValueError(f"several processes were asked for (MASTER_ADDR is set), but one was started: {FIX}")
    machines = int(environment.get("SLURM_NNODES", 1))
    agents = int(environment.get("GROUP_WORLD_SIZE", machines))
    if agents < machines:
        raise ValueError(
            f"SLURM_NNODES={machines} machines, but {agents} train together: give the launcher of each --num_machines "
            f"{machines} (torchrun: --nnodes {machines}) and the address of the first"
        )


def complain(console: Console, what: str, error: Exception) -> None:
    """Print an error: all of it in the first process, one line in the others, as most errors occur in all of them."""
    rank, text = int(os.environ.get("RANK", 0)), str(error)
    console.quiet = False
    where = f"process {rank}: " if rank else ""
    console.print(
        f"[red]{where}{what}:[/] {escape(text.splitlines()[0] if rank and text else text)}",
        highlight=False,
        soft_wrap=True,
    )


class Interruption:
    """Notes Ctrl-C or SIGTERM, after which the loop saves and stops. A second Ctrl-C stops at once."""

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


class Lifeline:
    """Ends this process, with exit code 1 and a message, soon after another one has died, unless `release` was called.

    All ``processes`` must make one, within their process group; for one process it does nothing. The first process
    notices every death, the others notice that of the first. Raises OSError if the first process cannot be reached.
    """

    def __init__(self, rank: int, processes: int, grace: float = GRACE) -> None:
        self.rank, self.grace, self.released = rank, grace, threading.Event()
        self.others: dict[int, socket.socket] = {}
        if processes > 1:
            self.others = _accept(processes) if rank == 0 else {0: _connect(rank)}
        for other, connection in self.others.items():
            os.register_at_fork(after_in_child=connection.close)  # loader processes may outlive this one
            threading.Thread(target=self._watch, args=(other, connection), daemon=True).start()

    def release(self) -> None:
        """Tell the others that this process ends because its work is done."""
        self.released.set()
        for connection in self.others.values():
            with contextlib.suppress(OSError):  # it has ended already
                connection.sendall(RELEASED)

    def _watch(self, other: int, connection: socket.socket) -> None:
        try:
            done = connection.recv(1) == RELEASED
        except OSError:  # no answer to the probes
            done = False
        if done or self.released.wait(self.grace):
            return
        print(
            f"process {self.rank} ends, because process {other} was killed, has failed or cannot be reached; the same "
            "command resumes from what is saved",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread may be waiting for the dead one


def _accept(processes: int) -> dict[int, socket.socket]:
    """Accept the connections of all other processes to the first; returns them by rank."""
    secret = secrets.token_bytes(SECRET)
    others: dict[int, socket.socket] = {}
    with _listen(os.environ["MASTER_ADDR"], processes) as server:
        server.settimeout(JOINING)
        from_first((server.getsockname()[1], secret), dist.group.WORLD)
        while len(others) < processes - 1:
            connection, _ = server.accept()
            connection.settimeout(JOINING)
            greeting = b""
            with contextlib.suppress(OSError):  # a stranger may send nothing
                greeting = connection.recv(SECRET + 4, socket.MSG_WAITALL)
            if greeting[:SECRET] == secret:
                others[int.from_bytes(greeting[SECRET:], "big")] = _probed(connection)
            else:
                connection.close()
    return others


def _listen(address: str, processes: int) -> socket.socket:
    """A listening socket: reachable on this machine only if all processes run here, else from other machines too."""
    known = socket.gethostbyname(address)
    if ipaddress.ip_address(known).is_loopback:
        return socket.create_server((known, 0), backlog=processes)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=processes, dualstack_ipv6=both)


def _connect(rank: int) -> socket.socket:
    """Connect this process to the first."""
    port, secret = from_first((0, b""), dist.group.WORLD)
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), JOINING)
    connection.sendall(secret + rank.to_bytes(4, "big"))
    return _probed(connection)


def _probed(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # absent on some systems
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
