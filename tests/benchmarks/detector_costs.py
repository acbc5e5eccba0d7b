"""CPU time and peak memory of one detector, ours or anomalib's, in a process of its own:
``python detector_costs.py patchcore ours``.

Both see the same 150 normal and 100 new photographs (noise; times do not depend on what is on them) of 224 pixels, in
batches of 16, on ResNet-18 with random weights and one thread. Networks that learn take `STEPS` steps.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NORMAL, NEW, SIDE, BATCH, STEPS = 150, 100, 224, 16, 10
SHARE = 0.01  # of the patches in PatchCore's bank
Work = tuple[Callable[[list[Tensor]], object], Callable[[Tensor], object]]  # fit, score


def images(count: int, seed: int) -> list[Tensor]:
    return list(torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).split(BATCH))


def ours(name: str) -> Work:
    from adpretrain.backbones import load_backbone
    from downstream.detectors import build_detector, find_detector

    levels = {"patchcore": [2, 3], "spade": [1, 2, 3, 4]}.get(name, [1, 2, 3])
    backbone = load_backbone("timm/resnet18", pretrained=False, image_size=SIDE, levels=levels)
    options: dict[str, Any] = {"amount": SHARE} if name == "patchcore" else {}
    if find_detector(name).load().learns:
        options = {"training": {"steps": STEPS, "batch_size": BATCH}}
        options |= {"levels": [-1]} if name == "dinomaly" else {}
    detector = build_detector(name, backbone, options)
    return detector.fit, detector.predict


def theirs(name: str) -> Work:
    warnings.simplefilter("ignore")
    return {"patchcore": _patchcore, "padim": _padim, "rd4ad": _reverse_distillation}[name]()


def _patchcore() -> Work:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(layers=["layer2", "layer3"], backbone="resnet18", pre_trained=False)

    def fit(batches: list[Tensor]) -> None:
        model.train()
        for batch in batches:
            model(batch)
        model.subsample_embedding(SHARE)
        model.eval()

    return fit, torch.no_grad()(model)


def _padim() -> Work:
    from anomalib.models.image.padim.torch_model import PadimModel

    model = PadimModel(backbone="resnet18", layers=["layer1", "layer2", "layer3"], pre_trained=False)

    def fit(batches: list[Tensor]) -> None:
        model.train()
        for batch in batches:
            model(batch)
        model.fit()
        model.eval()

    return fit, torch.no_grad()(model)


def _reverse_distillation() -> Work:
    from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
    from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
    from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel

    layers = ["layer1", "layer2", "layer3"]
    model = ReverseDistillationModel("resnet18", (SIDE, SIDE), layers, AnomalyMapGenerationMode.ADD, pre_trained=False)
    parts = [*model.decoder.parameters(), *model.bottleneck.parameters()]
    optimizer, loss = torch.optim.Adam(parts, 0.005, (0.5, 0.99)), ReverseDistillationLoss()

    def fit(batches: list[Tensor]) -> None:
        model.train()
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(*model(batches[step % (len(batches) - 1)])).backward()
            optimizer.step()
        model.eval()

    return fit, torch.no_grad()(model)


def measure(work: Work) -> dict[str, float]:
    fit, score = work
    normal, new = images(NORMAL, 0), images(NEW, 1)
    began = time.process_time()
    fit(normal)
    fitted = time.process_time()
    for batch in new:
        score(batch)
    scored = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"fit": fitted - began, "score": scored - fitted, "peak": peak}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps(measure((ours if sys.argv[2] == "ours" else theirs)(sys.argv[1]))))
