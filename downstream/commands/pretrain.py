"""`adpretrain pretrain` trains a projector on the marked defects of one's own products, and keeps it if it helps."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adpretrain.extras import need
from downstream.commands.options import Command
from downstream.terminal import ProgressBars, plain

if TYPE_CHECKING:
    from adpretrain.config import PretrainConfig
    from adpretrain.data import Sample
    from downstream.evaluation.gain import Gains

HELD_OUT = 4  # every so many products, one is held out
ALL = 0.9995  # an image AUROC that is shown as 100.0
HEADS = 16  # at most; they divide the channels of every level
# Residuals of so many draws of references are computed once, for sets of at most so many photographs; so many tokens of
# each enter a step.
DRAWS, CACHED, TOKENS = 4, 2000, 64


@dataclass(frozen=True, kw_only=True)
class Pretrain(Command):
    """Pretrain a feature projector on marked defects of several products, and keep it if it helps on others.

    A quarter of the products is held out of the training. At the end FeatureNorm scores them with the projector and
    without: if it gains more than it scatters between draws of references, the extractor is saved with its projector
    and this evidence in its card; otherwise it is saved without. The same command goes on with an interrupted run,
    whose checkpoints and curves lie in OUT.run. On several GPUs: accelerate launch -m downstream.cli pretrain ...
    All settings of the paper, and its own data set: recipes/pretrain.py.

    exit codes:
      0  the projector helps and is saved; or the run was stopped on request, and the same command goes on with it
      3  the projector does not help: the extractor is saved without it (or with it, if --keep always)
      2  wrong usage or data: nothing was trained

    Args:
        data: folder of several products in a known layout, such as that of MVTec AD: PRODUCT/train/good,
            PRODUCT/test/DEFECT, and masks in PRODUCT/ground_truth/DEFECT; or hf://org/name
        out: folder to save the extractor in
        backbone: network whose features are projected (listed by adpretrain backbones)
        weights: local file or folder with the backbone's weights
        image_size: side of the network's input in pixels
        held_out: names of the products that are not trained on; by default a quarter of those with defects, drawn by
            --seed
        shots: number of normal photographs of a held-out product that are its references
        steps: number of training steps
        batch_size: number of photographs per step and process
        lr: learning rate
        references: number of learnable references of the projector
        workers: number of processes that read photographs
        data_licence: licence of the photographs, for the extractor's card: own if they are yours, or such as CC-BY-4.0;
            without it adpretrain push refuses a card that allows commercial use
        keep: whether the projector is saved: only if it helps, or always
        seed: random seed of the training and of the choice of held-out products
    """

    data: str
    out: Path
    backbone: str = "lite0"
    weights: Path | None = None
    image_size: int = 224
    held_out: list[str] = field(default_factory=list)
    shots: int = 4
    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-3
    references: int = 256
    workers: int = 2
    data_licence: str | None = None
    keep: Literal["if-better", "always"] = "if-better"
    seed: int = 0

    def run(self) -> int:
        need("train", "accelerate")
        import torch
        from rich.console import Console

        from adpretrain import ADExtractor
        from adpretrain.data import index_with_bare
        from adpretrain.data.products import by_product, draw_shots
        from adpretrain.files import check_writable
        from adpretrain.saved import refuse_others
        from adpretrain.training.run import pretrain
        from downstream.evaluation.gain import compare

        refuse_others(self.out, "extractor", [])
        check_writable(self.out)
        samples, _ = index_with_bare("auto", self.data)
        held = held_out_of(samples, self.held_out, self.seed)
        apart = by_product([sample for sample in samples if sample.category in held])
        for group in apart.values():
            draw_shots(group, self.shots)  # too few photographs are found before the training
        first = int(os.environ.get("RANK", "0")) == 0
        console = Console(stderr=True)
        if first:
            print(found(samples, held))
        config = self._config(samples, held)
        pretrain(config, console)
        trained = Path(config.run) / "extractor"
        if not trained.is_dir():
            return 0  # stopped on request; the same command goes on
        if not first:
            return 0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        extractor = ADExtractor.from_pretrained(trained, device, self.weights)
        with ProgressBars() as progress:
            gains = compare(extractor, list(apart.values()), self.shots, progress=progress)
        print(evidence(gains))
        keep = gains.better or self.keep == "always"
        if keep:
            extractor.config = dataclasses.replace(
                extractor.config, provenance=with_evidence(extractor.config.provenance, gains)
            )
        (extractor if keep else extractor.without_projector()).save_pretrained(self.out)
        why = "" if gains.better else ", which does not help: --keep always" if keep else ", as it does not help"
        print(f"saved {'with' if keep else 'without'} the projector{why}: {plain(self.out)}")
        return 0 if gains.better else 3

    def _config(self, samples: Sequence[Sample], held: Sequence[str]) -> PretrainConfig:
        """The run: the norm loss in units of the residuals' own scale (docs/carry_over.md says why)."""
        from adpretrain.backbones import load_backbone
        from adpretrain.config import (
            BackboneConfig,
            CacheConfig,
            DataConfig,
            LocalScaleConfig,
            LossConfig,
            OptimConfig,
            PretrainConfig,
            ProjectorConfig,
        )

        weights = None if self.weights is None else str(self.weights)
        channels = load_backbone(self.backbone, weights=weights, image_size=self.image_size).channels
        width, trained = math.gcd(*channels), sum(sample.category not in held for sample in samples)
        heads = max(count for count in range(1, HEADS + 1) if width % count == 0)
        data = DataConfig("auto", self.data, held_out=list(held), workers=self.workers, licence=self.data_licence)
        return PretrainConfig(
            run=f"{self.out}.run",
            data=dataclasses.replace(data, on_error="skip"),
            backbone=BackboneConfig(self.backbone, self.image_size, weights=weights),
            projector=ProjectorConfig(references=self.references, heads=heads),
            loss=LossConfig(lambda_=0.0, radius=0.6, margin=0.3),
            optim=OptimConfig(lr=self.lr, batch_size=min(self.batch_size, trained), steps=self.steps),
            local_scale=LocalScaleConfig(),
            augment="none",  # the norm loss alone needs no second view
            cache=CacheConfig(draws=DRAWS if len(samples) <= CACHED else 0),
            tokens=TOKENS,
            tracker=False,
            seed=self.seed,
        )


