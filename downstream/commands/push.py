"""`adpretrain push`: a saved extractor or fitted detector to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from downstream.commands.options import POSITIONAL, Command
from downstream.terminal import plain


@dataclass(frozen=True, kw_only=True)
class Push(Command):
    """Publish a saved extractor or a fitted detector on the Hugging Face Hub.

    One commit holds everything, or nothing is changed; the same command may be run again.
    A fitted detector holds features of your product: its repository is private unless you say --visibility public.
    For a pretraining run with curves, heatmaps and results on the page, use hub/publish.py.

    exit codes:
      0  published (or, with --dry-run, could be)
      2  wrong usage or input, no token, no network, no right: the message says which and what to do

    Args:
        folder: written by save_pretrained or adpretrain fit
        repo_id: org/name on the Hub; made if there is none
        visibility: of the repository; by default an extractor is public, a fitted detector private
        tag: a version, such as v1, put on the commit
        message: of the commit
        dry_run: say what would be published; change nothing
    """

    folder: Path = field(metadata=POSITIONAL)
    repo_id: str
    visibility: Literal["private", "public"] | None = None
    tag: str | None = None
    message: str | None = None
    dry_run: bool = False

    def run(self) -> int:
        from downstream.saved import push_folder

        private = None if self.visibility is None else self.visibility == "private"
        done = push_folder(
            self.folder, self.repo_id, private=private, tag=self.tag, message=self.message, dry_run=self.dry_run
        )
        for step in done.steps:
            print(f"{'would ' if self.dry_run else ''}{plain(step)}")
        for name, size in sorted(done.files.items()):
            print(f"{size:>12,} bytes  {plain(name)}")
        print("nothing was changed" if self.dry_run else plain(done.url))
        return 0
