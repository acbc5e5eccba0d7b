"""Detect the layout of a folder by one folder or file that only that layout has."""

from __future__ import annotations

from pathlib import Path

from adpretrain.data.layouts.tree import existing_folder, subfolders

HUB = "hf:/"  # "hf://org/name"; a Path keeps only one slash
_PNG = "*.[pP][nN][gG]"

# Glob patterns below the set's folder or below one category's own. A special layout stands before the general one
# that it also fits: AD 2, LOCO and 3D before MVTec. A plain folder has no labels and would fit anything.
PATTERNS: dict[str, tuple[str, ...]] = {
    "realiad": ("realiad_*/*/OK",),
    "realiad_variety": ("realiadvariety_*/*/OK", "realiadvariety_*/*/*/OK"),
    "visa": ("split_csv/*.csv", "Data/Images"),
    "mvtec_ad_2": ("*/test_public/good", "test_public/good"),
    "mvtec_3d": ("*/train/good/rgb", "train/good/rgb"),
    "mvtec_loco": (f"*/ground_truth/*/[!.]*/{_PNG}", f"ground_truth/*/[!.]*/{_PNG}"),  # no .ipynb_checkpoints
    "btad": ("*/train/ok", "train/ok"),
    "mvtec": ("*/train/good", "train/good"),
    "mtd": ("MT_Free/Imgs",),
    "oct2017": ("test/DRUSEN",),
    "aptos": ("train_images",),
    "isic2018": ("ISIC2018_Task3_Training_Input",),
    "hf": (
        "dataset_dict.json",
        "state.json",
        "*.parquet",
        "*/*.parquet",
        "metadata.csv",
        "metadata.jsonl",
        "*/metadata.csv",
        "*/metadata.jsonl",
    ),
    "elpv": ("labels.csv",),
}


def detect_layout(root: str | Path) -> str:
    """The name of the layout that ``root`` is in.

    Raises ValueError that lists the patterns, and a subfolder in a known layout if there is one.
    """
    if str(root).startswith(HUB):
        return "hf"
    path = existing_folder(root)
    if found := layout_of(path):
        return found
    listing = "\n".join(f"  {name}: {' or '.join(patterns)}" for name, patterns in PATTERNS.items())
    hint = next((f"\ndid you mean {inner} ({name})?" for inner in subfolders(path) if (name := layout_of(inner))), "")
    raise ValueError(
        f"{path} is in none of the known layouts; looked for\n{listing}\n"
        f"(a folder of photographs without labels must be asked for as 'folder'){hint}"
    )


def layout_of(path: Path) -> str | None:
    """The name of the layout that a folder is in, or None."""
    for name, patterns in PATTERNS.items():
        if any(next(path.glob(pattern), None) for pattern in patterns):
            return name
    return None
