"""A card that claims more than its chain of licences allows is refused before anything is sent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hub_server.server import Hub
from small_models import Saved
from test_publish import publish as publish_run

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor
from adpretrain.hub.claims import refuse_claims
from adpretrain.hub.upload import publish
from downstream.cli import main

FORBIDDEN, NOBODYS, MINE = ({"data": data} for data in ({"set": "Real-IAD"}, {"set": "parts"}, {"licence": "own"}))


def folder_of(extractor: ADExtractor, folder: Path, provenance: object, front: str) -> Path:
    """A saved extractor with this provenance, and a card with this front matter."""
    extractor.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "provenance": provenance}))
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    return folder


@pytest.mark.parametrize(
    ("front", "refused"),
    [
        ("license: apache-2.0", True),
        ("license: cc-by-4.0", True),
        ("license: gpl-3.0", True),  # not in our table, and does not forbid it
        ("license: [cc-by-nc-sa-4.0, mit]", True),
        ("license: other", True),  # nothing says that it forbids it
        ("license: other\nlicense_name: dinov3-license", True),
        ("license: cc-by-nc-sa-4.0\nlicense_name: apache-2.0", True),
        ("license: own", True),
        ("license: {name: mit}", True),
        ("license: cc-by-nc-sa-4.0", False),
        ("license: cc-by-nc-4.0", False),
        ("license: other\nlicense_name: ours-non-commercial", False),
        ("license: fair-noncommercial-research-license", False),
        ("license: unknown", False),
        ("tags: [mine]", False),  # no claim
        ("license:", False),
    ],
)
def test_a_claim_over_a_chain_that_forbids_it(
    extractor: ADExtractor, tmp_path: Path, front: str, refused: bool
) -> None:
    for provenance in (FORBIDDEN, NOBODYS):
        folder = folder_of(extractor, tmp_path / "one", provenance, front)
        if refused:
            with pytest.raises(ValueError, match="which does not forbid use in a product, but"):
                refuse_claims(folder)
        else:
            refuse_claims(folder)
    refuse_claims(folder_of(extractor, tmp_path / "one", MINE, front))  # one's own photographs: whatever one likes


def test_the_message_names_the_link_its_licence_its_source_and_the_fix(
    hub: Hub, extractor: ADExtractor, tmp_path: Path
) -> None:
    folder = folder_of(extractor, tmp_path / "one", FORBIDDEN, "license: apache-2.0")
    with pytest.raises(
        ValueError,
        match=r"(?s)README\.md claims the licence 'apache-2\.0'.*the pretraining data Real-IAD are under "
        r"CC-BY-NC-SA-4\.0 \(https://huggingface\.co/datasets/Real-IAD/Real-IAD\), which forbids it\. .*"
        r"--licence cc-by-nc-sa-4\.0.*Nothing was uploaded",
    ):
        publish(folder, "ada/one", private=False)
    folder = folder_of(extractor, tmp_path / "one", NOBODYS, "license: apache-2.0")
    with pytest.raises(ValueError, match=r"(?s)licence of the pretraining data parts is unknown.*--data-licence own"):
        publish(folder, "ada/one", private=False, dry_run=True)
    made = ADExtractor(load_backbone("timm/resnet18.a1_in1k", pretrained=False, image_size=64, levels=[1]))
    folder = folder_of(made, tmp_path / "two", MINE, "license: mit")
    with pytest.raises(ValueError, match=r"resnet18\.a1_in1k is unknown \(https://huggingface\.co/timm/.*config\.json"):
        publish(folder, "ada/two", private=False)
    assert hub.requests == []


def test_front_matter_that_cannot_be_read_is_no_way_around(extractor: ADExtractor, tmp_path: Path) -> None:
    for front in ("license: [apache-2.0", "- apache-2.0"):
        folder = folder_of(extractor, tmp_path / "one", FORBIDDEN, front)
        with pytest.raises(ValueError, match="its front matter cannot be read"):
            refuse_claims(folder)
    text = "\ufeff---\r\nlicense: apache-2.0\r\n---\r\n"  # as a Windows editor writes it
    (folder / "README.md").write_bytes(text.encode())
    with pytest.raises(ValueError, match=r"claims the licence 'apache-2\.0'"):
        refuse_claims(folder)


def test_the_commands_refuse_it_and_publish_it_under_a_licence_that_forbids_it(
    hub: Hub, extractor: ADExtractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(extractor, tmp_path / "one", FORBIDDEN, "license: apache-2.0")
    assert main(["push", str(folder), "--repo-id", "ada/pushed"]) == 2
    told = capsys.readouterr().err
    assert f"{folder / 'README.md'} claims the licence 'apache-2.0'" in told.replace("\n", " ")
    flags = ["--run", str(folder), "--repo-id", "ada/published", "--licence"]
    assert publish_run(*flags, "apache-2.0") == 2
    assert "Real-IAD are under CC-BY-NC-SA-4.0" in capsys.readouterr().err
    assert hub.writes == []
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# Mine\n")
    assert main(["push", str(folder), "--repo-id", "ada/pushed"]) == 0
    assert publish_run(*flags, "cc-by-nc-sa-4.0") == 0
    for name in ("pushed", "published"):
        assert b"license: cc-by-nc-sa-4.0" in hub.repositories[f"ada/{name}"].contents()["README.md"]
    text = hub.repositories["ada/published"].contents()["README.md"].decode()
    assert "**In a product: no.**" in text


def test_pushing_from_a_program_is_no_other_way(hub: Hub, extractor: ADExtractor, saved: Saved) -> None:
    bold = ADExtractor.from_pretrained(saved.folder)
    bold.config = dataclasses.replace(bold.config, provenance=FORBIDDEN)
    with pytest.raises(ValueError, match="Real-IAD are under CC-BY-NC-SA-4"):
        bold.push_to_hub("ada/one", readme="---\nlicense: mit\n---\n# Mine\n")
    assert hub.requests == []
    bold.push_to_hub("ada/one")  # the card that is made for it claims nothing
