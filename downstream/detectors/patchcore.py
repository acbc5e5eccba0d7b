"""PatchCore: the distance of every patch to the nearest patch in a memory bank of normal ones (Roth et al. 2022).

Shapes: B images, S side in pixels, H x W patches of an image, N rows of the bank, D channels, b neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.memory import GrowingBank
from adpretrain.progress import Progress
from downstream.coreset import METHODS, check_amount, subsample
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.embedding import Embedding, EmbeddingConfig, settle_levels
from downstream.maps import SIGMA, check_sigma, pixel_maps
from downstream.neighbours import ApproximateNeighbours, Neighbours, nearest
from downstream.plain_search import PlainNeighbours, constant
from downstream.roi import RegionOfInterest

SEARCHES = ("exact", "ivfpq")
CHOOSING = 40  # bytes per row that the coreset selection needs for bounds, norms and counts
WEIGHED = 4096  # number of patches whose weights are computed at a time


@dataclass(frozen=True)
class PatchCoreConfig:
    """Options of `PatchCore`.

    Args:
        embedding: levels ("hierarchies"), patch size, stride and channels. The paper uses two levels of
            WideResNet-50 (stages 2 and 3), 3 x 3 patches, stride 1.
        amount: size of the bank after subsampling: a share (PatchCore-10% is 0.1) or a number of rows.
        method: "greedy" coreset (Alg. 1), "random" rows, or "none" (PatchCore-100%).
        projection_dim: channels after the random projection that the greedy selection works on; null, or a number not
            below that of the channels, means no projection.
        keep: share of every image's patches, drawn at random, that are put into the bank before subsampling; it limits
            the memory for a large training set.
        reweight: b of Eq. 7, the neighbours of the nearest patch that weight the image's score; 0 = the plain maximum.
        reweight_all: weight the distance of every patch, not only of the farthest; the image's score is then the
            largest weighted distance (ReConPatch Eq. 9 and 10).
        squared: use squared distances in maps and scores, like ADPretrain's evaluation, whose faiss index returns
            squares. The ranking of patches is the same, but smoothed maps and mean scores are not; weights (Eq. 7) are
            still computed from Euclidean distances.
        search: "exact", or "ivfpq" for banks too large for exact search (faiss; approximate).
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
        max_bank_bytes: largest size of the bank before subsampling, including what the selection needs per row; null =
            half of the memory.
        seed: random seed of ``keep``, the projection and the selection.
    """

    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    amount: int | float = 0.1
    method: Literal["greedy", "random", "none"] = "greedy"
    projection_dim: int | None = 128
    keep: float = 1.0
    reweight: int = 9
    reweight_all: bool = False
    squared: bool = False
    search: Literal["exact", "ivfpq"] = "exact"
    sigma: float = SIGMA
    max_bank_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"subsampling method {self.method!r} is unknown; choose one of {METHODS}")
        if self.search not in SEARCHES:
            raise ValueError(f"search {self.search!r} is unknown; choose one of {SEARCHES}")
        check_amount(self.amount)
        check_sigma(self.sigma)
        for name, value, least in (("projection_dim", self.projection_dim, 1), ("seed", self.seed, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep {self.keep} must be a share of an image's patches, above 0 and at most 1")
        if self.reweight < 0 or self.reweight == 1:
            raise ValueError(f"reweight {self.reweight} must be 0 (off) or at least 2: one neighbour gives weight 0")


DEFAULT = PatchCoreConfig()
STAGES = (2, 3)  # the stages of a ResNet that the paper uses
# ADPretrain's evaluation: the last three levels, 1024 channels of each and of all, no re-weighting, squared distances.
# Its greedy selection is approximate and ours exact, so the patches that remain in the bank differ.
ADPRETRAIN = PatchCoreConfig(
    EmbeddingConfig(levels=[-3, -2, -1], level_dim=1024, target_dim=1024, form="released"), reweight=0, squared=True
)


class PatchCore(Detector):
    """Patch embeddings of normal images -> subsampled bank -> nearest distances -> map; Eq. 6 and 7 -> score.

    Memory: fitting needs all patches (N = images x H x W x keep rows of 4 D bytes) and one batch; the selection needs
    another 20 N bytes or so and the projected rows (4 N projection_dim). Afterwards, twice the subsampled bank remains.
    """

    name = "patchcore"
    options = PatchCoreConfig

    bank_ND: Tensor
    _search: Neighbours | ApproximateNeighbours | PlainNeighbours
    _around_Nb: Tensor | None = None  # the b neighbours of every row, which only a `traceable` copy looks up

    def __init__(self, extract: Extract, config: PatchCoreConfig = DEFAULT) -> None:
        super().__init__(extract, replace(config, embedding=settle_levels(config.embedding, extract, STAGES)))
        self.embedding = Embedding(self.config.embedding)

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Fill the bank and subsample it; ``progress`` follows the growing coreset. Raises ValueError, which says what
        to change, before the bank exceeds ``max_bank_bytes``."""
        self.remember(self.choose(map(self.embedding, normals), normals.batches, progress, normals.region))

    def choose(
        self,
        embeddings: Iterable[Tensor],
        batches: int | None = None,
        progress: Progress | None = None,
        region: RegionOfInterest | None = None,
    ) -> Tensor:
        """Subsample embeddings [b, H, W, D] of the normal images, in the region, to a bank [N, D]. ``batches`` is their
        number if it is known; the first must be the largest. Raises the errors of `fit_features`."""
        config, bank, count = self.config, None, 0
        for maps_BHWD in embeddings:
            # Checked at the first batch, not after hours of extraction.
            if config.search == "ivfpq" and maps_BHWD.device.type != "cpu":
                raise ValueError(
                    f"search 'ivfpq' works on the CPU only, and the features are on {maps_BHWD.device}: choose search "
                    "'exact', or move extract and images to the CPU"
                )
            inside = region and region.pick(range(count, count + len(maps_BHWD))).inside(maps_BHWD[..., 0])
            kept_ND = self._kept(maps_BHWD, count, inside)
            count += len(maps_BHWD)
            if bank is None:
                alike = batches is not None and (region is None or region.shared)  # as many rows from every image
                rows = batches * len(kept_ND) if batches is not None and alike else None
                bank = GrowingBank(rows, config.max_bank_bytes, self._beside(kept_ND))
            bank.add(kept_ND)
        assert bank is not None
        bank_ND = bank.take()
        if config.method == "none":
            return bank_ND
        projection = config.projection_dim
        if projection is not None and projection >= bank_ND.shape[1]:
            projection = None
        chosen = subsample(bank_ND, config.amount, config.method, 0, projection, config.seed, progress)
        return bank_ND[chosen]

    def _beside(self, rows_ND: Tensor) -> int:
        """Return the additional bytes per row of the bank that subsampling (or searching the full bank) needs."""
        width, size = rows_ND.shape[1], rows_ND.element_size()
        if self.config.method != "greedy":
            return width * size if self.config.method == "none" else CHOOSING
        projected = self.config.projection_dim or width
        return CHOOSING + (projected * size if projected < width else 0)

    def _kept(self, maps_BHWD: Tensor, first: int, inside_BHW: Tensor | None) -> Tensor:
        """Keep a random share of every image's patches (inside), drawn from (seed, number of the image): [n, D]."""
        if self.config.keep == 1:
            return maps_BHWD.flatten(0, 2) if inside_BHW is None else maps_BHWD[inside_BHW]
        kept = []
        for image, maps_HWD in enumerate(maps_BHWD):
            rows_TD = maps_HWD.flatten(0, 1) if inside_BHW is None else maps_HWD[inside_BHW[image]]
            patches = len(rows_TD)
            drawn = np.random.default_rng([self.config.seed, first + image]).permutation(patches)
            chosen = np.sort(drawn[: max(1, round(self.config.keep * patches))])
            kept.append(rows_TD[torch.from_numpy(chosen).to(rows_TD.device)])
        return torch.cat(kept)

    def remember(self, bank_ND: Tensor) -> None:
        """Use a bank [N, D] of embeddings, from `choose` or a file."""
        approximate = self.config.search == "ivfpq"
        self._search = ApproximateNeighbours(bank_ND, seed=self.config.seed) if approximate else Neighbours(bank_ND)
        self.bank_ND = bank_ND

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        return self.score(self.embedding(features), self.side, region)

    def score(self, rows_BHWD: Tensor, side: int, region: RegionOfInterest | None = None) -> Prediction:
        """Predict from embeddings [B, H, W, D] of images whose side is ``side`` pixels."""
        batch, height, width, _ = rows_BHWD.shape
        rows_ND = rows_BHWD.flatten(0, 2)
        distance_N, index_N = self._nearest(rows_ND)
        if self.config.squared:
            distance_N = distance_N.square()
        if self.config.reweight and self.config.reweight_all:
            distance_N = distance_N * self._all_weights(rows_ND, index_N)
        distance_BT = distance_N.view(batch, -1)
        inside = region and region.inside(rows_BHWD[..., 0]).flatten(1)
        scores, farthest_B = (distance_BT if inside is None else distance_BT.masked_fill(~inside, -torch.inf)).max(1)
        if self.config.reweight and not self.config.reweight_all:
            picked = torch.arange(batch, device=farthest_B.device), farthest_B
            scores = scores * self._weights(rows_BHWD.flatten(1, 2)[picked], index_N.view(batch, -1)[picked])
        return Prediction(
            scores, pixel_maps(distance_BT.unflatten(1, (height, width)), side, self.config.sigma, region)
        )

    def _nearest(self, rows_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance to the nearest row of the bank, and its index: [N], [N]."""
        distance, index = (found[:, 0] for found in self._search.search(rows_ND, 1))
        if self.config.search == "exact":
            return distance, index
        lost = index < 0  # an approximate search found nothing, because the cells it visited are empty
        if bool(lost.any()):
            distance[lost], index[lost] = (found[:, 0] for found in nearest(rows_ND[lost], self.bank_ND, 1))
        return distance, index

    def _all_weights(self, rows_ND: Tensor, nearest_N: Tensor) -> Tensor:
        """Compute the weights of all patches, a few at a time except in a graph, which has no loops: [N]."""
        if self._around_Nb is not None:
            return self._weights(rows_ND, nearest_N)
        steps = zip(rows_ND.split(WEIGHED), nearest_N.split(WEIGHED), strict=True)
        return torch.cat([self._weights(rows, nearest) for rows, nearest in steps])

    def _weights(self, patch_BD: Tensor, nearest_B: Tensor) -> Tensor:
        """Compute w of Eq. 7 for some patches and their nearest rows m*: [B] in 0..1.

        w = 1 - exp ||m_test - m*|| / sum over the b rows next to m* of exp ||m_test - m||. m* is one of the b rows, and
        the weight is computed as the share of the other rows in the sum, so that nothing overflows or cancels. For a
        bank of one row we return 1; Eq. 7 gives 0, with which every score would be 0.
        """
        count = min(self.config.reweight, len(self.bank_ND))
        if count < 2:
            return torch.ones_like(patch_BD[:, 0])
        index_Bb = self._around(nearest_B, count) if self._around_Nb is None else self._around_Nb[nearest_B]
        distance_Bb = (patch_BD[:, None] - self.bank_ND[index_Bb]).norm(dim=2)
        distance_Bb = distance_Bb.masked_fill(index_Bb < 0, -torch.inf)
        return distance_Bb.softmax(1)[:, 1:].sum(1)

    def _around(self, row_M: Tensor, count: int) -> Tensor:
        """Return the rows of the bank that are nearest to some of its rows, which are the first: [M, b] int64."""
        rows, back_M = row_M.unique(return_inverse=True)  # many patches share their nearest row
        return self._search.search(self.bank_ND[rows], count)[1][back_M]

    def traceable(self) -> Self:
        if self.config.search != "exact":
            raise ValueError(
                f"search {self.config.search!r} cannot be exported: a graph has no inverted lists; fit with search "
                "'exact' and a smaller amount"
            )
        copied, rows = super().traceable(), torch.arange(len(self.bank_ND), device=self.bank_ND.device)
        copied._search = PlainNeighbours(self.bank_ND)
        copied.bank_ND = copied._search.bank_ND
        if self.config.reweight:
            copied._around_Nb = constant(self._around(rows, min(self.config.reweight, len(rows))))
        return copied

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the bank, which holds FEATURES OF THE PRODUCT."""
        return {"bank": self.bank_ND, **self.embedding.state_dict()}, {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.embedding.reducer = tensors.get("reducer")
        self.remember(tensors["bank"])
