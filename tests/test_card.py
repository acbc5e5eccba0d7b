"""The model card: its metadata is what the Hub's own client reads, its snippet runs, its table cannot be broken."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from adpretrain import ADExtractor
from adpretrain.backbones import load_backbone
from adpretrain.card import METRICS, Result, card, held_out_results
from adpretrain.config import BackboneConfig, LocalScaleConfig, ProjectorConfig
from adpretrain.projector import FeatureProjector
from adpretrain.saved import ExtractorConfig

MEASURED = {"step": 40, "image_auroc": 0.912, "aupro": 0.805, "raw_image_auroc": 0.9, "raw_aupro": 0.75}
PROVENANCE = {"data": {"name": "realiad", "set": "Real-IAD", "images": 9}, "steps": 50, "held_out_metrics": MEASURED}
OWN = {"data": {"set": "parts", "licence": "own"}}
RESULT = Result("MTD", "test, K=8", "padim on adpretrain features", "aupro", 66.6789, "python evaluate.py --root MTD")


@pytest.fixture(scope="module")
def extractor() -> ADExtractor:
    backbone = load_backbone("lite0", image_size=64)
    config = ProjectorConfig(references=8, heads=1)
    return ADExtractor(backbone, FeatureProjector(backbone.channels, config), provenance=PROVENANCE)


def test_the_hubs_client_reads_the_results_back(extractor: ADExtractor) -> None:
    data = ModelCard(card(extractor.config, "org/name", [RESULT], "apache-2.0")).data
    assert (data.library_name, data.license, data.pipeline_tag) == (
        "adpretrain",
        "apache-2.0",
        "image-feature-extraction",
    )
    assert "anomaly-detection" in data.tags
    found = {
        (r.dataset_name, r.dataset_split, r.metric_type, r.metric_name, r.metric_value, r.metric_args["command"])
        for r in data.eval_results
    }
    command = "accelerate launch recipes/pretrain.py --config config.yaml"
    held_out = "Real-IAD, held-out categories"
    assert found == {
        (held_out, "step 40", "image_auroc", "image AUROC in %, FeatureNorm", 91.2, command),
        (held_out, "step 40", "aupro", "AUPRO in %, FeatureNorm", 80.5, command),
        (held_out, "step 40", "image_auroc", "image AUROC in %, FeatureNorm without the projector", 90.0, command),
        (held_out, "step 40", "aupro", "AUPRO in %, FeatureNorm without the projector", 75.0, command),
        ("MTD", "test, K=8", "aupro", "AUPRO in %, padim on adpretrain features", 66.68, RESULT.command),
    }


def test_the_text_says_what_it_is_and_how_it_was_made(extractor: ADExtractor) -> None:
    text = card(extractor.config, "org/name", [RESULT])
    for part in (
        "| projector.references | `8` |",
        "| data.set | `Real-IAD` |",
        "| MTD | test, K=8 |",
        "66.7",
        RESULT.command,
    ):
        assert part in text
    assert "license:" not in text.split("---")[1]  # whoever publishes decides


def test_without_a_projector_it_promises_none(extractor: ADExtractor) -> None:
    for scaled in (False, True):
        scale = LocalScaleConfig(share=0.25) if scaled else None
        plain = dataclasses.replace(extractor.config, projector=None, local_scale=scale, provenance={})
        text = card(plain, "org/name")
        assert "It has no projector: nothing in it was trained on defects." in text
        assert "feature projector" not in text
        assert "pretrained on defects" not in text
        assert ("divided by how much good parts vary" in text) == ("| local_scale.share | `0.25` |" in text) == scaled


def test_a_backbone_is_named_with_its_repository_and_licence(extractor: ADExtractor) -> None:
    backbone = BackboneConfig("dinov2-base", revision="0" * 40, levels=[3, 6, 9, 12])
    text = card(dataclasses.replace(extractor.config, backbone=backbone))
    assert ModelCard(text).data.base_model == "facebook/dinov2-base"
    assert f"commit `{'0' * 40}`" in text
    assert "| backbone weights | dinov2-base | Apache-2.0 | yes | Whoever passes it on adds a copy" in text
    conditions = card(dataclasses.replace(extractor.config, backbone=BackboneConfig("dinov3-base"), provenance=OWN))
    assert "**In a product: with conditions.** A product may use it on the conditions of backbone weights" in conditions
    forbidden = card(dataclasses.replace(extractor.config, backbone=BackboneConfig("imagebind")))
    assert "| backbone weights | imagebind | CC-BY-NC-SA-4.0 | no |" in forbidden
    unknown = card(dataclasses.replace(extractor.config, licence=None, backbone=BackboneConfig("made-here")))
    assert "| backbone weights | made-here | unknown | unknown |" in unknown
    newer = dataclasses.replace(extractor.config, licence="MIT", backbone=BackboneConfig("of-a-later-version"))
    assert "| backbone weights | of-a-later-version | MIT | yes |" in card(newer)


def test_the_licences_of_the_whole_chain_are_told(extractor: ADExtractor) -> None:
    text = card(extractor.config)  # trained on Real-IAD
    assert (
        "**In a product: no.** A product may not use it, because of pretraining data Real-IAD (CC-BY-NC-SA-4.0)."
        in text
    )
    assert "https://huggingface.co/datasets/Real-IAD/Real-IAD" in text
    assert "open question of law" in text
    assert "not by lawyers" in text


def test_nothing_in_the_provenance_breaks_a_table(extractor: ADExtractor) -> None:
    config = dataclasses.replace(extractor.config, provenance={"note": "a | b\n| c | d |\n# heading"})
    (line,) = [line for line in card(config).splitlines() if line.startswith("| note |")]
    assert len(re.split(r"(?<!\\)\|", line)) == 4
    assert "\n# heading" not in card(config)


def test_strange_provenance_gives_no_results(extractor: ADExtractor) -> None:
    for metrics in ({}, {"image_auroc": "high"}, {"aupro": float("nan")}, {"aupro": 7.0}):
        config: ExtractorConfig = dataclasses.replace(extractor.config, provenance={"held_out_metrics": metrics})
        assert held_out_results(config) == []
        assert "## Results" not in card(config)


def test_results_are_checked() -> None:
    with pytest.raises(ValueError, match="metric 'accuracy' is unknown; choose one of image_auroc"):
        dataclasses.replace(RESULT, metric="accuracy")
    with pytest.raises(ValueError, match=r"aupro of MTD is 166\.0; expected per cent"):
        dataclasses.replace(RESULT, value=166.0)
    assert set(METRICS) >= {"image_auroc", "pixel_auroc", "aupro"}


def test_the_snippet_runs(
    extractor: ADExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extractor.save_pretrained(tmp_path / "org" / "name")
    generator = torch.Generator().manual_seed(0)
    for folder, count in (("good", 3), ("new", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            pixels = torch.randint(0, 255, (80, 70, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    (code,) = re.findall(r"```python\n(.*?)```", card(extractor.config, "org/name"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert re.search(r"tensor\(\[\d+\.\d+, \d+\.\d+\]\)", capsys.readouterr().out)
