"""Processes that train together end together: real ones, killed, stopped or done before the others."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from processes import output, start, wait

ROOT = Path(__file__).parents[2]


def join(rank: int, count: int, grace: float) -> tuple[object, list[int]]:
    """A lifeline between processes of one group, and the process numbers of all of them."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from adpretrain.training.launch import Lifeline

    PartialState(cpu=True)
    return Lifeline(rank, count, grace), gather_object([os.getpid()])


def killed_while_the_others_are_busy(rank: int) -> int:
    join(rank, 3, grace=0.2)
    if rank == 2:
        if os.fork() == 0:  # as a loader's process, it lives on for a while
            time.sleep(75)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # no message is waited for
    return 0


def test_when_one_is_killed_the_others_end_though_they_are_busy(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert wait(start(3, log, killed_while_the_others_are_busy), log, expected=None) == [1, 1, -signal.SIGKILL]
    assert "process 0 ends, because process 2 was killed" in output(log, 0)
    assert "process 1 ends, because process 0 was killed" in output(log, 1)


def stopped_then_done_before_the_other(rank: int) -> int:
    lifeline, numbers = join(rank, 2, grace=0.1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # as a debugger does
    else:
        while Path(f"/proc/{numbers[1]}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.01)
        time.sleep(1)
        os.kill(numbers[1], signal.SIGCONT)
        time.sleep(1)  # the other has ended
    lifeline.release()  # type: ignore[attr-defined]
    return 0


def test_a_stopped_process_and_one_that_is_done_earlier_end_nobody(tmp_path: Path) -> None:
    log = tmp_path / "log"
    wait(start(2, log, stopped_then_done_before_the_other), log)
    assert "was killed" not in output(log, 0)


def test_processes_of_one_machine_meet_on_it_alone() -> None:
    from adpretrain.training.launch import _listen

    with _listen("localhost", 2) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with _listen("0.0.0.0", 2) as server:  # others may come from anywhere
        assert server.getsockname()[0] in ("::", "0.0.0.0")
