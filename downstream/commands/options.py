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
PATHS: dict[Any, Any] = {Path: str, Path | None: str | None}  # paths are parsed as strings
EMBEDDED = "embedded"
# Field metadata: a positional argument; a flag that may be repeated. A field with "hidden" is not an option.
POSITIONAL, REPEATED = {"positional": True}, {"action": "append"}


class Command(ABC):
    """A subcommand. Its docstring is its help: a summary, text shown below the options, and an Args section.

    torch is imported only when a command runs, so that --help is fast.
    """

    from_file: ClassVar[bool] = False  # whether options can also be read with --config FILE

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Add the options of this command to a parser."""
        add_options(parser, cls)

    @classmethod
    def parsed(cls, options: Mapping[str, Any]) -> Self:
        """Make the command from parsed options. Raises ValueError for options that do not go together."""
        return from_options(cls, options)

    @abstractmethod
    def run(self) -> int:
        """Run the command and return its exit code."""


def add_options(parser: ArgumentParser, cls: type) -> None:
    """Add a typed --flag with help for each field of a dataclass; a field that is a dataclass adds its own fields."""
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
            default = item.default if factory is dataclasses.MISSING else factory()
            kind["default"] = str(default) if isinstance(default, Path) else default
        parser.add_argument(flag, **kind, help=told[item.name])


def from_options(cls: type[T], options: Mapping[str, Any]) -> T:
    """Make the dataclass from parsed options. Raises ValueError for options that do not go together."""
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
    """Split the docstring of ``cls`` into its summary, the text after it, and the help of each field in Args."""
    text, _, arguments = (inspect.getdoc(cls) or "").partition("\nArgs:\n")
    summary, _, rest = text.partition("\n\n")
    parts = re.split(r"^    (\w+): ", arguments, flags=re.MULTILINE)[1:]
    told = {name: " ".join(words.split()) for name, words in zip(parts[::2], parts[1::2], strict=True)}
    return " ".join(summary.split()), rest.strip("\n"), told


def usage_error(message: str, options: Sequence[str]) -> str:
    """Shorten a parser's ``message`` to one line: flag, wrong value, expected values. ``options`` are its flags.

    A message of unknown form only loses its line breaks.
    """
    line = " ".join(message.split())
    if line.startswith('expected "subcommand"'):
        return "needed: COMMAND, such as score"
    if line.startswith("the following arguments are required: "):
        flags = map(_flag, re.findall(r"[\w-]+\.(\w+)", line))  # score.false_alarm_rate
        return f"needed: {', '.join(flag if flag in options else flag.strip('-').upper() for flag in flags)}"
    if wrong := wrong_value(line):
        key, value, expected = wrong
        kinds = (kind for kind in expected if kind != "null")  # null is the flag left out
        named = _flag(key) if _flag(key) in options else key.upper()  # a word without a flag, such as an action
        return f"{named} {value}: expected {' or '.join(kinds)}"
    if found := re.fullmatch(r"unrecognized arguments: (--\S+).*|Subcommand '\S+' does not accept option '(.+)'", line):
        unknown = (found[1] or _flag(found[2])).partition("=")[0]
        close = difflib.get_close_matches(unknown, options, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown option {unknown}{guess}; known are {', '.join(options)}"
    return line


def refuse_beside_detector(given: Sequence[str]) -> None:
    """Raise ValueError if flags were ``given`` that a fitted detector has settled."""
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be given with --detector: it was fitted with its own value")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A feature network: a raw backbone or an extractor. Raises ValueError for options that do not go together.

    Args:
        backbone: use raw features of this network (listed by adpretrain backbones)
        extractor: use residual features of this extractor: a folder, "org/name" on the Hub, or "embedded"
        weights: local file or folder with the backbone's weights
        revision: version of the backbone's weights on the Hub
        levels: blocks or stages whose features are used, such as [3,6,9,12]
        image_size: side of the square input image in pixels; 224 by default
        resize: squeeze the whole photograph to a square (default), or crop its centre
        crop_from: with --resize crop, length of the shorter side before cropping, such as 256 for 224
        batch_size: number of images per batch
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
        """Load the chosen network on ``device``."""
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
