"""Collections: made if there is none, the same again without a change, and never at the cost of what is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server.server import Hub
from small_models import Saved
from test_publish import publish

from adpretrain.hub.collection import add_to_collection

NEW, ITEM = "POST /api/collections$", r"POST /api/collections/.*/items"


@pytest.fixture
def published(hub: Hub, saved: Saved) -> Saved:
    for name in ("ada/one", "factory/two"):
        hub.add(name)
    hub.add("ada/demo", kind="space")
    return saved


def items(hub: Hub) -> dict[str, list[tuple[str, str, str]]]:
    return {
        one["title"]: [(item["type"], item["id"], item["note"]["text"]) for item in one["items"]]
        for one in hub.collections.values()
    }


def test_a_collection_is_made_once_and_an_item_added_once(hub: Hub, published: Saved) -> None:
    for _ in range(2):
        address = add_to_collection("ada/one", "model", "factory/Our extractors", "on parts")
    add_to_collection("ada/demo", "space", "factory/Our extractors", "the demo")
    assert items(hub) == {"Our extractors": [("model", "ada/one", "on parts"), ("space", "ada/demo", "the demo")]}
    (slug,) = hub.collections
    assert address == f"{hub.endpoint}/collections/{slug}"
    assert (hub.count(NEW), hub.count(ITEM)) == (1, 2)
    add_to_collection("ada/one", "model", slug, "on other parts")  # the slug in its address, and another note
    assert items(hub)["Our extractors"][0] == ("model", "ada/one", "on other parts")
    assert len(hub.collections) == 1


def test_without_an_owner_it_is_the_owner_of_the_repository(hub: Hub, published: Saved) -> None:
    add_to_collection("factory/two", "model", "Ours", "x" * 600, private=True)
    (collection,) = hub.collections.values()
    assert (collection["owner"], collection["private"]) == ("factory", True)
    assert items(hub)["Ours"][0][2] == "x" * 500  # as much as the Hub takes


def test_more_items_than_a_list_of_collections_shows(hub: Hub, published: Saved) -> None:
    for number in range(6):
        hub.add(f"ada/m{number}")
        for _ in range(2):
            add_to_collection(f"ada/m{number}", "model", "Many", f"{number}")
    assert len(items(hub)["Many"]) == 6


def test_lost_answers_make_nothing_twice(hub: Hub, published: Saved) -> None:
    hub.break_next(NEW, "lose")
    hub.break_next(ITEM, "lose")
    add_to_collection("ada/one", "model", "Ours", "on parts")
    assert items(hub) == {"Ours": [("model", "ada/one", "on parts")]}


def test_what_the_hub_refuses_is_told(hub: Hub, published: Saved) -> None:
    with pytest.raises(ValueError, match=r"(?s)cannot add ada/one to the collection bob/Ours: .*namespace 'bob'"):
        add_to_collection("ada/one", "model", "bob/Ours", "on parts")
    slug = f"ada/ours-{1:024x}"
    with pytest.raises(ValueError, match=f"there is no collection {slug}"):
        add_to_collection("ada/one", "model", slug, "on parts")
    assert hub.collections == {}


def test_an_extractor_is_published_into_a_collection_and_a_failure_there_loses_nothing(
    hub: Hub, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[str | Path] = ["--run", saved.folder, "--repo-id", "ada/one", "--collection", "Extractors"]
    assert publish(*flags, "--dry-run") == 0
    assert "would add it to the collection Extractors: a projector on lite0" in capsys.readouterr().out
    assert hub.writes == []
    hub.break_next(ITEM, "status", times=1, status=403)
    assert publish(*flags) == 2
    told = capsys.readouterr()
    assert f"{hub.endpoint}/ada/one is published; only the collection lacks it: run the same command" in told.err
    assert f"{hub.endpoint}/ada/one" in told.out
    head = hub.repositories["ada/one"].head().sha
    assert publish(*flags) == 0
    assert hub.repositories["ada/one"].head().sha == head  # nothing was uploaded twice
    note = "a projector on lite0, trained on parts, 9 images, 3 products; in a product: yes."
    assert items(hub) == {"Extractors": [("model", "ada/one", note)]}
    assert publish("--space", "--repo-id", "ada/demo", "--collection", "Extractors") == 0
    assert items(hub)["Extractors"][1][:2] == ("space", "ada/demo")
