"""WinCLIP: windows of an image are compared with sentences about flawless and damaged products, and, if there are
normal photographs, with theirs (Jeong et al. 2023).

Without photographs it works from the product's name alone ("zero-shot"): `fit` is only needed to add normal ones. It
takes an open_clip model (`downstream.clip_windows.ClipWindows`), in Python only.

A softmax over the two meanings gives the score of a window (Eq. 1); a patch has the harmonic mean of the windows that
cover it (Sec. 4.2), then of the scales, the whole image being one. Normal photographs add half the cosine distance to
the nearest of theirs, windows and patches alike (Eq. 4).

A vision transformer sees the whole image in every patch, and windows see themselves. Within a region of interest, the
whole image is left out of the map, and the image's score is the maximum of the map.

Shapes: B images, S side in pixels, H x W patches, h x w windows of a scale, N rows of a bank, D and C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.memory import GrowingBank
from adpretrain.progress import Progress
from downstream.clip_windows import ClipWindows
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.maps import check_sigma, highest_tokens, pixel_maps
from downstream.neighbours import Neighbours
from downstream.plain_search import PlainNeighbours, constant
from downstream.roi import RegionOfInterest

FLAWLESS = (
    *("{}", "flawless {}", "perfect {}", "unblemished {}"),
    *("{} without flaw", "{} without defect", "{} without damage"),
)
DAMAGED = ("damaged {}", "{} with flaw", "{} with defect", "{} with damage")
VIEWS = ("cropped", "close-up", "bright", "dark", "jpeg corrupted", "blurry")
TEMPLATES = (
    *(f"a {view} photo of {{article}} {{state}}." for view in VIEWS),
    *(f"a photo of {{article}} {size}{{state}}." for size in ("", "small ", "large ")),
    *(f"a photo of {{article}} {{state}} for {purpose}." for purpose in ("visual inspection", "anomaly detection")),
)


@dataclass(frozen=True)
class WinCLIPConfig:
    """Options of `WinCLIP`.

    Args:
        product: what the photographs show, in English words, such as "metal nut".
        temperature: divisor of the cosines before the softmax; 0.07 is CLIP's before its training.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels; the paper's maps are not smoothed.
    """

    product: str = "object"
    temperature: float = 0.07
    sigma: float = 0.0

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be positive, such as 0.07")
        if not self.product.strip():
            raise ValueError('product must say what the photographs show, such as "metal nut", or "object"')


DEFAULT = WinCLIPConfig()


class WinCLIP(Detector):
    """Windows and whole image -> softmax over sentences -> harmonic means -> map, with the distance to normal patches
    and windows if there are any; the whole image's score, averaged with that distance's maximum -> score."""

    name = "winclip"
    options = WinCLIPConfig

    extract: ClipWindows
    meanings_2D: Tensor  # of flawless and of damaged products
    banks: list[Tensor]  # of unit rows [N, D] or [N, C], of windows of each scale and of patches; empty = zero-shot

    def __init__(self, extract: Extract, config: WinCLIPConfig = DEFAULT) -> None:
        if not isinstance(extract, ClipWindows):
            raise ValueError(
                f"winclip reads sentences, which a {type(extract).__name__} cannot: in Python, give it "
                "downstream.clip_windows.ClipWindows(model) of an open_clip model"
            )
        super().__init__(extract, config)
        self.side = extract.preprocess.image_size
        self.meanings_2D = torch.stack([extract.meaning(sentences(config.product, s)) for s in (FLAWLESS, DAMAGED)])
        self._remember([])

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Keep the windows and patches of normal images in their region."""
        banks: list[GrowingBank] = []
        count = 0
        for features in normals:
            region = normals.region and normals.region.pick(range(count, count + len(features[0])))
            count += len(features[0])
            banks = banks or [GrowingBank() for _ in features[1:]]
            for bank, level in zip(banks, features[1:], strict=True):
                rows_BHWD = unit(level)
                bank.add(rows_BHWD.flatten(0, 2) if region is None else rows_BHWD[region.inside(rows_BHWD[..., 0])])
        self._remember([bank.take() for bank in banks])

    def _remember(self, banks: list[Tensor]) -> None:
        self.banks = banks
        self._searches: list[Neighbours | PlainNeighbours] = [Neighbours(bank) for bank in banks]

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        whole, *windows, patches = features
        grid = (int(patches.shape[2]), int(patches.shape[3]))
        covered = [on_patches(self._damaged(level), grid) for level in windows]
        whole_B = self._damaged(whole)[:, 0, 0]
        scales = covered if region is not None else [whole_B[:, None, None].expand_as(covered[0]), *covered]
        map_BHW = len(scales) / torch.stack([1 / scale for scale in scales]).sum(0)
        score_B = whole_B if region is None else highest_tokens(map_BHW, 0.0, region)
        if self.banks:
            distances = [self._distance(level, number) for number, level in enumerate(features[1:])]
            near = [on_patches(one, grid) for one in distances[:-1]]
            near_BHW = torch.stack([*near, distances[-1]]).mean(0)
            map_BHW = (map_BHW + near_BHW) / 2
            score_B = (score_B + highest_tokens(near_BHW, 0.0, region)) / 2
        return Prediction(score_B, pixel_maps(map_BHW, self.side, self.config.sigma, region))

    def _damaged(self, level_BDhw: Tensor) -> Tensor:
        """How much more windows look like damaged than like flawless products: 0..1, [B, h, w]."""
        return (unit(level_BDhw) @ self.meanings_2D.T / self.config.temperature).softmax(3)[..., 1]

    def _distance(self, level_BDhw: Tensor, number: int) -> Tensor:
        """Half the cosine distance to the nearest row of a bank: [B, h, w]."""
        rows_BhwD = unit(level_BDhw)
        distance_N = self._searches[number].search(rows_BhwD.flatten(0, 2), 1)[0][:, 0]
        return (distance_N.square() / 4).view(rows_BhwD.shape[:3])

    def traceable(self) -> Self:
        copied = super().traceable()
        copied.meanings_2D = constant(self.meanings_2D)
        copied._searches = [PlainNeighbours(bank) for bank in self.banks]
        return copied

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the meanings and the banks, which hold FEATURES OF THE PRODUCT."""
        banks = {f"bank.{number}": bank for number, bank in enumerate(self.banks)}
        return {"meanings": self.meanings_2D, **banks}, {"banks": len(self.banks)}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.meanings_2D = tensors["meanings"]
        self._remember([tensors[f"bank.{number}"] for number in range(facts["banks"])])


def sentences(product: str, states: tuple[str, ...]) -> list[str]:
    """Every state of the product in every template, with both articles (the compositional prompt ensemble)."""
    return [
        template.format(article=article, state=state.format(product))
        for state in states
        for template in TEMPLATES
        for article in ("a", "the")
    ]


def unit(level_BDHW: Tensor) -> Tensor:
    """The vectors of a level, of unit length: [B, H, W, D], float32 or wider."""
    level_BDHW = level_BDHW.to(torch.promote_types(level_BDHW.dtype, torch.float32))
    return F.normalize(level_BDHW.permute(0, 2, 3, 1), dim=3).contiguous()


def on_patches(scores_Bhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The harmonic mean, for every patch of the grid, of the scores of the windows that cover it: [B, H, W]."""
    kernel = scores_Bhw.new_ones(1, 1, grid[0] - scores_Bhw.shape[1] + 1, grid[1] - scores_Bhw.shape[2] + 1)
    inverse, ones = 1 / scores_Bhw[:, None], torch.ones_like(scores_Bhw[:1, None])
    return (F.conv_transpose2d(ones, kernel) / F.conv_transpose2d(inverse, kernel))[:, 0]
