"""`adpretrain fit`: a detector fitted on normal photographs, saved to be used again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from downstream.commands.network import add_network, check_network, load_network
from downstream.terminal import ProgressBars, plain, tell_memory

EPILOG = """The folder written holds features of the product: share it only with those who may see the product.
It scores with adpretrain score --detector FOLDER --normal OTHERS, normal photographs that it was not fitted on;
in Python: downstream.detectors.detector_from_pretrained(folder).predict(images).

exit codes:
  0  fitted and saved
  2  wrong usage or input: nothing was written"""


def fit(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Fit a detector on normal photographs and save it."""
    parser.epilog = EPILOG
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--detector", type=str, default="patchcore", help="its name (adpretrain detectors)")
    parser.add_argument("--backbone", type=str | None, default=None, help="raw features (adpretrain backbones)")
    parser.add_argument("--extractor", type=str | None, default=None, help="features of this extractor instead")
    parser.add_argument("--normal", type=str, required=True, help="folder of normal photographs, with subfolders")
    parser.add_argument("--out", type=str, required=True, help="folder of the fitted detector")
    parser.add_argument(
        "--set",
        type=str,
        nargs="*",
        default=[],
        help="options of the detector, such as amount=0.01 embedding.patch=5; a wrong one lists them",
    )
    parser.add_argument("--shots", type=int, default=8, help="references of an extractor, taken from the normal ones")
    add_network(parser)
    return _fit


def _fit(options: Namespace) -> int:
    from downstream.inspection.finding import find_images
    from downstream.inspection.fitting import fit_folder, parse_settings
    from downstream.inspection.run import pick_device

    check_network(options)
    tell_memory()
    normal, out = Path(options.normal), Path(options.out)
    device, settings = pick_device(options.device), parse_settings(options.set)
    find_images(normal, exclude=out)  # a wrong path is found before a network is loaded
    model = load_network(options, device)
    with ProgressBars() as progress:
        done = fit_folder(
            options.detector, model, normal, out, settings, options.shots, options.batch_size, device, progress
        )
    references = f"{done.references} references" if done.references else ""
    fitted = ", ".join(filter(None, [f"{done.images} images" if done.images else "", references]))
    print(f"{options.detector} fitted on {fitted or 'nothing (it needs none)'}: {plain(done.folder)}")
    return 0
