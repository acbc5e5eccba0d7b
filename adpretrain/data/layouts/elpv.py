"""Solar cells in electroluminescence light (ELPV, Buerhop-Lutz et al.): ``labels.csv`` and ``images/*.png``.

This is the folder ``data`` inside the Python package ``elpv-dataset`` (CC BY-NC-SA 4.0), which is not imported. A line
of labels.csv has a photograph, the experts' probability that its cell is defective, and the kind of cell.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from adpretrain.data.layouts.tree import existing_folder, inside
from adpretrain.data.samples import GOOD, Sample

PRODUCTS = ("mono", "poly")
GOOD_AT, DEFECTIVE_AT = 0.0, 1.0  # the experts were sure; 1/3 and 2/3 are left out
TEST_STRIDE = 5  # every 5th normal image of a product, in the order of the sorted names, is a test image


def index_elpv(root: str | Path) -> list[Sample]:
    """Samples of the products "mono" and "poly": probability 0 is good, 1 is a defect; cells in between are left out.

    There are no masks. Every 5th normal image and all defects are in the test split.

    Raises ValueError if ``labels.csv`` is absent, has a line that is not understood, or names a file outside ``root``.
    """
    path = existing_folder(root)
    file = path / "labels.csv"
    if not (file.is_file() and (path / "images").is_dir()):
        raise ValueError(f"{path} is not the ELPV set: expected labels.csv and images/ in it")
    seen: Counter[str] = Counter()
    samples = []
    for image, probability, product in sorted(_lines(path, file)):
        if probability == DEFECTIVE_AT:
            samples.append(Sample(image, None, product, "defective", None, "test"))
        elif probability == GOOD_AT:
            split = "train" if seen[product] % TEST_STRIDE else "test"
            samples.append(Sample(image, None, product, GOOD, None, split))
            seen[product] += 1
    if not samples:
        raise ValueError(f"{file} lists no image with the probability 0 or 1")
    return samples


def _lines(root: Path, file: Path) -> list[tuple[Path, float, str]]:
    """(image, probability, product) of every line. Columns are separated by spaces, and there is no heading."""
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        where = f"line {number} of {file}"
        if not line.strip():
            continue
        name, probability, product = (*line.split(), "", "")[:3]
        try:
            chance = float(probability)
        except ValueError:
            chance = -1.0
        if product not in PRODUCTS or not 0 <= chance <= 1:
            raise ValueError(
                f"{where} is {line[:200]!r}; expected an image, a probability from 0 to 1, and {' or '.join(PRODUCTS)}"
            )
        found.append((inside(root, name, where), chance, product))
    return found