def held_out_of(samples: Sequence[Sample], given: Sequence[str], seed: int) -> list[str]:
    """The names of the products to hold out. Raises ValueError if they leave nothing to train on, or are not there."""
    import numpy as np

    names = sorted({sample.category for sample in samples})
    defective = sorted({sample.category for sample in samples if sample.anomalous and sample.mask_files})
    if strange := [name for name in given if name not in names]:
        raise ValueError(f"--held-out {plain(strange[0])}: there is no such product; there are {', '.join(names)}")
    if given:
        if not set(defective) - set(given):
            raise ValueError("no product with marked defects is left to train on: hold out fewer")
        return list(given)
    if len(defective) < 2:
        raise ValueError(
            f"{len(defective)} of {len(names)} products have defects with masks; at least 2 are needed: one to train "
            "on, and one to see whether it helps on products that were not trained on"
        )
    order = np.random.default_rng(seed).permutation(len(defective))
    return sorted(defective[number] for number in order[: max(1, len(defective) // HELD_OUT)])


def found(samples: Sequence[Sample], held: Sequence[str]) -> str:
    """What a data set holds, one line for each product."""
    lines = []
    for name in sorted({sample.category for sample in samples}):
        own = [sample for sample in samples if sample.category == name]
        views = len({sample.view for sample in own})
        bad = [sample for sample in own if sample.anomalous]
        kinds = sorted({sample.defect for sample in bad})
        marked = sum(bool(sample.mask_files) for sample in bad)
        defects = f"{len(bad)} defects ({', '.join(kinds)}), {marked} with masks" if bad else "no defects"
        seen = f" in {views} views" if views > 1 else ""
        use = "held out" if name in held else "training"
        lines.append(f"{plain(name)}: {len(own) - len(bad)} normal photographs{seen}, {plain(defects)}; {use}")
    return "\n".join(lines)


def evidence(gains: Gains) -> str:
    """The comparison in a few lines."""
    lines = []
    for gain in gains.products:
        told = []
        for name, title in (("image_auroc", "image AUROC"), ("aupro", "AUPRO")):
            before, after = (100 * sum(row[name]) / len(row[name]) for row in (gain.without, gain.with_projector))
            told += [] if math.isnan(after) else [f"{title} {before:.1f} -> {after:.1f}"]
        known = gain.without["image_auroc"]
        full = sum(known) > ALL * len(known)
        told += ["nothing to gain in image AUROC: hold out a harder product"] if full else []
        lines.append(f"{plain(gain.product)}: {', '.join(told)}")
    verdict = "helps" if gains.better else "does not help"
    lines.append(
        f"on the held-out products the projector {verdict}: gain {100 * gains.gain:+.1f} points, spread "
        f"{100 * gains.spread:.1f} over {len(gains.products[0].per_draw())} draws of references"
    )
    return "\n".join(lines)


def with_evidence(provenance: dict[str, object], gains: Gains) -> dict[str, object]:
    """A run's provenance with what the comparison measured, which the card shows."""
    names = {"image_auroc", "aupro"}
    measured = {name: gains.mean(name, True) for name in names}
    measured |= {f"raw_{name}": gains.mean(name, False) for name in names}
    known = {name: value for name, value in measured.items() if not math.isnan(value)}
    held = {"step": provenance.get("kept_step"), **known, "gain": gains.gain, "spread": gains.spread}
    return {**provenance, "held_out_metrics": held}
