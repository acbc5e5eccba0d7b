"""The options of GLASS."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from downstream.embedding import EmbeddingConfig
from downstream.lessons import LearningConfig
from downstream.maps import SIGMA, check_sigma

FORMS = ("hypersphere", "manifold")


@dataclass(frozen=True)
class GLASSConfig:
    """Options of `GLASS`.

    Args:
        embedding: levels and channels of a patch; the neighbourhood is 3 x 3 patches.
        form: what global anomalies are kept away from: "hypersphere" (the centre of the normal features, GLASS-h, which
            ADPretrain uses; its distances need no unit) or "manifold" (every normal feature, GLASS-m).
        radii: least and largest distance of global anomalies; for "hypersphere" in units of that of normal features,
            for "manifold" in the unit of the features, where the authors' code has 0.5 and 1.
        noise: standard deviation of the noise on a feature, before the ascent.
        climb_steps, climb_rate: number and length of the steps of the gradient ascent.
        easy: share of the patches with pasted textures that are judged best and left out of the loss.
        hidden: channels inside the discriminator.
        learning_rate, adaptor_rate: learning rates of discriminator and adaptor.
        textures: folder with photographs of textures to paste, on the machine that fits; null = coloured noise.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
        training: steps and images per step; the number of steps is [ours], the authors take some 31,000.
    """

    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    form: Literal["hypersphere", "manifold"] = "hypersphere"
    radii: tuple[float, float] = (1.0, 2.0)
    noise: float = 0.015
    climb_steps: int = 20
    climb_rate: float = 1e-3
    easy: float = 0.5
    hidden: int = 1024
    learning_rate: float = 2e-4
    adaptor_rate: float = 1e-4
    textures: str | None = None
    sigma: float = SIGMA
    training: LearningConfig = field(default_factory=lambda: LearningConfig(steps=2000, batch_size=8))

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        object.__setattr__(self, "radii", tuple(self.radii))  # JSON and YAML give lists
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is unknown; choose one of {', '.join(FORMS)}")
        if len(self.radii) != 2 or not 0 < self.radii[0] <= self.radii[1] < math.inf:
            raise ValueError(f"radii {self.radii} must be two positive distances, ascending, such as (1, 2)")
        for name in ("learning_rate", "adaptor_rate", "climb_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if not 0 <= self.noise < math.inf or self.climb_steps < 0:
            raise ValueError(f"noise {self.noise} and climb_steps {self.climb_steps} must not be negative")
        if not 0 <= self.easy < 1:
            raise ValueError(f"easy {self.easy} must be a share, 0 (learn from all patches) to below 1")
        if not 1 <= self.hidden <= 65536:
            raise ValueError(f"hidden {self.hidden} must be at least 1, and at most 65536")
