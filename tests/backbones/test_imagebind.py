"""ImageBind's vision tower against a transformer written from the paper that sees a two-frame clip in three dimensions.

There is no installable library to compare with; the state dict has the names of the released file.
"""

from __future__ import annotations

from pathlib import Path

import plain_vit as plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.backbones import BACKBONES
from adpretrain.backbones.clip import TOWERS, Tower, VisionTower
from adpretrain.backbones.imagebind import HUGE, build
from adpretrain.backbones.weights import Source, Weights

SOURCE = Source("imagebind_huge.pth", url="https://localhost/imagebind_huge.pth")
TOLERANCE = 1e-5
WIDTH, BLOCKS, HEADS = 48, 4, 4
TINY = Tower(WIDTH, BLOCKS, HEADS, patch=14, eps=1e-6, antialias=False)


def released(seed: int = 0) -> dict[str, Tensor]:
    """A small file with the released names: a vision part and pieces of other modalities."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, spread: float = 0.15, around: float = 0.0) -> Tensor:
        return around + spread * torch.randn(shape, generator=generator)

    trunk, head, stem = "modality_trunks.vision", "modality_heads.vision", "modality_preprocessors.vision"
    # The embedded tokens are small, so that the norms' eps shows.
    state = {
        f"{stem}.cls_token": draw(1, 1, WIDTH, spread=0.01),
        f"{stem}.pos_embedding_helper.pos_embed": draw(1, 257, WIDTH, spread=0.01),
        f"{stem}.rgbt_stem.proj.1.weight": draw(WIDTH, 3, 2, 14, 14, spread=0.0003),
        f"{trunk}.pre_transformer_layer.0.weight": draw(WIDTH, around=1.0),
        f"{trunk}.pre_transformer_layer.0.bias": draw(WIDTH),
        f"{head}.0.weight": draw(WIDTH, around=1.0),
        f"{head}.0.bias": draw(WIDTH),
        f"{head}.2.weight": draw(32, WIDTH),
    }
    for i in range(BLOCKS):
        at = f"{trunk}.blocks.{i}"
        for norm in ("norm_1", "norm_2"):
            state |= {f"{at}.{norm}.weight": draw(WIDTH, around=1.0), f"{at}.{norm}.bias": draw(WIDTH)}
        for name, out, into in (
            ("attn.in_proj_", 3 * WIDTH, WIDTH),
            ("attn.out_proj.", WIDTH, WIDTH),
            ("mlp.fc1.", 4 * WIDTH, WIDTH),
            ("mlp.fc2.", WIDTH, 4 * WIDTH),
        ):
            state |= {f"{at}.{name}weight": draw(out, into), f"{at}.{name}bias": draw(out)}
    return state | {
        "modality_preprocessors.text.pos_embed": draw(1, 77, 32),
        "modality_preprocessors.audio.rgbt_stem.proj.weight": draw(24, 1, 16, 16),
        "modality_trunks.audio.blocks.0.attn.bias_k": draw(1, 1, 24),
        "modality_trunks.text.blocks.0.norm_1.weight": draw(32),
        "modality_heads.text.proj.0.weight": draw(32),
        "modality_postprocessors.text.1.log_logit_scale": draw(1),
    }


def expected_maps(state: dict[str, Tensor], pixels: Tensor, side: int, eps: float = 1e-6) -> list[Tensor]:
    w = {name: value.double() for name, value in state.items()}
    stem, trunk = "modality_preprocessors.vision", "modality_trunks.vision"
    clip = pixels.double()[:, :, None].repeat(1, 1, 2, 1, 1)  # one frame, shown twice
    patches = F.conv3d(clip, w[f"{stem}.rgbt_stem.proj.1.weight"], stride=(2, 14, 14)).flatten(2).transpose(1, 2)
    positions = w[f"{stem}.pos_embedding_helper.pos_embed"][0]
    if side != 224:
        grid = side // 14
        positions = plain.with_class_token(positions, lambda old: plain.bicubic(old, grid, grid / 16))
    tokens = torch.cat([w[f"{stem}.cls_token"].expand(len(pixels), -1, -1), patches], 1) + positions

    def pair(name: str, joint: str = ".") -> tuple[Tensor, Tensor]:
        return w[f"{name}{joint}weight"], w[f"{name}{joint}bias"]

    tokens = plain.layer_norm(tokens, *pair(f"{trunk}.pre_transformer_layer.0"), eps)
    names = [f"{trunk}.blocks.{i}" for i in range(BLOCKS)]
    blocks = [
        plain.Block(
            pair(f"{at}.norm_1"),
            pair(f"{at}.attn", ".in_proj_"),
            pair(f"{at}.attn.out_proj"),
            pair(f"{at}.norm_2"),
            plain.two_layers(pair(f"{at}.mlp.fc1"), pair(f"{at}.mlp.fc2"), plain.gelu),
        )
        for at in names
    ]
    return plain.block_outputs(tokens, blocks, HEADS, eps)


def tiny(file: Path, side: int = 224, levels: tuple[int, ...] = (1, 2, 3, 4)) -> VisionTower:
    return build("imagebind", Weights("imagebind", SOURCE, path=str(file)), side, levels, TINY)


@pytest.mark.parametrize("side", [224, 112, 252])
def test_equals_a_transformer_that_sees_a_clip(side: int, tmp_path: Path) -> None:
    state, pixels = released(), plain.images(side)
    torch.save(state, tmp_path / "imagebind_huge.pth")
    backbone = tiny(tmp_path / "imagebind_huge.pth", side)
    ours = backbone(pixels)
    assert plain.error(ours, expected_maps(state, pixels, side)) < TOLERANCE
    assert plain.error(ours, expected_maps(state, pixels, side, eps=1e-5)) > 10 * TOLERANCE  # CLIP's eps is another
    some = tiny(tmp_path / "imagebind_huge.pth", side, (2, 4))(pixels)
    assert all(torch.equal(a, b) for a, b in zip(some, [ours[1], ours[3]], strict=True))


def test_another_file_is_refused(tmp_path: Path) -> None:
    file, state = tmp_path / "w.pth", released()
    torch.save({name: value for name, value in state.items() if "vision" not in name}, file)
    with pytest.raises(ValueError, match=r"w\.pth is not imagebind_huge\.pth: it has no weights named modality_trunks"):
        tiny(file)
    torch.save({name: value for name, value in state.items() if "vision.blocks.2" not in name}, file)
    with pytest.raises(ValueError, match=r"lacks 12 of its weights \(transformer\.resblocks\.2"):
        tiny(file)
    torch.save({**state, "modality_trunks.vision.blocks.0.gamma": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="holds 1 unknown ones"):
        tiny(file)


def test_the_huge_tower_is_a_vit_h_14() -> None:
    free = TOWERS["openclip-huge"]
    assert (HUGE.width, HUGE.blocks, HUGE.heads, HUGE.patch) == (free.width, free.blocks, free.heads, free.patch)
    assert (HUGE.eps, HUGE.quick_gelu) == (1e-6, False)
    assert BACKBONES["imagebind"].levels == (8, 16, 24, 32)
    assert BACKBONES["imagebind"].terms.product == "no"
