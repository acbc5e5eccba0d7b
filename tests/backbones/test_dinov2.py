"""DINOv2 against transformers' own forward and against a transformer written from the paper, at small sizes."""

from __future__ import annotations

from pathlib import Path

import plain_vit as plain
import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from adpretrain.backbones import BACKBONES, load_backbone
from adpretrain.backbones.dinov2 import SIZES, DinoV2, build
from adpretrain.backbones.weights import Source, Weights

SOURCE = Source("model.safetensors", repo_id="nobody/tiny")
TOLERANCE = 1e-5
SIDES = [224, 182]


def config(swiglu: bool = False) -> Dinov2Config:
    return Dinov2Config(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )


def reference(swiglu: bool = False) -> Dinov2Model:
    network = Dinov2Model(config(swiglu))
    return plain.lively(network, spread=0.1)


def tiny(path: Path, side: int = 224, levels: tuple[int, ...] = (1, 2, 4), swiglu: bool = False) -> DinoV2:
    return build("tiny", Weights("tiny", SOURCE, path=str(path)), side, levels, config(swiglu))


def original_grid(network: Dinov2Model, side: int) -> Tensor:
    """The position embeddings [1, 1 + G * G, C] of the original code: bicubic, scale (G + 0.1) / 37."""
    grid = side // 14
    positions = network.embeddings.position_embeddings.detach()[0].double()
    return plain.with_class_token(positions, lambda old: plain.bicubic(old, grid, (grid + 0.1) / 37))[None]


@pytest.fixture(scope="module", params=[False, True], ids=["mlp", "swiglu"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dinov2Model, Path, bool]:
    network = reference(request.param)
    folder = tmp_path_factory.mktemp("tiny")
    network.save_pretrained(folder)
    return network, folder, request.param


@pytest.mark.parametrize("side", SIDES)
def test_equals_the_library_s_forward_with_the_original_grid(saved: tuple[Dinov2Model, Path, bool], side: int) -> None:
    network, folder, swiglu = saved
    pixels = plain.images(side)
    ours = tiny(folder, side, (1, 2, 4), swiglu)(pixels)
    theirs = Dinov2Model(network.config).eval()
    theirs.load_state_dict(network.state_dict())
    blocks = [theirs.encoder.layer[index] for index in (0, 1, 3)]
    own_grid = plain.as_maps(plain.hooked(theirs, blocks, lambda: theirs(pixels)))
    theirs.embeddings.position_embeddings = torch.nn.Parameter(original_grid(network, side).float())
    expected = plain.as_maps(plain.hooked(theirs, blocks, lambda: theirs(pixels)))
    assert plain.error(ours, expected) < TOLERANCE
    assert plain.error(ours, own_grid) > 100 * TOLERANCE  # the library's own interpolation is another one


@pytest.mark.parametrize("side", SIDES)
def test_equals_a_transformer_written_from_the_paper(saved: tuple[Dinov2Model, Path, bool], side: int) -> None:
    network, folder, swiglu = saved
    pixels = plain.images(side, seed=1)
    original = original_layout(network, swiglu)
    w = {name: value.double() for name, value in original.items()}

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def mlp(i: int) -> object:
        if not swiglu:
            return plain.two_layers(pair(f"blocks.{i}.mlp.fc1"), pair(f"blocks.{i}.mlp.fc2"), plain.gelu)

        def gated(x: Tensor) -> Tensor:
            gate, up = torch.nn.functional.linear(x, *pair(f"blocks.{i}.mlp.w12")).chunk(2, -1)
            return torch.nn.functional.linear(gate * torch.sigmoid(gate) * up, *pair(f"blocks.{i}.mlp.w3"))

        return gated

    patches = torch.nn.functional.unfold(pixels.double(), 14, stride=14).transpose(1, 2)
    embedded = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    tokens = torch.cat([w["cls_token"].expand(2, -1, -1), embedded], 1) + original_grid(network, side)
    blocks = [
        plain.Block(
            pair(f"blocks.{i}.norm1"),
            pair(f"blocks.{i}.attn.qkv"),
            pair(f"blocks.{i}.attn.proj"),
            pair(f"blocks.{i}.norm2"),
            mlp(i),
            w[f"blocks.{i}.ls1.gamma"],
            w[f"blocks.{i}.ls2.gamma"],
        )
        for i in range(4)
    ]
    expected = plain.block_outputs(tokens, blocks, heads=4, eps=1e-6)
    assert plain.error(tiny(folder, side, (1, 2, 3, 4), swiglu)(pixels), expected) < TOLERANCE


def original_layout(network: Dinov2Model, swiglu: bool) -> dict[str, Tensor]:
    """The weights under the names of the original release."""
    parts = network.embeddings
    state = {
        "cls_token": parts.cls_token,
        "pos_embed": parts.position_embeddings,
        "mask_token": parts.mask_token,
        "patch_embed.proj.weight": parts.patch_embeddings.projection.weight,
        "patch_embed.proj.bias": parts.patch_embeddings.projection.bias,
        "norm.weight": network.layernorm.weight,
        "norm.bias": network.layernorm.bias,
    }
    for i, block in enumerate(network.encoder.layer):
        weights = dict(block.named_parameters())
        old = any(name.startswith("attention.attention") for name in weights)
        query = "attention.attention.{}" if old else "attention.{}_proj"
        output = "attention.output.dense" if old else "attention.o_proj"
        for kind in ("weight", "bias"):
            parts_of_qkv = ("query", "key", "value") if old else ("q", "k", "v")
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [weights[f"{query.format(part)}.{kind}"] for part in parts_of_qkv]
            )
            state[f"blocks.{i}.attn.proj.{kind}"] = weights[f"{output}.{kind}"]
            for norm in ("norm1", "norm2"):
                state[f"blocks.{i}.{norm}.{kind}"] = weights[f"{norm}.{kind}"]
            if not swiglu:
                for layer in ("fc1", "fc2"):
                    state[f"blocks.{i}.mlp.{layer}.{kind}"] = weights[f"mlp.{layer}.{kind}"]
            elif old:
                state[f"blocks.{i}.mlp.w12.{kind}"] = weights[f"mlp.weights_in.{kind}"]
                state[f"blocks.{i}.mlp.w3.{kind}"] = weights[f"mlp.weights_out.{kind}"]
            else:
                halves = [weights[f"mlp.{half}_proj.{kind}"] for half in ("gate", "up")]
                state[f"blocks.{i}.mlp.w12.{kind}"] = torch.cat(halves)
                state[f"blocks.{i}.mlp.w3.{kind}"] = weights[f"mlp.down_proj.{kind}"]
        for number in (1, 2):
            state[f"blocks.{i}.ls{number}.gamma"] = weights[f"layer_scale{number}.lambda1"]
    return {name: value.detach().clone() for name, value in state.items()}


