"""A command is a dataclass: its fields are the options, its docstring is their help."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from jsonargparse import ArgumentParser
from typing_extensions import Self

from adpretrain.parsing import wrong_value

if TYPE_CHECKING:
    import torch

    from adpretrain import ADExtractor
    from adpretrain.backbones import Backbone

T = TypeVar("T")
PATHS: dict[Any, Any] = {Path: str, Path | None: str | None}  # what the parser calls them
EMBEDDED = "embedded"
# Metadata of fields: no flag, and a flag that may be given several times; "hidden": no option at all.
POSITIONAL, REPEATED = {"positional": True}, {"action": "append"}


class Command(ABC):
    """One subcommand. Its docstring is the help: a summary, text that is shown below the options, and an Args section.

    torch is imported only when a command runs, so that --help is quick.
    """

    from_file: ClassVar[bool] = False  # whether --config FILE may give the options

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Add its options to a parser."""
        add_options(parser, cls)

    @classmethod
    def parsed(cls, options: Mapping[str, Any]) -> Self:
        """The command from what the parser found. Raises ValueError for options that do not go together."""
        return from_options(cls, options)

    @abstractmethod
    def run(self) -> int:
        """The exit code."""


def add_options(parser: ArgumentParser, cls: type) -> None:
    """Add the fields of a dataclass to a parser: --with-dashes, typed, with help; of a dataclass in it, its fields."""
    hints, told = typing.get_type_hints(cls), help_of(cls)[2]
    for item in dataclasses.fields(cls):
        if "hidden" in item.metadata:
            continue
        hint = PATHS.get(hints[item.name], hints[item.name])
        if dataclasses.is_dataclass(hint):
            add_options(parser, typing.cast(type, hint))
            continue
        positional = "positional" in item.metadata
        flag = item.name if positional else f"--{item.name.replace('_', '-')}"
        kind: dict[str, Any] = {"type": hint}
        if hint is bool:
            kind = {"action": "store_true"}
        elif "action" in item.metadata:
            kind = dict(item.metadata)
        elif hint == list[str]:
            kind = {"type": str, "nargs": "*"}
        if item.default is item.default_factory is dataclasses.MISSING:
            kind |= {} if positional else {"required": True}
        elif hint is not bool:
            factory = item.default_factory
            kind["default"] = item.default if factory is dataclasses.MISSING else factory()
        parser.add_argument(flag, **kind, help=told[item.name])


def from_options(cls: type[T], options: Mapping[str, Any]) -> T:
    """The dataclass from what the parser found. Raises ValueError for options that do not go together."""
    values = dict[str, Any]()
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = typing.get_type_hints(cls)[item.name]
        if dataclasses.is_dataclass(hint):
            values[item.name] = from_options(typing.cast(type, hint), options)
        else:
            value = options[item.name]
            values[item.name] = Path(value) if hint is Path or (hint in PATHS and value) else value
    return cls(**values)


def help_of(cls: type) -> tuple[str, str, dict[str, str]]:
    """Of a docstring: its summary, the text after it, and what its Args section says of every field."""
    text, _, arguments = (inspect.getdoc(cls) or "").partition("\nArgs:\n")
    summary, _, rest = text.partition("\n\n")
    parts = re.split(r"^    (\w+): ", arguments, flags=re.MULTILINE)[1:]
    told = {name: " ".join(words.split()) for name, words in zip(parts[::2], parts[1::2], strict=True)}
    return " ".join(summary.split()), rest.strip("\n"), told


def usage_error(message: str, options: Sequence[str]) -> str:
    """One sentence of a parser's ``message``: the flag, the wrong value, what is expected; ``options``: its flags.

    A message of unknown form loses its line breaks only.
    """
    line = " ".join(message.split())
    if line.startswith('expected "subcommand"'):
        return "needed: COMMAND, such as score"
    if line.startswith("the following arguments are required: "):
        flags = map(_flag, re.findall(r"[\w-]+\.(\w+)", line))  # score.false_alarm_rate
        return f"needed: {', '.join(flag if flag in options else flag.strip('-').upper() for flag in flags)}"
    if wrong := wrong_value(line):
        key, value, expected = wrong
        kinds = (kind for kind in expected if kind != "null")  # said by leaving the flag out
        return f"{_flag(key)} {value}: expected {' or '.join(kinds)}"
    if found := re.fullmatch(r"unrecognized arguments: (--\S+).*|Subcommand '\S+' does not accept option '(.+)'", line):
        unknown = (found[1] or _flag(found[2])).partition("=")[0]
        close = difflib.get_close_matches(unknown, options, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown option {unknown}{guess}; known are {', '.join(options)}"
    return line


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A feature network: a raw backbone or an extractor. Raises ValueError for options that do not go together.

    Args:
        backbone: raw features of this network (adpretrain backbones)
        extractor: features of this extractor, compared with its normal references: a folder, "org/name" or embedded
        weights: local file or folder of backbone weights
        revision: version of the backbone's weights on the Hub
        levels: blocks or stages, such as [3,6,9,12]
        image_size: input side in pixels; 224 by default
        resize: squeeze the whole photograph to a square (default), or crop its centre
        crop_from: shorter side before --resize crop, such as 256 for 224
        batch_size: images in memory at once
        device: auto, cpu, cuda, cuda:1, mps
    """

    backbone: str | None = None
    extractor: str | None = None
    weights: Path | None = None
    revision: str | None = None
    levels: list[int] | None = None
    image_size: int | None = None
    resize: Literal["squeeze", "crop"] | None = None
    crop_from: int | None = None
    batch_size: int = 16
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.backbone is None) == (self.extractor is None):
            raise ValueError("name one network: --backbone NAME or --extractor FOLDER")
        trained = ("revision", "levels", "image_size", "resize", "crop_from")
        fixed = [_flag(name) for name in trained if getattr(self, name) is not None]
        if self.extractor and fixed:
            raise ValueError(f"{' and '.join(fixed)} cannot be given with --extractor: it was trained with its own")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: expected at least 1")

    def load(self, device: torch.device) -> Backbone | ADExtractor:
        """The network that was named, on the device."""
        from adpretrain import ADExtractor
        from adpretrain.backbones import load_backbone

        if self.extractor:
            return ADExtractor.from_pretrained(self.extractor, device=device, weights=self.weights)
        assert self.backbone is not None
        backbone = load_backbone(
            self.backbone,
            revision=self.revision,
            weights=self.weights,
            image_size=self.image_size or 224,
            levels=self.levels,
            resize=self.resize or "squeeze",
            crop_from=self.crop_from,
        )
        return backbone.to(device)
