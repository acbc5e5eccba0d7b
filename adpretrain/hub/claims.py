"""A card may not claim more than the licences of what the model was made of allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from adpretrain.licences import LICENCES, find_licence
from adpretrain.passport import BACKBONE, DATA, Link, deciding, in_a_product, passport_of
from adpretrain.saved import CARD_NAME

# What the name of a licence says if it forbids commercial use; the Hub has many licences, the table few.
FORBIDS = re.compile(r"(?<![a-z])(?:nc|non-?commercial|research)(?![a-z])")
NO_CLAIM = "unknown"  # the Hub's own word


def refuse_claims(folder: Path) -> None:
    """Raise ValueError if README.md of a saved model claims a licence that does not forbid use in a product, but
    something that the model was made of does, or nobody has said whether it does. No licence is no claim.

    The claims are ``license`` and ``license_name`` in the card's front matter.
    """
    card = folder / CARD_NAME
    bold = [claim for claim in _claims(card) if not _forbids_products(claim)] if card.is_file() else []
    if not bold:
        return
    links = passport_of(folder)
    if in_a_product(links) not in ("no", "unknown"):
        return
    reasons = "; ".join(f"{_described(link)}. {_fix(link)}" for link in deciding(links))
    raise ValueError(
        f"{card} claims the licence {bold[0]!r}, which does not forbid use in a product, but that is not allowed: "
        f"{reasons}. Or leave the licence out of the card. Nothing was uploaded"
    )


def _claims(card: Path) -> list[str]:
    from huggingface_hub.repocard import metadata_load  # as the Hub's own client reads it
    from yaml import YAMLError

    try:
        front: dict[str, Any] = metadata_load(card) or {}
    except (ValueError, YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{card}: its front matter cannot be read ({reason}): correct what is between ---") from error
    given, name = front.get("license"), front.get("license_name")
    stated = [*(given if isinstance(given, list) else [given]), name]
    silent = [None, "", NO_CLAIM, *(["other"] if name else [])]  # "other" says no more than its name
    return [str(claim) for claim in stated if claim not in silent]


def _forbids_products(claim: str) -> bool:
    key = find_licence(claim)
    return LICENCES[key].product == "no" if key is not None else FORBIDS.search(claim.lower()) is not None


def _described(link: Link) -> str:
    source = f" ({link.source})" if link.source else ""
    if link.product == "no":
        return f"the {link.what} {link.name} are under {link.licence}{source}, which forbids it"
    return f"the licence of the {link.what} {link.name} is unknown{source}"


def _fix(link: Link) -> str:
    if link.product == "no":
        claim = link.licence.lower()
        return f"Publish under a licence that forbids it too: --licence {claim}, or license: {claim} in the card"
    if link.what == DATA:
        return (
            "If the photographs are yours, say so: adpretrain pretrain --data-licence own, or data.licence: own in a "
            'run\'s configuration, or "licence": "own" under "provenance", "data" in config.json'
        )
    where = ' and write it into config.json as "licence"' if link.what == BACKBONE else ""
    return f"Ask its publisher for one{where}, or publish under a licence that forbids use in a product (cc-by-nc-4.0)"
