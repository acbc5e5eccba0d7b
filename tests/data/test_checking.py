"""Every kind of broken sample is found, in order, whatever the number of threads; sound ones give nothing."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import mask, photograph
from PIL import Image

from adpretrain.data import MissingMasks, Sample, index_dataset
from adpretrain.data.checking import Problem, check_sample, check_samples


@pytest.fixture
def defect(tmp_path: Path) -> Sample:
    image, truth = photograph(tmp_path / "bad.png"), mask(tmp_path / "bad_mask.png")
    return Sample(image, truth, "cap", "dent", None, "test")


def reasons(sample: Sample) -> list[str]:
    return [problem.reason for problem in check_sample(sample)]


def test_sound_samples_give_nothing(loco: Path, visa: Path, mvtec_3d: Path, btad: Path, mpdd: Path) -> None:
    for root in (loco, visa, mvtec_3d, btad, mpdd):
        assert check_samples(index_dataset("auto", root)) == []


def test_every_contradiction_is_found(defect: Sample, tmp_path: Path) -> None:
    image, truth = defect.image, defect.mask
    blank = mask(tmp_path / "blank.png", value=0)
    other = tmp_path / "other.png"
    Image.new("L", (8, 12), 1).save(other)
    cut = tmp_path / "cut.png"
    cut.write_bytes(image.read_bytes()[:100])
    assert reasons(replace(defect, mask=None)) == [f"{image} is a defect without a mask"]
    assert reasons(replace(defect, mask=blank)) == [
        f"{image} is a defect of kind 'dent' but nothing is marked in {blank}"
    ]
    assert reasons(replace(defect, mask=(blank, truth))) == []  # the union counts
    assert reasons(replace(defect, defect="good")) == [f"{image} is normal but pixels are marked in {truth}"]
    assert reasons(replace(defect, defect="good", mask=blank)) == []
    assert reasons(replace(defect, mask=(truth, other))) == [
        f"mask {other} is 8x12 but its image {image} is 12x8 pixels; they must be of one size"
    ]
    (unreadable,) = reasons(replace(defect, image=cut))
    assert unreadable.startswith(f"cannot read image {cut}")
    first, second = reasons(replace(defect, image=tmp_path / "gone.png", mask=cut))
    assert (first, second[: len(f"cannot read image {cut}")]) == (
        f"image not found: {tmp_path / 'gone.png'}",
        f"cannot read image {cut}",
    )


def test_doubtful_masks_are_told_if_nothing_is_wrong(defect: Sample, tmp_path: Path) -> None:
    inverted = mask(tmp_path / "inverted.png", (0, 0, 12, 7))
    lossy = tmp_path / "lossy.jpg"
    Image.open(defect.mask).save(lossy)
    problems = check_sample(replace(defect, mask=(inverted, lossy)))
    assert all(problem.doubtful for problem in problems)
    assert [problem.reason for problem in problems] == [
        f"mask {inverted} marks 88% of the pixels as defective: is it inverted?",
        f"mask {lossy} is in a lossy format: pixels brighter than half of white count as marked",
    ]
    (contradiction,) = check_sample(replace(defect, defect="good", mask=inverted))
    assert not contradiction.doubtful


def test_a_missing_mask_is_told_as_the_layout_tells_it(mvtec_3d: Path) -> None:
    (mvtec_3d / "bagel/test/crack/gt/001.png").unlink()
    with pytest.raises(MissingMasks) as caught:
        index_dataset("auto", mvtec_3d)
    problems = check_samples(caught.value.samples, missing=caught.value.missing)
    assert [problem.reason for problem in problems] == list(caught.value.missing.values())
    assert "expected" in problems[0].reason


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_is_the_samples_and_progress_is_told(tmp_path: Path, workers: int) -> None:
    samples = [Sample(tmp_path / f"{i}.png", None, "cap", "good", None, "train") for i in range(20)]
    told: list[tuple[str, int, int]] = []
    problems = check_samples(samples, workers, lambda *step: told.append(step))
    assert [problem.image for problem in problems] == [sample.image for sample in samples]
    assert told == [("checking images", i, 20) for i in range(1, 21)]
    with pytest.raises(ValueError, match="workers 0; expected at least 1"):
        check_samples(samples, 0)


def test_an_interrupt_stops_the_images_that_wait(tmp_path: Path) -> None:
    photographs = [photograph(tmp_path / f"{i}.png", i) for i in range(2)]
    samples = [Sample(photographs[i % 2], None, "cap", "good", None, "train") for i in range(2000)]

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        check_samples(samples, 2, interrupt)
    assert threading.active_count() == before


def test_an_image_in_two_splits_is_told_once(defect: Sample) -> None:
    twice = [defect, replace(defect, split="train"), defect]
    assert check_samples(twice) == [Problem(defect.image, f"{defect.image} is in several splits: test and train")]
