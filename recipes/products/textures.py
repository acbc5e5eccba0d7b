"""The table of textures: products that fill the image."""

from collections.abc import Callable

from numpy.random import Generator

from products import irregular, patterns
from products.fields import Draw

TEXTURES: dict[str, Callable[[Generator, int], Draw]] = {
    "brushed": irregular.brushed,
    "ground": irregular.ground,
    "grain": irregular.grain,
    "wood": irregular.wood,
    "fabric": patterns.fabric,
    "leather": irregular.leather,
    "carpet": irregular.carpet,
    "tiles": patterns.tiles,
    "concrete": irregular.concrete,
    "perforated": patterns.perforated,
    "printed": patterns.printed,
    "stripes": patterns.stripes,
    "marble": irregular.marble,
    "speckle": irregular.speckle,
    "smooth": irregular.smooth,
    "mesh": patterns.mesh,
    "nonwoven": irregular.nonwoven,
}
