"""Images that cannot be trained on: all are found before training, and listed or left out."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from adpretrain.config import DataConfig
from adpretrain.data import index_dataset


@pytest.fixture
def damaged(tiny_set: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A set with three bad images: one cut off, one empty, one a defect in whose mask nothing is marked."""
    root = shutil.copytree(tiny_set, tmp_path / "set")
    samples = index_dataset("realiad", root)
    good = [sample.image for sample in samples if not sample.anomalous][:2]
    good[0].write_bytes(good[0].read_bytes()[:200])
    good[1].write_bytes(b"")
    defect = next(sample for sample in samples if sample.anomalous)
    blank = defect.mask_files[0]
    with Image.open(blank) as mask:
        Image.new("L", mask.size).save(blank)
    return root, [*good, defect.image]


def check(root: Path, run: Path, on_error: str) -> tuple[list[Path], str]:
    """The images that are left and what was said."""
    from adpretrain.training.sources import checked_samples

    said = io.StringIO()
    config = DataConfig("realiad", str(root), on_error=on_error)  # type: ignore[arg-type]
    return [s.image for s in checked_samples(config, run, Console(file=said, width=300), main=True)], said.getvalue()


def test_fail_stops_with_the_whole_list(damaged: tuple[Path, list[Path]], tmp_path: Path) -> None:
    root, bad = damaged
    with pytest.raises(ValueError, match=r"3 of \d+ images cannot be trained on") as caught:
        check(root, tmp_path / "run", "fail")
    assert all(str(image) in str(caught.value) for image in bad)
    assert "--data.on_error skip" in str(caught.value)


def test_skip_leaves_them_out_and_lists_each_once(damaged: tuple[Path, list[Path]], tmp_path: Path) -> None:
    root, bad = damaged
    images, said = check(root, tmp_path / "run", "skip")
    assert set(images) == {sample.image for sample in index_dataset("realiad", root)} - set(bad)
    assert "checking images" in said
    assert [sum(image.name in line for line in said.splitlines()) for image in bad] == [1, 1, 1]


def test_a_check_is_remembered_until_a_file_changes(damaged: tuple[Path, list[Path]], tmp_path: Path) -> None:
    root, bad = damaged
    first, _ = check(root, tmp_path / "run", "skip")
    again, said = check(root, tmp_path / "run", "skip")
    assert again == first
    assert "checking images" not in said
    assert f"3 of 60 images are left out, as before; {tmp_path / 'run' / 'checked.json'} lists them" in said
    assert not any(image.name in said for image in bad)
    moved = root.rename(tmp_path / "moved")
    assert "checking images" not in check(moved, tmp_path / "run", "skip")[1]
    shutil.copy(moved / first[0].relative_to(root), moved / bad[0].relative_to(root))
    mended, said = check(moved, tmp_path / "run", "skip")
    assert len(mended) == len(first) + 1
    assert "the images have changed" in said
    touched = moved / first[0].relative_to(root)
    os.utime(touched, (1, 1))
    assert "checking images" in check(moved, tmp_path / "run", "skip")[1]


def test_the_recipe_trains_on_without_them_and_stops_with_them(
    damaged: tuple[Path, list[Path]],
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import pretrain

    root, bad = damaged
    quick = ["--data.root", str(root), "--backbone.image_size", "64", "--optim.steps", "1", "--eval.keep", "last"]
    flags = arguments(tmp_path / "run", *quick, "--data.held_out", "[]", "--local_scale", "null")
    assert pretrain.main(flags) == 2
    said = capfd.readouterr().err
    assert all(str(image) in said for image in bad)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert pretrain.main([*flags, "--data.on_error", "skip"]) == 0
    said = capfd.readouterr().err
    assert "3 of 60 images are left out" in said
    assert (tmp_path / "run" / "extractor" / "model.safetensors").exists()
