"""`python recipes/draw_products.py`: write a procedural set of products and defects."""

from pathlib import Path

from jsonargparse import ArgumentParser
from products.defects import DEFECTS
from products.product import PRODUCTS
from products.write import make_synthetic
from rich.console import Console

DESCRIPTION = f"""Write procedural products with defects in the Real-IAD layout: nothing to download.

Three in five products are textures, two in five are objects, {len(PRODUCTS)} kinds;
defects come from {len(DEFECTS)} families: {", ".join(DEFECTS)}.
The same parameters and seed give the same bytes for any number of workers. A folder that already holds
the set is kept as it is. Example, a small set to look at (a few seconds):

  python recipes/draw_products.py --out data/synthetic --products 10 --samples 4 --defects 4
"""


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python recipes/draw_products.py", description=DESCRIPTION)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write; it must not exist, be empty, or hold this set",
    )
    parser.add_argument("--products", type=int, default=80, help="how many products; pretraining wants 70 or more")
    parser.add_argument(
        "--samples", type=int, default=12, help="normal samples per product; half of them are the train split"
    )
    parser.add_argument("--defects", type=int, default=12, help="defective samples per product")
    parser.add_argument(
        "--views",
        type=int,
        default=1,
        help="cameras per sample, 1 to 5; C1 is frontal, the others are tilted",
    )
    parser.add_argument("--size", type=int, default=256, help="image side in pixels, even, at least 64")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other products")
    parser.add_argument("--workers", type=int | None, default=None, help="processes; default: one per core, at most 16")
    return parser


def main() -> None:
    cli = parser()
    given = cli.parse_args()
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
        cli.error(str(error))
    except KeyboardInterrupt:
        cli.exit(130, "stopped: nothing was written\n")
    images = sum(1 for _ in root.glob("realiad_256/**/*.jpg"))
    Console().print(f"{images} images of {given.products} products in {root}", highlight=False)


if __name__ == "__main__":
    main()
