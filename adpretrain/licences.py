"""What licences say of use in a product, of weights and of data sets, and under which licence each data set is.

Read from the texts by engineers, not by lawyers: before a product ships, read the licence itself at its ``source``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Product = Literal["yes", "with conditions", "no", "unknown"]
STRICTNESS: tuple[Product, ...] = (
    "yes",
    "with conditions",
    "unknown",
    "no",
)  # a chain is as strict as its last of these
UNKNOWN = "see its page on the Hub"
OWN = "own"


@dataclass(frozen=True)
class Licence:
    """Whether what is under a licence may be used in a ``product`` that is sold or earns money; ``terms``: what it asks
    for, in one sentence; ``source``: the address of its text."""

    product: Product
    terms: str
    source: str


LICENCES: dict[str, Licence] = {
    "Apache-2.0": Licence(
        "yes",
        "Whoever passes it on adds a copy of the licence and of the notices.",
        "https://www.apache.org/licenses/LICENSE-2.0",
    ),
    "MIT": Licence(
        "yes",
        "Whoever passes it on adds the copyright notice and the licence.",
        "https://opensource.org/license/mit",
    ),
    "BSD-3-Clause": Licence(
        "yes",
        "Whoever passes it on adds the copyright notice and the licence, and does not advertise with the "
        "authors' names.",
        "https://opensource.org/license/bsd-3-clause",
    ),
    "CC-BY-4.0": Licence(
        "yes",
        "Whoever passes it on names the authors and the licence, and says what was changed.",
        "https://creativecommons.org/licenses/by/4.0/",
    ),
    OWN: Licence("yes", "The rights are with whoever trained on them, as they say themselves.", ""),
    "DINOv3 License": Licence(
        "with conditions",
        "Whoever passes it on, or what is derived from it, does so under this licence only and adds a copy "
        "of it; military, nuclear and weapons uses are forbidden, as is what trade controls forbid.",
        "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    ),
    "NVIDIA Open Model License": Licence(
        "with conditions",
        "Whoever passes it on adds a copy of the licence and NVIDIA's notice; use must agree with NVIDIA's "
        "terms for trustworthy AI.",
        "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
    ),
    "CC-BY-NC-SA-4.0": Licence(
        "no",
        "Commercial use is forbidden.",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    ),
    UNKNOWN: Licence("unknown", "Its publisher says on its page what is allowed.", ""),
}


def find_licence(text: str) -> str | None:
    """The key of `LICENCES` that a text names, in any case and with spaces or hyphens ("apache-2.0"), or None."""
    return next((name for name in LICENCES if _plain(name) == _plain(text)), None)


def stated_licence(text: str, where: str) -> str:
    """The key of `LICENCES` that a user states. Raises ValueError, which begins with ``where``, for any other text."""
    found = find_licence(text)
    if found is None or found == UNKNOWN:
        valid = ", ".join(name for name in LICENCES if name != UNKNOWN)
        raise ValueError(
            f"{where} {text!r} is not a licence that this version knows; choose one of {valid} ({OWN} = the "
            "photographs are yours), or leave it out: then it counts as unknown"
        )
    return found


def strictest(answers: list[Product]) -> Product:
    """The answer for a chain: "no" if one says no, else "unknown" if one is unknown. An empty chain gives "yes"."""
    return max(answers, key=STRICTNESS.index, default="yes")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class DataSet:
    """A set of photographs.

    ``licence``: a key of `LICENCES`, or None if its publishers state none that we could read. ``source``: where they
    say so. ``names``: an expression that finds its name in that of a folder or repository, in lower case. ``layout``:
    the layout of `adpretrain.data.DATASETS` (or "drawn") that no other set has; "" if there is none.
    """

    licence: str | None
    source: str
    names: str
    layout: str = ""


NC = "CC-BY-NC-SA-4.0"
REAL_IAD = "https://huggingface.co/datasets/Real-IAD"
MVTEC = "https://www.mvtec.com/company/research/datasets"

# A name that holds those of two sets is the first one's.
DATA_SETS: dict[str, DataSet] = {
    "Real-IAD Variety": DataSet(
        None,
        f"{REAL_IAD}/Real-IAD_Variety",
        "real[-_ ]?iad[-_ ]?variety",
        "realiad_variety",
    ),
    "Real-IAD": DataSet(
        NC, "https://huggingface.co/datasets/Real-IAD/Real-IAD", r"real[-_ ]?iad(?:_\d+|_raw)?", "realiad"
    ),
    "VisA": DataSet("CC-BY-4.0", "https://github.com/amazon-science/spot-diff", r"visa(?:_\d{8})?", "visa"),
    "MVTec AD 2": DataSet(NC, f"{MVTEC}/mvtec-ad-2", "mvtec[-_ ]?ad[-_ ]?2", "mvtec_ad_2"),
    "MVTec LOCO AD": DataSet(NC, f"{MVTEC}/mvtec-loco", "mvtec[-_ ]?loco", "mvtec_loco"),
    "MVTec 3D-AD": DataSet(NC, f"{MVTEC}/mvtec-3d-ad", "mvtec[-_ ]?3d", "mvtec_3d"),
    "MVTec AD": DataSet(NC, f"{MVTEC}/mvtec-ad", "mvtec(?:[-_ ]?ad|[-_ ]anomaly[-_ ]detection)?"),
    "BTAD": DataSet(None, "http://avires.dimi.uniud.it/papers/btad/btad.zip", "btad|btech", "btad"),
    "MPDD": DataSet(None, "https://github.com/stepanje/MPDD", "mpdd", "mpdd"),
    "KolektorSDD2": DataSet(NC, "https://www.vicos.si/resources/kolektorsdd2/", "kolektorsdd2|ksdd2"),
    "KolektorSDD": DataSet(NC, "https://www.vicos.si/resources/kolektorsdd/", "kolektor(?:sdd)?|ksdd"),
    "Magnetic Tile Defects": DataSet(
        None, "https://github.com/abin24/Magnetic-tile-defect-datasets.", "magnetic[-_ ]tile|mtd", "mtd"
    ),
    "ELPV": DataSet(NC, "https://github.com/zae-bayern/elpv-dataset", "elpv", "elpv"),
    "DAGM 2007": DataSet(None, "https://conferences.mpi-inf.mpg.de/dagm/2007/prizes.html", r"dagm(?:[-_ ]?2007)?"),
    "drawn products": DataSet("Apache-2.0", LICENCES["Apache-2.0"].source, r"(?:\d+ )?drawn products\b.*", "drawn"),
}


def find_data_set(name: str, exactly: bool = False) -> str | None:
    """The key of `DATA_SETS` that the name of a folder or repository (hf://org/name@revision) means, or None.

    A set whose licence allows products must be named exactly; for others, unless ``exactly``, it is enough that their
    name occurs in it ("mvtec_bottle"), so that a part of a set is taken for the set.
    """
    text = name.lower().removeprefix("hf://").partition("@")[0].strip()
    for key, found in DATA_SETS.items():
        if exactly or (found.licence is not None and LICENCES[found.licence].product == "yes"):
            if any(re.fullmatch(found.names, part) for part in (text, text.rpartition("/")[2])):
                return key
        elif re.search(rf"(?<![a-z0-9])(?:{found.names})(?![a-z])", text):
            return key
    return None


def data_set_of_layout(layout: str) -> str | None:
    """The key of the only data set of `DATA_SETS` that lies in this layout, or None."""
    return next((key for key, found in DATA_SETS.items() if layout and found.layout == layout), None)
