"""`adpretrain score` on several processes and machines, which share the photographs; the results are those of one.

  accelerate launch --num_processes 4 recipes/score.py --at products/lid --images line/ --out out/

The bytes are those of one process that has as many threads (OMP_NUM_THREADS). If a process is killed, the same command
with --resume goes on, also with another number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import PartialState

from downstream import cli

WAIT = timedelta(days=30)  # for the slowest process; one that has died is noticed by its connection, or the launcher


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    cpu = not torch.cuda.is_available() or "--device cpu" in " ".join(arguments)
    state = PartialState(cpu=cpu, timeout=WAIT)
    place = {"rank": state.process_index, "processes": state.num_processes, "device": str(state.device)}
    return cli.main(["score", *arguments], **place)


if __name__ == "__main__":
    sys.exit(main())
