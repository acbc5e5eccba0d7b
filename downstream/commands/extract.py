"""`adpretrain extract` writes feature maps of photographs to disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from downstream.commands.options import Command, Network
from downstream.terminal import ProgressBars, plain

if TYPE_CHECKING:
    from adpretrain import ADExtractor

TOP = 5  # at most this many unreadable images are listed on stdout


@dataclass(frozen=True, kw_only=True)
class Extract(Command):
    """Write the feature maps of photographs to safetensors files.

    --out is a folder (one .safetensors file per batch, and index.json) or one FILE.safetensors (and FILE.json).
    Tensors level_0, level_1, ... are [images, channels, height, width]; the index says which row is which image.

    exit codes:
      0  every image was read
      3  some images were unreadable: the index lists them with the reason; the features of the others were written
      2  wrong usage or input: nothing was written

    Args:
        images: folder of photographs, searched with its subfolders
        out: output folder, or FILE.safetensors
        normal: folder of normal photographs, the references of --extractor
        shots: use at most this many references, evenly spaced in the order of their names
    """

    from_file = True
    images: Path
    out: Path
    normal: Path | None = None
    shots: int = 16
    network: Network

    def __post_init__(self) -> None:
        if self.network.extractor and not self.normal:
            raise ValueError("--extractor compares with normal photographs: name their folder with --normal")
        if self.network.backbone and self.normal:
            raise ValueError("--normal goes with --extractor: a raw backbone does not use references; leave it out")
        if self.shots < 1:
            raise ValueError(f"--shots {self.shots}: expected at least 1")

    def run(self) -> int:
        from downstream.inspection import Options
        from downstream.inspection.extraction import extract_folder, refuse_others
        from downstream.inspection.normals import NormalBatches, choose_references, set_references
        from downstream.inspection.photos import PhotoReader, find_images
        from downstream.inspection.run import pick_device

        device = pick_device(self.network.device)
        images = find_images(self.images, exclude=self.out)  # a wrong path is found before a network is loaded
        refuse_others(self.out, self.out.suffix == ".safetensors")
        model = self.network.load(device)
        normals = find_images(self.normal, exclude=self.out) if self.normal else []
        reader = PhotoReader.of_camera(normals or images, model.preprocess, self.network.batch_size)
        if normals:
            extractor = cast("ADExtractor", model)
            chosen = choose_references(normals, extractor, Options(shots=self.shots), reader)
            set_references(extractor, NormalBatches(chosen, reader, device))
        with ProgressBars() as progress:
            done = extract_folder(model, self.images, self.out, reader, device, progress)
        unreadable = done.index["unreadable"]
        print(f"{len(done.index['images'])} images of {len(done.index['levels'])} levels: {plain(self.out)}")
        for level in done.index["levels"]:
            height, width = level["grid"]
            print(f"  {level['tensor']}  {level['channels']} x {height} x {width}  {level['dtype']}")
        for entry in unreadable[:TOP]:
            print(f"unreadable: {plain(entry['path'])} ({plain(entry['reason'])})")
        if len(unreadable) > TOP:
            print(f"unreadable: and {len(unreadable) - TOP} more")
        return done.exit_code
