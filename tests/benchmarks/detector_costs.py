"""CPU time and peak memory of one detector, ours or anomalib's, in a process of its own:
``python detector_costs.py patchcore ours``, or with another number of steps, ``python detector_costs.py glass ours 3``.

Both see the same 150 normal and 100 new photographs (noise; times do not depend on what is on them) of 224 pixels, in
batches of 16, on ResNet-18 with random weights and one thread. Networks that learn take `STEPS` steps of 16 images,
of which CFLOW sees 256 vectors of each level. anomalib's Dinomaly, AnomalyDINO and WinCLIP have no random weights: they
download.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NORMAL, NEW, SIDE, BATCH, STEPS = 150, 100, 224, 16, 10
VECTORS = 256  # of each level in a step of CFLOW
SHARE = 0.01  # of the patches in PatchCore's bank
Work = tuple[Callable[[list[Tensor]], object], Callable[[Tensor], object]]  # fit, score


def images(count: int, seed: int) -> list[Tensor]:
    return list(torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).split(BATCH))


def ours(name: str, steps: int) -> Work:
    from adpretrain.backbones import load_backbone
    from downstream.detectors import build_detector, find_detector

    levels = {"spade": [1, 2, 3, 4]}.get(name, [2, 3] if name in ("patchcore", "reconpatch", "glass") else [1, 2, 3])
    backbone = load_backbone("timm/resnet18", pretrained=False, image_size=SIDE, levels=levels)
    options: dict[str, Any] = {"amount": SHARE} if name == "patchcore" else {}
    if find_detector(name).load().learns:
        options = {"training": {"steps": steps, "batch_size": BATCH}}
        options |= {"levels": [-1]} if name == "dinomaly" else {}
    detector = build_detector(name, backbone, options)
    return detector.fit, detector.predict


def theirs(name: str, steps: int) -> Work:
    warnings.simplefilter("ignore")
    made = {"patchcore": _patchcore, "padim": _padim, "rd4ad": _reverse_distillation, "cflow": _cflow, "glass": _glass}
    return made[name](steps)


def _patchcore(steps: int) -> Work:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(layers=["layer2", "layer3"], backbone="resnet18", pre_trained=False)

    def fit(batches: list[Tensor]) -> None:
        model.train()
        for batch in batches:
            model(batch)
        model.subsample_embedding(SHARE)
        model.eval()

    return fit, torch.no_grad()(model)


def _padim(steps: int) -> Work:
    from anomalib.models.image.padim.torch_model import PadimModel

    model = PadimModel(backbone="resnet18", layers=["layer1", "layer2", "layer3"], pre_trained=False)

    def fit(batches: list[Tensor]) -> None:
        model.train()
        for batch in batches:
            model(batch)
        model.fit()
        model.eval()

    return fit, torch.no_grad()(model)


def _reverse_distillation(steps: int) -> Work:
    from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
    from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
    from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel

    layers = ["layer1", "layer2", "layer3"]
    model = ReverseDistillationModel("resnet18", (SIDE, SIDE), layers, AnomalyMapGenerationMode.ADD, pre_trained=False)
    parts = [*model.decoder.parameters(), *model.bottleneck.parameters()]
    optimizer, loss = torch.optim.Adam(parts, 0.005, (0.5, 0.99)), ReverseDistillationLoss()

    def fit(batches: list[Tensor]) -> None:
        model.train()
        for step in range(steps):
            optimizer.zero_grad()
            loss(*model(batches[step % (len(batches) - 1)])).backward()
            optimizer.step()
        model.eval()

    return fit, torch.no_grad()(model)


def _cflow(steps: int) -> Work:
    from anomalib.models.image.cflow.torch_model import CflowModel
    from anomalib.models.image.cflow.utils import get_logp, positional_encoding_2d

    layers = ["layer1", "layer2", "layer3"]
    model = CflowModel("resnet18", layers, pre_trained=False, fiber_batch_size=VECTORS)
    optimizer = torch.optim.Adam(model.decoders.parameters(), 1e-4)

    def fit(batches: list[Tensor]) -> None:
        model.encoder.eval()
        for step in range(steps):
            features = model.encoder(batches[step % (len(batches) - 1)])
            for layer, decoder in zip(layers, model.decoders, strict=True):
                level = features[layer].detach()
                where = positional_encoding_2d(model.condition_vector, *level.shape[2:]).expand(len(level), -1, -1, -1)
                rows, places = (x.movedim(1, 3).flatten(0, 2) for x in (level, where))
                chosen = torch.randperm(len(rows))[:VECTORS]
                optimizer.zero_grad()
                likelihood = get_logp(rows.shape[1], *decoder(rows[chosen], [places[chosen]])) / rows.shape[1]
                (-torch.nn.functional.logsigmoid(likelihood)).mean().backward()
                optimizer.step()
        model.eval()

    return fit, torch.no_grad()(model)


def _glass(steps: int) -> Work:
    from anomalib.models.image.glass.torch_model import GlassModel

    width = 384  # the channels of layers 2 and 3, all of which ours takes
    model = GlassModel((SIDE, SIDE), None, width, width, "resnet18", pre_trained=False, layers=["layer2", "layer3"])
    model.forward_modules.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.discriminator.parameters(), 2e-4)
    adapting = torch.optim.Adam(model.projection.parameters(), 1e-4)

    def fit(batches: list[Tensor]) -> None:
        model.calculate_center([SimpleNamespace(image=batch) for batch in batches], torch.device("cpu"))
        model.train()
        model.forward_modules.eval()
        for step in range(steps):
            optimizer.zero_grad()
            adapting.zero_grad()
            model(batches[step % (len(batches) - 1)])[-1].backward()
            adapting.step()
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
    name, whose, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else STEPS
    print(json.dumps(measure((ours if whose == "ours" else theirs)(name, steps))))