def test_the_original_release_s_file_loads_too(saved: tuple[Dinov2Model, Path, bool], tmp_path: Path) -> None:
    network, folder, swiglu = saved
    torch.save(original_layout(network, swiglu), tmp_path / "dinov2_tiny_pretrain.pth")
    pixels = plain.images(224)
    expected = tiny(folder, swiglu=swiglu)(pixels)
    ours = tiny(tmp_path / "dinov2_tiny_pretrain.pth", swiglu=swiglu)(pixels)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_file_of_another_network_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = original_layout(reference(), swiglu=False)
    file = tmp_path / "w.pth"
    torch.save({name: value for name, value in state.items() if "blocks.3." not in name}, file)
    with pytest.raises(
        ValueError, match=r"w\.pth is not a weights file of tiny: it lacks \d+ of its weights .*layer\.3"
    ):
        tiny(file)
    torch.save({**state, "register_tokens": torch.zeros(1, 4, 48)}, file)
    with pytest.raises(ValueError, match=r"holds 1 unknown ones \(register_tokens\)"):
        tiny(file)
    torch.save({**state, "norm.weight": torch.zeros(64)}, file)
    with pytest.raises(ValueError, match=r"has layernorm\.weight of shape \[64\], expected \[48\]"):
        tiny(file)
    assert capfd.readouterr() == ("", "")  # the library's own reports would say it twice


def test_the_grid_of_the_trained_size_is_left_alone() -> None:
    network = reference()
    before = network.embeddings.position_embeddings.detach().clone()
    assert torch.equal(DinoV2(network, "tiny", 518, [4]).network.embeddings.position_embeddings, before)


def test_levels_and_sizes_that_do_not_fit_are_named() -> None:
    for levels in ([], [0], [5], [2, 1], [1, 1], [True], ["2"]):
        with pytest.raises(ValueError, match=r"do not fit tiny: list some of its blocks 1, 2, 3, 4, in increasing"):
            build("tiny", Weights("tiny", SOURCE), 224, levels, config())  # type: ignore[arg-type]
    for side, near in ((225, "224 or 238"), (13, "14"), (-14, "14")):
        with pytest.raises(ValueError, match=rf"multiple of its patch \(14 pixels\), got {side}: choose {near}$"):
            build("tiny", Weights("tiny", SOURCE), side, [1], config())
    backbone = DinoV2(reference(), "tiny", 112, [1])
    with pytest.raises(ValueError, match=r"takes images \[B, 3, 112, 112\] of floats with B > 0, got"):
        backbone(plain.images(126))


def test_the_published_sizes_have_as_many_parameters_as_timm_s() -> None:
    import timm

    for name, size in SIZES.items():
        with torch.device("meta"):
            ours = Dinov2Model(size.config())
            theirs = timm.create_model(f"vit_{name.removeprefix('dinov2-')}_patch14_dinov2")
        extra = size.width  # the mask token, which timm leaves out
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + extra
        depth = len(theirs.blocks)
        assert BACKBONES[name].levels == tuple(depth * quarter // 4 for quarter in (1, 2, 3, 4))
        assert BACKBONES[name].channels == (theirs.embed_dim,) * 4


def test_the_base_size_at_full_width() -> None:
    backbone = load_backbone("dinov2-base", pretrained=False)
    levels = backbone(plain.images(224, count=1))
    assert [tuple(level.shape) for level in levels] == [(1, 768, 16, 16)] * 4
    assert backbone.preprocess.mean == (0.485, 0.456, 0.406)
