"""The flags that name a feature network, shared by the commands that take a raw backbone or an extractor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    import torch

    from adpretrain import ADExtractor
    from adpretrain.backbones import Backbone

EMBEDDED = "embedded"
EXTRACTOR_HELP = 'a folder written by save_pretrained, "org/name" on the Hugging Face Hub, or the embedded one'


def add_network(parser: ArgumentParser) -> None:
    """What says how a network is built and run, from --weights to --device; its name is the command's own."""
    parser.add_argument("--weights", type=str | None, default=None, help="local file or folder of backbone weights")
    parser.add_argument(
        "--revision", type=str | None, default=None, help="version of the backbone's weights on the Hub"
    )
    parser.add_argument("--levels", type=list[int] | None, default=None, help="blocks or stages, such as [3,6,9,12]")
    parser.add_argument("--image-size", type=int | None, default=None, help="input side in pixels; 224 by default")
    parser.add_argument(
        "--resize",
        type=Literal["squeeze", "crop"] | None,
        default=None,
        help="squeeze the whole photograph to a square (default), or crop its centre",
    )
    parser.add_argument(
        "--crop-from", type=int | None, default=None, help="shorter side before --resize crop, such as 256 for 224"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images in memory at once")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")


def check_network(options: Namespace) -> None:
    """ValueError for options that do not go together."""
    if (options.backbone is None) == (options.extractor is None):
        raise ValueError("name one network: --backbone NAME or --extractor FOLDER")
    fixed = [name for name in ("revision", "levels", "image_size", "resize", "crop_from") if options[name] is not None]
    if options.extractor and fixed:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in fixed)
        raise ValueError(f"{flags} cannot be given with --extractor: it was trained with its own")
    if options.batch_size < 1 or options.shots < 1:
        raise ValueError(f"--batch-size {options.batch_size} and --shots {options.shots}: expected at least 1")


def load_network(options: Namespace, device: torch.device) -> Backbone | ADExtractor:
    """The network that was named, on the device."""
    from adpretrain import ADExtractor
    from adpretrain.backbones import load_backbone

    if options.extractor:
        return ADExtractor.from_pretrained(options.extractor, device=device, weights=options.weights)
    backbone = load_backbone(
        options.backbone,
        revision=options.revision,
        weights=options.weights,
        image_size=options.image_size or 224,
        levels=options.levels,
        resize=options.resize or "squeeze",
        crop_from=options.crop_from,
    )
    return backbone.to(device)
