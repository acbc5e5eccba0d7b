"""A trial against the few-shot table's own path, references that are never compared with themselves, and the report."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from adpretrain.data import Sample, index_dataset
from adpretrain.extractor import ADExtractor
from downstream.detectors import build_detector
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.evaluation import plots, trial
from downstream.evaluation.comparison_page import write_comparison
from downstream.evaluation.few_shot import encode_samples, few_shot
from downstream.evaluation.means import TITLES
from downstream.evaluation.measured import CURVE
from downstream.evaluation.networks import Contender, Networks, Withheld
from downstream.evaluation.pictures import in_two_dimensions, sampled_patches
from downstream.evaluation.protocols import Part, ProtocolOptions, Trial, trials
from downstream.evaluation.trial import Images, Settings, Training, run_trial
from downstream.inspection.report import Fact
from downstream.metrics import auroc, d_prime


@pytest.fixture(scope="module")
def samples(tile_products: Path) -> list[Sample]:
    return index_dataset("mvtec", tile_products)


@pytest.fixture(scope="module")
def networks(extractor_dir: Path) -> Networks:
    extractor = ADExtractor.from_pretrained(extractor_dir)
    return Networks(extractor.backbone, (extractor,))


def product(samples: list[Sample], name: str = "tile") -> list[Sample]:
    return [sample for sample in samples if sample.category == name]


def test_featurenorm_gets_the_few_shot_tables_numbers(samples: list[Sample], networks: Networks) -> None:
    group = product(samples)
    (found,) = trials(group, ProtocolOptions("few-shot", shots=(3,)))
    (record,) = run_trial(found, Contender("featurenorm", "pretrained"), networks, Settings(batch_size=3, pictures=0))
    expected = asdict(few_shot(networks.extractors[0], encode_samples(group, networks.backbone), shots=3, seed=0))
    for name in ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro"):
        assert record["metrics"][name] == pytest.approx(expected[name], abs=1e-6), name
    assert record["metrics"]["pixel_auroc"] > 0.9


@pytest.mark.parametrize(("detector", "shots"), [("padim", 1), ("aligned-featurenorm", 1), ("aligned-featurenorm", 2)])
def test_too_few_images_for_a_detector_are_no_reason_to_stop(
    samples: list[Sample], networks: Networks, detector: str, shots: int
) -> None:
    (found,) = trials(product(samples), ProtocolOptions("few-shot", shots=(shots,)))
    (record,) = run_trial(found, Contender(detector, "residual"), networks, Settings(pictures=0))
    assert set(record["metrics"]) == set(TITLES)
    assert not any(record["metrics"].values())
    assert record["notes"][-1].startswith(f"{detector} on residual, not fitted: ")
    assert plots.histograms([record]).startswith(b"\x89PNG")
    assert plots.curves([record]).startswith(b"\x89PNG")


def test_few_images_allow_fewer_aligned_references_and_stop_nothing(samples: list[Sample], networks: Networks) -> None:
    (found,) = trials(product(samples), ProtocolOptions("few-shot", shots=(6,)))
    contender = Contender("aligned-featurenorm", "pretrained")
    (record,) = run_trial(found, contender, networks, Settings(pictures=0))
    assert record["notes"][0] == "6 aligned references: there are no more training images"
    asked = Settings(pictures=0, options={"aligned-featurenorm": {"shots": 6}})
    (same,) = run_trial(found, contender, networks, asked)
    assert same["scores"] == record["scores"]
    assert not same["notes"]


def test_a_stream_measures_what_whole_maps_do(
    samples: list[Sample], networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = trials(product(samples), ProtocolOptions())
    contender, settings = Contender("featurenorm", "raw"), Settings(pictures=0)
    (whole,) = run_trial(found, contender, networks, settings)
    monkeypatch.setattr(trial, "WHOLE", 0)
    (streamed,) = run_trial(found, contender, networks, settings)
    assert streamed["notes"][-1].startswith("measured in a stream: pixel metrics are off by at most")
    for name in ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro"):
        assert streamed["metrics"][name] == pytest.approx(whole["metrics"][name], abs=1e-5), name
    assert streamed["metrics"]["aupro_official"] is None
    assert whole["metrics"]["aupro_official"] is not None


def test_a_reference_is_compared_with_the_others_only(samples: list[Sample], networks: Networks) -> None:
    extractor = networks.extractors[0]
    images = torch.cat(list(Images(product(samples)[:4], extractor.preprocess, Settings())))
    withheld = Withheld(extractor).set_references(images[:3])
    mixed = torch.stack([images[3], images[1]])
    features = withheld(mixed)
    others = extractor.encode_references(images[[0, 2]])
    for level, new, alone in zip(features, extractor(mixed[:1]), extractor(mixed[1:], others), strict=True):
        torch.testing.assert_close(level[0], new[0], rtol=1e-4, atol=5e-4)  # values of some 10
        torch.testing.assert_close(level[1], alone[0], rtol=1e-4, atol=5e-4)
        assert level[1].norm() > 0
    assert extractor(mixed)[0][1].norm() < 1e-3 * features[0][1].norm()  # what happens without


@pytest.mark.parametrize("detector", ["featurenorm", "padim"])
def test_an_anomaly_among_the_references_is_scored_as_the_extractor_in_use_would(
    samples: list[Sample], networks: Networks, detector: str
) -> None:
    """Contamination with overlap: the same image is a reference, learnt from, and scored."""
    group = product(samples)
    train, test = [s for s in group if s.split == "train"], [s for s in group if s.split == "test"]
    bad = next(sample for sample in test if sample.anomalous)
    part = Part("tile", (*train, bad), (*train[:2], bad), tuple(test))
    settings = Settings(pictures=0, batch_size=len(test), options={detector: {"sigma": 0.0}})
    (record,) = run_trial(Trial("tile", "overlap", 0, (part,)), Contender(detector, "pretrained"), networks, settings)
    extractor = networks.extractors[0]
    images, references = (
        torch.cat(list(Images(some, extractor.preprocess, settings))) for some in (test, part.references)
    )
    extractor.set_references(references)
    row = test.index(bad)
    assert extractor(images)[0][row].norm() < 1e-3 * extractor(images)[0].norm()  # nothing is left of it
    if detector == "featurenorm":
        expected = FeatureNorm(extractor, FeatureNormConfig(sigma=0.0)).predict(images).scores
        assert record["scores"] == pytest.approx(expected.tolist(), rel=1e-5)
        assert record["scores"][row] == min(record["scores"])
    else:
        fitted = Withheld(extractor).set_references(references)
        padim: Any = build_detector(detector, fitted, {"sigma": 0.0})
        padim.fit(Images(part.train, extractor.preprocess, settings))
        padim.extract = extractor
        assert record["scores"] == pytest.approx(padim.predict(images).scores.tolist(), rel=1e-4)


def test_training_meets_every_product_with_its_own_references(samples: list[Sample], networks: Networks) -> None:
    (found,) = trials(samples, ProtocolOptions("multi-class", references=2))
    settings = Settings(batch_size=4)
    extract = Withheld(networks.extractors[0])
    training = Training(found.parts, extract, networks.backbone.preprocess, settings)
    assert len(training) == 4
    seen = []
    for batch in training:
        bank = extract.extractor.references
        assert bank is not None
        seen.append((len(batch), bank.levels[0].clone()))
    assert [size for size, _ in seen] == [4, 2, 4, 2]
    for part, rows in zip(found.parts, (seen[:2], seen[2:]), strict=True):
        images = torch.cat(list(Images(part.references, networks.backbone.preprocess, settings)))
        expected = networks.extractors[0].encode_references(images).levels[0]
        assert all(torch.equal(bank, expected) for _, bank in rows)


def test_robustness_scores_images_that_a_detector_has_not_seen(samples: list[Sample], networks: Networks) -> None:
    """PaDiM expects every part in its place: scores of changed normal images rise, those as photographed are those of
    the full protocol."""
    group = product(samples)
    (full,) = trials(group, ProtocolOptions())
    *_, changed, same = trials(group, ProtocolOptions("robustness"))
    contender, settings = Contender("padim", "raw"), Settings(pictures=1)
    (usual,), (moved,), (plain,) = (run_trial(trial, contender, networks, settings) for trial in (full, changed, same))
    assert (moved["setting"], plain["setting"]) == ("light + rotation + shift + blur", "as photographed")
    assert plain["scores"] == usual["scores"]
    good = [index for index, label in enumerate(usual["labels"]) if not label]
    assert sum(moved["scores"][index] for index in good) > 1.2 * sum(usual["scores"][index] for index in good)
    assert moved["metrics"]["pixel_auroc"] > 0.5  # masks moved along
    assert (len(plain["shown"].maps), len(moved["shown"].maps)) == (1, 0)


def test_detectors_made_of_others_are_compared(samples: list[Sample], networks: Networks) -> None:
    """The mean of two standardised PaDiMs that differ in nothing ranks as one does."""
    group = product(samples)
    (full,) = trials(group, ProtocolOptions())
    options = {"ensemble": {"members": [{"detector": "padim"}, {"detector": "padim"}]}}
    settings = Settings(pictures=0, options=options)
    for features in ("raw", "pretrained"):
        single, joined = (
            run_trial(full, Contender(name, features), networks, settings)[0] for name in ("padim", "ensemble")
        )
        assert np.argsort(single["scores"]).tolist() == np.argsort(joined["scores"]).tolist()
    assert options == {"ensemble": {"members": [{"detector": "padim"}, {"detector": "padim"}]}}  # JSON still
    (every,) = trials(samples, ProtocolOptions("multi-class"))
    with pytest.raises(ValueError, match=r"refined on pretrained: .* makes images of its own"):
        run_trial(every, Contender("refined", "pretrained"), networks, settings)


def test_options_replace_single_ones_and_settings_are_adpretrains(networks: Networks) -> None:
    padim: Any = build_detector("padim", networks.backbone, {"embedding": {"patch": 3}}, "adpretrain")
    assert padim.config.per_level
    assert padim.config.embedding.patch == 3
    norm: Any = build_detector("featurenorm", networks.backbone, {}, "adpretrain")
    assert norm.config.top == 0.0
    with pytest.raises(ValueError, match="options of padim"):
        build_detector("padim", networks.backbone, {"epsilon": 1})
    with pytest.raises(ValueError, match="settings 'papers' are unknown; choose one of default, adpretrain"):
        build_detector("padim", networks.backbone, {}, "papers")


def test_patches_are_the_same_whatever_the_features(samples: list[Sample], networks: Networks) -> None:
    images = Images(product(samples)[6:], networks.backbone.preprocess, Settings())
    extract = Withheld(networks.extractors[0])
    trial.give_references(extract, trials(product(samples), ProtocolOptions())[0].parts[0], Settings())
    raw, marks = sampled_patches(networks.backbone, images.with_masks(), number=20)
    ours, same = sampled_patches(extract, images.with_masks(), number=20)
    assert np.array_equal(marks, same)
    assert raw.shape == ours.shape
    assert 0 < marks.sum() <= 20
    points, method = in_two_dimensions(raw)
    assert method in ("t-SNE", "UMAP")
    assert points.shape == (len(raw), 2)
    assert np.isfinite(points).all()
    with pytest.raises(ValueError, match="too few"):
        in_two_dimensions(raw[:4])


def test_averaged_roc_has_the_area_of_the_exact_one() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.4
    scores = np.round(rng.normal(size=400) + labels, 1)  # with ties
    curve = plots._roc({"labels": labels.tolist(), "scores": scores.tolist()})
    assert curve is not None
    assert float(trapezoid(curve, plots.RATES)) == pytest.approx(auroc(scores, labels), abs=0.005)
    assert curve[-1] == 1.0
    assert plots._roc({"labels": [1, 1], "scores": [0.1, 0.2]}) is None


class _Page(HTMLParser):
    """Tags, the sources they load and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_self_contained_and_escapes_names(
    samples: list[Sample], networks: Networks, tmp_path: Path
) -> None:
    records = []
    for order, features in enumerate(("raw", "pretrained")):
        for found in trials(product(samples), ProtocolOptions(references=3)):
            (record,) = run_trial(found, Contender("featurenorm", features), networks, Settings(pictures=1))
            shown = record.pop("shown")
            part = found.parts[0]
            saved = shown.save(tmp_path / "pictures", f"0-0-{order}", part.test, networks.backbone.preprocess)
            assert [entry["defect"] for entry in saved] == ["disc"]
            record |= {
                "pictures": [{**entry, "folder": "pictures"} for entry in saved],
                "order": [0, 0, order, 0, 0],
                "kind": features,
            }
            records.append({**record, "product": "<b>tile</b>"})
    path = write_comparison(tmp_path, records, "<script>alert(1)</script>", "/data", [Fact("Protocol", "full")])
    page = path.read_text(encoding="utf-8")
    parsed = _Page()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert "<b>tile</b>" in parsed.text
    assert "d' is a ratio: the number of standard deviations" in parsed.text
    # Curves, histograms, and four pictures: photograph, defect and two heatmaps.
    assert len(parsed.sources) == 6
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in parsed.sources)
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"https?://|\{\{", page)
    assert f"{100 * records[1]['metrics']['aupro']:.1f}" in parsed.text
    assert len(records[0]["pro"]) == len(CURVE)


