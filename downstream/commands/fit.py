"""`adpretrain fit` fits a detector on normal photographs and saves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from downstream.commands.options import Command, Network
from downstream.inspection import WHOLE
from downstream.terminal import ProgressBars, plain, tell_memory
from downstream.tiles import Tiling


@dataclass(frozen=True, kw_only=True)
class Fit(Command):
    """Fit a detector on normal photographs and save it.

    The saved folder contains features of the product: share it only with people who may see the product.
    To score with it, run adpretrain score --detector FOLDER --normal OTHERS, where OTHERS are normal photographs that
    it was not fitted on; in Python: downstream.detectors.detector_from_pretrained(folder).predict(images).

    exit codes:
      0  fitted and saved
      2  wrong usage or input: nothing was written

    Args:
        detector: name of the detector (listed by adpretrain detectors)
        normal: folder of normal photographs, searched with its subfolders
        out: folder to save the fitted detector in
        set: options of the detector, such as amount=0.01 embedding.patch=5; the error for an unknown one lists them all
        shots: with --extractor, the number of normal photographs used as its references
        roi: mask of what is inspected, white on black, the size of the photographs; nothing is learnt outside
        ignore_border: number of pixels along the edges of a photograph that are not inspected
        resume: go on with an interrupted training, for detectors that train a network; the result is that of one run
    """

    from_file = True
    detector: str = "patchcore"
    normal: Path
    out: Path
    set: list[str] = field(default_factory=list)
    shots: int = 8
    roi: Path | None = None
    ignore_border: int = 0
    resume: bool = False
    tiling: Tiling = WHOLE
    network: Network

    def run(self, accelerator: Any = None) -> int:
        """Fit, and save in the first process of ``accelerator``, if a launcher started several."""
        from downstream.inspection.fitting import fit_folder
        from downstream.inspection.photos import find_images
        from downstream.inspection.run import pick_device
        from downstream.learning import Workplace
        from downstream.roi import RoiFiles

        if self.shots < 1:
            raise ValueError(f"--shots {self.shots}: expected at least 1")
        tell_memory()
        device = pick_device(self.network.device if accelerator is None else str(accelerator.device))
        settings, batch_size = parse_settings(self.set), self.network.batch_size
        checkpoint = self.out.with_name(f"{self.out.name}.training.pt")
        workplace = Workplace(accelerator, checkpoint, resume=self.resume)
        find_images(self.normal, exclude=self.out)  # a wrong path is found before a network is loaded
        model = self.network.load(device)
        with ProgressBars() as progress:
            done = fit_folder(
                self.detector,
                model,
                self.normal,
                self.out,
                settings,
                self.shots,
                batch_size,
                device,
                progress,
                self.tiling,
                RoiFiles(self.roi, self.ignore_border),
                workplace,
            )
        if workplace.rank:
            return 0
        references = f"{done.references} references" if done.references else ""
        fitted = ", ".join(filter(None, [f"{done.images} images" if done.images else "", references]))
        print(f"{self.detector} fitted on {fitted or 'nothing (it needs none)'}: {plain(done.folder)}")
        return 0


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn ["embedding.patch=1", "amount=0.01"] into nested keys with YAML values. ValueError for any other form."""
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"setting {pair!r} must be key=value, such as embedding.target_dim=100")
        *parents, last = key.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"setting {pair!r}: {parent} already has a value")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"setting {pair!r}: {error}") from error
    return settings
