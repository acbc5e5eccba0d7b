"""hub/publish.py: a run's weights, card, curves and heatmaps become one commit; the numbers are this extractor's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hub_server.server import Hub
from huggingface_hub import ModelCard
from PIL import Image

from adpretrain.extractor import ADExtractor
from adpretrain.saved import folder_digest

HUB = Path(__file__).resolve().parents[2] / "hub"


def publish(*arguments: str | Path) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(HUB))
        from publish import main

        return main([str(argument) for argument in arguments])


@pytest.fixture
def run(extractor: ADExtractor, tmp_path: Path) -> Path:
    """A run's folder as recipes/pretrain.py leaves it."""
    folder = tmp_path / "secret-customer" / "run"
    extractor.save_pretrained(folder / "extractor")
    for name in ("curves.png", "heatmaps/p000/scratch.png", "heatmaps/p001/spot.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


@pytest.fixture
def table(run: Path, tmp_path: Path) -> Path:
    """A table as recipes/evaluate.py writes it."""
    root, source = tmp_path / "secret-customer" / "MTD", run / "extractor"
    command = (
        f"accelerate launch recipes/evaluate.py --root {root} --extractors {source} --detectors padim --out {tmp_path}"
    )
    configuration = {
        "root": str(root),
        "command": command,
        "extractors": [{"folder": str(source), "sha256": folder_digest(source)}],
    }
    means = {"image_auroc": 81.25, "aupro": 66.5, "pixel_ap": None}
    rows = [{"setting": "full", "detector": "padim", "features": "pretrained", "mean": means}]
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "table.json").write_text(json.dumps({"configuration": configuration, "summary": rows}))
    return folder


def test_a_run_becomes_a_page_and_the_page_an_extractor(
    hub: Hub, run: Path, table: Path, extractor: ADExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run", run, "--repo-id", "ada/features", "--results", table, "--tag", "v1", "--licence", "apache-2.0"]
    assert publish(*flags, "--dry-run") == 0
    assert hub.writes == []
    assert "nothing was changed" in capsys.readouterr().out
    assert publish(*flags) == 0
    repository = hub.repositories["ada/features"]
    files = repository.contents()
    assert {name for name in files if name != ".gitattributes"} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "assets/curves.png",
        "assets/heatmap-1.png",
        "assets/heatmap-2.png",
    }
    text = files["README.md"].decode()
    assert "secret-customer" not in text  # no path of this machine is published
    for shown in (
        "![",
        "assets/curves.png",
        "assets/heatmap-2.png",
        "| MTD | test, full | padim on pretrained features |",
    ):
        assert shown in text
    data = ModelCard(text).data
    assert data.license == "apache-2.0"
    (command,) = {result.metric_args["command"] for result in data.eval_results}
    assert command == "accelerate launch recipes/evaluate.py --root MTD --extractors ada/features --detectors padim"
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {("image_auroc", 81.25), ("aupro", 66.5)}
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded = ADExtractor.from_pretrained("ada/features", revision="v1").set_references(images[:2])
    ours = ADExtractor.from_pretrained(run / "extractor").set_references(images[:2])
    assert all(map(torch.equal, loaded(images[2:]), ours(images[2:])))


def test_an_extractors_folder_is_published_too_and_again_changes_nothing(hub: Hub, run: Path) -> None:
    for _ in range(2):
        assert publish("--run", run / "extractor", "--repo-id", "ada/plain", "--private") == 0
    assert hub.repositories["ada/plain"].private
    assert len([request for request in hub.writes if "/commit/" in request]) == 1
    assert "## Results" not in hub.repositories["ada/plain"].contents()["README.md"].decode()


def test_numbers_of_another_extractor_are_refused(
    hub: Hub, run: Path, table: Path, extractor: ADExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ADExtractor.from_pretrained(run / "extractor")
    changed.config = dataclasses.replace(changed.config, provenance={"seed": 9})
    changed.save_pretrained(run / "extractor")
    assert publish("--run", run, "--repo-id", "ada/features", "--results", table) == 2
    assert "was made with other extractors than" in capsys.readouterr().err
    assert hub.writes == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "nowhere"], "nowhere is neither a finished run of recipes/pretrain.py nor an extractor's folder"),
        ([], "give one of --run FOLDER, --space and --board FOLDER"),
        (["--space", "--run", "nowhere"], "give one of --run FOLDER, --space and --board FOLDER"),
    ],
)
def test_mistakes_are_a_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(*flags, "--repo-id", "ada/features") == 2
    assert capsys.readouterr().err == f"publish: error: {message}\n"


def test_a_broken_table_is_named(hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.json").write_text("{}")
    assert publish("--run", run, "--repo-id", "ada/features", "--results", tmp_path) == 2
    assert "is not a table of recipes/evaluate.py" in capsys.readouterr().err


def test_the_space_is_published_whole(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish("--space", "--repo-id", "ada/demo", "--dry-run") == 0
    assert hub.writes == []
    assert publish("--space", "--repo-id", "ada/demo") == 0
    files = hub.repositories["ada/demo"].contents()
    assert files["app.py"] == (HUB / "space" / "app.py").read_bytes()
    assert {"app.py", "requirements.txt", "README.md"} <= files.keys()
    assert publish("--space", "--repo-id", "ada/demo", "--tag", "v1") == 2
    assert "belong to an extractor, not to --space or --board" in capsys.readouterr().err
