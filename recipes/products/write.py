"""Write a synthetic set in the Real-IAD layout: parallel, the same bytes for any workers, all or nothing."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from products.product import Product, Rendering, make_product, render

VERSION = 2
"""Of the generator: raise it when the images of a seed change, so that old sets are not taken for new."""
MANIFEST = "synthetic.json"
TIME = "20260101000000"
SHOWN_IN_VIEW = 0.75
"""How often a view other than C1 of a defective sample shows the defect."""


def make_synthetic(
    root: str | Path,
    products: int = 80,
    normals: int = 12,
    defects: int = 12,
    views: int = 1,
    size: int = 256,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write the set to `root` and return it; a set there made with the same parameters is kept as it is.

    `normals` and `defects` count samples per product, each shot from `views` cameras (C1..C5). The layout is
    Real-IAD's: `realiad_256/{category}/OK/S0001/*.jpg`, `NG/{defect}/S0013/*.jpg` with `.png` masks, and
    `realiad_jsons/realiad_jsons/{category}.json`, where half of the normal samples are the train split. The
    folder is called `realiad_256` for any `size`, as its readers expect. Product `p007_wood` of a seed is the
    same in a set of 10 and of 100. A defective sample always shows its defect in C1; another view that does
    not show it has no mask and counts as normal, as in Real-IAD.

    `workers` processes (default: one per core, at most 16) never change the bytes. They start from a fresh
    interpreter, so a script that asks for more than one needs the usual `if __name__ == "__main__"`. When
    anything fails, nothing is left at `root`. Raises ValueError for a bad parameter, or a `root` that holds
    something else.
    """
    root = Path(root)
    parameters = {
        "products": products,
        "normals": normals,
        "defects": defects,
        "views": views,
        "size": size,
        "seed": seed,
    }
    _check(parameters, workers)
    if _reusable(root, parameters):
        if progress:
            Console(stderr=True).print(
                f"synthetic set: reusing {root} (made with the same parameters)", highlight=False
            )
        return root
    workers = min(products, workers or min(16, os.cpu_count() or 1))
    root.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.absolute().parent / f".{root.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        task = partial(_write_product, unfinished, parameters)
        names = list(_tracked(_run(task, products, workers), products, progress))
        manifest = {"generator": VERSION, "parameters": parameters, "categories": sorted(names)}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if root.is_dir():
            root.rmdir()  # empty, or _reusable had refused it
        unfinished.rename(root)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return root


def _check(parameters: dict[str, int], workers: int | None) -> None:
    lowest = {"products": 1, "normals": 1, "defects": 0, "views": 1, "size": 64, "seed": 0}
    highest = {"views": 5, "size": 2048, "products": 999, "normals": 4000, "defects": 4000}
    for name, value in parameters.items():
        if not lowest[name] <= value <= highest.get(name, sys.maxsize):
            upper = f" and at most {highest[name]}" if name in highest else ""
            raise ValueError(f"{name}={value} is out of range: it must be at least {lowest[name]}{upper}")
    if parameters["size"] % 2:
        raise ValueError(f"size={parameters['size']} is odd: choose an even number of pixels, e.g. 256")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} is out of range: give at least 1, or none for one per core")


def _reusable(root: Path, parameters: dict[str, int]) -> bool:
    """True for a set with these parameters, False for an absent or empty folder; anything else is refused."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    found: dict[str, Any] = {}
    if (root / MANIFEST).is_file():
        found = json.loads((root / MANIFEST).read_text())
    if found.get("parameters") == parameters and found.get("generator") == VERSION:
        return True
    what = f"a synthetic set made with {found['parameters']}" if "parameters" in found else "other files"
    raise ValueError(f"{root} holds {what}, not the set asked for ({parameters}); delete it or choose another folder")


def _run(task: partial[str], products: int, workers: int) -> Iterator[str]:
    if workers == 1:
        yield from map(task, range(products))
        return
    # A fork of this process could hang on the threads of torch: fork from a fresh one that imported us once.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker) as pool:
        try:
            yield from pool.map(task, range(products))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _quiet_worker() -> None:
    """Ctrl-C reaches the parent alone, which then stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tracked(done: Iterator[str], total: int, progress: bool) -> Iterator[str]:
    columns = (
        TextColumn("synthetic products"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        row = bar.add_task("", total=total)
        for name in done:
            bar.update(row, advance=1, description=name)
            yield name


def _write_product(root: Path, parameters: dict[str, int], index: int) -> str:
    """Render and write one product with its JSON; returns its name."""
    product = make_product(index, parameters["seed"], parameters["size"])
    folder = root / "realiad_256" / product.name
    train: list[dict[str, str | None]] = []
    test: list[dict[str, str | None]] = []
    normals, views = parameters["normals"], parameters["views"]
    for sample in range(1, normals + 1):
        split = train if sample <= (normals + 1) // 2 else test
        for view in range(views):
            split.append(_save(folder, product, sample, view, "OK", render(product, sample, view)))
    for number in range(parameters["defects"]):
        sample = normals + 1 + number
        for view, family, shot in _defective(product, sample, number, views):
            test.append(_save(folder, product, sample, view, family, shot))
    content = {"meta": {"normal_class": "OK", "prefix": f"{product.name}/"}, "train": train, "test": test}
    target = root / "realiad_jsons" / "realiad_jsons" / f"{product.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")
    return product.name


def _defective(product: Product, sample: int, number: int, views: int) -> Iterator[tuple[int, str, Rendering]]:
    """(view, family, rendering) of a defective sample: the next family of its product that shows in C1."""
    families = product.families
    for turn in range(len(families)):
        family = families[(number + turn) % len(families)]
        shot = render(product, sample, 0, family)
        if shot.mask is not None:
            break
    else:
        raise RuntimeError(f"no defect shows on {product.name} sample {sample}: report this seed ({product.seed})")
    yield 0, family, shot
    for view in range(1, views):
        shown = np.random.default_rng([product.seed, product.index, sample, view, 99]).random() < SHOWN_IN_VIEW
        yield view, family, render(product, sample, view, family if shown else None)


def _save(folder: Path, product: Product, sample: int, view: int, label: str, shot: Rendering) -> dict[str, str | None]:
    """Write one image and its mask; returns its entry in the JSON, with paths relative to the category."""
    where = Path("OK" if label == "OK" else f"NG/{label}") / f"S{sample:04d}"
    tag = "OK" if label == "OK" else f"NG_{label}"
    stem = f"{product.name}_{sample:04d}_{tag}_C{view + 1}_{TIME}"
    (folder / where).mkdir(parents=True, exist_ok=True)
    pixels = (shot.image * 255 + 0.5).astype(np.uint8)
    photo = Image.fromarray(pixels[..., 0]).convert("RGB") if pixels.shape[-1] == 1 else Image.fromarray(pixels)
    photo.save(folder / where / f"{stem}.jpg", quality=product.rig.quality, subsampling=0)
    mask_path = None
    if shot.mask is not None:
        mask_path = (where / f"{stem}.png").as_posix()
        Image.fromarray(shot.mask.astype(np.uint8) * 255).save(folder / mask_path)
    return {
        "category": product.name,
        "anomaly_class": label if shot.mask is not None else "OK",
        "image_path": (where / f"{stem}.jpg").as_posix(),
        "mask_path": mask_path,
    }
