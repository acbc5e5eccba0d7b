"""What a message quotes (paths, names, errors) is shown as it is, though it may look like rich's markup."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import output
from rich.console import Console
from running import train

from adpretrain.config import PretrainConfig


def written() -> Console:
    return Console(file=io.StringIO(), width=1000)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_root_in_brackets_is_named_by_evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from evaluate import main

    assert main(["--root", str(tmp_path / "[/x]"), "--extractors", "embedded"]) == 2
    assert f"{tmp_path}/[/x]" in capsys.readouterr().err.replace("\n", "")


def test_a_root_in_brackets_is_named_by_write_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from write_shards import main

    assert main(["--data.root", str(tmp_path / "[/x]"), "--data.name", "mvtec", "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path}/[/x]" in capsys.readouterr().err.replace("\n", "")


def test_a_torn_checkpoint_in_brackets_is_named(tmp_path: Path) -> None:
    from adpretrain.training.run_folder import RunFolder

    console, run = written(), tmp_path / "[red]" / "[" / "b]"
    torn = run / "checkpoints" / "step_0000002.pt"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"")
    assert RunFolder(PretrainConfig(run=str(run)), console, main=True).load_checkpoint() is None
    assert f"checkpoint {torn} is unreadable" in text(console)


def test_a_comparison_says_where_it_lies_and_what_is_no_share(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evaluate import main

    out = tmp_path / "[red]"
    flags = ["--image-size", "64", "--shots", "1", "--draws", "1", "--device", "cpu", "--pictures", "0"]
    assert main(["--root", str(photographs), *flags, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "/[red]/table.md" in (shown := said.err.replace("\n", ""))
    assert "/[red]/report.html" in shown
    assert "Means in %" in said.out
    assert "in % (d' is a ratio, errors are images)" in (out / "table.md").read_text()


@pytest.mark.slow
def test_a_run_in_brackets_is_named_when_it_ends_and_when_it_is_resumed(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "[red]" / "[" / "b]"
    flags = ["--optim.steps", "1", "--optim.epochs", "1", "--cache.draws", "0", "--data.held_out", "[]"]
    for start in ("memory", f"resuming {run} at step 1"):
        train(log, arguments(run, *flags))
        said = output(log).replace("\n", "")
        assert start in said
        assert f"from_pretrained('{run}/extractor')" in said