def test_the_report_says_a_note_of_many_products_once(
    samples: list[Sample], networks: Networks, tmp_path: Path
) -> None:
    (found,) = trials(product(samples), ProtocolOptions())
    (record,) = run_trial(found, Contender("featurenorm", "raw"), networks, Settings(pictures=0))
    del record["shown"]
    record |= {"pictures": [], "order": [0] * 5, "kind": "raw", "notes": ["no test split"]}
    records = [{**record, "product": f"p{number}"} for number in range(9)]
    records[8] = {**records[8], "notes": ["no test split", "no masks"]}
    path = write_comparison(tmp_path, records, "T", "/data", [Fact("Protocol", "full")])
    page = path.read_text(encoding="utf-8")
    assert page.count("no test split") == 1
    assert "p0, p1, p2 and 6 more: no test split" in page
    assert "p8: no masks" in page


def test_without_a_mask_there_are_image_metrics_and_no_pixel_metrics(
    samples: list[Sample], networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One defect of four without a mask: it would be scored as normal pixels."""
    group = product(samples)
    (found,) = trials(group, ProtocolOptions())
    contender = Contender("featurenorm", "raw")
    (whole,) = run_trial(found, contender, networks, Settings(pictures=0))
    last = next(index for index in reversed(range(len(group))) if group[index].anomalous)
    group[last] = replace(group[last], mask=None)
    (found,) = trials(group, ProtocolOptions())
    for limit in (trial.WHOLE, 0):
        monkeypatch.setattr(trial, "WHOLE", limit)
        (record,) = run_trial(found, contender, networks, Settings(pictures=0))
        values = record["metrics"]
        assert values == {n: None if n.startswith(("pixel", "aupro")) else whole["metrics"][n] for n in values}
        assert values["image_auroc"] is not None
        assert values["d_prime"] == pytest.approx(d_prime(record["scores"], record["labels"]))
        assert record["pro"] is None
        assert record["notes"][len(whole["notes"]) :] == [
            "1 defects have no mask, such as 003.png: no pixel metrics, which need one for each"
        ]


def test_an_unreadable_photograph_is_no_lack_of_images(write_tiles: Callable[..., Path], networks: Networks) -> None:
    """With a single training image: the error is told, no result without numbers is kept."""
    files = sorted(write_tiles("mixed", range(3)).iterdir())
    files[0].write_bytes(b"no photograph")
    first, *rest = (Sample(file, None, "cap", "good", None, "train") for file in files)
    part = Part("cap", (first,), (first,), tuple(rest))
    with pytest.raises(ValueError, match=r"tile_0\.png"):
        run_trial(Trial("cap", "K=1", 0, (part,)), Contender("padim", "raw"), networks, Settings(pictures=0))


def test_what_is_said_of_the_references(samples: list[Sample], networks: Networks) -> None:
    settings = Settings(pictures=0, options={"aligned-featurenorm": {"shots": 2}})
    (found,) = trials(samples, ProtocolOptions("multi-class", references=2))
    for features, notes in (("pretrained", [trial.OWN]), ("raw", [])):
        records = run_trial(found, Contender("featurenorm", features), networks, settings)
        assert [record["notes"] for record in records] == [notes, notes]
    alone = trials(product(samples), ProtocolOptions("reference-sensitivity", references=2))[0]
    (record,) = run_trial(alone, Contender("aligned-featurenorm", "pretrained"), networks, settings)
    assert record["notes"] == [trial.UNDRAWN]
