"""Real processes that train together, in a second instead of ten: forked from one that has imported everything.

Each runs ``target(rank, *arguments)``; they find each other as launched ones do (RANK, WORLD_SIZE, MASTER_ADDR, ...).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAIT = 300  # seconds


@functools.cache
def context() -> multiprocessing.context.BaseContext:
    # Another test's server has not imported the recipe, and each child would.
    forkserver._forkserver._stop()
    paths = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "recipes" / "studies"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)  # read when the first process starts
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["pretrain", "timm", "matplotlib.figure"])
    forkserver.ensure_running()
    return chosen


def start(count: int, log: Path, target: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """Start ``count`` processes, each with its output in ``log``.{rank}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        process = context().Process(target=_run, args=(rank, count, port, log, target, arguments), daemon=True)
        process.start()
        started.append(process)
    return started


def output(log: Path, rank: int = 0) -> str:
    """What a process has said so far."""
    return Path(f"{log}.{rank}").read_text(encoding="utf-8")


def wait(processes: list[BaseProcess], log: Path, expected: int | None = 0) -> list[int]:
    """Their exit codes; fails with what they said if they do not end, or not as expected (None: anyhow)."""
    for process in processes:
        process.join(WAIT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = "\n".join(output(log, rank) for rank in range(len(processes)))
    assert None not in codes, f"still running after {WAIT} s, {codes}:\n{said}"
    assert expected is None or codes == [expected] * len(codes), f"{codes}:\n{said}"
    return codes  # type: ignore[return-value]


def together(count: int, folder: Path, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``target(rank, *arguments)`` returns in each of ``count`` processes."""
    log = folder / "processes"
    wait(start(count, log, _keep, folder, target, *arguments), log)
    return [pickle.loads((folder / f"result.{rank}").read_bytes()) for rank in range(count)]


def _keep(rank: int, folder: Path, target: Callable[..., Any], *arguments: Any) -> None:
    (folder / f"result.{rank}").write_bytes(pickle.dumps(target(rank, *arguments)))


def _run(rank: int, count: int, port: int, log: Path, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    file = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    multiprocessing.current_process().daemon = False  # so that it may start loader workers
    sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "recipes" / "studies")]
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.exit(target(rank, *arguments))
