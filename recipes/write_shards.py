"""Write a pretraining set as Parquet shards, which recipes/pretrain.py streams (docs/multi_node.md).

  python recipes/write_shards.py --data.root /data/Real-IAD --out /data/shards --shards 192
  python recipes/pretrain.py --config recipes/configs/dinov2-base.yaml --data.name shards --data.root /data/shards

Any layout is read. Categories that are to be held out of training must be named here already (--data.held_out).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from adpretrain.config import DataConfig
from adpretrain.data import index_with_bare
from adpretrain.data.samples import to_learn_from
from adpretrain.data.shard_writer import check_target, write_shards
from adpretrain.parsing import parse_command_line
from adpretrain.progress import progress_bar
from adpretrain.training.launch import complain
from adpretrain.training.sources import checked, split_samples


@dataclass(frozen=True)
class ShardConfig:
    """Options of the shards.

    Args:
        data: the data set, as for pretraining; its files are checked first.
        out: folder of the shards; shards that are already there are replaced when the new ones are complete.
        shards: number of files; a multiple of the processes that will train.
        references: normal photographs of every category and view to set aside for the start; more than the largest K.
        seed: seed of the order.
    """

    data: DataConfig = field(default_factory=DataConfig)
    out: str = "data/shards"
    shards: int = 192
    references: int = 16
    seed: int = 0


def write(config: ShardConfig, console: Console) -> None:
    """Check every file, then write. Raises ValueError for unusable images, unless they are to be skipped."""
    samples, missing = index_with_bare(config.data.name, config.data.root, config.data.columns)
    training, _ = split_samples(samples, config.data.held_out)
    check_target(config.out, config.shards, len(to_learn_from(training)))  # before hours of reading
    with TemporaryDirectory() as scratch:
        readable = checked(config.data, samples, missing, Path(scratch), console, main=True)
    samples, held_out = split_samples(readable, config.data.held_out)
    with progress_bar(console) as bar:
        track = lambda items, total: bar.track(items, total=total, description="writing shards")  # noqa: E731
        out = write_shards(samples, config.out, config.shards, held_out, config.references, config.seed, track)
    done = f"{len(to_learn_from(samples))} images in {config.shards} shards, {len(held_out)} held out: {out}"
    console.print(done, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 = written, 2 = a user's mistake, 130 = stopped; incomplete shards are deleted."""
    console = Console(stderr=True)
    try:
        write(parse_command_line(ShardConfig, argv, __doc__), console)
    except (ValueError, OSError) as error:
        complain(console, "error", error)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
