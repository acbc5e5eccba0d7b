"""`adpretrain push` publishes a saved extractor or fitted detector on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from downstream.commands.options import POSITIONAL, Command
from downstream.terminal import plain


@dataclass(frozen=True, kw_only=True)
class Push(Command):
    """Publish a saved extractor or a fitted detector on the Hugging Face Hub.

    All files are uploaded in one commit, or nothing is changed; it is safe to run the same command again.
    A fitted detector contains features of your product: its repository is private unless you set --visibility public.
    A licence in the card (license: in README.md) that does not forbid use in a product is refused if something that the
    model was made of forbids it, or leaves it open: adpretrain info lists the licences.
    To publish a pretraining run with its curves, heatmaps and results, use hub/publish.py.

    exit codes:
      0  published; with --dry-run, it could be published
      2  wrong usage or input, no token, no network or no permission: the message says which and what to do

    Args:
        folder: folder written by save_pretrained or adpretrain fit
        repo_id: org/name on the Hub; created if it does not exist
        visibility: visibility of the repository; by default an extractor is public, a fitted detector private
        tag: version to tag the commit with, such as v1
        message: message of the commit
        dry_run: say what would be published and change nothing
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
