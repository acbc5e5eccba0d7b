"""`adpretrain extract`: feature maps of photographs, written to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from downstream.commands.network import add_network, check_network, load_network
from downstream.terminal import ProgressBars, plain

TOP = 5  # unreadable images listed on stdout

EPILOG = """--out is a folder (one .safetensors file per batch, and index.json) or one FILE.safetensors (and FILE.json).
Tensors are level_0, level_1, ... of [images, channels, height, width]; the index says which image is which row.

exit codes:
  0  every image was read
  3  some images were unreadable: they are listed in the index, with the reason; the others were written
  2  wrong usage or input: nothing was written"""


def extract(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Write the feature maps of photographs to safetensors files."""
    parser.epilog = EPILOG
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--backbone", type=str | None, default=None, help="raw features of this network (adpretrain backbones)"
    )
    parser.add_argument("--extractor", type=str | None, default=None, help="features of this extractor; needs --normal")
    parser.add_argument("--normal", type=str | None, default=None, help="folder of the extractor's normal references")
    parser.add_argument("--images", type=str, required=True, help="folder of photographs, with subfolders")
    parser.add_argument("--out", type=str, required=True, help="folder, or FILE.safetensors")
    parser.add_argument("--shots", type=int, default=16, help="use at most so many references, evenly spaced by name")
    add_network(parser)
    return _extract


def _extract(options: Namespace) -> int:
    from downstream.inspection.extraction import extract_folder, refuse_others, set_references
    from downstream.inspection.finding import find_images
    from downstream.inspection.photos import full_scale
    from downstream.inspection.run import pick_device

    _check(options)
    images, out = Path(options.images), Path(options.out)
    device = pick_device(options.device)
    find_images(images, exclude=out)  # a wrong path is found before a network is loaded
    refuse_others(out, out.suffix == ".safetensors")
    model = load_network(options, device)
    scale = None
    if options.normal:
        normal = Path(options.normal)
        scale = full_scale(find_images(normal, exclude=out))
        set_references(model, normal, options.shots, options.batch_size, out, scale)  # type: ignore[arg-type]
    with ProgressBars() as progress:
        done = extract_folder(model, images, out, options.batch_size, device, progress, scale)
    unreadable = done.index["unreadable"]
    print(f"{len(done.index['images'])} images of {len(done.index['levels'])} levels: {plain(out)}")
    for level in done.index["levels"]:
        height, width = level["grid"]
        print(f"  {level['tensor']}  {level['channels']} x {height} x {width}  {level['dtype']}")
    for entry in unreadable[:TOP]:
        print(f"unreadable: {plain(entry['path'])} ({plain(entry['reason'])})")
    if len(unreadable) > TOP:
        print(f"unreadable: and {len(unreadable) - TOP} more")
    return done.exit_code


def _check(options: Namespace) -> None:
    """ValueError for options that do not go together."""
    check_network(options)
    if options.extractor and not options.normal:
        raise ValueError("--extractor compares with normal photographs: name their folder with --normal")
    if options.backbone and options.normal:
        raise ValueError("--normal goes with --extractor: a raw backbone compares with nothing")
