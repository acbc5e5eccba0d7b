"""Pretrain a feature projector on residual features (ADPretrain).

  python recipes/pretrain.py --config recipes/configs/demo.yaml
  accelerate launch recipes/pretrain.py --config recipes/configs/dinov2-base.yaml --data.root /data/Real-IAD

Flags override the file's keys. The same command resumes an interrupted run; Ctrl-C saves first. The run's folder gets
config.yaml, metrics.jsonl, curves.png, checkpoints and, at the end, the extractor (ADExtractor.from_pretrained).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from adpretrain.config import PretrainConfig
from adpretrain.parsing import parse_command_line
from adpretrain.training.launch import complain
from adpretrain.training.run import pretrain
from downstream.evaluation.few_shot import HeldOut


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 = finished or stopped on request (resumable), 1 = the training failed, 2 = a user's mistake, 130 =
    stopped at once, before training began or at a second Ctrl-C."""
    console = Console(stderr=True)
    try:
        pretrain(parse_command_line(PretrainConfig, argv, __doc__), console, HeldOut)
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that is not writable
        complain(console, "error", error)
        return 2
    except KeyboardInterrupt:
        console.print("stopped at once; the same command resumes from the newest checkpoint, if there is one")
        return 130
    except FloatingPointError as error:
        complain(console, "training failed", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
