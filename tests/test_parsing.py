"""A value of a wrong type, in a sentence: where it stands, its key, what is expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from adpretrain.config import PretrainConfig
from adpretrain.parsing import from_dict, parse_command_line, read_yaml

KEYS = ["--optim.lr", "1e-4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: fast}", "optim.lr fast: expected a number"),
        ("shots: [1, a]", "shots a: expected a whole number"),
        ("shots: 3", "shots 3: expected a list, such as [1,2]"),
        ("augment: sometimes", "augment sometimes: expected one of epoch, once, none"),
        ("backbone: {weights: 3}", "backbone.weights 3: expected a text or null"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    """Also where a flag after the file gives the key another value."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="mine") as by_flag:
        parse_command_line(PretrainConfig, ["--config", str(path), *KEYS])
    with pytest.raises(ValueError, match="mine") as by_mapping:
        from_dict(PretrainConfig, read_yaml(str(path)), str(path))
    assert str(by_flag.value) == str(by_mapping.value) == f"{path}: {message}"


def test_a_flag_of_a_wrong_type_is_named() -> None:
    with pytest.raises(ValueError, match="fast") as error:
        parse_command_line(PretrainConfig, ["--optim.lr", "fast"])
    assert str(error.value) == "--optim.lr fast: expected a number"


def test_a_value_without_end_is_not_repeated_without_end() -> None:
    """Nor searched in quadratic time: 10 MB of what looks like the parser's own words."""
    with pytest.raises(ValueError, match=r"hub: optim\.lr Expected a typing.*: expected a number") as error:
        from_dict(PretrainConfig, {"optim": {"lr": "Expected a typing.Literal[ " * 400_000}}, "hub")
    assert len(str(error.value)) < 3000


def test_what_a_flag_mends_in_a_file_is_no_mistake(tmp_path: Path) -> None:
    """A file of the right types whose values exclude each other."""
    path = tmp_path / "mine.yaml"
    path.write_text("augment: none\n")
    config = parse_command_line(PretrainConfig, ["--config", str(path), "--loss.lambda_", "0"])
    assert (config.augment, config.loss.lambda_) == ("none", 0)
