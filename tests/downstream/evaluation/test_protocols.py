"""What each protocol fits and scores, on lists of samples; no image is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adpretrain.data import Sample
from adpretrain.references import random_references
from downstream.evaluation.perturbations import Change
from downstream.evaluation.protocols import PROTOCOLS, Part, ProtocolOptions, Trial, split, trials


def product(name: str, train: int = 20, good: int = 5, bad: int = 8, view: str | None = None) -> list[Sample]:
    def sample(split: str, kind: str, index: int) -> Sample:
        image = Path(f"{name}-{view}-{split}-{kind}-{index:03}.png")
        return Sample(image, image if kind != "good" else None, name, kind, view, split)

    return [
        *(sample("train", "good", index) for index in range(train)),
        *(sample("test", "good", index) for index in range(good)),
        *(sample("test", "dent", index) for index in range(bad)),
    ]


def only(found: list[Trial]) -> Part:
    assert len(found) == 1
    assert len(found[0].parts) == 1
    return found[0].parts[0]


def names(samples: tuple[Sample, ...]) -> set[str]:
    return {sample.image.name for sample in samples}


def test_full_fits_on_all_normal_training_images_and_scores_the_test_split() -> None:
    samples = product("cap")
    part = only(trials(samples, ProtocolOptions()))
    assert part.train == tuple(samples[:20])
    assert part.test == tuple(samples[20:])
    assert len(part.references) == 8
    assert names(part.references) <= names(part.train)


def test_a_seed_and_all_images() -> None:
    """Draw d of seed s takes the images of seed s + d, whatever the protocol; all images are drawn once."""
    samples = product("cap")
    first, second, everything = trials(samples, ProtocolOptions("few-shot", shots=(3, 0), draws=2, seed=5))
    for trial, seed in ((first, 5), (second, 6)):
        chosen = tuple(samples[index] for index in random_references(20, 3, seed))
        assert trial.parts[0].train == trial.parts[0].references == chosen
    assert (everything.setting, everything.draw) == ("K=all", 0)
    assert everything.parts[0].train == everything.parts[0].references == tuple(samples[:20])
    assert everything.parts[0].test == first.parts[0].test == tuple(samples[20:])
    later = only(trials(samples, ProtocolOptions(seed=1)))
    assert later.references == trials(samples, ProtocolOptions(draws=2))[1].parts[0].references
    apart = [replace(sample, split="train") for sample in samples]
    (held,) = trials(apart, ProtocolOptions("few-shot", shots=(0,)))
    assert [part.train for part in held.parts] == [tuple(split(apart)[0])]


def test_without_a_test_split_every_fifth_normal_image_is_held_out() -> None:
    samples = [replace(sample, split="train") for sample in product("cap", train=10, good=0, bad=3)]
    train, test = split(samples)
    assert train == [samples[index] for index in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert test == [samples[index] for index in (4, 9, 10, 11, 12)]


def test_a_set_without_a_test_split_is_told_of() -> None:
    samples = product("cap")
    assert only(trials(samples, ProtocolOptions())).notes == ()
    apart = [replace(sample, split="train") for sample in samples]
    (note,) = only(trials(apart, ProtocolOptions())).notes
    assert note.startswith("no test split: every 5th normal image is held out")


@pytest.mark.parametrize("protocol", ["full", "few-shot", "contamination", "shifted-line"])
def test_unmarked_views_of_defective_parts_are_scored_and_never_learnt_from(protocol: str) -> None:
    samples = [replace(sample, split="train") for sample in product("cap", train=10, good=0, bad=4)]
    unmarked = [replace(sample, mask=None, defect="good", of_defective_part=True) for sample in samples[-2:]]
    part = only(trials([*samples[:-2], *unmarked], ProtocolOptions(protocol, shots=(4,))))
    assert not names(tuple(unmarked)) & names((*part.train, *part.references))
    assert names(tuple(unmarked)) <= names(part.test)


def test_few_shot_never_scores_what_it_learnt_from_even_where_all_images_are_of_the_test_split() -> None:
    samples = [replace(sample, split="test") for sample in product("cap")]
    part = only(trials(samples, ProtocolOptions("few-shot", shots=(4,))))
    assert not names(part.train) & names(part.test)
    assert len(part.test) == len(samples) - 4
    assert part.notes == (
        "all normal images are in the test split: those used for fitting come from it and are not scored",
    )
    assert not only(trials(product("cap"), ProtocolOptions("few-shot", shots=(4,)))).notes


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "shifted-line"])  # it makes its own splits
def test_an_image_of_two_splits_is_scored_and_never_learnt_from(protocol: str) -> None:
    samples = product("cap")
    twice = [replace(sample, split="train") for sample in samples[20:24]]  # normal test images, listed once more
    options = ProtocolOptions(protocol, shots=(8,), draws=4, references=16)  # type: ignore[arg-type]
    for trial in trials([*twice, *samples], options):
        (part,) = trial.parts
        assert not names((*part.train, *part.references)) & names(tuple(twice))
        assert names(tuple(twice)) <= names(part.test)


def test_few_shot_draws_the_references_of_the_few_shot_table() -> None:
    samples = product("cap")
    found = trials(samples, ProtocolOptions("few-shot", shots=(1, 4), draws=2))
    assert [(trial.setting, trial.draw) for trial in found] == [("K=1", 0), ("K=1", 1), ("K=4", 0), ("K=4", 1)]
    for trial, shots in zip(found, (1, 1, 4, 4), strict=True):
        part = trial.parts[0]
        assert part.train == tuple(samples[index] for index in random_references(20, shots, seed=trial.draw))
        assert part.references == part.train
        assert part.test == tuple(samples[20:])


def test_sample_efficiency_takes_a_share_and_references_from_it() -> None:
    part = only(trials(product("cap", train=60), ProtocolOptions("sample-efficiency")))
    assert len(part.train) == 6
    assert len(part.references) == 6
    assert part.notes == ()
    assert part.reference_notes == ("6 references instead of 8: there are no more training images",)
    assert names(part.references) <= names(part.train)


@pytest.mark.parametrize("overlap", [True, False])
def test_contamination_moves_test_anomalies_into_training(overlap: bool) -> None:
    samples = product("cap", train=30)
    part = only(trials(samples, ProtocolOptions("contamination", noise=0.1, overlap=overlap)))
    moved = {sample.image.name for sample in part.train if sample.anomalous}
    assert len(moved) == 3
    assert len(part.train) == 33
    assert moved <= names(tuple(samples[30:]))
    assert (moved <= names(part.test)) == overlap
    assert len(part.test) == (13 if overlap else 10)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_contaminated_training_list_is_learnt_from_where_asked_for_only(protocol: str) -> None:
    """As in Real-IAD: marked defects and unmarked views of defective parts among the training images."""
    samples = product("cap", train=20)
    marked = [replace(sample, image=Path(f"noise-{n}.png")) for n, sample in enumerate(samples[-3:])]
    views = [
        replace(sample, image=Path(f"view-{n}.png"), defect="good", mask=None) for n, sample in enumerate(marked[:2])
    ]
    views = [replace(sample, of_defective_part=True) for sample in views]
    noise = [replace(sample, split="train", noise=True) for sample in (*marked, *views)]
    shots = () if protocol == "contamination" else (4,)
    options = ProtocolOptions(protocol, shots=shots, references=25, noise=0.5)  # type: ignore[arg-type]
    told = "5 of the 25 listed training images are of defective parts, 3 with a marked defect: "
    for trial in trials([*noise, *samples], options):
        (part,) = trial.parts
        if protocol != "shifted-line":
            assert names(part.test) == names(tuple(samples[20:]))
        if protocol == "contamination":
            assert trial.setting == "noise as listed, in the references too"
            assert names(part.train) == names((*noise, *samples[:20]))
            assert part.notes == (told + "fitted on as if they were normal",)
            assert part.reference_notes == ("3 references are anomalies, drawn with the contaminated training images",)
        else:
            assert not {*names(part.test)} & {*names(tuple(noise))}
            assert not any(sample.noise for sample in (*part.train, *part.references))
            if protocol != "shifted-line":
                assert told + "left out (--protocol contamination fits on them)" in part.notes


def test_references_that_are_anomalies_are_told_of() -> None:
    """All 45 training images are references, 15 of them anomalies."""
    samples = product("cap", train=30, bad=40)
    options = ProtocolOptions("contamination", noise=0.5, references=45)
    assert only(trials(samples, options)).reference_notes == (
        "15 references are anomalies, drawn with the contaminated training images",
    )


def test_contamination_takes_at_most_half_of_the_anomalies_and_says_so() -> None:
    part = only(trials(product("cap", train=100, bad=4), ProtocolOptions("contamination", noise=0.5)))
    assert sum(sample.anomalous for sample in part.train) == 2
    assert part.notes == ("2 anomalies instead of 50: half of the product's",)


def test_reference_sensitivity_changes_nothing_but_the_references() -> None:
    found = trials(product("cap"), ProtocolOptions("reference-sensitivity"))
    assert [trial.draw for trial in found] == [0, 1, 2]
    parts = [trial.parts[0] for trial in found]
    assert len({part.train for part in parts}) == len({part.test for part in parts}) == 1
    assert len({part.references for part in parts}) == 3
    assert all(trial.only_references for trial in found)


SETTINGS = ["light", "rotation", "shift", "blur", "noise", "jpeg", "light + rotation + shift + blur", "as photographed"]


def test_robustness_scores_the_same_images_under_each_change_and_as_they_are() -> None:
    found = trials(product("cap"), ProtocolOptions("robustness", draws=2))
    assert [(trial.setting, trial.draw) for trial in found] == [(name, draw) for draw in (0, 1) for name in SETTINGS]
    for trial in found:
        (part,), (full,) = trial.parts, trials(product("cap"), ProtocolOptions(seed=trial.draw))
        if trial.setting == "as photographed":
            assert part.perturbed is None
            assert part == full.parts[0]
        else:
            assert part.perturbed == Change(trial.draw, tuple(trial.setting.split(" + ")))
            assert part.notes == (part.perturbed.said,)
            assert replace(part, perturbed=None, notes=()) == full.parts[0]


def test_robustness_with_shots_takes_the_images_of_few_shot() -> None:
    """K is in every setting, so that another K adds cells and changes none; all images are drawn once."""
    samples = product("cap")
    found = trials(samples, ProtocolOptions("robustness", shots=(4, 0), draws=2))
    few = trials(samples, ProtocolOptions("few-shot", shots=(4, 0), draws=2))
    assert [(trial.setting, trial.draw) for trial in found] == [
        (f"K={count}, {name}", draw) for count, draw in ((4, 0), (4, 1), ("all", 0)) for name in SETTINGS
    ]
    for number, trial in enumerate(found):
        assert replace(trial.parts[0], perturbed=None, notes=()) == few[number // len(SETTINGS)].parts[0]
    alone = trials(samples, ProtocolOptions("robustness", shots=(4,), draws=2))
    assert alone == found[: len(alone)]


def test_a_shifted_line_learns_from_the_first_half_and_scores_the_second() -> None:
    """Names order all normal photographs, whatever their split, and 9 comes before 10."""
    samples = product("cap", train=8, good=5, bad=3)
    times = [3, 12, 0, 7, 5, 9, 2, 11, 10, 1, 8, 4, 6]  # of the normal photographs, in the order of the listing
    samples = [
        *(replace(sample, image=Path("some", f"{at}.png")) for sample, at in zip(samples[:13], times, strict=True)),
        *samples[13:],
    ]
    (trial,) = trials(samples, ProtocolOptions("shifted-line"))
    (part,) = trial.parts
    assert trial.setting == "shifted-line"
    assert [sample.image.name for sample in part.train] == [f"{at}.png" for at in range(6)]
    assert {sample.image for sample in part.test if sample.anomalous} == {sample.image for sample in samples[13:]}
    assert names(part.test) == {f"{at}.png" for at in range(6, 13)} | names(tuple(samples[13:]))
    assert names(part.references) <= names(part.train)
    assert part.notes[0].startswith("names stand for time: ")
    assert part.notes[0].endswith("if names carry no order, these numbers mean nothing")
    for draw, few in enumerate(trials(samples, ProtocolOptions("shifted-line", shots=(2,), draws=3))):
        assert (few.setting, few.draw) == ("K=2, shifted-line", draw)
        chosen = tuple(part.train[index] for index in random_references(6, 2, draw))
        assert few.parts[0].train == few.parts[0].references == chosen
        assert few.parts[0].test == part.test
        assert few.parts[0].notes == part.notes
    with pytest.raises(ValueError, match=r"too few normal images for K = 7 references: cap \(6\)"):
        trials(samples, ProtocolOptions("shifted-line", shots=(7,)))
    with pytest.raises(ValueError, match="cap: 1 normal images cannot be halved: a shifted line needs at least 2"):
        trials(product("cap", train=1, good=0), ProtocolOptions("shifted-line"))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("noise", "bad"), [(0.01, 1), (0.25, 2), (0.5, 4)])
def test_few_references_are_contaminated_by_a_share_and_at_least_one(noise: float, bad: int, overlap: bool) -> None:
    """The other references are some of the K of few-shot."""
    samples = product("cap", train=30)
    options = ProtocolOptions("contamination", shots=(8,), noise=noise, overlap=overlap, draws=2)
    few = trials(samples, ProtocolOptions("few-shot", shots=(8,), draws=2))
    for trial, clean in zip(trials(samples, options), few, strict=True):
        (part,), (pure,) = trial.parts, clean.parts
        wrong = tuple(sample for sample in part.train if sample.anomalous)
        assert trial.setting == f"K=8, noise {noise:g}, in the references too, {'' if overlap else 'no '}overlap"
        assert part.train == part.references
        assert (len(part.train), len(wrong)) == (8, bad)
        assert names(part.train) - names(wrong) <= names(pure.train)
        assert names(part.test) == names(pure.test) - (set() if overlap else names(wrong))
        assert part.notes == (f"{bad} of the K = 8 images, which are the references too, are anomalies",)


def test_few_contaminated_references_come_from_the_sets_own_list() -> None:
    samples = product("cap", train=20)
    listed = [
        replace(sample, image=Path(f"noise-{n}.png"), split="train", noise=True)
        for n, sample in enumerate(samples[-4:])
    ]
    (trial,) = trials([*listed, *samples], ProtocolOptions("contamination", shots=(4,)))
    (part,) = trial.parts
    assert trial.setting == "K=4, noise 0.1 of those listed, in the references too"
    assert len(names(part.train) & names(tuple(listed))) == 1
    assert names(part.test) == names(tuple(samples[20:]))
    assert part.notes[0].endswith("4 with a marked defect: some are fitted on as if they were normal")


def test_a_product_with_few_anomalies_is_contaminated_by_half_of_them() -> None:
    part = only(trials(product("cap", bad=3), ProtocolOptions("contamination", shots=(8,), noise=0.5)))
    assert sum(sample.anomalous for sample in part.train) == 1
    assert len(part.train) == 8
    assert part.notes[0] == "1 anomalies instead of 4: half of the product's"
    with pytest.raises(ValueError, match=r"cap: of K = 1 images a share of 0.1, .* no normal one is left"):
        trials(product("cap"), ProtocolOptions("contamination", shots=(1,)))


@pytest.mark.parametrize("overlap", [True, False])
def test_contamination_says_in_every_row_that_references_come_from_it(overlap: bool) -> None:
    (trial,) = trials(product("cap"), ProtocolOptions("contamination", overlap=overlap))
    assert trial.setting == f"noise 0.1, in the references too, {'' if overlap else 'no '}overlap"
    assert set(trial.parts[0].references) <= set(trial.parts[0].train)


def test_multi_class_is_one_trial_of_all_products_with_references_of_each() -> None:
    samples = [*product("cap"), *product("nut"), *product("pcb", view="C1"), *product("pcb", view="C2")]
    (trial,) = trials(samples, ProtocolOptions("multi-class", references=4))
    assert [part.product for part in trial.parts] == ["cap", "nut", "pcb/C1", "pcb/C2"]
    for part in trial.parts:
        assert len(part.train) == 20
        assert len(part.references) == 4
        assert names(part.references) <= names(part.train)
    assert trial.images == 4 * 33


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_protocol_lets_a_normal_test_image_into_training_and_all_repeat(protocol: str) -> None:
    samples = [*product("cap"), *product("nut")]
    options = ProtocolOptions(protocol, shots=(2,), draws=2)  # type: ignore[arg-type]
    found = trials(samples, options)
    assert found == trials(samples, options)
    for trial in found:
        for part in trial.parts:
            assert all(sample.split == "train" or sample.anomalous for sample in part.train)
            assert not names(part.test) & {sample.image.name for sample in part.train if not sample.anomalous}


def test_mistakes_name_the_product_or_the_option() -> None:
    three = [sample for name in ("cap", "nut", "pin") for sample in product(name, train=9 if name == "nut" else 3)]
    with pytest.raises(ValueError, match=r"for K = 4 references: cap \(3\), pin \(3\); choose smaller .* \(--shots\)"):
        trials(three, ProtocolOptions("few-shot", shots=(4, 1)))
    with pytest.raises(ValueError, match=r"cap: all normal images are in the test split"):
        trials(product("cap", train=0), ProtocolOptions())
    with pytest.raises(ValueError, match="no samples"):
        trials([], ProtocolOptions())
    with pytest.raises(ValueError, match=r"protocol 'zero-shot' is unknown; choose one of full"):
        ProtocolOptions("zero-shot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"share 1.5 must be in"):
        ProtocolOptions(share=1.5)
    with pytest.raises(ValueError, match=r"shots \[-1\]"):
        ProtocolOptions(shots=(-1,))
