"""`adpretrain evaluate` on several processes, which share the products of its sets.

  accelerate launch recipes/evaluate.py --detectors patchcore,padim,featurenorm --features raw,pretrained \\
      --dataset mvtec --root data/mvtec --extractors runs/mine/extractor --protocol full --out runs/mvtec
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from accelerate import PartialState
from rich.console import Console

from adpretrain.training.launch import complain, refuse_other_precision
from downstream import cli


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        refuse_other_precision("no", os.environ)
    except ValueError as error:
        complain(Console(stderr=True), "error", error)
        return 2
    on_cpu = not torch.cuda.is_available() or "--device cpu" in " ".join(arguments)
    state = PartialState(cpu=on_cpu)
    place = {"rank": state.process_index, "processes": state.num_processes, "device": str(state.device)}
    return cli.main(["evaluate", *arguments], **place, program="accelerate launch recipes/evaluate.py")


if __name__ == "__main__":
    sys.exit(main())
