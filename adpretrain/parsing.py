"""Configuration dataclasses from YAML, JSON or flags: an unknown key is an error that lists the known ones.

Files may come from strangers, so their content is checked before it is built (`check_yaml`): a small file cannot take
all memory, overflow the stack, or mean something other than a reader sees.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import re
import sys
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import jsonargparse
import yaml

T = TypeVar("T")
DEEPEST = 32  # levels of nested collections
TOO_DEEP = f"more than {DEEPEST} collections"
LARGEST = 64 << 20  # bytes of a JSON file; the longest lists of images take a tenth of it
SAID = 2000  # characters that are kept of a parser's message, which may repeat a whole file
YAML = "checked-yaml"  # mode of our parsers
POSITIONAL = {"positional": True}  # metadata of a field, for `parse_flags`
KINDS = {  # the parser's names of types, in words
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "a text",
    "<class 'bool'>": "true or false",
    "<class 'list'>": "a list, such as [1,2]",
    "<class 'dict'>": "a mapping, such as {mask: label}",
    "<class 'NoneType'>": "null",
}


def check_keys(cls: type, mapping: Any, where: str, prefix: str = "") -> None:
    """Raise ValueError for a key of ``mapping`` that the dataclass lacks, naming the closest and all known keys."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where}: {prefix.rstrip('.') or 'the top level'} must be a mapping, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):  # jsonargparse would fill an absent section with its defaults
        if item.default is item.default_factory is dataclasses.MISSING and item.name not in mapping:
            raise ValueError(f"{where}: key {prefix}{item.name} is missing")
    for key, value in mapping.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            guess = f" (did you mean {prefix}{close[0]}?)" if close else ""
            raise ValueError(f"{where}: unknown key {prefix}{key}{guess}; known keys: {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            check_keys(typing.cast(type, hints[key]), value, where, f"{prefix}{key}.")


def check_yaml(text: str) -> None:
    """Raise yaml.YAMLError for aliases, a key given twice, or collections more than `DEEPEST` deep.

    PyYAML follows aliases (nine lines can stand for a billion values), silently keeps the last of two equal keys, and
    its C loader crashes on deep nesting. Reading its stream of events, as here, does none of that.
    """
    outer: list[set[str] | None] = []  # the keys of every open collection so far; None for a sequence
    at_key: list[bool] = []
    for event in _events(text):
        if isinstance(event, yaml.CollectionEndEvent):
            outer.pop()
            at_key.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        where = f"line {event.start_mark.line + 1}"  # type: ignore[union-attr]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"{where} refers to &{event.anchor}: write the value itself")
        if outer and (keys := outer[-1]) is not None:
            if at_key[-1] and isinstance(event, yaml.ScalarEvent):
                if event.value in keys:
                    raise yaml.YAMLError(f"{where} gives {event.value} a second time")
                keys.add(event.value)
            at_key[-1] = not at_key[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            if len(outer) == DEEPEST:
                raise yaml.YAMLError(f"{where} lies in {TOO_DEEP}")
            outer.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            at_key.append(True)


def _events(text: str) -> Iterator[yaml.Event]:
    """PyYAML's events. Raises yaml.YAMLError, with our message where some versions stop at their own nesting depth.

    They may stop before the first event, because they read many open brackets ahead.
    """
    try:
        yield from yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        before = text[: mark.index] if mark else ""
        if mark and sum(map(before.count, "[{")) - sum(map(before.count, "]}")) > DEEPEST:
            raise yaml.YAMLError(f"line {mark.line + 1} lies in {TOO_DEEP}") from error
        raise


def load_yaml(text: str) -> Any:
    """The content of a YAML text, checked. Raises yaml.YAMLError."""
    check_yaml(text)
    try:
        return jsonargparse.get_loader("yaml")(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, an impossible date
        raise yaml.YAMLError(str(error)) from error


jsonargparse.set_loader(YAML, load_yaml, exceptions=(yaml.YAMLError,))


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the description's own line breaks, so that its examples stay readable."""


def _parser(cls: type, description: str | None = None) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description=description, exit_on_error=False, formatter_class=_Help, parser_mode=YAML
    )
    parser.usage = "%(prog)s --config FILE [--key value ...]"
    parser.add_argument("--config", action="config", help="YAML file; flags after it override its keys")
    parser.add_class_arguments(cls)
    return parser


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "configuration") -> T:
    """A dataclass from nested mappings, with types checked. Raises ValueError naming the key that is wrong."""
    parser = _parser(cls)
    found = _instantiate(cls, parser, _checked(cls, parser, mapping, where))
    # The parser reads every text in a dict[str, Any] as YAML: "none: why" would become a mapping.
    free = [key for key, hint in typing.get_type_hints(cls).items() if hint == dict[str, Any] and key in mapping]
    return dataclasses.replace(found, **{key: copy.deepcopy(mapping[key]) for key in free})  # type: ignore[type-var]


def _checked(
    cls: type, parser: jsonargparse.ArgumentParser, mapping: Mapping[str, Any], where: str
) -> jsonargparse.Namespace:
    """A mapping with its keys and types checked. Raises ValueError naming the key that is wrong."""
    check_keys(cls, mapping, where)
    try:
        return parser.parse_object(copy.deepcopy(dict(mapping)))  # it changes lists in place
    except (jsonargparse.ArgumentError, RecursionError) as error:
        raise ValueError(f"{where}: {_in_words(error)}") from error


def _in_words(error: Exception, dashes: str = "") -> str:
    """A parser's message on one line; for a value of a wrong type: its key, the value and what is expected."""
    line = " ".join(str(error)[:SAID].split())
    if wrong := wrong_value(line):
        key, value, expected = wrong
        return f"{dashes}{key} {value}: expected {' or '.join(expected)}"
    return line


def wrong_value(line: str) -> tuple[str, str, list[str]] | None:
    """The key, the value and the valid kinds, such as ["one of even, random"] or ["a number", "null"], from a parser's
    message about a value of a wrong type. None for other messages."""
    found = re.fullmatch(r'Parser key "([\w.]+)": (.*(?:Got|Given) value: )(.*)', line)
    if not found:
        return None
    key, about, value = found.groups()
    words = []
    for kind in re.findall(r"Expected an? (typing\.Literal\[.*?\]|<class '\w+'>|\S+)", about):
        if kind.startswith("typing.Literal"):
            words.append("one of " + ", ".join(re.findall(r"'(.*?)'", kind)))
        else:
            words.append(KINDS.get(kind, kind))
    return key, value, sorted(dict.fromkeys(words), key="null".__eq__)  # the parser's own order changes with Python


def _refuse_nulls(cls: type, parsed: Any, prefix: str = "") -> None:
    """Raise ValueError naming a key that is null but must not be: the parser accepts null for any type."""
    for key, hint in typing.get_type_hints(cls).items():
        value, kinds = parsed.get(key), typing.get_args(hint) or (hint,)
        if value is None and hint is not Any and type(None) not in kinds:
            raise ValueError(f"{prefix}{key} null: expected a value; leave the key out to have its default")
        inside = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if inside is not None and isinstance(value, jsonargparse.Namespace):
            _refuse_nulls(typing.cast(type, inside), value, f"{prefix}{key}.")


def _instantiate(cls: type[T], parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace) -> T:
    _refuse_nulls(cls, parsed)
    values = vars(parser.instantiate(parsed))
    return cls(**{item.name: values[item.name] for item in dataclasses.fields(cls)})  # type: ignore[arg-type]


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file as a dict. Raises ValueError if it cannot be read or is not a mapping."""
    try:
        content = load_yaml(_text(Path(path)))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"configuration {path} must be a mapping of keys, got {type(content).__name__}")
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError that names it if it cannot be read."""
    try:
        return json.loads(_text(path), object_pairs_hook=_refuse_repeats)
    except RecursionError as error:
        raise ValueError(f"cannot read {path}: collections are nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return found


def _text(path: Path) -> str:
    """The text of a regular file. Anything else is refused: a pipe would wait for ever, a device would never end."""
    if not path.is_file():
        raise ValueError("it is not a file" if path.exists() else "there is no such file")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"it has {size} bytes, more than {LARGEST}")
    return path.read_text(encoding="utf-8")


def parse_command_line(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """A dataclass from ``--config FILE`` and ``--key.subkey VALUE`` flags, the later winning.

    Raises ValueError for an unreadable file, an unknown key (listing the known ones) or a value of a wrong type.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _check_flags(cls, arguments)
    parser = _parser(cls, description)
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--config":
            path = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
            _checked(cls, parser, read_yaml(path), path)
    try:
        return _instantiate(cls, parser, parser.parse_args(arguments))
    except jsonargparse.ArgumentError as error:
        raise ValueError(_in_words(error, "--")) from error


def _check_flags(cls: type, arguments: Sequence[str]) -> None:
    """Raise ValueError for an unknown flag, naming the closest key: the parser would only say that it is unknown."""
    known = ["config", "help", *_flags(cls)]
    leaves = [key for key in known if not any(other.startswith(f"{key}.") for other in known)]
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].removesuffix("+")  # --shots+=4 appends
        inside = any(name.startswith(f"{key}.") for key in leaves)  # a key of a mapping, such as data.columns.mask
        if argument.startswith("--") and name not in known and not inside:
            close = difflib.get_close_matches(name, known, n=1)
            guess = f" (did you mean --{close[0]}?)" if close else ""
            raise ValueError(f"unknown flag --{name}{guess}; --help lists all")


def _flags(cls: type, prefix: str = "") -> list[str]:
    """Every key of a dataclass and of the dataclasses inside it: ["run", "data", "data.name", ...]."""
    names = []
    for key, hint in typing.get_type_hints(cls).items():
        names.append(f"{prefix}{key}")
        if dataclasses.is_dataclass(hint):
            names += _flags(typing.cast(type, hint), f"{prefix}{key}.")
    return names


def parse_flags(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """A dataclass of options from flags such as ``--image-side 512 --shots 2 4``, whose help is its docstring's Args; a
    field with ``metadata=POSITIONAL`` has no flag. A wrong flag ends the program with exit code 2."""
    parser = jsonargparse.ArgumentParser(description=description, formatter_class=_Help, exit_on_error=False)
    told = {each.arg_name: each.description for each in docstring_parser.parse(cls.__doc__ or "").params}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        options: dict[str, Any] = {"type": hints[item.name], "help": told.get(item.name)}
        if typing.get_origin(options["type"]) is list:
            options |= {"type": typing.get_args(options["type"])[0], "nargs": "*"}
        elif options["type"] is bool:
            options = {"action": "store_true", "help": options["help"]}
        if item.metadata == POSITIONAL:
            parser.add_argument(item.name, **options)
        elif default is dataclasses.MISSING:
            parser.add_argument(f"--{item.name.replace('_', '-')}", required=True, **options)
        else:
            parser.add_argument(f"--{item.name.replace('_', '-')}", default=default, **options)
    try:
        given = vars(parser.parse_args(argv))
    except jsonargparse.ArgumentError as error:
        flag, space, words = _in_words(error, "--").partition(" ")
        parser.exit(2, f"error: {flag.replace('_', '-')}{space}{words}; --help lists all flags\n")
    return cls(**{name: value for name, value in given.items() if name in hints})


def to_yaml(config: Any) -> str:
    """A configuration dataclass as YAML that `parse_command_line` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
