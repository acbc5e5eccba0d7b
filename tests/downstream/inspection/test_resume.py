"""`adpretrain score --resume`: a run that was interrupted goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import output, start, wait

from adpretrain.files import sweep
from downstream.cli import main
from downstream.inspection import Options
from downstream.inspection.resume import PART
from downstream.inspection.run import score_folder
from downstream.visualise import ColourScale, overlay, panel, photo_and_heatmap

Write = Callable[..., Path]
Scene = tuple[Path, Path, Path]
TIMES = re.compile(r'"seconds": [\d.]+|on \d{4}-\d\d-\d\d \d\d:\d\d')


def score(scene: Scene, out: Path, *more: str) -> int:
    folders = [str(part) for pair in zip(("--extractor", "--normal", "--images"), scene, strict=True) for part in pair]
    return main(["score", *folders, "--out", str(out), "--device", "cpu", "--batch-size", "3", *more])


def content(out: Path) -> dict[str, bytes]:
    """Every file below ``out``, without the times that a run took and was made at."""
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name in ("summary.json", "report.html"):
        files[name] = TIMES.sub("", files[name].decode()).encode()
    return files


def lines(out: Path) -> int:
    return (out / PART).read_bytes().count(b"\n") if (out / PART).is_file() else 0


def interrupt(scene: Scene, out: Path, after: int, options: Options) -> None:
    """A run that Ctrl-C ends when ``after`` images are scored, as the progress display sees them."""

    def press(what: str, done: int, total: int) -> None:
        if what == "scoring" and done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_folder(*scene, out, options=options, device="cpu", progress=press)


@pytest.fixture
def scene(write_tiles: Write, extractor_dir: Path) -> Scene:
    """Extractor, 4 references, and 10 images of which one has a disc and one cannot be read."""
    normal = write_tiles("shots", range(4))
    write_tiles("line", range(10, 18))
    images = write_tiles("line", range(20, 21), blob=True, prefix="disc")
    (images / "tile_13b.png").write_bytes(b"no picture")
    return extractor_dir, normal, images


@pytest.mark.parametrize("references", [4, 1])  # with one, a sample of the images fixes the colours
def test_an_interrupted_run_ends_with_the_bytes_of_a_whole_one(scene: Scene, tmp_path: Path, references: int) -> None:
    for extra in sorted(scene[1].iterdir())[references:]:
        extra.unlink()
    score(scene, tmp_path / "whole")
    out = tmp_path / "out"
    interrupt(scene, out, 6, Options(batch_size=3))
    with (out / PART).open("ab") as record:
        record.write(b'{"images": [["til')  # the line that a killed process tears
    (out / "heatmaps" / ".disc_20.77.tmp.png").write_bytes(b"half")
    assert not (out / "summary.json").exists()
    scored = {path: path.stat().st_mtime_ns for path in (out / "heatmaps").glob("[!.]*")}
    assert len(scored) == 5  # two batches of three, one image unreadable
    score(scene, out, "--resume")
    assert {path: path.stat().st_mtime_ns for path in scored} == scored  # none was scored again
    assert content(out) == content(tmp_path / "whole")


def test_resuming_nothing_or_a_whole_run_is_a_run(scene: Scene, tmp_path: Path) -> None:
    for _ in range(2):
        assert score(scene, tmp_path / "out", "--resume") == 1
    score(scene, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_without_resume_a_run_starts_anew(scene: Scene, tmp_path: Path) -> None:
    interrupt(scene, tmp_path / "out", 6, Options(batch_size=3))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "heatmaps").iterdir()}
    score(scene, tmp_path / "out")
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


def test_a_run_after_an_interrupted_one_leaves_none_of_its_heatmaps(scene: Scene, tmp_path: Path) -> None:
    """Those of other images would stay for ever, in the colours of another run."""
    interrupt(scene, tmp_path / "out", 6, Options(batch_size=3))
    for image in sorted(scene[2].iterdir())[:3]:
        image.unlink()
    score(scene, tmp_path / "out")
    score(scene, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_changed_since_is_scored_again(scene: Scene, tmp_path: Path, write_tiles: Write) -> None:
    out, images = tmp_path / "out", scene[2]
    interrupt(scene, out, 9, Options(batch_size=3))
    names = sorted(path.name for path in images.iterdir())
    Image.new("RGB", (96, 96)).save(images / names[0])  # in the first batch; the second loses a heatmap
    (out / "heatmaps" / f"{Path(names[4]).stem}.png").unlink()
    write_tiles("line", range(90, 93), prefix="zz")
    score(scene, out, "--resume")
    score(scene, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_run_of_other_images_is_told_of(scene: Scene, tmp_path: Path, write_tiles: Write) -> None:
    interrupt(scene, tmp_path / "out", 6, Options(batch_size=3))
    others = write_tiles("others", range(30, 32))
    with pytest.warns(UserWarning, match="has scored none of these 2 images as they are now: all are scored anew"):
        score((*scene[:2], others), tmp_path / "out", "--resume")
    interrupt(scene, tmp_path / "again", 6, Options(batch_size=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        score(scene, tmp_path / "again", "--resume")


@pytest.mark.parametrize(
    ("change", "more", "named"),
    [
        ("", ["--threshold", "3"], r"threshold \(None, now 3.0\)"),
        ("", ["--shots", "2", "--seed", "1"], r"shots \(16, now 2\), seed \(0, now 1\)"),
        ("shots/tile_0.png", [], "normal photographs"),
        ("", ["--calibration", "line"], "calibration photographs"),
        ("extractor", [], "extractor"),
    ],
)
def test_other_settings_are_refused_by_name(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, more: list[str], named: str
) -> None:
    interrupt(scene, tmp_path / "out", 6, Options(batch_size=3))
    if change == "extractor":
        scene = (other_extractor(tmp_path), *scene[1:])
    elif change:
        with Image.open(tmp_path / change) as photo:
            other = photo.transpose(Image.Transpose.ROTATE_180)
        other.save(tmp_path / change)
    more = [str(tmp_path / word) if word == "line" else word for word in more]
    assert score(scene, tmp_path / "out", "--resume", *more) == 2
    message = capsys.readouterr().err
    assert re.search(rf"other settings: {named}\. Give those", message)
    assert message.count("\n") == 1
    assert score(scene, tmp_path / "out", *more) != 2


def other_extractor(folder: Path) -> Path:
    from adpretrain.backbones import load_backbone
    from adpretrain.extractor import ADExtractor

    backbone = load_backbone("lite0", image_size=64)
    return ADExtractor(backbone, matching="cosine").save_pretrained(folder / "other")


def test_another_sample_cannot_fix_the_colours(
    scene: Scene, tmp_path: Path, write_tiles: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in sorted(scene[1].iterdir())[1:]:
        extra.unlink()
    interrupt(scene, tmp_path / "out", 6, Options(batch_size=3))
    write_tiles("line", range(90, 93), prefix="zz")
    assert score(scene, tmp_path / "out", "--resume") == 2
    assert "the images that fixed the colours" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"[]\n", b'{"images": 3}\n', b"\xff\n", b"[" * 100_000 + b"\n", b'{"settings": 1}\n'])
def test_a_damaged_record_is_named(
    scene: Scene, tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    interrupt(scene, out, 6, Options(batch_size=3))
    lines = (out / PART).read_bytes().splitlines(keepends=True)
    for broken in ([line, *lines], [lines[0], line, *lines[1:]]):
        (out / PART).write_bytes(b"".join(broken))
        assert score(scene, out, "--resume") == 2
        message = capsys.readouterr().err
        assert PART in message
        assert "leave out --resume" in message
        assert message.count("\n") == 1


def test_the_pictures_of_a_panel_are_found_again() -> None:
    values = np.random.default_rng(0)
    for size in ((384, 384), (384, 16), (31, 384)):
        photo = Image.fromarray(values.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        map_SS, scale = values.random((20, 20)), ColourScale(0.1, 0.5, 0.9)
        found = photo_and_heatmap(panel(photo, map_SS, scale, title="name"))
        for ours, theirs in zip(found, (photo, overlay(photo, map_SS, scale)), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_only_leftovers_are_swept(tmp_path: Path) -> None:
    ours = [".a.b.12.tmp.png", ".scores.csv.7.tmp.check", ".x.1.tmp"]
    others = ["a.12.tmp.png", ".a.tmp.png", ".a.b12.tmp.png", ".tmp", "a.png", ".a.12.tmp.b.c"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    sweep(tmp_path / "nowhere")


def started(scene: Scene, out: Path) -> subprocess.Popen[str]:
    folders = ["--extractor", scene[0], "--normal", scene[1], "--images", scene[2], "--out", out]
    command = [sys.executable, "-m", "downstream.cli", "score", *map(str, folders), "--device=cpu", "--batch-size=4"]
    return subprocess.Popen(
        [*command, "--resume"],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that: `make test &`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of memory that the process holds."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def score_in_process(rank: int, scene: Scene, out: Path) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job, `make test &`, ignores it
    return score(scene, out, "--resume")


def test_a_process_that_is_stopped_then_killed_loses_nothing(scene: Scene, tmp_path: Path) -> None:
    """Ctrl-C, then SIGKILL, to a process as a user has it; the last of three ends with the bytes of a whole run."""
    log, out = tmp_path / "log", tmp_path / "out"
    score(scene, tmp_path / "whole")
    for number, how, code in ((2, signal.SIGINT, 130), (3, signal.SIGKILL, -signal.SIGKILL)):
        (process,) = start(1, log, score_in_process, scene, out)
        while process.is_alive() and lines(out) < number:
            time.sleep(1e-3)
        os.kill(process.pid or 0, how)
        wait([process], log, expected=code)
        assert ("with --resume goes on" in output(log)) == (how is signal.SIGINT)
    score(scene, out, "--resume")
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the memory from")
def test_memory_stays_and_nothing_is_lost(scene: Scene, tmp_path: Path, write_tiles: Write) -> None:
    """100 images: the memory held after 36 of them is that after 80, within 0.25 MB an image (a picture that was kept
    would be 0.44 MB). A run that is stopped with Ctrl-C, then killed, ends with the same bytes."""
    write_tiles("line", range(100, 190))
    whole, held = started(scene, tmp_path / "whole"), dict[int, int]()
    while whole.poll() is None:
        if images := 4 * (lines(tmp_path / "whole") - 1):
            with contextlib.suppress(OSError, IndexError):  # the process has ended
                held[images] = resident(whole)
        time.sleep(0.01)
    assert whole.wait() == 1
    early, late = (min(held[n] for n in held if low <= n < low + 20) for low in (36, 80))
    assert late - early < 0.25e6 * 44, held

    out = tmp_path / "out"
    for number, how in ((5, signal.SIGINT), (14, signal.SIGKILL)):
        process = started(scene, out)
        while process.poll() is None and lines(out) <= number:
            time.sleep(0.002)
        os.kill(process.pid, how)
        message = process.communicate(timeout=300)[1]
        assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
        assert ("with --resume goes on" in message) == (how is signal.SIGINT)
    before = {path: path.stat().st_mtime_ns for path in (out / "heatmaps").iterdir()}
    assert len(before) > 50
    assert started(scene, out).wait(timeout=300) == 1
    again = sum(not path.exists() or path.stat().st_mtime_ns != changed for path, changed in before.items())
    assert again <= 5  # at most the batch that was under way, and a heatmap half written
    assert content(out) == content(tmp_path / "whole")
