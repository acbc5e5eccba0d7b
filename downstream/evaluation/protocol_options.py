"""A protocol of `protocols` by name, and its options. This module does not import torch, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Protocol = Literal[
    "full",
    "few-shot",
    "sample-efficiency",
    "contamination",
    "reference-sensitivity",
    "multi-class",
    "robustness",
    "shifted-line",
]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
FEW = ("few-shot", "robustness", "contamination", "shifted-line")  # protocols that take K photographs


@dataclass(frozen=True)
class ProtocolOptions:
    """A protocol of `protocols`, and its options.

    Args:
        protocol: full, few-shot, sample-efficiency, contamination, reference-sensitivity, multi-class, robustness
            (scored as photographed and again under each change: light, rotation, shift, blur, noise, jpeg) or
            shifted-line (fitted on the first half of the normal photographs in the order of their file names, scored on
            the second: names must stand for time).
        shots: for few-shot, robustness, contamination and shifted-line, the numbers K of training images, which are
            also the references; 0 (in a file also "all") takes all of them, in one draw. By default 4 for few-shot; the
            others fit on all and draw their references from them, as full does.
        draws: number of random draws (of training images, anomalies, references or perturbations, as the protocol
            needs); 0 = the protocol's default.
        seed: random seed of the first draw; each further draw adds 1.
        references: number of the extractor's references, drawn from the training images; with shots, the K images are.
        share: for sample-efficiency, the share of the normal training images to use.
        noise: for contamination, the anomalies added per normal training image, or with shots the share of the K images
            that are anomalies, at least one; at most half of a product's anomalies. A set's own contaminated training
            list is taken as it is, or with shots its anomalies are drawn.
        overlap: for contamination, whether the anomalies in the training images are also scored, as in the paper.
    """

    protocol: Protocol = "full"
    shots: tuple[int, ...] = ()
    draws: int = 0
    seed: int = 0
    references: int = 8
    share: float = 0.1
    noise: float = 0.1
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol {self.protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
        if self.protocol == "few-shot" and not self.shots:
            object.__setattr__(self, "shots", (4,))
        if any(count < 0 for count in self.shots) or self.references < 1 or self.draws < 0 or self.seed < 0:
            raise ValueError(
                f"shots {list(self.shots)} must be numbers of images (0 = all), references {self.references} at least "
                f"1, draws {self.draws} (0 = the protocol's default) and seed {self.seed} at least 0"
            )
        for name in ("share", "noise"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be in (0, 1], such as 0.1")

    @property
    def repeats(self) -> int:
        """Number of draws; by default 3 for reference-sensitivity, else 1."""
        return self.draws or (3 if self.protocol == "reference-sensitivity" else 1)
