"""`make demo`: the whole journey on this machine, without any download, in a few minutes.

Makes synthetic products, pretrains a projector on most of them (three seeds, each through `accelerate launch`), loads
it in a new process, scores products that no training has seen, and prints one table. With --data FOLDER (a folder of
photographs with a `good` subfolder in the MVTec layout, the Magnetic Tile set, ...) real photographs are scored too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "recipes" / "configs" / "demo.yaml"
PRODUCTS = 80


def run(*command: str | Path) -> None:
    """Run a step, echoed, with this environment's programs; stop the demo if it fails."""
    print("$", " ".join(str(part) for part in command), flush=True)
    result = subprocess.run([str(part) for part in command], cwd=ROOT, check=False)
    if result.returncode:
        raise SystemExit(f"the demo stops here: {command[0]} ended with exit code {result.returncode}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of everything the demo makes")
    parser.add_argument("--data", type=Path, help="real photographs to score too, in any layout the toolkit reads")
    parser.add_argument("--products", type=int, default=PRODUCTS, help="synthetic products")
    parser.add_argument("--seeds", type=int, default=3, help="pretraining runs, for the spread between seeds")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run (0 = as the configuration says)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    began = time.perf_counter()
    python, launcher = sys.executable, Path(sys.executable).parent / "accelerate"
    synthetic, extractors = options.out / "synthetic", []
    workers = str(os.cpu_count() or 1)
    run(python, "-m", "adpretrain.data.synthetic", "--out", synthetic, "--products", str(options.products),
        "--samples", "12",
        "--defects", "12", "--views", "1", "--seed", "0", "--workers", workers)  # fmt: skip
    for seed in range(options.seeds):
        folder = options.out / f"pretrain-seed{seed}"
        steps = ["--optim.steps", str(options.steps)] if options.steps else []
        run(launcher, "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "recipes/pretrain.py", "--config", CONFIG, "--run", folder, "--seed", str(seed),
            "--data.root", synthetic, "--cache.folder", options.out / "cache", *steps)  # fmt: skip
        extractors.append(folder / "extractor")
    table = options.out / "table.json"
    run(python, "recipes/evaluate.py", "--extractors", *extractors, "--dataset", "realiad", "--root", synthetic,
        "--categories", *_held_out(), "--shots", "2", "4", "8", "--json", table)  # fmt: skip
    if options.data:
        run(python, "recipes/evaluate.py", "--extractors", *extractors, "--dataset", "auto", "--root", options.data,
            "--shots", "4", "8", "--draws", "3", "--json", options.out / "table-real.json")  # fmt: skip
    report = _inspect(options.out, synthetic, extractors[0])
    print(f"\nextractor  {extractors[0]}\ncurves     {extractors[0].parent / 'curves.png'}\ntable      {table}")
    print(f"heatmaps   {report / 'heatmaps'}\nreport     {report / 'report.html'}")
    print(f"done in {(time.perf_counter() - began) / 60:.1f} minutes")


def _held_out() -> list[str]:
    import yaml

    return list(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["data"]["held_out"])


def _inspect(out: Path, synthetic: Path, extractor: Path) -> Path:
    """What an inspection engineer does: 8 good photographs of one unseen product, then a batch of new ones."""
    product = sorted((synthetic / "realiad_256").glob("p00*"))[0]
    shots, batch, report = out / "inspection" / "shots", out / "inspection" / "batch", out / "inspection" / "report"
    good = sorted(product.glob("OK/*/*.jpg"))
    for folder, images in ((shots, good[:8]), (batch, good[8:] + sorted(product.glob("NG/*/*/*.jpg")))):
        folder.mkdir(parents=True, exist_ok=True)
        for image in images:
            (folder / image.name).write_bytes(image.read_bytes())
    command = [str(Path(sys.executable).parent / "adpretrain"), "score", "--extractor", extractor, "--normal", shots]
    command += ["--images", batch, "--out", report, "--false-alarm-rate", "0.12"]
    print("$", " ".join(str(part) for part in command), flush=True)
    code = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    if code not in (0, 1):  # 1 = defects found, as it should be
        raise SystemExit(f"the demo stops here: adpretrain score ended with exit code {code}")
    return report


if __name__ == "__main__":
    main()
