"""Pretrain and score every variant of an ablation study, and put the results into one table.

  python recipes/studies/sweep.py --config recipes/configs/imagebind.yaml --tables 2a 8 --out runs/ablations \\
      --evaluate "--dataset visa --root data/VisA" --launch "accelerate launch --num_processes 8" \\
      -- --data.root data/Real-IAD

Flags after -- go to every pretraining run, and those of --evaluate to recipes/evaluate.py. The same command resumes
after a crash, as both recipes do; they refuse a folder that holds another run or other results. --dry-run
prints the commands. Variants with the same keys, such as the default of each table, are one run.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from adpretrain.config import PretrainConfig
from adpretrain.files import atomic_path
from adpretrain.parsing import parse_command_line, parse_flags, read_yaml
from downstream.evaluation.comparison import PRETRAINED, RAW, RESIDUAL

ABLATIONS = Path(__file__).with_name("ablations.yaml")
RECIPES = Path(__file__).resolve().parents[1]
# The paper's settings, unless --evaluate gives others.
DETECTORS = ["--detectors", "padim,patchcore,featurenorm", "--protocol", "full", "--settings", "adpretrain"]
METRICS = {"image_auroc": "image AUROC", "aupro": "AUPRO"}  # the two that the paper's ablations report


@dataclass(frozen=True)
class Options:
    """Options of the sweep.

    Args:
        config: the configuration that the variants change.
        evaluate: flags of recipes/evaluate.py, in quotes, that say what is scored.
        study: YAML file with tables of variants.
        tables: names of the tables to run (all by default).
        out: folder of the runs' folders and of table.md.
        launch: command that starts the recipes.
        dry_run: print the commands without running them.
    """

    config: Path
    evaluate: str
    study: Path = ABLATIONS
    tables: list[str] = field(default_factory=list)
    out: Path = Path("runs/ablations")
    launch: str = sys.executable
    dry_run: bool = False


@dataclass(frozen=True)
class Variant:
    """A row of a table: ``flags`` of the pretraining run, in the folder ``run``."""

    table: str
    name: str
    flags: tuple[str, ...]
    run: Path


def flags_of(keys: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """{loss: {margin: 0.5}} -> ["--loss.margin", "0.5"]; lists and texts as YAML reads them."""
    out: list[str] = []
    for key, value in keys.items():
        out += flags_of(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}", _text(value)]
    return out


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def variants(file: Path, tables: Sequence[str], out: Path) -> list[Variant]:
    """The rows of some tables of a study. Raises ValueError for an unknown table."""
    study = {str(name): rows for name, rows in read_yaml(str(file)).items()}
    if unknown := [name for name in tables if name not in study]:
        raise ValueError(f"tables {', '.join(unknown)} are not in {file}; it has {', '.join(study)}")
    found = []
    for table in tables or study:
        for name, keys in study[table].items():
            flags = flags_of(keys)
            folder = "-".join(flag.removeprefix("--").strip("[]").replace(", ", "-") for flag in flags) or "default"
            found.append(Variant(table, str(name), tuple(flags), out / folder))
    return found


def commands(options: Options, given: Sequence[str], variant: Variant) -> list[list[str]]:
    """The commands of pretraining, with the flags ``given`` added, and of evaluation with and without its extractor."""
    pretrain = [*shlex.split(options.launch), str(RECIPES / "pretrain.py"), "--config", str(options.config)]
    pretrain += [*variant.flags, *given, "--run", str(variant.run)]
    evaluate = [*shlex.split(options.launch), str(RECIPES / "evaluate.py"), *DETECTORS, *shlex.split(options.evaluate)]
    evaluate += ["--features", RAW, RESIDUAL, PRETRAINED, "--extractors", str(variant.run / "extractor")]
    evaluate += ["--out", str(variant.run / "evaluation")]
    if "backbone" in variant.flags:  # "--learns backbone": its weights lie beside the extractor
        evaluate += ["--weights", str(variant.run / "backbone.safetensors")]
    return [pretrain, evaluate]


def table_of(rows: Sequence[Variant]) -> str:
    """Markdown: a line for every variant, and `image AUROC / AUPRO` of its features for every detector."""
    parts = []
    for table in dict.fromkeys(row.table for row in rows):
        lines: list[list[str]] = []
        for row in (row for row in rows if row.table == table):
            results = json.loads((row.run / "evaluation" / "table.json").read_text(encoding="utf-8"))["summary"]
            means = {entry["detector"]: entry["mean"] for entry in results if entry["features"] == PRETRAINED}
            if not lines:
                lines += [[f"Tab. {table}", *means], ["---"] * (1 + len(means))]
            lines.append([row.name, *(_cell(mean) for mean in means.values())])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return f"{' / '.join(METRICS.values())} in %, pretrained features\n\n" + "\n\n".join(parts) + "\n"


def _cell(mean: Mapping[str, float | None]) -> str:
    values = [mean.get(name) for name in METRICS]
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 = done, 1 = a command failed (other results are kept), 2 = a user's mistake."""
    own, _, rest = " ".join(map(shlex.quote, sys.argv[1:] if argv is None else argv)).partition(" -- ")
    options, given, console = parse_flags(Options, shlex.split(own), __doc__), shlex.split(rest), Console(stderr=True)
    try:
        rows = variants(options.study, options.tables, options.out)
        for row in rows:  # a wrong key is found before anything is trained
            parse_command_line(PretrainConfig, ["--config", str(options.config), *row.flags, *given])
    except ValueError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    for row in {row.run: row for row in rows}.values():
        for command in commands(options, given, row):
            print("$", shlex.join(command), flush=True)
            if options.dry_run:
                continue
            if code := subprocess.run(command, check=False, env=os.environ).returncode:
                console.print(f"[red]error:[/] it ended with exit code {code}; the same command resumes")
                return 1
    if not options.dry_run:
        with atomic_path(options.out / "table.md") as temporary:
            temporary.write_text(table_of(rows), encoding="utf-8")
        print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
