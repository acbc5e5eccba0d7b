"""`adpretrain identify` says which of several products photographs show."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

from downstream.commands.options import REPEATED, Command
from downstream.terminal import ProgressBars, plain


@dataclass(frozen=True, kw_only=True)
class Identify(Command):
    """Say which of several products each photograph shows: that whose normal photographs it resembles most, or none.

    A good photograph is called unlike its own product with a probability of at most that inspector's promised rate.

    exit codes:
      0  every photograph is of one of the products
      1  some are of none
      2  wrong usage or input

    Args:
        at: the folder of a product, made by adpretrain inspector new; give several
        images: folder of photographs, searched with its subfolders
        out: CSV file for the product of each photograph and its p-values, one for every product: the product with the
            highest is named, and of several equal ones, as few normal photographs give, that with the lowest score
            relative to its threshold
        weights: local file with the backbone's weights, so that nothing is downloaded
        device: cpu, cuda, cuda:1, mps, or auto
    """

    at: list[str] = field(default_factory=list, metadata=REPEATED)
    images: Path
    out: Path | None = None
    weights: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if len(self.at) < 2:
            raise ValueError("needed: at least two --at PRODUCT, folders made by adpretrain inspector new")

    def run(self) -> int:
        from adpretrain.files import atomic_path
        from downstream.commands.serve import load_products
        from downstream.inspection.identify import identify
        from downstream.inspection.photos import find_images, relative_name

        paths = find_images(self.images)
        inspectors, rows = load_products(self.at, self.device, self.weights), list[list[str]]()
        with ProgressBars() as progress:
            for number, path in enumerate(paths):
                found = identify(inspectors, path)
                p_values = [f"{found.p_values[name]:.4g}" for name in inspectors]
                rows.append([relative_name(self.images, path), found.product or "", *p_values])
                progress("identifying", number + 1, len(paths))
        for name, product, *_ in rows:
            print(f"{product or 'none of them'}  {plain(name)}")
        if self.out is not None:
            with atomic_path(self.out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([["path", "product", *inspectors], *rows])
        return 0 if all(row[1] for row in rows) else 1
