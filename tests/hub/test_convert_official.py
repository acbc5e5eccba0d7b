"""A released .pth becomes an extractor folder that scores as its authors' code does; other files are refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from released import released_state
from torch import Tensor
from transformers import Dinov2Model

from adpretrain.backbones import load_backbone
from adpretrain.backbones.dinov2 import SIZES
from adpretrain.extractor import ADExtractor
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig

ROOT = Path(__file__).resolve().parents[2]
WIDTH, LEVELS = 384, 4  # dinov2-small


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, extractor folder), through the command."""
    folder = tmp_path_factory.mktemp("released")
    path = folder / "checkpoints_pro_norm.pth"
    torch.save({"projectors": released_state(WIDTH, LEVELS), "img_auc": 0.5, "pix_auc": 0.6, "pix_pro": 0.7}, path)
    command = [sys.executable, "hub/convert_official.py", str(path), "--backbone", "dinov2-small"]
    command += ["--out", str(folder / "extractor")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "from_pretrained" in done.stdout
    return path, folder / "extractor"


def test_config_says_how_the_authors_run_it_and_where_it_came_from(converted: tuple[Path, Path]) -> None:
    path, folder = converted
    config = json.loads((folder / "config.json").read_text())
    assert (config["matching"], config["norm"], config["local_scale"]) == ("cosine", "released", None)
    assert (config["projector"]["form"], config["projector"]["heads"]) == ("released", 16)
    assert (config["backbone"]["name"], config["channels"]) == ("dinov2-small", [WIDTH] * LEVELS)
    assert (config["preprocess"]["image_size"], config["preprocess"]["interpolation"]) == (224, "bicubic")
    source = config["provenance"]["converted_from"]
    assert source["file"] == path.name
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert config["provenance"]["released_metrics"] == {"img_auc": 0.5, "pix_auc": 0.6, "pix_pro": 0.7}
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def released_attention(x_TC: Tensor, state: dict[str, Tensor], level: int) -> Tensor:
    """One level of the released projector, as FACTS describe it, with torch's own multi-head attention."""
    weights = {key.removeprefix(f"l{level}_proj."): value for key, value in state.items() if key[1] == str(level)}
    attention = torch.nn.MultiheadAttention(WIDTH, 16, batch_first=True)
    prefix = "layers.0.cross_attn."
    attention.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    mlp = {key.removeprefix("layers.0.mlp."): value for key, value in weights.items()}
    linear = torch.nn.functional.linear
    refs = linear(weights["x_ref"], weights["ref_proj.project.weight"][:, :, 0], weights["ref_proj.project.bias"])
    y = x_TC[None] - attention(x_TC[None], refs, refs, need_weights=False)[0]
    hidden = linear(y, mlp["fc1.weight"], mlp["fc1.bias"])
    gate = linear(hidden.mean(1, keepdim=True), mlp["se.fc1.weight"], mlp["se.fc1.bias"]).relu()
    hidden = hidden * linear(gate, mlp["se.fc2.weight"], mlp["se.fc2.bias"]).sigmoid()
    out = linear(torch.nn.functional.gelu(hidden), mlp["fc2.weight"], mlp["fc2.bias"]) + y
    return out[0]


def test_loaded_extractor_scores_as_the_released_code(converted: tuple[Path, Path], tmp_path: Path) -> None:
    """Cosine match, plain difference, projector, sqrt(norm + 1) - 1: written out here, image by image."""
    torch.manual_seed(0)
    torch.save(Dinov2Model(SIZES["dinov2-small"].config()).state_dict(), tmp_path / "dinov2-small.pth")
    backbone = load_backbone("dinov2-small", weights=tmp_path / "dinov2-small.pth")
    extractor = ADExtractor.from_pretrained(converted[1], weights=tmp_path / "dinov2-small.pth")
    references, images = torch.randn(2, 3, 224, 224), torch.randn(2, 3, 224, 224)
    detector = FeatureNorm(extractor, FeatureNormConfig(sigma=0.0)).fit([references])
    assert detector.config.norm == "released"
    found = detector.predict(images).maps
    state = released_state(WIDTH, LEVELS)
    with torch.no_grad():
        banks = [level.flatten(2).transpose(1, 2).flatten(0, 1) for level in backbone(references)]
        features = backbone(images)
        for image in range(2):
            expected = torch.zeros(224, 224)
            for level, bank in enumerate(banks):
                tokens = features[level][image].flatten(1).T
                cosine = torch.nn.functional.normalize(tokens, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
                projected = released_attention(tokens - bank[cosine.argmax(1)], state, level + 1)
                norm = (projected.norm(dim=1) + 1).sqrt() - 1
                norm_map = norm.view(1, 1, 16, 16)
                resize = torch.nn.functional.interpolate
                expected += resize(norm_map, size=(224, 224), mode="bilinear", align_corners=True)[0, 0] / LEVELS
            torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-5)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


@pytest.fixture
def convert_official(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "hub"))
    return importlib.import_module("convert_official")


def test_files_that_are_no_checkpoint_are_refused_and_nothing_is_executed(
    convert_official: Any, tmp_path: Path
) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}, "epoch": 3}, tmp_path / "other.pth")
    torch.save({"projectors": {"l1_proj.weight": torch.zeros(2)}}, tmp_path / "keys.pth")
    torch.save({"projectors": Harmful()}, tmp_path / "harmful.pth")
    torch.save({"projectors": released_state(64, LEVELS)}, tmp_path / "narrow.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not a zip")
    cases = {
        "other.pth": "found a dict with the keys 'model', 'epoch'",
        "keys.pth": "'l1_proj.weight' is not a key of a released ADPretrain projector; expected l1_proj.x_ref",
        "harmful.pth": "refused: it is not a plain file of tensors",
        "narrow.pth": "widths [64, 64, 64, 64]; backbone 'dinov2-small' gives [384, 384, 384, 384]",
        "cut.pth": "cut.pth",
        "absent.pth": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=r"\w") as caught:
            convert_official.convert(tmp_path / name, "dinov2-small", tmp_path / "out")
        assert message in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_the_command_ends_with_2_and_one_line(
    convert_official: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent.pth"
    assert convert_official.main([str(absent), "--backbone", "dinov2-small", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        f"convert_official: error: no such file: {tmp_path / 'absent.pth'}"
    ]
