"""What licences say is one table; every backbone is under one of its rows, and a saved extractor carries it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub

from adpretrain import ADExtractor
from adpretrain.backbones import BACKBONES, Backbone, FeatureMaps, load_backbone
from adpretrain.backbones.table import TIMM, find_entry, licence_of
from adpretrain.licences import LICENCES, OWN, UNKNOWN
from adpretrain.preprocess import Preprocess
from adpretrain.saved import CONFIG_NAME
from downstream.commands.info import describe_model


def test_every_backbone_is_under_a_licence_of_the_table() -> None:
    assert {entry.licence for entry in BACKBONES.values()} <= LICENCES.keys() - {UNKNOWN, OWN}
    for name, licence in LICENCES.items():
        assert licence.terms.endswith(".")
        assert licence.source.startswith("https://") == (name not in (UNKNOWN, OWN))


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith(TIMM)])
def test_the_licence_is_the_one_that_timm_states(name: str) -> None:
    """timm writes the licence of the weights beside each of its models, in the Hub's spelling."""
    stated = timm.get_pretrained_cfg(BACKBONES[name].source.repo_id.removeprefix(TIMM)).license
    assert BACKBONES[name].licence.lower().replace(" ", "-") == stated


def test_the_licence_of_other_networks_is_unknown() -> None:
    assert find_entry("timm/resnet18.a1_in1k").licence == UNKNOWN
    assert find_entry("timm/resnet18.a1_in1k").terms.product == "unknown"
    assert licence_of("made-here") is None
    assert licence_of("timm/vit_small_patch16_dinov3.lvd1689m") == BACKBONES["dinov3-small"].licence  # the same weights


class Mine(Backbone):
    """A network of a user."""

    def maps(self, images: torch.Tensor) -> FeatureMaps:
        return [images]


def test_a_saved_extractor_carries_the_licence_of_its_backbone(tmp_path: Path) -> None:
    folder = ADExtractor(load_backbone("lite0", image_size=64)).save_pretrained(tmp_path / "one")
    content = json.loads((folder / CONFIG_NAME).read_text())
    assert content["licence"] == "Apache-2.0"
    assert "| backbone weights | lite0 | Apache-2.0 | yes |" in (folder / "README.md").read_text()
    facts = describe_model(folder)
    assert (facts["backbone licence"], facts["backbone in a product"]) == ("Apache-2.0", "yes")
    del content["licence"]  # as saved by earlier versions
    (folder / CONFIG_NAME).write_text(json.dumps(content))
    assert ADExtractor.from_pretrained(folder).config.licence is None
    assert describe_model(folder)["backbone licence"] == "Apache-2.0"
    mine = ADExtractor(Mine("mine", [3], Preprocess(16), [1])).save_pretrained(tmp_path / "two")
    assert json.loads((mine / CONFIG_NAME).read_text())["licence"] is None
    assert "| backbone weights | mine | unknown | unknown |" in (mine / "README.md").read_text()


def test_gated_weights_say_how_to_get_them(hub: Hub) -> None:
    repo_id = BACKBONES["dinov3-small"].source.repo_id
    hub.add(repo_id).write({"model.safetensors": b"x"})
    hub.repositories[repo_id].gated = True
    with pytest.raises(
        ValueError, match=rf"is gated: accept its licence at {hub.endpoint}/{repo_id} .*`hf auth login`"
    ):
        load_backbone("dinov3-small")
