"""The options of ReContrast and RD4AD, among them the configurations of the ReContrast paper's ablation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from downstream.lessons import LearningConfig
from downstream.maps import SIGMA, check_sigma, check_top

NORMS = ("train", "eval", "guarded")


@dataclass(frozen=True)
class Form:
    """What distinguishes the configurations of Table 6.

    ``whole``: the loss compares whole levels (Eq. 3), not single places (Eq. 2). ``trains``: the encoder is trained.
    ``stops``: no gradient passes through what is reconstructed (Eq. 4). ``crosses``: the trained encoder's features
    reconstruct those of the frozen one, and vice versa (Sec. 2.5).
    """

    whole: bool
    trains: bool
    stops: bool
    crosses: bool


FORMS = {
    "A": Form(whole=False, trains=False, stops=False, crosses=False),
    "B": Form(whole=True, trains=False, stops=False, crosses=False),
    "C": Form(whole=True, trains=True, stops=False, crosses=False),
    "C+cp": Form(whole=True, trains=True, stops=False, crosses=True),
    "D": Form(whole=True, trains=True, stops=True, crosses=False),
    "E": Form(whole=True, trains=True, stops=True, crosses=True),
}


@dataclass(frozen=True)
class ReContrastConfig:
    """Options of `ReContrast` and of `RD4AD`. The defaults are those of the ReContrast paper on MVTec AD.

    Args:
        levels: levels of the extract, counted from 0, finest first; "paper" = stages 1 to 3 of a network with stages,
            null = all. Each must be twice as large as the next.
        form: configuration of the paper's Table 6. "A": regional loss, frozen encoder. "B": global loss (released
            RD4AD). "C": the encoder is trained, too. "D": no gradient through what is reconstructed. "C+cp": "C" with
            the contrast of a frozen and a trained encoder. "E": all of these; with hard mining the paper's ReContrast.
        hard_mining: whether the gradients of places that are easy to reconstruct are discarded (Eq. 5).
        alpha: of Eq. 5, after the first tenth of the steps, in which it rises from -3.
        bottleneck: the residual blocks have a 1/bottleneck of their channels inside: 2 for WideResNet-50, 4 for
            ResNet-50, 0 for blocks of two 3 x 3 convolutions as in ResNet-18; null = 2 or 0, by the channels.
        learning_rate: of the bottleneck and the decoder.
        encoder_rate: learning rate of the encoder.
        batch_norm: "train" lets the trained encoder's batch norms use the batch, "eval" the pretrained statistics, for
            products on which training is unstable; "guarded" replaces only vanishing variances (App. E, there together
            with training.reset_every=500).
        top: the image score is the mean of this share of the highest map values; 0 = the maximum, 1 = the mean of the
            map, for data whose anomalies are whole objects of another class.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
        training: steps, images per step and seed. The paper takes 3,000 steps on VisA and 1,000 on APTOS and OCT2017.
    """

    levels: list[int] | Literal["paper"] | None = "paper"
    form: Literal["A", "B", "C", "C+cp", "D", "E"] = "E"
    hard_mining: bool = True
    alpha: float = 1.0
    bottleneck: int | None = None
    learning_rate: float = 2e-3
    encoder_rate: float = 1e-5
    batch_norm: Literal["train", "eval", "guarded"] = "train"
    top: float = 0.0
    sigma: float = SIGMA
    training: LearningConfig = field(default_factory=lambda: LearningConfig(steps=2000))

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_top(self.top)
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is unknown; choose one of {', '.join(FORMS)}")
        if self.batch_norm not in NORMS:
            raise ValueError(f"batch_norm {self.batch_norm!r} is unknown; choose one of {', '.join(NORMS)}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha {self.alpha} must be a number of standard deviations, such as 1")
        if self.bottleneck is not None and self.bottleneck < 0:
            raise ValueError(f"bottleneck {self.bottleneck} must be 0, 2, 4 or another divisor, or null")
        for name in ("learning_rate", "encoder_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
