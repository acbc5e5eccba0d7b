"""Products held out of pretraining, scored with FeatureNorm while a projector is trained on the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from adpretrain.data import Sample
from adpretrain.data.products import draw_shots
from adpretrain.extractor import ADExtractor
from adpretrain.progress import progress_bar
from adpretrain.saved import place
from downstream.evaluation.few_shot import FeatureSet, encode_samples, few_shot, score
from downstream.evaluation.panels import product_folder, save_panels

EXAMPLES = 3  # products whose heatmaps are drawn


class HeldOut:
    """What `adpretrain.training.run.pretrain` scores held-out products with; ``samples`` are those of each, of which
    ``shots`` are references. A frozen backbone sees each photograph once."""

    def __init__(self, samples: Sequence[Sequence[Sample]], shots: int, console: Console) -> None:
        self.samples, self.shots, self.console = samples, shots, console
        self._seen: list[FeatureSet] = []

    def _sets(self, extractor: ADExtractor) -> list[FeatureSet]:
        if not (self._seen and extractor.backbone.frozen):
            device = place(extractor.backbone)
            with progress_bar(self.console) as bar:
                groups = bar.track(self.samples, description="held-out products")
                self._seen = [encode_samples(group, extractor.backbone, device) for group in groups]
        return self._seen

    def score(self, extractor: ADExtractor) -> dict[str, float]:
        """Mean FeatureNorm image AUROC and AUPRO over the products."""
        results = [few_shot(extractor, images, self.shots) for images in self._sets(extractor)]
        means = {name: [getattr(result, name) for result in results] for name in ("image_auroc", "aupro")}
        return {name: float(torch.tensor(values).nanmean()) for name, values in means.items()}

    def draw(self, extractor: ADExtractor, folder: Path) -> None:
        """Heatmaps of a few products, for whoever looks at the run or at its page on the Hub."""
        shots = max(2, self.shots)  # two, at least, give a colour scale
        for images in [images for images in self._sets(extractor) if len(images.normals()) >= shots][:EXAMPLES]:
            references, queries = draw_shots(images.samples, shots)
            prediction = score([extractor], images, references, queries)[0]
            place = folder / product_folder(images.samples[0])
            save_panels(place, extractor, images, references, queries, prediction, kinds=1)
