"""`adpretrain push`, `export` and `extract` given what they should refuse: one sentence and exit code 2, no traceback;
nothing of somebody else's is touched, nothing half-written stays."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from test_images import drawn

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor
from downstream.cli import main
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.embedding import EmbeddingConfig

SIDE = 64
RAW = ["--backbone=lite0", f"--image-size={SIDE}", "--device=cpu"]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by name; None for what is no file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """extractor/, detector/ and photographs in shots/."""
    root = tmp_path_factory.mktemp("saved")
    backbone = load_backbone("lite0", image_size=SIDE)
    ADExtractor(backbone, None).save_pretrained(root / "extractor")
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    options = PatchCoreConfig(EmbeddingConfig(target_dim=8), amount=0.2)
    PatchCore(backbone, options).fit([images]).save_pretrained(root / "detector")
    (root / "shots").mkdir()
    for number in range(3):
        drawn("RGB", 50, 40, number).save(root / "shots" / f"{number}.png")
    return root


@pytest.fixture
def here(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, in which the commands run; no Hub answers, and no token is set."""
    shutil.copytree(saved, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "here"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a command ends with."""
    assert main(list(arguments)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    last = told.err.splitlines()[-1]
    assert last.startswith("adpretrain")
    assert "Traceback" not in told.err
    assert told.err.isprintable() or told.err.replace("\n", "").isprintable()
    return last


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


CARDS: dict[str, Callable[[Path], object]] = {
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link": lambda path: path.symlink_to(path.parents[1] / "mine.md"),
    "endless": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("model", ["extractor", "detector"])
@pytest.mark.parametrize("card", CARDS)
def test_push_reads_no_card_that_is_none(here: Path, model: str, card: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(here / model / "README.md", here / "mine.md")
    replace(here / model / "README.md", CARDS[card])
    before = contents(here)
    said = refused(capsys, "push", model, "--repo-id=o/n", "--dry-run")
    assert f"{model}/README.md" in said or "holds files that are not" in said or card == "folder"
    assert contents(here) == before  # not even the file that a link points to


def test_push_finds_mistakes_before_it_asks_the_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for repo_id in ("../../etc", "o/../n", "/o/n", "o", "o/n/m", "o/n.git", "", "o/n\n", "o/" + "n" * 95, "o/n--m"):
        assert "is not valid" in refused(capsys, "push", "extractor", f"--repo-id={repo_id}", "--dry-run")
    assert "is not a folder" in refused(capsys, "push", "nowhere", "--repo-id=o/n")
    for model in ("extractor", "detector"):
        content = json.loads((here / model / "config.json").read_text())
        assert "no token is set" in refused(capsys, "push", model, "--repo-id=o/" + "n" * 94)
        (here / model / "README.md").unlink()  # is made anew
        assert "no token is set" in refused(capsys, "push", model, "--repo-id=o/n")
        (here / model / "config.json").write_text(json.dumps({**content, "surplus": 1}))
        assert "surplus" in refused(capsys, "push", model, "--repo-id=o/n", "--dry-run")
        (here / model / "config.json").write_text(json.dumps(content))
        (here / model / "a\x1b[31m.pth").write_bytes(b"\x80\x04.")
        assert r"a\x1b[31m" in refused(capsys, "push", model, "--repo-id=o/n", "--dry-run")


def test_extract_replaces_nothing_but_features(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "product.json").write_text('{"mine": 1}')
    (here / "listed").mkdir()
    (here / "listed" / "index.json").write_text("[]")
    (here / "odd" / "features-1.safetensors").mkdir(parents=True)
    before = contents(here)
    for out in ("product.safetensors", "extractor/config.safetensors", "extractor/model.safetensors", "listed", "odd"):
        assert out.split("/")[0].split(".")[0] in refused(capsys, "extract", *RAW, "--images=shots", f"--out={out}")
        assert contents(here) == before
    for out in ("new", "new.safetensors"):
        for _ in range(2):  # over its own
            assert main(["extract", *RAW, "--images=shots", f"--out={out}"]) == 0


def test_names_are_shown_and_not_obeyed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("-rf.png", "a\nb.png", "\x1b]0;owned\x07.png", "\u202egnp.png", "x" * 240 + ".png"):
        shutil.copy(here / "shots/0.png", here / "shots" / name)
    shutil.copy(here / "shots/0.png", os.fsencode(here / "shots") + b"/\xff.png")
    (here / "shots" / "torn\n\x1b[2J.png").write_bytes(b"torn")
    assert main(["extract", *RAW, "--images=shots", "--out=-features"]) == 3
    told = capsys.readouterr()
    assert r"unreadable: torn\n\x1b[2J.png" in told.out
    assert told.out.replace("\n", "").isprintable()
    assert len(json.loads((here / "-features/index.json").read_text())["images"]) == 9
    export = ["export", "--normal=shots", "--out=a.onnx", "--device=cpu"]
    assert "is not a folder" in refused(capsys, *export, "--extractor=../../etc/passwd")
    assert "expected a folder written by" in refused(capsys, *export, "--extractor=detector")
    assert "cannot be used here" in refused(capsys, "extract", *RAW, "--device=meta", "--images=shots", "--out=b")


def test_a_link_to_an_output_folder_stays_one(here: Path) -> None:
    (here / "disk").mkdir()
    (here / "out").symlink_to(here / "disk")
    assert main(["extract", *RAW, "--images=shots", "--out=out"]) == 0
    assert (here / "out").is_symlink()
    assert (here / "disk/index.json").is_file()


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file of this process may exceed 4 KiB: as on a full disk, writing fails half-way."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would leave torn .pyc files
    usual, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    "arguments",
    [
        ["extract", *RAW, "--images=shots", "--out=made"],
        ["extract", *RAW, "--images=shots", "--out=made.safetensors"],
        ["fit", "--detector=padim", *RAW, "--normal=shots", "--out=made"],
        ["score", "--extractor=extractor", "--normal=shots", "--images=shots", "--out=made", "--device=cpu"],
    ],
)
def test_a_full_disk_is_told_with_the_name_that_was_asked_for(
    here: Path, arguments: list[str], small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    said = refused(capsys, *arguments)
    assert "File too large: 'made" in said
    assert ".tmp" not in said
    left = contents(here).keys() - before.keys()
    assert not [name for name in left if ".tmp" in name or name.endswith(("index.json", "safetensors", "summary.json"))]


def test_an_export_looks_at_its_place_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    before = contents(here)
    for out, words in (
        ("shots/0.png", "does not end in .onnx"),
        ("shots", "is a folder"),
        ("/proc/a.onnx", "'/proc/a.onnx'"),
        ("y" * 250 + ".onnx", f"too long: '{'y' * 250}.onnx'"),
    ):
        assert words in refused(capsys, "export", "--extractor=extractor", "--normal=shots", f"--out={out}")
    assert contents(here) == before


def test_a_photograph_compared_with_itself_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn("RGB", 50, 40, 9).save(here / "new.png")
    where = ["score", "--extractor=extractor", "--normal=shots", "--device=cpu"]
    main([*where, "--images=shots", "--out=a"])
    assert "3 of 3 images are copies of normal photographs" in capsys.readouterr().out
    main([*where, "--images=new.png", "--out=b"])
    assert "copies of normal photographs" not in capsys.readouterr().out
