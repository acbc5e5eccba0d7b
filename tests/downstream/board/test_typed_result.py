"""A result is refused unless it is what it claims to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from results_drawn import measured, result
from sklearn.metrics import average_precision_score, roc_auc_score

from downstream.board.result import Result, check, digest_of, read_result, sealed, write_result


def changed(one: Result, path: str, value: Any, reseal: bool = False) -> dict[str, Any]:
    """The content of a result with the entry at ``path`` replaced; sealed anew, as somebody who cheats would."""
    content = json.loads(one.model_dump_json())
    *parents, last = path.split(".")
    place = content
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    if reseal:
        content["digest"] = digest_of({key: entry for key, entry in content.items() if key != "digest"})
    return content


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    one = result(draws=3, products=("cap", "tile"))
    assert read_result(write_result(tmp_path, one)) == one
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_means_are_over_products_then_draws() -> None:
    """Against scikit-learn's metrics of the same scores, averaged in a plain loop; a metric that one product lacks is
    the mean of the others."""
    one = result(draws=2, products=("cap", "tile"), quality=0.7)
    for name, metric in (("image_auroc", roc_auc_score), ("image_ap", average_precision_score)):
        repeats = []
        for draw in (0, 1):
            own = [metric(m.labels, m.scores) for m in one.measured if m.draw == draw]
            repeats.append(sum(own) / 2)
        assert one.metrics[name].repeats == pytest.approx(repeats, abs=1e-12)
        assert one.metrics[name].mean == pytest.approx(sum(repeats) / 2, abs=1e-12)
    content = json.loads(one.model_dump_json(exclude={"metrics", "digest", "format"}))
    for own in content["measured"]:
        own["metrics"]["aupro"] = None if own["product"] == "cap" else 0.25
    assert sealed(content).metrics["aupro"].repeats == (0.25, 0.25)


@pytest.mark.parametrize(
    ("path", "value", "reseal", "message"),
    [
        ("measured.0.scores.3", 99.0, False, "its digest is another"),
        ("metrics.image_auroc.mean", 0.99, False, "its digest is another"),
        ("measured.0.scores.3", -99.0, True, "claims image_auroc .* but its scores give"),
        ("measured.0.metrics.image_ap", None, True, "claims image_ap None"),
        ("metrics.image_auroc.mean", 0.99, True, "the mean of image_auroc is not that of its products"),
        ("metrics.aupro.repeats", [0.5, 0.5, 0.5], True, "the means of aupro are not there for every draw"),
        ("metrics.invented", {"mean": 1.0, "repeats": [1.0, 1.0]}, True, "invented was measured of no product"),
        ("detector.options", {"sigma": 0.0}, True, "the digest of the options of padim is another"),
        ("protocol.draws", 3, True, "the protocol has 3 draws, but draws"),
        ("data.products", ["tile", "cap"], True, "the products that were measured are not those"),
        ("measured.0.labels", [1], True, "1 labels and 60 scores"),
        ("measured.1.draw", 0, True, "draws|measured once"),
        ("extractor.licences", [], True, "its chain of licences says otherwise"),
        ("extractor.licences.1.product", "no", True, "its chain of licences says otherwise"),
        ("extractor.licences.0.licence", "MIT", True, "the weights of lite0 are under Apache-2.0"),
        ("extractor.licences.1.licence", "CC-BY-NC-SA-4.0", True, "CC-BY-NC-SA-4.0 says 'no'"),
        ("extractor.backbone", "imagebind", True, "the weights of imagebind are under CC-BY-NC-SA-4.0"),
    ],
)
def test_what_is_not_true_is_refused(path: str, value: Any, reseal: bool, message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(changed(result(draws=2), path, value, reseal)))
    with pytest.raises(ValueError, match=rf"result.json is not what it claims to be: .*({message})"):
        read_result(tmp_path / "result.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("measured.0.scores.0", "1.0", "measured.0.scores.0: Input should be a valid number"),
        ("measured.0.labels.0", 2, "measured.0.labels.0"),
        ("extractor.product", "maybe", "extractor.product"),
        ("extractor.digest", "../../etc", "extractor.digest"),
        ("surprise", 1, "surprise: Extra inputs are not permitted"),
        ("format", 2, "format"),
        ("measured", [], "measured"),
        ("latency", -1, "latency: Input should be greater than 0, not '-1'"),
        ("extractor.name", "a\n\\input{/etc/hostname}%", "extractor.name"),
        ("data.name", "   ", "data.name"),
        ("command", "a\u2028b", "command"),
    ],
)
def test_what_is_not_well_formed_is_told_with_its_place(path: str, value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(changed(result(), path, value)))
    with pytest.raises(ValueError, match=f"result.json is not a result of format 1: {message}"):
        read_result(tmp_path / "result.json")


def test_other_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a.json is not a result of format 1: the file: Invalid JSON"):
        read_result(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is not a file"):
        read_result(tmp_path)
    for text in ('{"a": NaN}', "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="is not a result"):
            read_result(tmp_path / "a.json")


def test_a_product_without_defects_has_no_auroc() -> None:
    content = json.loads(result().model_dump_json(exclude={"metrics", "digest", "format"}))
    own = measured("tile", 0, [0.1, 0.2], [0, 0], aupro=None)
    own["metrics"] = dict.fromkeys(own["metrics"])
    one = sealed({**content, "measured": [own]})
    assert check(one) is None
    assert one.metrics["image_auroc"].mean is None


def test_the_identity_is_what_was_measured_not_what_came_out() -> None:
    assert result(seed=1).identity == result(seed=2, latency=1.0).identity
    others = [result("lite1"), result(detector="spade"), result(data="caps"), result(setting="K=1"), result(draws=2)]
    assert len({one.identity for one in (result(), *others)}) == 6
