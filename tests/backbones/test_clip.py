"""CLIP's vision tower against open_clip's own forward and against a transformer written from the paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import plain_vit as plain
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adpretrain.backbones import BACKBONES
from adpretrain.backbones.clip import TOWERS, Tower, VisionTower, build
from adpretrain.backbones.weights import Source, Weights

SOURCE = Source("open_clip_model.safetensors", repo_id="nobody/tiny")
TOLERANCE = 1e-5
TINY = Tower(width=64, blocks=4, heads=4, patch=16, quick_gelu=True)
SIDES = [224, 160]


def clip_model(quick_gelu: bool = True, side: int = 224) -> open_clip.CLIP:
    """A whole small CLIP, text tower included, as open_clip builds it."""
    vision = {"layers": 4, "width": 64, "head_width": 16, "patch_size": 16, "image_size": side}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    return plain.lively(open_clip.CLIP(32, vision, text, quick_gelu=quick_gelu), spread=0.15)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    state = clip_model().state_dict()
    file = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    save_file({name: value.half() for name, value in state.items()}, file)  # OpenAI's are half precision
    return {name: value.half().float() for name, value in state.items()}, file


def tiny(file: Path, side: int = 224, levels: tuple[int, ...] = (1, 2, 4), tower: Tower = TINY) -> VisionTower:
    return build("tiny", Weights("tiny", SOURCE, path=str(file)), side, levels, tower)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("quick", [True, False])
def test_equals_the_library_s_forward(saved: tuple[dict[str, Tensor], Path], side: int, quick: bool) -> None:
    state, file = saved
    theirs, resized, pixels = clip_model(quick, side), dict(state), plain.images(side)
    open_clip.model.resize_pos_embed(resized, theirs)  # the library's own way to other sizes
    theirs.load_state_dict(resized)
    blocks = [theirs.visual.transformer.resblocks[index] for index in (0, 1, 3)]
    expected = plain.as_maps(plain.hooked(theirs, blocks, lambda: theirs.encode_image(pixels)))
    assert plain.error(tiny(file, side, tower=replace(TINY, quick_gelu=quick))(pixels), expected) < TOLERANCE
    other = tiny(file, side, tower=replace(TINY, quick_gelu=not quick))
    assert plain.error(other(pixels), expected) > 100 * TOLERANCE  # the two activations are told apart


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("quick", [True, False])
def test_equals_a_transformer_written_from_the_paper(
    saved: tuple[dict[str, Tensor], Path], side: int, quick: bool
) -> None:
    state, file = saved
    pixels = plain.images(side, seed=1)
    w = {name.removeprefix("visual."): v.double() for name, v in state.items() if name.startswith("visual.")}
    activation = plain.quick_gelu if quick else plain.gelu

    def pair(name: str, joint: str = ".") -> tuple[Tensor, Tensor]:
        return w[f"{name}{joint}weight"], w[f"{name}{joint}bias"]

    patches = torch.nn.functional.unfold(pixels.double(), 16, stride=16).transpose(1, 2)
    embedded = patches @ w["conv1.weight"].flatten(1).T
    positions = w["positional_embedding"]
    if side != 224:
        positions = plain.with_class_token(positions, lambda old: plain.pillow_bicubic(old, side // 16))
    tokens = torch.cat([w["class_embedding"].expand(2, 1, -1), embedded], 1) + positions
    tokens = plain.layer_norm(tokens, *pair("ln_pre"), 1e-5)
    names = [f"transformer.resblocks.{i}" for i in range(4)]
    blocks = [
        plain.Block(
            pair(f"{at}.ln_1"),
            pair(f"{at}.attn", ".in_proj_"),
            pair(f"{at}.attn.out_proj"),
            pair(f"{at}.ln_2"),
            plain.two_layers(pair(f"{at}.mlp.c_fc"), pair(f"{at}.mlp.c_proj"), activation),
        )
        for at in names
    ]
    expected = plain.block_outputs(tokens, blocks, heads=4, eps=1e-5)
    ours = tiny(file, side, (1, 2, 3, 4), replace(TINY, quick_gelu=quick))
    assert plain.error(ours(pixels), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "model"), [("clip-base", "ViT-B-16"), ("clip-large", "ViT-L-14"), ("openclip-huge", "ViT-H-14")]
)
def test_the_published_geometries_are_open_clip_s(name: str, model: str) -> None:
    vision = open_clip.get_model_config(model)["vision_cfg"]
    tower = TOWERS[name]
    assert (tower.width, tower.blocks, tower.patch) == (vision["width"], vision["layers"], vision["patch_size"])
    assert tower.width // tower.heads == vision.get("head_width", 64)
    tag = "laion2b_s32b_b79k" if tower.width == 1280 else "openai"
    published = open_clip.get_pretrained_cfg(model, tag)
    source = BACKBONES[name].source
    assert source is not None
    assert source.repo_id == published["hf_hub"].rstrip("/")
    assert source.filename == open_clip.constants.HF_SAFE_WEIGHTS_NAME
    assert tower.quick_gelu == (tag == "openai")
    preprocess = build(name, Weights(name, pretrained=False), 224, [1], replace(TINY, patch=tower.patch)).preprocess
    assert (preprocess.mean, preprocess.std) == (published["mean"], published["std"])
    assert BACKBONES[name].levels == tuple(tower.blocks * quarter // 4 for quarter in (1, 2, 3, 4))
    assert BACKBONES[name].channels == (tower.width,) * 4


def test_a_file_of_the_tower_alone_loads_and_others_are_refused(
    saved: tuple[dict[str, Tensor], Path], tmp_path: Path
) -> None:
    state, file = saved
    alone = {name.removeprefix("visual."): v for name, v in state.items() if name.startswith("visual.")}
    path, pixels = tmp_path / "tower.pt", plain.images(224)
    torch.save(alone, path)
    assert all(torch.equal(a, b) for a, b in zip(tiny(path)(pixels), tiny(file)(pixels), strict=True))
    torch.save({name: value for name, value in alone.items() if "resblocks.2" not in name}, path)
    with pytest.raises(ValueError, match=r"tower\.pt is not a weights file of tiny: it lacks 12 of its weights"):
        tiny(path)
    torch.save({name: value for name, value in state.items() if not name.startswith("visual.")}, path)
    with pytest.raises(
        ValueError, match=r"tower\.pt is not a weights file of tiny: position embeddings of shape \[8, 32\]"
    ):
        tiny(path)
    torch.save({**alone, "positional_embedding": torch.zeros(200, 64)}, path)
    with pytest.raises(ValueError, match=r"position embeddings of shape \[200, 64\]"):
        tiny(path)


def test_levels_and_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"levels \[13\] do not fit clip-base: list some of its blocks 1, 2, .*12, in"):
        build("clip-base", Weights("clip-base"), 224, [13])
    with pytest.raises(ValueError, match=r"clip-large needs .* \(14 pixels\), got 230: choose 224 or 238"):
        build("clip-large", Weights("clip-large"), 230, [6])
