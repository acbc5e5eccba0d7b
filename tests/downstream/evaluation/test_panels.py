"""What a finished run leaves."""

from __future__ import annotations

from downstream.evaluation.pictures import file_name


def test_views_and_categories_of_any_name_have_heatmaps_of_their_own() -> None:
    products = [("nut", "C1"), ("nut", "C2"), ("nut", None), ("nut@C1", None), ("a/b", None), ("a", "b"), ("..", "/")]
    products += [(".", None), ("..", None), ("%2E", None)]
    names = [file_name(category, view) for category, view in products]
    assert len(set(names)) == len(products)
    assert not any("/" in name or name in (".", "..") for name in names)
    assert names[2] == "nut"
