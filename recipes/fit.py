"""`adpretrain fit` of a detector that trains a network, on several processes and machines, or in mixed precision.

  accelerate launch --num_processes 2 recipes/fit.py --detector recontrast --normal good/ --out lid/

The processes share the images of every step. If one is killed, the same command with --resume goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from downstream import cli


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    on_cpu = not torch.cuda.is_available() or "--device cpu" in " ".join(arguments)
    return cli.main(["fit", *arguments], accelerator=Accelerator(cpu=on_cpu))


if __name__ == "__main__":
    sys.exit(main())
