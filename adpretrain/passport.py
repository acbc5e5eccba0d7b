"""The licence passport of an extractor: what it is made of, under which licences, and whether a product may use it.

It is computed from the extractor's configuration and the tables of `adpretrain.licences` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adpretrain.backbones.table import find_entry, licence_of
from adpretrain.licences import (
    DATA_SETS,
    LICENCES,
    UNKNOWN,
    Product,
    data_set_of_layout,
    find_data_set,
    find_licence,
    strictest,
)
from adpretrain.parsing import read_json
from adpretrain.saved import CONFIG_NAME, ExtractorConfig, provenance_of, read_config

BACKBONE, PROJECTOR, DATA, CODE = "backbone weights", "projector weights", "pretraining data", "code"
OPEN_QUESTION = (
    "Whether the licence of photographs reaches the weights that were trained on them is an open question of law; here "
    "it is counted all the same."
)
NO_LAWYERS = "Read by engineers, not by lawyers: before a product ships, read the texts themselves."


@dataclass(frozen=True)
class Link:
    """One thing that an extractor is made of.

    Args:
        what: `BACKBONE`, `PROJECTOR`, `DATA` or `CODE`.
        name: its name.
        licence: its licence, a key of `LICENCES` or what the configuration says; "unknown" if nobody has said.
        product: whether the licence allows use in a product that is sold or earns money.
        terms: what it asks for, in a sentence.
        source: address of the text that says so; "" if there is none.
    """

    what: str
    name: str
    licence: str
    product: Product
    terms: str
    source: str


def passport(config: ExtractorConfig) -> list[Link]:
    """Everything that an extractor is made of, with its licence, in the order in which it was made."""
    links = [_backbone(config.backbone.name, config.licence)]
    if "converted_from" in config.provenance:
        page = "https://github.com/xcyao00/ADPretrain"
        links.append(_link(PROJECTOR, "the checkpoint of ADPretrain's authors", None, page))
    if config.projector is not None or "data" in config.provenance:
        links.append(_data(config))
    return [*links, _link(CODE, "adpretrain", "Apache-2.0")]


def passport_of(folder: Path) -> list[Link]:
    """The same for a folder: an extractor, or a fitted detector with all that lies in it, every link once.

    The photographs that a detector was fitted on are not in it: whoever fits one knows whose they are.
    """
    links: list[Link] = []
    for path in sorted(folder.rglob(CONFIG_NAME)):
        content = read_json(path)
        if isinstance(content, dict) and "detector" in content:
            found = [*_of_detector(content), _link(CODE, "adpretrain", "Apache-2.0")]
        else:
            found = passport(read_config(path.parent))
        links += found
    return sorted(dict.fromkeys(links), key=lambda link: link.what == CODE)


def _of_detector(content: Mapping[str, Any]) -> list[Link]:
    """The backbone that a detector's config.json names, or the function of one's own that it was fitted on."""
    network = content.get("backbone")
    if isinstance(network, dict) and "name" in network:
        return [_backbone(str(network["name"]), None)]
    return [_link(BACKBONE, "a user's own function", None)] if content.get("extract") == "given" else []


def in_a_product(links: Sequence[Link]) -> Product:
    """Whether a product may use what consists of these links: what the strictest of them says."""
    return strictest([link.product for link in links])


def deciding(links: Sequence[Link]) -> list[Link]:
    """The links that say what `in_a_product` says."""
    return [link for link in links if link.product == in_a_product(links)]


def in_words(links: Sequence[Link]) -> str:
    """The answer for the chain, and because of which links, in one sentence."""
    answer = in_a_product(links)
    if answer == "yes":
        return "A product may use it: no licence of what it is made of forbids that."
    named = ", ".join(f"{link.what} {link.name} ({link.licence})" for link in deciding(links))
    if answer == "with conditions":
        return f"A product may use it on the conditions of {named}."
    if answer == "no":
        return f"A product may not use it, because of {named}."
    return f"Nobody has said yet whether a product may use it, because of {named}."


def trained_on(config: ExtractorConfig) -> str:
    """What an extractor was trained on, in a line without a full stop."""
    data = provenance_of(config, "data")
    if config.projector is None:
        return f"{config.backbone.name} without a projector: nothing in it was trained on defects"
    name = data.get("set") or data.get("name") or "unknown data"
    counts = [f"{data[key]} {unit}" for key, unit in (("images", "images"), ("categories", "products")) if key in data]
    return f"a projector on {config.backbone.name}, trained on {', '.join([str(name), *counts])}"


def _link(what: str, name: str, licence: str | None, source: str = "") -> Link:
    """A link under a licence, which may be any text. ``source``: where that is said; else the licence's own text."""
    key = find_licence(licence or UNKNOWN)
    if key is None:
        return Link(what, name, str(licence), "unknown", "This version does not know that licence.", source)
    if key == UNKNOWN:
        terms = "No licence of it is known here: see its page." if source else "Nobody has stated its licence."
        return Link(what, name, "unknown", "unknown", terms, source)
    found = LICENCES[key]
    return Link(what, name, key, found.product, found.terms, source or found.source)


def _backbone(name: str, stated: str | None) -> Link:
    """The table is surer than a file, which is heard only about networks that the table does not know."""
    known = licence_of(name)
    if known is not None and known != UNKNOWN:
        return _link(BACKBONE, name, known)
    page = f"https://huggingface.co/{find_entry(name).source.repo_id}" if known == UNKNOWN else ""
    return _link(BACKBONE, name, stated or UNKNOWN, page)


def _data(config: ExtractorConfig) -> Link:
    """The name of a set is surest; then what the user says; then a part of a name, or the layout."""
    data = provenance_of(config, "data")
    given = [data.get(key) for key in ("set", "layout", "name", "licence")]
    name, layout, kind, stated = (value if isinstance(value, str) else "" for value in given)
    named, by_layout = find_data_set(name, exactly=bool(stated)), data_set_of_layout(layout or kind)
    if named is not None and DATA_SETS[named].licence is not None:
        return _link(DATA, named, DATA_SETS[named].licence, DATA_SETS[named].source)
    if stated:
        return _link(DATA, named or name or "not recorded", stated)
    key = named or by_layout
    if key is None:
        return _link(DATA, name or "not recorded", None)
    return _link(DATA, key, DATA_SETS[key].licence, DATA_SETS[key].source)
