"""The extractor: saved and loaded in a new process, damaged folders, references, autocast, training on its output."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import output, start, together, wait
from safetensors.torch import load_file, save_file
from torch import Tensor

from adpretrain import ADExtractor
from adpretrain.backbones import Backbone, FeatureMaps, load_backbone
from adpretrain.config import ProjectorConfig
from adpretrain.local_scale import LocalScale
from adpretrain.preprocess import Preprocess
from adpretrain.projector import ARCHITECTURES, FeatureProjector
from adpretrain.references import ReferenceBank
from adpretrain.residual import residual_features
from adpretrain.saved import FORMAT_VERSION

SIDE = 64
PROVENANCE = {"seed": 0, "data": "noise", "note": "none: a text that YAML would take for a mapping"}
HALF = (0.5, 0.5, 0.5)  # mean and std of the pixels of Lite0
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def make(architecture: str | None = "learnable_kv", scaled: bool = True, **projector: Any) -> ADExtractor:
    torch.manual_seed(0)
    backbone = load_backbone("lite0", image_size=SIDE, levels=[1, 2, 3], finest=8)
    scale = LocalScale(len(backbone.channels)) if scaled else None
    if scale:
        scale.fit([backbone(images(3, seed=seed)) for seed in (10, 11)])
    config = None
    if architecture:
        config = ProjectorConfig(architecture, **{"references": 64, "heads": 4, "mlp_ratio": 2.0, **projector})
    trained = FeatureProjector(backbone.channels, config) if config else None
    for parameter in trained.parameters() if trained else ():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)  # untrained, it would return its input
    return ADExtractor(
        backbone,
        projector=trained,
        local_scale=scale,
        centers=[torch.randn(width) for width in backbone.channels],
        provenance=PROVENANCE,
    )


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def features_of(rank: int, folder: Path, references: Tensor, query: Tensor) -> list[Tensor]:
    extractor = ADExtractor.from_pretrained(folder).set_references(references)
    assert not extractor.training
    return extractor(query)


def save_zeros(rank: int, folder: Path, limit: int) -> None:
    """Over an extractor, where no file may have more bytes."""
    extractor = ADExtractor.from_pretrained(folder)
    for parameter in extractor.projector.parameters():
        torch.nn.init.zeros_(parameter)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    extractor.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make().set_references(images(2, 1)).save_pretrained(tmp_path_factory.mktemp("saved") / "extractor")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved extractor, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "extractor"))


def test_a_new_process_gives_bit_equal_features(saved: Path, tmp_path: Path) -> None:
    query, references = images(2, 2), images(2, 1)
    (theirs,) = together(1, tmp_path, features_of, saved, references, query)
    ours = make().set_references(references)(query)
    assert len(theirs) == 3
    assert same(ours, theirs)
    assert all(x.std() > 0 for x in ours)


def test_the_folder_holds_no_references_and_no_backbone(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == ["README.md", CONFIG, WEIGHTS]
    weights = load_file(saved / WEIGHTS)
    extractor = make()
    expected = {name for name in extractor.state_dict() if not name.startswith("backbone.")}
    assert set(weights) == expected
    assert {name.split(".")[0] for name in weights} == {"projector", "local_scale", *(f"center_{i}" for i in range(3))}
    banks = extractor.encode_references(images(2, 1))
    rows = torch.cat([row.flatten() for row in weights.values() if row.is_floating_point()]).sort().values
    for bank in banks.levels:  # not one of the references' numbers is in the file, beyond chance
        found = torch.isin(bank.flatten(), rows).float().mean()
        assert found < 0.01
    assert ADExtractor.from_pretrained(saved).references is None


def test_the_config_comes_back(saved: Path) -> None:
    loaded = ADExtractor.from_pretrained(saved)
    assert loaded.config == make().config
    assert loaded.config.provenance == PROVENANCE
    assert loaded.preprocess == loaded.backbone.preprocess
    assert json.loads((saved / CONFIG).read_text())["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("architecture", [None, *ARCHITECTURES])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_architecture_saves_and_loads(architecture: str | None, scaled: bool, tmp_path: Path) -> None:
    extractor = make(architecture, scaled, references=16)
    loaded = ADExtractor.from_pretrained(extractor.save_pretrained(tmp_path / "extractor"))
    banks, query = extractor.encode_references(images(2, 1)), images(2, 2)
    assert same(loaded(query, banks), extractor(query, banks))


def test_a_crop_is_saved_with_the_extractor(tmp_path: Path) -> None:
    backbone = load_backbone("lite0", image_size=SIDE, resize="crop", crop_from=72)
    loaded = ADExtractor.from_pretrained(ADExtractor(backbone).save_pretrained(tmp_path / "extractor"))
    assert loaded.preprocess == backbone.preprocess == Preprocess(SIDE, 72, HALF, HALF, "bicubic")
    content = json.loads((tmp_path / "extractor" / CONFIG).read_text())
    assert (content["backbone"]["resize"], content["backbone"]["crop_from"]) == ("crop", 72)
    assert content["preprocess"]["crop_from"] == 72
    assert "shorter side of 72 pixels and cropped" in (tmp_path / "extractor" / "README.md").read_text()


def test_a_folder_of_an_earlier_version_squeezes_as_it_did(folder: Path) -> None:
    """They called the side that photographs were squeezed to ``resize``, and knew no crop."""
    edit_config(folder, preprocess__crop_from=None, backbone__resize=None, backbone__crop_from=None)
    edit_config(folder, preprocess__resize=SIDE)
    expected = Preprocess(SIDE, None, HALF, HALF, "bicubic")
    assert ADExtractor.from_pretrained(folder).preprocess == make().preprocess == expected


def as_version_0_1_wrote_it(folder: Path, conditioning: bool, **changes: Any) -> None:
    edit_config(folder, local_scale=None, backbone__finest=None, fingerprint=None)
    edit_config(folder, conditioning=conditioning, preprocess__crop_from=None, preprocess__resize=SIDE, **changes)


def test_a_folder_of_version_0_1_without_conditioning_loads(tmp_path: Path) -> None:
    backbone = load_backbone("lite0", image_size=SIDE)
    extractor = ADExtractor(backbone).set_references(images(2, 1))
    as_version_0_1_wrote_it(folder := extractor.save_pretrained(tmp_path / "old"), conditioning=False)
    loaded = ADExtractor.from_pretrained(folder).set_references(images(2, 1))
    assert loaded.config.local_scale is None
    assert same(loaded(images(2)), extractor(images(2)))


def test_a_folder_of_version_0_1_with_what_is_gone_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = ADExtractor(load_backbone("lite0", image_size=SIDE)).save_pretrained(tmp_path / "old")
    as_version_0_1_wrote_it(folder, conditioning=False, backbone__name="filterbank")
    with pytest.raises(ValueError, match=r"'filterbank' of adpretrain 0\.1 is gone: use the extractor 'embedded'"):
        ADExtractor.from_pretrained(folder)
    edit_config(folder, conditioning=True, backbone__name="lite0")
    with pytest.raises(ValueError, match=r"with conditioning: it centred every photograph .* pretrain again"):
        ADExtractor.from_pretrained(folder)


# Damaged folders


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        if value is None:
            del part[last]
        else:
            part[last] = value
    (folder / CONFIG).write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def _nan(weights: dict[str, Tensor]) -> None:
    weights["center_1"][3] = float("nan")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer": (
        lambda f: edit_config(f, format_version=FORMAT_VERSION + 1, library_version="9.9"),
        rf"has format version {FORMAT_VERSION + 1}, written by adpretrain 9\.9.*upgrade adpretrain",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), r"has no config\.json: expected a folder written by"),
    "garbage config": (lambda f: (f / CONFIG).write_text("{"), r"cannot read .*config\.json"),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), r"cannot read .*config\.json"),
    "list config": (lambda f: (f / CONFIG).write_text("[1]"), r"config\.json: the top level must be a mapping"),
    "unknown key": (lambda f: edit_config(f, matchnig="l2"), r"unknown key matchnig \(did you mean matching\?\)"),
    "no backbone": (lambda f: edit_config(f, backbone=None), r"config\.json: key backbone is missing"),
    "no preprocess": (lambda f: edit_config(f, preprocess=None), r"config\.json: key preprocess is missing"),
    "unknown backbone": (lambda f: edit_config(f, backbone__name="resnet9000"), "'resnet9000' is unknown.*lite0"),
    "bad type": (lambda f: edit_config(f, channels="many"), r"(?s)config\.json.*channels"),
    "bad metric": (lambda f: edit_config(f, matching="l7"), "'l7' is unknown"),
    "bad projector": (lambda f: edit_config(f, projector__heads="four"), r"(?s)config\.json.*heads"),
    "bad preprocess": (
        lambda f: edit_config(f, preprocess__crop_from=8),
        r"image_size 64 must be in 1\.\.crop_from \(8\)",
    ),
    "squeezed, then cropped": (
        lambda f: edit_config(f, preprocess__resize=80),
        r"config\.json: preprocess\.resize 80 is not image_size 64",
    ),
    "other backbone": (
        lambda f: edit_config(f, channels=[768] * 3),
        r"made on features of \[768, 768, 768\] channels.*'lite0' gives \[24, 40, 112\]",
    ),
    "other sizes": (
        lambda f: edit_config(f, projector__references=32),
        r"projector\.levels\.0\.references is \[64, 24\], its config says \[32, 24\]",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"cannot read weights .*model\.safetensors"),
    "truncated weights": (lambda f: _truncate(f / WEIGHTS), r"cannot read weights .*model\.safetensors"),
    "garbage weights": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), r"cannot read weights .*model\.safetensors"),
    "nan": (lambda f: edit_weights(f, _nan), r"model\.safetensors: center_1 holds NaN"),
    "missing weight": (lambda f: edit_weights(f, lambda w: w.pop("center_1")), "lacks center_1"),
    "surplus weight": (
        lambda f: edit_weights(f, lambda w: w.update({f"x{i}": torch.zeros(1) for i in range(5)})),
        "holds unknown weights x0, x1, x2 and 2 more",
    ),
    "gone": (shutil.rmtree, "is not a folder: expected a folder written by save_pretrained"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_says_why(folder: Path, damage: str) -> None:
    inflict, message = DAMAGE[damage]
    inflict(folder)
    with pytest.raises(ValueError, match=message):
        ADExtractor.from_pretrained(folder)


# Saving


def test_saving_again_replaces_the_earlier_extractor(folder: Path) -> None:
    (folder / "assets").mkdir()
    for picture in ("curves.png", "assets/heatmap-1.png"):  # of the earlier one
        (folder / picture).write_bytes(b"")
    make(None).save_pretrained(folder)
    assert ADExtractor.from_pretrained(folder).projector is None
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["extractor"]


def test_saving_never_deletes_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "only_copy.txt").write_text("words")
    (tmp_path / "notes.txt").write_text("more words")
    with pytest.raises(ValueError, match=r"thesis holds other files \(only_copy\.txt\): save into a new folder"):
        make(None).save_pretrained(tmp_path / "thesis")
    with pytest.raises(ValueError, match=r"notes\.txt is a file: save into a new folder"):
        make(None).save_pretrained(tmp_path / "notes.txt")
    assert (tmp_path / "thesis" / "only_copy.txt").read_text() == "words"
    assert (tmp_path / "notes.txt").read_text() == "more words"
    (tmp_path / "new").mkdir()
    assert ADExtractor.from_pretrained(make(None).save_pretrained(tmp_path / "new")).projector is None


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make(None).save_pretrained(tmp_path / "file" / "run")
    assert os.listdir(tmp_path) == ["file"]


def test_a_save_that_runs_out_of_space_leaves_the_earlier_extractor(folder: Path, tmp_path: Path) -> None:
    """The file size limit stops the write of the weights after 20 kB, as a full disk would."""
    before = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    log = tmp_path / "log"
    wait(start(1, log, save_zeros, folder, 20_000), log, expected=1)
    assert "File too large" in output(log)
    assert {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)} == before
    assert sorted(os.listdir(folder.parent)) == ["extractor", "log.0"]
    ADExtractor.from_pretrained(folder)


# Features


@pytest.mark.parametrize("matching", ["l2", "cosine"])
def test_without_projector_and_local_scale_the_features_are_the_residuals(matching: str) -> None:
    backbone = load_backbone("lite0", image_size=SIDE)
    extractor = ADExtractor(backbone, matching=matching).set_references(images(3, 1))
    each = [backbone(image[None]) for image in images(3, 1)]  # a batch may give other last bits
    levels = [torch.cat(level) for level in zip(*each, strict=True)]
    banks = [level.flatten(2).transpose(1, 2).reshape(1, -1, level.shape[1]) for level in levels]
    assert same(extractor.references.levels, banks)
    assert same(extractor(images(2)), residual_features(backbone(images(2)), banks, matching))


@pytest.mark.parametrize("architecture", [None, "learnable_kv", "self_cross_attention"])
def test_references_per_image_equal_shared_ones_one_at_a_time(architecture: str | None) -> None:
    extractor = make(architecture)
    query = images(3)
    references = images(6, 1).view(3, 2, 3, SIDE, SIDE)
    together = extractor(query, extractor.encode_references(references))
    for index in range(3):
        alone = extractor(query[index : index + 1], extractor.encode_references(references[index]))
        for all_of_them, one in zip(together, alone, strict=True):
            torch.testing.assert_close(all_of_them[index], one[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shots", [1, 2])
def test_references_of_one_call_do_not_stay(shots: int) -> None:
    """The product scale is cached for the references that were set, never for those of a call."""
    extractor, query = make(), images(2)
    banks = extractor.encode_references(images(shots, 5) * 0.3)
    extractor.set_references(images(2, 1))
    first = extractor(query)
    other = extractor(query, banks)
    assert not same(first, other)
    assert same(extractor(query), first)
    assert same(extractor.set_references(banks)(query), other)
    assert same(extractor.set_references(images(2, 1))(query), first)


def test_the_baseline_is_the_same_up_to_the_residuals() -> None:
    extractor = make().set_references(images(2, 1))
    raw = extractor.without_projector()
    assert same(raw(images(2)), make(None).set_references(images(2, 1))(images(2)))
    with torch.inference_mode():
        projected = extractor.projector(raw(images(2)))
    assert same(projected, extractor(images(2)))


def test_autocast_is_close_and_full_precision_returns() -> None:
    extractor = make().set_references(images(2, 1))
    single = extractor(images(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = extractor(images(2))
    assert same(extractor(images(2)), single)
    assert not same(half, single)
    for a, b in zip(half, single, strict=True):
        assert (a.float() - b).norm() < 0.2 * b.norm()  # a difference of features has less digits than they


def test_a_layer_can_train_on_the_features() -> None:
    extractor = make().set_references(images(2, 1))
    features = extractor(images(2))[0]
    assert not features.is_inference()
    assert not features.requires_grad
    layer = torch.nn.Conv2d(features.shape[1], 1, 1)
    layer(features).sum().backward()
    assert torch.allclose(layer.weight.grad.flatten(), features.sum((0, 2, 3)), rtol=1e-4, atol=1e-3)
    features += 1  # inference tensors would refuse this


def test_moving_moves_the_references() -> None:
    extractor = make(None, scaled=False).set_references(images(2, 1))
    extractor.to(torch.float64)
    assert {bank.dtype for bank in extractor.references.levels} == {torch.float64}


def test_reference_errors_say_what_to_do() -> None:
    extractor = make(None)
    with pytest.raises(ValueError, match=r"call set_references\(normal_images\) first"):
        extractor(images(1))
    for wrong in (torch.zeros(3, SIDE, SIDE), torch.zeros(1, 0, 3, SIDE, SIDE)):
        with pytest.raises(ValueError, match=r"\[K, 3, S, S\] or \[B, K, 3, S, S\] with K > 0"):
            extractor.set_references(wrong)
    with pytest.raises(ValueError, match=r"images \[B, 3, 64, 64\] of floats with B > 0, got \(1, 3, 96, 96\)"):
        extractor.set_references(torch.zeros(1, 3, 96, 96))
    with pytest.raises(ValueError, match=r"of floats with B > 0, got \(0, 3, 64, 64\)"):
        extractor(images(0), extractor.encode_references(images(2, 1)))
    banks = extractor.encode_references(images(2, 1))
    for wrong in (list(images(4)), ["good.png"], banks.levels):
        with pytest.raises(ValueError, match=r"one tensor of images .* or a ReferenceBank .* got a list: prepare"):
            extractor.set_references(wrong)
    with pytest.raises(ValueError, match=r"the references have 2 levels of \[\d+, \d+\] channels, .* 3 levels of"):
        extractor(images(1), ReferenceBank(banks.levels[:2], banks.grids[:2]))
    with pytest.raises(ValueError, match="127 tokens is not a whole number of 64-token images"):
        banks.apply(lambda bank: bank[:, 1:])
    with pytest.raises(ValueError, match="do not fit a batch of 3 images"):
        extractor(images(3), banks.apply(lambda bank: bank.repeat(2, 1, 1)))


class OwnBackbone(Backbone):
    """A network that no name finds."""

    def __init__(self, seed: int = 0, side: int = SIDE) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = torch.nn.Conv2d(3, 8, 4, 4)
        super().__init__("mine", [8], Preprocess(side), [1], network)

    def maps(self, images: Tensor) -> FeatureMaps:
        return [self.network(images)]


def test_a_backbone_of_one_s_own_is_given_when_loading(tmp_path: Path) -> None:
    config, references = ProjectorConfig("linear"), images(2, 1)
    saved = ADExtractor(OwnBackbone(), FeatureProjector([8], config))
    folder = saved.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"backbone 'mine' is unknown.* given: as backbone= for an extractor"):
        ADExtractor.from_pretrained(folder)
    loaded = ADExtractor.from_pretrained(folder, backbone=OwnBackbone())
    expected = saved.set_references(references)(images(2))
    assert torch.equal(loaded.set_references(references)(images(2))[0], expected[0])
    with pytest.raises(ValueError, match="made with other weights of 'mine'"):
        ADExtractor.from_pretrained(folder, backbone=OwnBackbone(seed=1))
    with pytest.raises(ValueError, match=r"made on images of Preprocess\(image_size=64.* prepares them as .*=96"):
        ADExtractor.from_pretrained(folder, backbone=OwnBackbone(side=96))


def test_impossible_parts_are_refused() -> None:
    backbone = load_backbone("lite0", image_size=SIDE)
    with pytest.raises(ValueError, match="'l3' is unknown"):
        ADExtractor(backbone, matching="l3")


def test_a_loaded_extractor_takes_larger_images(tmp_path: Path) -> None:
    larger = ADExtractor.from_pretrained("embedded", image_size=320)
    assert larger.preprocess.image_size == 320
    assert larger.config.backbone.image_size == 320
    references = torch.rand(2, 3, 320, 320)
    features = larger.set_references(references)(references)
    assert [level.shape[2:] for level in features] == [(40, 40), (40, 40), (20, 20)]
    plain = ADExtractor.from_pretrained("embedded")
    by_hand = plain.backbone.network(references)  # a network without positions takes any size
    assert by_hand[1].shape[2:] == (40, 40)
    torch.testing.assert_close(larger.encode(references)[1], by_hand[1])
    again = ADExtractor.from_pretrained(larger.save_pretrained(tmp_path / "larger"))
    assert again.preprocess == larger.preprocess
    with pytest.raises(ValueError, match="choose 96 or 112"):
        ADExtractor.from_pretrained("embedded", image_size=100)
