"""Add a repository to a collection of the Hub, with a note on what it is; doing so again changes nothing."""

from __future__ import annotations

import re
from typing import Any, Literal

import huggingface_hub

from adpretrain.hub.download import TROUBLES, explain, persistently

SLUG = re.compile(r".*-[0-9a-f]{24}")  # what the Hub makes of a title, and a number
LONGEST_NOTE = 500  # characters; the Hub refuses more


def add_to_collection(
    repo_id: str,
    kind: Literal["model", "space"],
    collection: str,
    note: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
) -> str:
    """Put a repository into a collection, or give it another ``note`` there. Returns the collection's address.

    ``collection``: "org/title", or the slug in its address; without "org/" it is one of the repository's owner. It is
    made, ``private`` or not, if the owner has none of that title.

    Raises ValueError, with the fix, if there is no collection of that slug, or the Hub refuses or cannot be reached.
    """
    api = huggingface_hub.HfApi(token=token, library_name="adpretrain")
    owner, _, title = collection.rpartition("/")
    owner = owner or repo_id.partition("/")[0]
    note = note[:LONGEST_NOTE]
    try:
        slug = _find(api, owner, title) or _create(api, owner, title, private)
        found = persistently(lambda: api.get_collection(slug))
        item = next((one for one in found.items if (one.item_id, one.item_type) == (repo_id, kind)), None)
        if item is None:
            persistently(lambda: api.add_collection_item(slug, repo_id, kind, note=note, exists_ok=True))
        elif item.note != note:
            where = item.item_object_id
            persistently(lambda: api.update_collection_item(slug, where, note=note))
    except TROUBLES as error:
        raise explain(error, f"{owner}/{title}", f"add {repo_id} to the collection") from error
    return found.url


def _find(api: huggingface_hub.HfApi, owner: str, title: str) -> str | None:
    """The slug of the owner's collection with this title or slug, if there is one."""
    listed: list[Any] = persistently(lambda: list(api.list_collections(owner=owner)))
    return next((one.slug for one in listed if title in (one.title, one.slug.partition("/")[2])), None)


def _create(api: huggingface_hub.HfApi, owner: str, title: str, private: bool) -> str:
    if SLUG.fullmatch(title):
        raise ValueError(f"there is no collection {owner}/{title}: give the slug of one that exists, or a title")

    def send() -> str:
        return api.create_collection(title, namespace=owner, private=private, exists_ok=True).slug

    return persistently(send, lambda: _find(api, owner, title))
