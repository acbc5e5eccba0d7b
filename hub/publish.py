"""Publish a pretraining run as an extractor on the Hugging Face Hub: weights, model card, curves, heatmaps.

  python hub/publish.py --run runs/mine --repo-id org/adpretrain-dinov2-base --licence apache-2.0 --tag v1 --dry-run
  python hub/publish.py --run runs/mine --repo-id org/adpretrain-dinov2-base --results runs/compare --tag v1
  python hub/publish.py --space --repo-id org/adpretrain-demo
  python hub/publish.py --board site/ --repo-id org/adpretrain-board

One commit publishes everything, or nothing is changed; the same command may be run again. --run also takes the folder
of an extractor, as hub/convert_official.py writes it. --results takes output folders of recipes/evaluate.py for this
extractor: their numbers, and the command that reproduces them, go into the card and its metadata. --collection adds
what was published to a collection, with a line on what it is.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adpretrain.card import METRICS, Result, card
from adpretrain.hub.collection import add_to_collection
from adpretrain.hub.contents import files_of_page, files_of_space
from adpretrain.hub.upload import Published, publish, publish_space
from adpretrain.parsing import parse_flags, read_json
from adpretrain.passport import in_a_product, passport, trained_on
from adpretrain.saved import CONFIG_NAME, WEIGHTS_NAME, folder_digest, read_config
from downstream.evaluation.result_files import public_command

HUB = Path(__file__).resolve().parent
EXAMPLES = 3  # heatmaps on the page, at most


@dataclass(frozen=True)
class Options:
    """Options of the publication.

    Args:
        repo_id: org/name on the Hub.
        run: folder of a run, or of an extractor.
        space: publish the demo (hub/space) as a Space instead.
        board: publish index.html of this folder, which adpretrain board rendered, as a static Space instead.
        results: output folders of recipes/evaluate.py.
        licence: licence of the weights, such as apache-2.0; refused if it allows more than the licences of what they
            were made of.
        collection: org/title or slug of a collection to add it to; made if there is none of that title.
        private: let only you and your organisation see it.
        tag: a version, such as v1, put on the commit.
        message: message of the commit.
        dry_run: say what would be published; change nothing.
    """

    repo_id: str
    run: Path | None = None
    space: bool = False
    board: Path | None = None
    results: list[Path] = field(default_factory=list)
    licence: str | None = None
    collection: str | None = None
    private: bool = False
    tag: str | None = None
    message: str | None = None
    dry_run: bool = False


def extractor_folder(run: Path) -> Path:
    """The extractor's folder, given it or its run's folder. Raises ValueError if it is neither."""
    for folder in (run / "extractor", run):
        if (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
            return folder
    raise ValueError(f"{run} is neither a finished run of recipes/pretrain.py nor an extractor's folder")


def stage(run: Path, folder: Path, repo_id: str, results: Sequence[Path] = (), licence: str | None = None) -> None:
    """Write all files to publish into an empty ``folder``. Raises ValueError as `results_of` does."""
    source = extractor_folder(run)
    config = read_config(source)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copyfile(source / name, folder / name)
    assets = folder / "assets"
    pictures = sorted((run / "heatmaps").rglob("*.png"))[:EXAMPLES]
    curves = run / "curves.png"
    for number, picture in enumerate(pictures):
        assets.mkdir(exist_ok=True)
        shutil.copyfile(picture, assets / f"heatmap-{number + 1}.png")
    if curves.is_file():
        assets.mkdir(exist_ok=True)
        shutil.copyfile(curves, assets / "curves.png")
    measured = [result for table in results for result in results_of(table, source, repo_id)]
    text = card(config, repo_id, measured, licence, len(pictures), curves.is_file())
    (folder / "README.md").write_text(text, encoding="utf-8")


def results_of(folder: Path, extractor: Path, repo_id: str) -> list[Result]:
    """The means of a table of recipes/evaluate.py. Raises ValueError unless it was made with this extractor alone."""
    path = folder / "table.json"
    try:
        content = read_json(path)
        configuration, rows = content["configuration"], content["summary"]
        made_with = [entry["sha256"] for entry in configuration["extractors"]]
        command = _command(configuration, repo_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of recipes/evaluate.py ({error or type(error).__name__})") from error
    if made_with != [folder_digest(extractor)]:
        raise ValueError(f"{folder} was made with other extractors than {extractor}: its numbers are not this one's")
    return [
        Result(
            dataset=Path(configuration["root"]).name,
            split=f"test, {row['setting']}",
            method=f"{row['detector']} on {row['features']} features",
            metric=metric,
            value=row["mean"][metric],
            command=command,
        )
        for row in rows
        for metric in METRICS
        if row["mean"].get(metric) is not None
    ]


def _command(configuration: Mapping[str, Any], repo_id: str) -> str:
    """The command with the name under which others find the extractor, and without this machine's paths."""
    names = {str(entry["folder"]): repo_id for entry in configuration["extractors"]}
    root = str(configuration["root"])
    words = [
        names.get(word, Path(root).name if word == root else word) for word in shlex.split(configuration["command"])
    ]
    return public_command(shlex.join(words))


def describe(done: Published, dry_run: bool) -> str:
    """What was done, or would be, in a few lines."""
    lines = [f"{'would ' if dry_run else ''}{step}" for step in done.steps]
    lines += [f"{size:>12,} bytes  {name}" for name, size in sorted(done.files.items())]
    lines.append(f"{'nothing was changed' if dry_run else done.url}")
    return "\n".join(lines)


def _publish_run(options: Options) -> Published:
    assert options.run is not None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stage(options.run, folder, options.repo_id, options.results, options.licence)
        return publish(
            folder,
            options.repo_id,
            private=options.private,
            tag=options.tag,
            message=options.message,
            dry_run=options.dry_run,
        )


def _publish_space(options: Options) -> Published:
    if options.tag or options.results or options.licence:
        raise ValueError("--tag, --results and --licence belong to an extractor, not to --space or --board")
    how: dict[str, Any] = {"private": options.private, "message": options.message, "dry_run": options.dry_run}
    if options.board is not None:
        return publish_space(
            files_of_page(options.board, HUB / "board" / "README.md"), options.repo_id, "static", **how
        )
    return publish_space(files_of_space(HUB / "space"), options.repo_id, **how)


def _collect(options: Options, collection: str) -> str:
    """Add what was published to a collection; what was done, in a line."""
    note = "The demo: your photographs, in the browser." if options.space else "The board: detectors compared."
    if options.run is not None:
        config = read_config(extractor_folder(options.run))
        note = f"{trained_on(config)}; in a product: {in_a_product(passport(config))}."
    if options.dry_run:
        return f"would add it to the collection {collection}: {note}"
    kind: Literal["model", "space"] = "space" if options.run is None else "model"
    address = add_to_collection(options.repo_id, kind, collection, note, private=options.private)
    return f"in the collection {address}: {note}"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(Options, argv, __doc__)
    try:
        if (options.run is not None) + options.space + (options.board is not None) != 1:
            raise ValueError("give one of --run FOLDER, --space and --board FOLDER")
        done = _publish_run(options) if options.run is not None else _publish_space(options)
    except (ValueError, OSError) as error:
        print(f"publish: error: {error}", file=sys.stderr)
        return 2
    print(describe(done, options.dry_run))
    try:
        if options.collection is not None:
            print(_collect(options, options.collection))
    except (ValueError, OSError) as error:
        print(
            f"publish: error: {error}. {done.url} is published; only the collection lacks it: run the same command "
            "again, which uploads nothing twice",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
