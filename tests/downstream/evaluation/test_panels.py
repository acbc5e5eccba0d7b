"""What a finished run leaves."""

from __future__ import annotations

from pathlib import Path

from adpretrain.data import Sample


def test_views_and_categories_of_any_name_have_heatmaps_of_their_own() -> None:
    from downstream.evaluation.panels import product_folder

    products = [("nut", "C1"), ("nut", "C2"), ("nut", None), ("nut@C1", None), ("a/b", None), ("a", "b"), ("..", "/")]
    products += [(".", None), ("..", None), ("%2E", None)]
    names = [product_folder(Sample(Path("x.png"), None, category, "good", view, "")) for category, view in products]
    assert len(set(names)) == len(products)
    assert not any("/" in name or name in (".", "..") for name in names)
    assert names[2] == "nut"
