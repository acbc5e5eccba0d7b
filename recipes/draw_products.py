"""`python recipes/draw_products.py`: write a procedural set of products and defects."""

import sys
from dataclasses import dataclass
from pathlib import Path

from products.defects import DEFECTS
from products.product import PRODUCTS
from products.write import make_synthetic
from rich.console import Console

from adpretrain.parsing import parse_flags

DESCRIPTION = f"""Write procedural products with defects in the Real-IAD layout: nothing to download.

Three in five products are textures, two in five are objects, {len(PRODUCTS)} kinds;
defects come from {len(DEFECTS)} families: {", ".join(DEFECTS)}.
The same parameters and seed give the same bytes for any number of workers. A folder that already holds
the set is kept as it is. Example, a small set to look at (a few seconds):

  python recipes/draw_products.py --out data/synthetic --products 10 --samples 4 --defects 4
"""


@dataclass(frozen=True)
class Options:
    """Options of the drawn set.

    Args:
        out: folder to write; it must not exist, be empty, or hold this set.
        products: number of products; pretraining needs 70 or more.
        samples: normal samples per product; half of them are the train split.
        defects: defective samples per product.
        views: cameras per sample, 1 to 5; C1 is frontal, the others are tilted.
        size: image side in pixels, even, at least 64.
        seed: another seed gives other products.
        workers: processes; null = one per core, at most 16.
    """

    out: Path
    products: int = 80
    samples: int = 12
    defects: int = 12
    views: int = 1
    size: int = 256
    seed: int = 0
    workers: int | None = None


def main() -> None:
    given = parse_flags(Options, description=DESCRIPTION)
    try:
        root = make_synthetic(
            given.out,
            products=given.products,
            normals=given.samples,
            defects=given.defects,
            views=given.views,
            size=given.size,
            seed=given.seed,
            workers=given.workers,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        sys.exit(130)
    images = sum(1 for _ in root.glob("realiad_256/**/*.jpg"))
    Console().print(f"{images} images of {given.products} products in {root}", highlight=False)


if __name__ == "__main__":
    main()
