"""Configurations: whatever a dataclass can say survives YAML; whatever it cannot is one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from bounded import bounded
from hypothesis import assume, given
from hypothesis import strategies as st

from adpretrain.config import PretrainConfig
from adpretrain.parsing import DEEPEST, from_dict, parse_command_line, read_json, read_yaml, to_yaml
from adpretrain.saved import ExtractorConfig
from downstream.detectors.anomalydino import AnomalyDINOConfig
from downstream.detectors.cflow import CFLOWConfig
from downstream.detectors.dinomaly import DinomalyConfig
from downstream.detectors.glass import GLASSConfig
from downstream.detectors.musc import MuScConfig
from downstream.detectors.padim import PaDiMConfig
from downstream.detectors.patchcore import PatchCoreConfig
from downstream.detectors.reconpatch import ReConPatchConfig
from downstream.detectors.recontrast import ReContrastConfig
from downstream.detectors.spade import SPADEConfig
from downstream.detectors.subspacead import SubspaceADConfig
from downstream.detectors.uniad import UniADConfig

CLASSES = [
    PretrainConfig,
    ExtractorConfig,
    PatchCoreConfig,
    PaDiMConfig,
    ReConPatchConfig,
    SPADEConfig,
    SubspaceADConfig,
    AnomalyDINOConfig,
    MuScConfig,
    ReContrastConfig,
    DinomalyConfig,
    CFLOWConfig,
    GLASSConfig,
    UniADConfig,
]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(1, 10**6),
    float: st.floats(1e-6, 0.9),
    bool: st.booleans(),
    Any: st.one_of(st.none(), st.integers(), st.booleans(), TEXT, st.lists(st.integers(), max_size=2)),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, those that configurations use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return made(typing.cast(type, hint))
    if hint in PLAIN:
        return PLAIN[hint]
    if hint is type(None):
        return st.none()
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), min_size=1, max_size=3)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if origin is dict:
        return st.dictionaries(TEXT, values_of(arguments[1]), max_size=2)
    return st.one_of(*map(values_of, arguments))


@st.composite
def made(draw: st.DrawFn, cls: type) -> Any:
    """An instance of a dataclass with some of its fields drawn; combinations that it refuses are not examples."""
    hints = typing.get_type_hints(cls)
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    chosen = {*needed, *draw(st.sets(st.sampled_from(sorted(hints)), max_size=4))}
    arguments = {name: draw(values_of(hints[name])) for name in sorted(chosen)}
    try:
        return cls(**arguments)
    except ValueError:
        assume(False)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_dataclass_survives_yaml_and_json(cls: type, tmp_path: Path) -> None:
    @bounded(10)
    @given(made(cls))
    def check(config: Any) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert from_dict(cls, read_yaml(str(path))) == config
        path.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
        assert from_dict(cls, read_json(path)) == config

    check()


@bounded(60)
@given(
    name=st.sampled_from(sorted(typing.get_type_hints(PretrainConfig))),
    at=st.integers(0, 20),
    letter=st.sampled_from("qz_"),
)
def test_a_misspelt_key_is_refused_with_a_suggestion(name: str, at: int, letter: str) -> None:
    at = min(at, len(name))
    wrong = name[:at] + letter + name[at:]
    with pytest.raises(ValueError, match=f"unknown key {wrong}.*known keys: run, data") as refused:
        from_dict(PretrainConfig, {wrong: 1})
    assert f"did you mean {name}?" in str(refused.value) or len(name) < 4


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.binary(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


@bounded(100)
@given(cls=st.sampled_from(CLASSES), key=st.integers(0, 30), value=JUNK)
def test_a_value_of_any_type_is_taken_or_a_valueerror(cls: type, key: int, value: Any) -> None:
    names = sorted(typing.get_type_hints(cls))
    mapping: dict[str, Any] = {"backbone": {}, "channels": [1], "preprocess": {}} if cls is ExtractorConfig else {}
    mapping[names[key % len(names)]] = value
    said = ""
    try:
        from_dict(cls, mapping, "file.yaml")
    except ValueError as error:
        said = str(error)
    assert not said or any(name in said for name in ("file.yaml", *names))


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)
IN_PYTHONS_WORDS = "cannot read configuration"  # what follows changes with the versions of Python and PyYAML
TEXTS = {
    "aliases": (BOMB, "write the value itself"),
    "merged": ("data: &d {name: a}\nbackbone: {<<: *d}", "write the value itself"),
    "deep": ("shots: " + "[" * 300_000, f"more than {DEEPEST} collections"),
    "deep pairs": ("shots: " + "[{a: " * 300_000, f"line 1 lies in more than {DEEPEST} collections"),
    "deep mappings": ("\n".join(" " * i + "a:" for i in range(2000)), f"more than {DEEPEST} collections"),
    "twice": ("seed: 1\nseed: 2", "gives seed a second time"),
    "twice inside": ("optim:\n  lr: 1\n  lr: 2", "gives lr a second time"),
    "code": ("run: !!python/object/apply:os.mkdir [pwned]", IN_PYTHONS_WORDS),
    "digits": ("seed: 1" + "0" * 5000, IN_PYTHONS_WORDS),
    "tab": ("a:\t- b", IN_PYTHONS_WORDS),
    "control": ("run: \x07", IN_PYTHONS_WORDS),
    "list": ("- 1", "must be a mapping"),
    "empty": ("", "must be a mapping"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_yaml_that_no_one_writes_by_hand_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = TEXTS[name]
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    for read in (lambda: read_yaml(str(path)), lambda: parse_command_line(PretrainConfig, ["--config", str(path)])):
        with pytest.raises(ValueError, match=message) as refused:
            read()
        assert str(path) in str(refused.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "collections are nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b"\xff\xfe", ""),  # the rest in Python's words, which change
        (b"1" * 5000, ""),
        (b"{", ""),
    ],
)
def test_json_that_cannot_be_read_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*c\.json: .*{message}"):
        read_json(tmp_path / "c.json")


def test_numbers_that_yaml_spells_in_many_ways() -> None:
    for text in ("1e-4", "1.0e-4", "0.0001", "1E-4", ".0001"):
        assert parse_command_line(PretrainConfig, ["--optim.lr", text]).optim.lr == 1e-4
    assert math.isinf(parse_command_line(PretrainConfig, ["--optim.clip", ".inf"]).optim.clip)
