"""Collections of the Hub: their addresses, and the answers as the client expects them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from hub_server.routes import Answer

if TYPE_CHECKING:
    from hub_server.server import Hub

SHOWN = 4  # items of each collection in a list of collections


class Collections:
    """The part of the handler that answers for collections; `Hub.collections` holds them by slug."""

    hub: Hub
    path: str
    body: bytes

    def answer(self, status: int, content: Any = None) -> None:
        raise NotImplementedError

    def may_write(self, namespace: str) -> bool:
        raise NotImplementedError

    def _writable(self, namespace: str) -> None:
        if not self.may_write(namespace):
            raise Answer(403, f"You don't have the rights to write to the namespace {namespace!r}")

    def on_collections(self) -> None:
        (owner,) = parse_qs(urlsplit(self.path).query)["owner"]
        mine = [one for one in self.hub.collections.values() if one["owner"] == owner]
        seen = [one for one in mine if not one["private"] or self.may_write(owner)]
        listed = [{**one, "items": one["items"][:SHOWN]} for one in seen]
        self.answer(200, [{key: one[key] for key in one if key != "position"} for one in listed])

    def on_new_collection(self) -> None:
        asked = json.loads(self.body)
        owner, title = asked["namespace"], asked["title"]
        self._writable(owner)
        slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower())}-{len(self.hub.collections):024x}"
        shown = {"slug": slug, "title": title, "owner": owner, "private": asked.get("private", False), "items": []}
        more = {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
        self.hub.collections[slug] = {**shown, **more}
        self.answer(200, self.hub.collections[slug])

    def _collection(self, slug: str) -> dict[str, Any]:
        if slug not in self.hub.collections:
            raise Answer(404, "Collection not found")
        return self.hub.collections[slug]

    def on_collection(self, slug: str) -> None:
        self.answer(200, self._collection(slug))

    def on_new_item(self, slug: str) -> None:
        collection, asked = self._collection(slug), json.loads(self.body)
        self._writable(collection["owner"])
        item = asked["item"]
        repository = self.hub.repositories.get(item["id"])
        if repository is None or repository.kind != item["type"]:
            raise Answer(404, f"{item['type']} {item['id']} not found")
        if any((one["id"], one["type"]) == (item["id"], item["type"]) for one in collection["items"]):
            raise Answer(409, "the item is in the collection already")
        number = len(collection["items"])
        note = {"text": asked["note"], "html": asked["note"]} if "note" in asked else None
        collection["items"].append({"_id": f"{number:024x}", **item, "position": number, "note": note})
        self.answer(200, collection)

    def on_item(self, slug: str, item: str) -> None:
        collection = self._collection(slug)
        self._writable(collection["owner"])
        found = next(one for one in collection["items"] if one["_id"] == item)
        found["note"] = {"text": json.loads(self.body)["note"]}
        self.answer(200, {})
