"""`adpretrain push`: a saved extractor or fitted detector to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from downstream.terminal import plain

EPILOG = """One commit holds everything, or nothing is changed; the same command may be run again.
A fitted detector holds features of your product: it becomes a private repository unless you say --visibility public.
For a pretraining run with curves, heatmaps and results on the page, use hub/publish.py.

exit codes:
  0  published (or, with --dry-run, could be)
  2  wrong usage or input, no token, no network, no right: the message says which and what to do"""


def push(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Publish a saved extractor or a fitted detector on the Hugging Face Hub."""
    parser.epilog = EPILOG
    parser.add_argument("folder", type=str, help="written by save_pretrained or adpretrain fit")
    parser.add_argument("--repo-id", type=str, required=True, help="org/name on the Hub; made if there is none")
    parser.add_argument(
        "--visibility",
        type=Literal["private", "public"] | None,
        default=None,
        help="of the repository; by default an extractor is public, a fitted detector private",
    )
    parser.add_argument("--tag", type=str | None, default=None, help="a version, such as v1, put on the commit")
    parser.add_argument("--message", type=str | None, default=None, help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="say what would be published; change nothing")
    return _push


def _push(options: Namespace) -> int:
    from downstream.saved import push_folder

    done = push_folder(
        Path(options.folder),
        options.repo_id,
        private=None if options.visibility is None else options.visibility == "private",
        tag=options.tag,
        message=options.message,
        dry_run=options.dry_run,
    )
    for step in done.steps:
        print(f"{'would ' if options.dry_run else ''}{plain(step)}")
    for name, size in sorted(done.files.items()):
        print(f"{size:>12,} bytes  {plain(name)}")
    print("nothing was changed" if options.dry_run else plain(done.url))
    return 0
