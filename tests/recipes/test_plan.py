"""The plan's arithmetic against what is counted and weighed: parameters, FLOPs, kept bytes, messages, checkpoints."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from running import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from adpretrain.config import BackboneConfig, LossConfig, OptimConfig, PretrainConfig, ProjectorConfig
from adpretrain.losses import angle_loss
from adpretrain.projector import FeatureProjector
from adpretrain.training import costs
from adpretrain.training.batches import LabelledBatch, thin

SMALL = PretrainConfig(
    backbone=BackboneConfig("lite0", 64),
    projector=ProjectorConfig(references=64, heads=4),
    optim=OptimConfig(batch_size=3),
)


def test_counts_of_dinov2_base_are_those_of_its_geometry() -> None:
    """Twelve blocks of 768, 257 tokens, 14 px patches; projectors of 2048 references, by hand."""
    counts = costs.count(PretrainConfig(backbone=BackboneConfig("dinov2-base"), optim=OptimConfig(precision="bf16")))
    width, tokens, references = 768, 256, 2048
    level = references * width + 13 * width**2 + 10 * width  # R, its linear map, q, kv, out, fc1, fc2, their biases
    assert counts.projector_parameters == 4 * level
    assert (counts.tokens, counts.widths) == ([tokens] * 4, [width] * 4)
    products = 12 * 12 * width**2  # weights of a block, twelve blocks
    forward = 2 * ((tokens + 1) * products + 12 * 2 * (tokens + 1) ** 2 * width + tokens * 14 * 14 * 3 * width)
    assert counts.backbone_flops == pytest.approx(forward, rel=1e-3)
    assert counts.backbone_bytes == pytest.approx(4 * 85.7e6, rel=1e-2)
    per_image = 4 * 2 * tokens * (10 * width**2 + 2 * references * width)  # q, out and MLP; attention to R
    shared = 4 * 2 * references * 3 * width**2 / 64  # keys and values, once for the step's 64 views
    assert counts.projector_flops == pytest.approx(per_image + shared, rel=1e-3)
    assert costs.checkpoint_bytes(counts) == 3 * 4 * 4 * level


def test_cross_attention_is_counted_with_its_context() -> None:
    """A projector that the references' residuals must be given; by hand, K being 4.33 on average."""
    config = dataclasses.replace(SMALL, projector=ProjectorConfig("cross_attention", heads=4))
    counts = costs.count(config)
    expected = 0
    for tokens, width in zip(counts.tokens, counts.widths, strict=True):
        inner = -(-width // 4) * 4
        expected += 2 * tokens * 2 * width * inner  # q, out
        expected += 2 * 4 * tokens * width * 2 * inner  # k, v
        expected += 2 * 2 * tokens * 4 * tokens * inner  # attention
        expected += 2 * tokens * 2 * width * 4 * width  # MLP
    assert counts.projector_flops == expected


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("architecture", ["learnable_kv", "self_cross_attention"])
def test_bytes_kept_for_the_backward_are_those_of_real_tensors(precision: Any, architecture: Any) -> None:
    shape = dataclasses.replace(SMALL.projector, architecture=architecture)
    config = dataclasses.replace(SMALL, optim=OptimConfig(precision=precision), projector=shape)
    shapes, contexts = [(3, 32, 4, 4), (3, 48, 4, 4)], [(3, 32, 32), (3, 32, 48)]
    projector = FeatureProjector([32, 48], config.projector)
    own = {parameter.untyped_storage().data_ptr() for parameter in projector.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        projector(*([torch.randn(*shape) for shape in levels] for levels in (shapes, contexts)))
    expected = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    assert costs.saved_bytes(config, shapes, contexts) == expected


def test_a_checkpoint_has_the_bytes_that_were_planned(tmp_path: Path) -> None:
    projector = FeatureProjector([256, 256], SMALL.projector)
    adam = torch.optim.Adam(projector.parameters())
    sum(level.sum() for level in projector([torch.randn(1, 256, 2, 2)] * 2)).backward()
    adam.step()
    torch.save({"extractor": projector.state_dict(), "optimizer": adam.state_dict()}, tmp_path / "step.pt")
    counts = costs.Counts(0, sum(parameter.numel() for parameter in projector.parameters()), [], [], [], 0, 0, 0)
    assert (tmp_path / "step.pt").stat().st_size == pytest.approx(costs.checkpoint_bytes(counts), rel=0.01)


def small_counts() -> Any:
    return costs.Counts(0, 0, [64, 16], [64, 16], [24, 40], 0, 0, 0)


class Products(TorchDispatchMode):
    """FLOPs of matrix products, those in place included, which torch's own counter leaves out."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_flops_of_the_angle_loss_are_counted() -> None:
    counts, share = small_counts(), 0.25
    with Products() as products:
        for tokens, width in zip(counts.tokens, counts.widths, strict=True):
            anomalous = torch.arange(3 * tokens) % 4 == 0
            views = [torch.randn(3 * tokens, width, requires_grad=True) for _ in range(2)]
            angle_loss(*views, anomalous, torch.zeros(width)).backward()
    assert costs.loss_flops(SMALL, counts, share, gpus=1) == products.flops


@pytest.mark.parametrize("marked", [0, 13, 31, 32, 33, 128, 230, 256])
@pytest.mark.parametrize("kept", [9, 64, 256])
def test_anomalous_tokens_are_those_that_thinning_keeps(marked: int, kept: int) -> None:
    """Of 256 tokens ``marked`` are anomalous; a level of 16 stays whole where more than that are kept."""
    sizes = [256, 16]
    labels = [(torch.arange(size) < marked * size // 256).view(1, 1, size) for size in sizes]
    views = [[torch.zeros(1, 2, 1, size) for size in sizes]]
    found = thin(LabelledBatch(views, labels, labels, []), [(0, 0)], kept, seed=1).labels
    for size, level in zip(sizes, found, strict=True):
        counts = costs.Counts(0, 0, [size], [min(size, kept)], [2], 0, 0, 0)
        share = marked * size // 256 / size
        assert costs.anomalous_tokens(counts, share) == [pytest.approx(int(level.sum()), abs=1e-9)]
        assert costs.gathered_rows(SMALL, counts, share, 4) == [2 * 3 * 4 * int(level.sum())]


def counted_messages(rank: int) -> list[tuple[str, int]]:
    """Kinds and bytes of all messages of a step's angle losses, as torch.distributed is asked for them."""
    torch.manual_seed(rank)
    dist.init_process_group("gloo")
    messages: list[tuple[str, int]] = []

    def counted(name: str, size: Callable[..., int]) -> None:
        send = getattr(dist, name)
        setattr(dist, name, lambda *given, **named: (messages.append((name, size(*given))), send(*given, **named))[1])

    counted("all_gather", lambda parts, own: sum(part.nbytes for part in parts) if own.is_floating_point() else 0)
    counted("all_reduce", lambda tensor, *rest: tensor.nbytes)
    sys.path.insert(0, str(ROOT / "recipes"))
    counts = small_counts()
    for tokens, width in zip(counts.tokens, counts.widths, strict=True):
        views = [torch.randn(3 * tokens, width, requires_grad=True) for _ in range(2)]
        anomalous = torch.arange(3 * tokens) % 4 == 0
        angle_loss(*views, anomalous, torch.zeros(width), group=dist.group.WORLD).backward()
    dist.destroy_process_group()
    return messages


def test_gathered_bytes_are_those_of_two_processes(tmp_path: Path) -> None:
    counts = small_counts()
    rows = costs.gathered_rows(SMALL, counts, 0.25, 2)
    planned = costs.gather_bytes(SMALL, counts, 0.25, 2)
    for messages in together(2, tmp_path, counted_messages):
        gathered = sum(size for name, size in messages if name == "all_gather")
        summed = sum(size for name, size in messages if name == "all_reduce")
        backward = sum(4 * row * (width + 1) for row, width in zip(rows, counts.widths, strict=True))
        assert planned + backward == gathered + summed
        assert gathered == sum(4 * row * width for row, width in zip(rows, counts.widths, strict=True))
    alone = dataclasses.replace(SMALL, loss=LossConfig(cross_process=False))
    assert costs.gather_bytes(alone, counts, 0.25, 64) == 0
    assert costs.loss_flops(alone, counts, 0.25, 64) == costs.loss_flops(SMALL, counts, 0.25, 1)


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import plan

    flags = ["--config", str(ROOT / "recipes/configs/demo.yaml"), "--gpus", "16", "--image-side", "64"]
    assert plan.main(flags) == 0
    said = capsys.readouterr().out
    assert "16 GPUs on 2 nodes, 64 images a GPU and step" in said
    assert "(64 enter)" in said  # of 784 tokens: `tokens` of the configuration
    assert "a checkpoint, written by the first process" in said
    assert said.rstrip().endswith("all images have that share of anomalous tokens.")
    assert plan.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read configuration" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        plan.main([*flags, "--node-gbit", "nan"])
    assert "error: --node-gbit nan: expected a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "--gpus 0 must be more than 0"),
        (["--gpus", "-3"], "--gpus -3 must be more than 0"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0 must be more than 0"),
        (["--image-side", "0"], "--image-side 0 must be more than 0"),
        (["--shares", "0.1", "0"], "--shares [0.1, 0.0] must be more than 0"),
    ],
)
def test_a_number_that_nothing_can_be_planned_with_is_named(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    import plan

    assert plan.main(["--config", str(ROOT / "recipes/configs/demo.yaml"), *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
