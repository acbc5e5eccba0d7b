"""The folder of a board: results from many people, each checked, and each consistent with the others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adpretrain.files import atomic_path
from downstream.board.result import Result, read_result

RESULTS = "results"


@dataclass(frozen=True)
class Added:
    """What `add` did: names of the files that are new, replaced, and that were there already."""

    new: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)


def read_board(at: Path) -> list[Result]:
    """Read and check all results of a board. Raises ValueError, naming the file, for what is wrong with them."""
    found = _stored(at)
    if not found:
        _refuse_files(at)
        raise ValueError(f"{at} holds no results: adpretrain board add runs/NAME/results/*.json --at {at}")
    claims = _Claims()
    for path, result in found:
        claims.take(result, str(path))
    return [result for _, result in found]


def add(at: Path, files: Sequence[Path], replace: bool = False) -> Added:
    """Add results to a board, all or none. A folder stands for the .json files in it.

    Raises ValueError, naming the file, for a result that is not what it claims to be, that contradicts another one
    about a data set or a protocol, or that was measured before with other numbers, unless ``replace`` takes the new.
    """
    _refuse_files(at)
    given = [(path, read_result(path)) for path in _files(files)]
    stored = {result.identity: (path, result) for path, result in _stored(at)}
    coming = {result.identity for _, result in given}
    added, claims, copies = Added(), _Claims(), list[tuple[Path, Path]]()
    for identity, (path, result) in stored.items():
        if identity not in coming:
            claims.take(result, str(path))
    seen: dict[str, tuple[Path, str]] = {}
    for path, result in given:
        claims.take(result, str(path))
        twin, digest = seen.get(result.identity, (path, result.digest))
        if digest != result.digest:
            raise ValueError(f"{path} and {twin} are the same experiment with other numbers: add one of the two")
        if result.identity in seen:
            continue
        seen[result.identity] = path, result.digest
        before, known = stored.get(result.identity, (None, None))
        if known is not None and known.digest == result.digest:
            added.known.append(path.name)
            continue
        if known is not None and not replace:
            raise ValueError(
                f"{path} was measured before, with other numbers or on another machine ({before}): --replace takes "
                "the new ones"
            )
        (added.new if known is None else added.replaced).append(path.name)
        copies.append((path, at / RESULTS / f"{result.identity}.json"))
    for path, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            shutil.copyfile(path, temporary)
    return added


def _refuse_files(at: Path) -> None:
    if at.exists() and not at.is_dir():
        raise ValueError(f"--at {at} is a file: name the folder of a board")


def _stored(at: Path) -> list[tuple[Path, Result]]:
    return [(path, read_result(path)) for path in sorted((at / RESULTS).glob("*.json"))]


def _files(given: Sequence[Path]) -> list[Path]:
    found = [path for one in given for path in (sorted(one.glob("*.json")) if one.is_dir() else [one])]
    if not found:
        raise ValueError(
            f"no results in {', '.join(map(str, given))}: name .json files that adpretrain evaluate wrote to results/"
        )
    return found


def check_files(files: Sequence[Path]) -> int:
    """Check results without adding them, each by itself and against each other, and return their number.

    Raises ValueError, naming the file, as `add` does.
    """
    claims, paths = _Claims(), _files(files)
    for path in paths:
        claims.take(read_result(path), str(path))
    return len(paths)


class _Claims:
    """What results say of data sets and protocols: they must not contradict each other."""

    def __init__(self) -> None:
        self._data: dict[str, tuple[str, str]] = {}
        self._names: dict[str, tuple[str, str]] = {}
        self._images: dict[tuple[object, ...], tuple[str, str]] = {}

    def take(self, result: Result, where: str) -> None:
        """Raise ValueError if a result contradicts one that came before."""
        data, protocol = result.data, result.protocol
        digest, other = self._data.setdefault(data.name, (data.digest, where))
        if digest != data.digest:
            raise ValueError(
                f"{where} and {other} call different photographs {data.name!r} (their listings have other digests): "
                "give one of the sets another name and evaluate again; finished cells are not computed again"
            )
        name, other = self._names.setdefault(data.digest, (data.name, where))
        if name != data.name:
            raise ValueError(
                f"{where} calls the photographs {data.name!r} that {other} calls {name!r}: evaluate again under that "
                "name (name: in the file's sets); finished cells are not computed again"
            )
        for one in result.measured:
            key = (data.digest, protocol.name, protocol.setting, protocol.seed, one.product, one.draw)
            images, other = self._images.setdefault(key, (one.images, where))
            if images != one.images:
                raise ValueError(
                    f"{where} claims the protocol of {other} ({result.task}, seed {protocol.seed}), but fitted on or "
                    f"scored other photographs of {one.product} in draw {one.draw}: were --references, --share, "
                    "--noise or --overlap others? Such results cannot be compared"
                )
