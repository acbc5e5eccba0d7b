"""Products held out of pretraining, scored with FeatureNorm while a projector is trained on the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from adpretrain.data import Sample
from adpretrain.data.products import draw_shots
from adpretrain.extractor import ADExtractor
from adpretrain.photographs import read_image
from adpretrain.progress import progress_bar
from adpretrain.saved import place
from downstream.detectors.featurenorm import FeatureNorm
from downstream.evaluation.few_shot import FeatureSet, encode_samples, few_shot, score
from downstream.evaluation.pictures import file_name, median_images, save_panels
from downstream.visualise import ColourScale

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
            photos = [extractor.preprocess(read_image(images.samples[index].image)) for index in references]
            normal = FeatureNorm(extractor).leave_one_out(torch.stack(photos).to(prediction.maps.device))
            scale = ColourScale.from_normal_maps(normal.maps.cpu().numpy())  # as that of `adpretrain score`
            samples, masks = [images.samples[index] for index in queries], images.masks[queries].cpu().numpy()
            typical = median_images(samples, prediction.scores.cpu().numpy(), prediction.maps.cpu().numpy(), masks)
            name = file_name(samples[0].category, samples[0].view)
            save_panels(folder / name, typical[:1], scale, extractor.preprocess)
