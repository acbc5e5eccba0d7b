"""The ablation studies: every variant is a valid run, and a tiny study ends with its table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from processes import output, start, wait
from running import ROOT

from adpretrain.config import PretrainConfig
from adpretrain.parsing import parse_command_line

CONFIG = ROOT / "recipes" / "configs" / "imagebind.yaml"


def sweep(rank: int, argv: list[str]) -> int:
    import sweep as recipe

    return recipe.main(argv)


def test_every_variant_of_the_paper_s_tables_is_a_configuration(tmp_path: Path) -> None:
    """As many rows as the paper's tables have, less the two untrained ones of Tab. 2a."""
    from sweep import variants

    rows = variants(ROOT / "recipes" / "studies" / "ablations.yaml", [], tmp_path)
    counts = {table: sum(row.table == table for row in rows) for table in dict.fromkeys(row.table for row in rows)}
    assert counts == {"2a": 6, "2b": 6, "8": 6, "9": 6, "10": 6, "11": 3, "12": 7, "13": 5}
    configs = {row.run: parse_command_line(PretrainConfig, ["--config", str(CONFIG), *row.flags]) for row in rows}
    assert len(configs) == len({repr(config) for config in configs.values()}) == 1 + sum(counts.values()) - len(counts)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = ["--config", str(CONFIG), "--evaluate", f"--root {tmp_path}", "--tables", "7"]
    wait(start(1, log, sweep, argv), log, expected=2)
    assert "tables 7 are not in" in output(log)
    wait(start(1, log, sweep, [*argv[:4], "--dry-run", "--", "--loss.marginn", "1"]), log, expected=2)
    assert "did you mean --loss.margin?" in output(log)


@pytest.mark.long
def test_a_small_study_ends_with_one_table(arguments: Callable[..., list[str]], tiny_set: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("8:\n  tau 0.1: {loss: {temperature: 0.1}}\n  tau 0.15: {}\n9:\n  margin 0.75: {}\n")
    _, config, *rest = arguments(tmp_path / "unused", "--optim.steps", "2", "--data.held_out", "[]")
    place = rest.index("--run")
    rest = rest[:place] + rest[place + 2 :]
    argv = ["--config", config, "--study", str(study), "--out", str(tmp_path / "out"), "--evaluate"]
    argv += [f"--root {tiny_set} --protocol few-shot --shots 2 --detectors featurenorm", "--", *rest]
    log = tmp_path / "log"
    wait(start(1, log, sweep, argv), log)
    table = (tmp_path / "out" / "table.md").read_text()
    assert output(log).endswith(table + "\n")
    lines = table.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")] == [
        *("Tab. 8", "---", "tau 0.1", "tau 0.15"),
        *("Tab. 9", "---", "margin 0.75"),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["default", "loss.temperature-0.1", "table.md"]
