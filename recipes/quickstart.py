"""`make demo`: the whole journey on this machine, without any download, in a few minutes.

Draws synthetic products, pretrains a projector on them (three seeds, each through `accelerate launch`), loads it in a
new process, inspects and scores products that no training has seen, and prints one table. With --data FOLDER (MVTec
layout, Real-IAD or Magnetic Tile Defects) real photographs are scored too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from adpretrain.parsing import parse_flags

CAVEAT = (
    "Note: drawn products show the whole path, but teach a projector little that carries over to photographs (see\n"
    "docs/carry_over.md). For photographs, pretrain on real defects, or use the embedded extractor (no projector)."
)
ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "recipes" / "configs" / "demo.yaml"
PROGRAMS = Path(sys.executable).parent
# Many products with few images each: what a projector learns from 60 products does not carry over to new ones.
TRAINING = {"products": 130, "samples": 9, "defects": 5, "seed": 0}
UNSEEN = {"products": 16, "samples": 16, "defects": 12, "seed": 1000}


def run(*command: object, allowed: tuple[int, ...] = (0,)) -> None:
    """Run a step, echoed; stop the demo if it fails."""
    print("$", " ".join(str(part) for part in command), flush=True)
    code = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    if code not in allowed:
        raise SystemExit(f"the demo stops here: {command[0]} ended with exit code {code}")


@dataclass(frozen=True)
class Options:
    """Options of the demo.

    Args:
        out: folder for everything that the demo makes.
        data: real photographs to score too, in any layout the toolkit reads.
        products: number of synthetic products, for a quicker look (0 = the usual number).
        seeds: number of pretraining runs, which give the spread between seeds.
        steps: number of steps of each run (0 = that of the configuration).
    """

    out: Path = Path("runs/demo")
    data: Path | None = None
    products: int = 0
    seeds: int = 3
    steps: int = 0


def synthesise(folder: Path, size: dict[str, int]) -> None:
    """Draw a set of products."""
    flags = [part for name, value in size.items() for part in (f"--{name}", str(value))]
    workers = str(os.cpu_count() or 1)
    run(
        *(sys.executable, "recipes/draw_products.py", "--out", folder, *flags),
        *("--views", "1", "--workers", workers),
    )


def pretraining(out: Path, seed: int, steps: int) -> list[object]:
    """The command of one pretraining run."""
    defaults = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command: list[object] = [PROGRAMS / "accelerate", "launch", *defaults, "recipes/pretrain.py", "--config", CONFIG]
    command += ["--run", out / f"pretrain-seed{seed}", "--seed", str(seed), "--data.root", out / "synthetic"]
    command += ["--cache.folder", out / "cache"]
    return [*command, "--optim.steps", str(steps)] if steps else command


def pretrain(out: Path, seeds: int, steps: int) -> list[Path]:
    """Train every seed; the first keeps its residuals on disk, the others train on them side by side."""
    run(*pretraining(out, 0, steps))
    others = []
    for seed in range(1, seeds):
        log = out / f"pretrain-seed{seed}.log"
        command = [str(part) for part in pretraining(out, seed, steps)]
        print("$", " ".join(command), f"> {log}", flush=True)
        with log.open("w") as file:
            others.append((log, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)))
    for log, process in others:
        if process.wait():
            raise SystemExit(f"the demo stops here: a pretraining run failed, see {log}")
    return [out / f"pretrain-seed{seed}" / "extractor" for seed in range(seeds)]


def inspect(out: Path, extractor: Path) -> Path:
    """Inspect as an engineer does: with 8 good photographs of one unseen product, then a batch of new ones."""
    product = min((out / "unseen").glob("realiad_*/*"))
    shots, batch, report = (out / "inspection" / name for name in ("shots", "batch", "report"))
    good, bad = sorted(product.glob("OK/*/*.jpg")), sorted(product.glob("NG/*/*/*.jpg"))
    for folder, images in ((shots, good[:8]), (batch, good[8:] + bad)):
        folder.mkdir(parents=True, exist_ok=True)
        for image in images:
            (folder / image.name).write_bytes(image.read_bytes())
    # Exit code 1: defects were found, as they should be. 8 photographs can promise one false alarm in 9.
    run(PROGRAMS / "adpretrain", "score", "--extractor", extractor, "--normal", shots, "--images", batch,
        "--out", report, "--false-alarm-rate", "0.12", allowed=(0, 1))  # fmt: skip
    return report


def main() -> None:
    options = parse_flags(Options, description=__doc__)
    out, began = options.out.resolve(), time.perf_counter()
    shrink = {"products": options.products} if options.products else {}
    synthesise(out / "synthetic", {**TRAINING, **shrink})
    synthesise(out / "unseen", {**UNSEEN, **({"products": 2} if shrink else {})})
    extractors = pretrain(out, options.seeds, options.steps)
    compare = [PROGRAMS / "adpretrain", "evaluate", "--features", "raw,residual,scaled,pretrained"]
    compare += ["--extractors", *extractors, "--root"]
    report = inspect(out, extractors[0])
    run(*compare, out / "unseen", "--shots", "2", "4", "8", "--draws", "1", "--out", out / "unseen-products")
    if options.data:
        run(*compare, options.data.resolve(), "--shots", "4", "8", "--per-defect", "--panels",
            "--out", out / "photographs")  # fmt: skip
    print(f"\n{CAVEAT}")
    print(f"\nextractor  {extractors[0]}\ncurves     {extractors[0].parent / 'curves.png'}")
    print(f"heatmaps   {report / 'heatmaps'}\nreport     {report / 'report.html'}")
    print(f"done in {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
