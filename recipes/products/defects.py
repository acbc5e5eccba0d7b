"""The table of defect families: a name and a function that damages a surface.

(image [S, S, C], part [S, S], site, rng) -> damaged image [S, S, C]; the image given is left as it was.
What a defect is *called* is its only label; its mask is measured afterwards from what it really changed.
"""

from collections.abc import Callable

from numpy.random import Generator

from products import painted, structural
from products.fields import Array
from products.sites import Site

DEFECTS: dict[str, Callable[[Array, Array, Site, Generator], Array]] = {
    "scratch": painted.scratch,
    "spot": painted.spot,
    "crack": painted.crack,
    "stain": painted.stain,
    "blowhole": structural.blowhole,
    "missing": structural.missing,
    "cutpaste": structural.cutpaste,
    "warp": structural.warp,
    "blur": structural.blur,
    "swap": structural.swap,
    "streak": painted.streak,
    "fray": structural.fray,
    "break": structural.breakage,
    "dent": structural.dent,
    "fibre": painted.fibre,
    "uneven": painted.uneven,
    "wear": structural.wear,
    "specks": painted.specks,
}
