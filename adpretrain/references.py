"""K normal photographs to compare with: the bank of their features, and how they are chosen.

Shapes: B images, R banks, K references, L levels, T = H x W tokens per image, N = K * T, C channels; P pool images,
S x S grid cells of G = (H / S) * (W / S) tokens each, N_c centres per cell, M = S^2 N_c histogram bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.backbones.base import FeatureMaps
from adpretrain.local_scale import LocalScale
from adpretrain.residual import (
    LeaveOneOut,
    SearchIndex,
    as_map,
    leave_one_out_residuals,
    residual_tokens,
    search_index,
    tokens,
)

CELLS, CENTRES = 5, 5  # S and N_c of the paper
EPS = 1e-8
CHUNK_BYTES = 64 << 20


class TooFewImages(ValueError):
    """Fewer normal images than a method needs; raised only if more images would help."""


class ReferenceBank:
    """The features of K normal photographs of one product, or of K for each of R groups of images, for matching.

    ``levels``: L tensors [R, K * T_l, C_l], the tokens of a photograph together and in order. Bank r belongs to B / R
    consecutive images of a batch: R = 1 is one bank for all, R = B one for each image. ``grids``: (H_l, W_l) of
    each level. ``metric`` finds the nearest reference, and ``local_scale`` scales residuals. Scales, search indices and
    attention context are computed when they are first needed, and kept.

    Raises ValueError if a level is not a whole number of photographs.
    """

    def __init__(
        self,
        levels: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        metric: str = "l2",
        local_scale: LocalScale | None = None,
    ) -> None:
        self.levels, self.grids, self.metric, self.local_scale = list(levels), list(grids), metric, local_scale
        if len(self.levels) != len(self.grids):
            raise ValueError(f"{len(self.levels)} levels of references, but grids of {len(self.grids)} levels")
        for level, (height, width) in zip(self.levels, self.grids, strict=True):
            if not level.shape[1] or level.shape[1] % (height * width):
                raise ValueError(
                    f"a bank of {level.shape[1]} tokens is not a whole number of {height * width}-token images: "
                    "were the references encoded at another image size?"
                )
        self.shots = self.levels[0].shape[1] // (self.grids[0][0] * self.grids[0][1])

    @classmethod
    def of(
        cls, features: FeatureMaps, metric: str = "l2", local_scale: LocalScale | None = None, banks: int = 1
    ) -> ReferenceBank:
        """The bank of encoded photographs: L levels [R * K, C_l, H_l, W_l], ordered by bank; R = ``banks``."""
        levels = [tokens(level).reshape(banks, -1, level.shape[1]) for level in features]
        grids = [(int(level.shape[2]), int(level.shape[3])) for level in features]
        return cls(levels, grids, metric, local_scale)

    @property
    def banks(self) -> int:
        """The number of banks R."""
        return self.levels[0].shape[0]

    @property
    def channels(self) -> list[int]:
        """The number of channels C_l of each level."""
        return [level.shape[2] for level in self.levels]

    @cached_property
    def scales(self) -> list[Tensor] | None:
        """The divisors of the residuals, L levels [R, N_l]; None without a local scale."""
        return None if self.local_scale is None else self.local_scale.scales(self.levels, self.grids, self.metric)

    @cached_property
    def indices(self) -> list[SearchIndex] | None:
        """The `search_index` of every level; None if there is more than one bank."""
        return [search_index(level[0], self.metric) for level in self.levels] if self.banks == 1 else None

    @cached_property
    def context(self) -> list[Tensor]:
        """The references' (scaled) residuals among themselves, for cross attention: L levels [R, N_l, C_l]."""
        out = []
        for level, bank_RNC in enumerate(self.levels):
            context = torch.stack([leave_one_out_residuals(bank, self.shots, self.metric) for bank in bank_RNC])
            out.append(context if self.scales is None else context / self.scales[level][..., None])
        return out

    def residuals(self, features: FeatureMaps) -> FeatureMaps:
        """Features minus their nearest references, divided by the local scale: L levels [B, C_l, H_l, W_l].

        Raises ValueError if metric, levels, channels or batch sizes do not fit.
        """
        if len(features) != len(self.levels):
            raise ValueError(f"features have {len(features)} levels but references have {len(self.levels)}")
        images, out = features[0].shape[0], []
        if images % self.banks:
            raise ValueError(f"{self.banks} banks of references do not fit a batch of {images} images: expected 1 or B")
        if self.metric == "none":
            return features
        for level, (feature, bank_RNC) in enumerate(zip(features, self.levels, strict=True)):
            query_RQC = tokens(feature).reshape(self.banks, -1, feature.shape[1])
            scale = None if self.scales is None else self.scales[level]
            index = None if self.indices is None else self.indices[level]
            residual = residual_tokens(query_RQC, bank_RNC, self.metric, scale_RN=scale, index=index)
            out.append(as_map(residual.view(images, -1, feature.shape[1]), feature))
        return out

    def without(self, images: Sequence[int]) -> ReferenceBank:
        """The bank without these photographs. Raises ValueError if none remain."""
        kept = [image for image in range(self.shots) if image not in images]
        levels = [level.unflatten(1, (self.shots, -1))[:, kept].flatten(1, 2) for level in self.levels]
        return ReferenceBank(levels, self.grids, self.metric, self.local_scale)

    def leave_one_out(self) -> FeatureMaps:
        """Residuals of each photograph of a shared bank as if it were new, with the other K - 1 as references: L levels
        [K, C_l, H_l, W_l]. Raises ValueError if K < 2.

        Matching with `without` for every photograph would compare every pair of tokens K - 1 times, because the scales
        depend on which photograph is left out; here each pair is compared once.
        """
        assert self.banks == 1
        if self.shots < 2:
            raise ValueError(f"leave-one-out needs at least 2 references, got {self.shots}")
        maps = []
        for level, (height, width) in zip(self.levels, self.grids, strict=True):
            photographs_KTC = level[0].unflatten(0, (self.shots, -1))
            maps.append(photographs_KTC.transpose(1, 2).unflatten(2, (height, width)))
        if self.shots == 2:  # the scale of a single reference is measured in another way
            alone = [self.without([i]).residuals([level[i : i + 1] for level in maps]) for i in range(2)]
            return [torch.cat(level) for level in zip(*alone, strict=True)]
        return [self._left_out(level) for level in maps]

    def _left_out(self, feature_KCHW: Tensor) -> Tensor:
        shots, _, height, width = feature_KCHW.shape
        table = LeaveOneOut(tokens(feature_KCHW).flatten(0, 1), shots, self.metric)
        image_N = torch.arange(shots, device=feature_KCHW.device).repeat_interleave(height * width)
        parts = []
        for image in range(shots):
            residual, matched = table.residuals((image_N == image).nonzero()[:, 0])
            if self.local_scale is not None:
                rest = (image_N != image).nonzero()[:, 0]
                norms, _ = table.residuals(rest, without=image)
                scale = torch.empty_like(image_N, dtype=norms.dtype)
                scale[rest] = self.local_scale.smoothed(norms.norm(dim=1)[None], height, width)[0]
                residual = residual / scale[matched][:, None]
            parts.append(residual)
        return as_map(torch.stack(parts), feature_KCHW)

    def apply(self, change: Callable[[Tensor], Tensor]) -> ReferenceBank:
        """The bank with ``change`` applied to its features, such as a move to a device."""
        return ReferenceBank([change(level) for level in self.levels], self.grids, self.metric, self.local_scale)


def _check_count(shots: int, pool: int) -> None:
    if not 1 <= shots <= pool:
        raise ValueError(
            f"K = {shots} references cannot be chosen from a pool of {pool} images; K must be in 1..{pool}"
        )


def random_references(pool: int, shots: int, seed: int = 0) -> list[int]:
    """K distinct indices of a pool of ``pool`` images, the same for the same seed. Raises ValueError if K > pool."""
    _check_count(shots, pool)
    return sorted(int(index) for index in np.random.default_rng(seed).choice(pool, size=shots, replace=False))


def kmeans_references(features_PCHW: Tensor, shots: int, clusters: int = 0, seed: int = 0) -> list[int]:
    """K indices spread over the pool: cluster, share K evenly, take the images nearest to each centre.

    Images are described by their average feature and its deviation over tokens, [P, 2 C]. ``clusters``: number of
    clusters, 0 = K (then one image from each). If a cluster holds fewer images than its share, the rest goes to the
    other clusters in turn (ADPretrain App. C). Raises ValueError if K > P or clusters > P.
    """
    from sklearn.cluster import KMeans  # this import takes a second and is needed here only

    pool = features_PCHW.shape[0]
    _check_count(shots, pool)
    clusters = clusters or shots
    _check_count(clusters, pool)
    flat = features_PCHW.flatten(2).double()
    descriptor = torch.cat([flat.mean(2), flat.std(2, correction=0)], 1).cpu().numpy()
    found = KMeans(clusters, n_init=10, random_state=seed).fit(descriptor)
    distance = np.linalg.norm(descriptor - found.cluster_centers_[found.labels_], axis=1)
    # Largest clusters first, so that with K < clusters the commonest appearances are covered.
    sizes = np.bincount(found.labels_, minlength=clusters)
    queues = [
        sorted(np.flatnonzero(found.labels_ == label), key=lambda index: (distance[index], index))
        for label in np.argsort(-sizes, kind="stable")
    ]
    chosen: list[int] = []
    while len(chosen) < shots:
        for queue in queues:
            if queue and len(chosen) < shots:
                chosen.append(int(queue.pop(0)))
    return sorted(chosen)


class AlignedReferences:
    """Semantic-aligned matching: for each query the K pool images whose parts lie in the same places (App. C).

    Every cell of an S x S grid contributes N_c k-means centres. Each token has a histogram of its cosine similarity
    to all M centres, normalised to sum 1. Two images are compared cell by cell: the largest KL divergence
    KL(h_pool || h_query) over the tokens at the same place within the cell, then averaged over cells (Eq. 9). The K
    pool images with the smallest mean are the references.

    Cosine similarities lie in -1..1; the paper's "cosine distance histogram" must be non-negative to be normalised,
    so a bin is (1 + cosine) / 2.

    Raises ValueError for an empty pool, `TooFewImages` for a pool with fewer tokens per cell than centres.
    """

    def __init__(self, features_PCHW: Tensor, cells: int = CELLS, centres: int = CENTRES, seed: int = 0) -> None:
        from sklearn.cluster import KMeans

        if features_PCHW.ndim != 4 or features_PCHW.shape[0] == 0:
            raise ValueError(f"the pool must be [P, C, H, W] with P > 0, got {tuple(features_PCHW.shape)}")
        if min(features_PCHW.shape[2:]) < cells:
            raise ValueError(
                f"a {cells} x {cells} grid needs maps of at least that size, got {tuple(features_PCHW.shape[2:])}"
            )
        self.cells = cells
        blocks = self._blocks(features_PCHW)  # [P, S^2, G, C]
        images, _, tokens, _ = blocks.shape
        if images * tokens < centres:
            raise TooFewImages(
                f"{images * tokens} tokens per cell cannot form {centres} centres: at least {-(-centres // tokens)} "
                f"normal images are needed, got {images}"
            )
        found = [
            KMeans(centres, n_init=3, random_state=seed)
            .fit(blocks[:, cell].flatten(0, 1).cpu().numpy())
            .cluster_centers_
            for cell in range(blocks.shape[1])
        ]
        codebook = torch.from_numpy(np.concatenate(found)).to(features_PCHW)
        self.codebook_MC = F.normalize(codebook, dim=1)
        self.histograms = self._histograms(blocks)  # [P, S^2, G, M]

    def _blocks(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, S^2, G, C]; rows and columns that S does not divide are cut off evenly."""
        height, width = (side // self.cells * self.cells for side in features_BCHW.shape[2:])
        top, left = (features_BCHW.shape[2] - height) // 2, (features_BCHW.shape[3] - width) // 2
        inner = features_BCHW[:, :, top : top + height, left : left + width]
        grid = inner.unflatten(2, (self.cells, -1)).unflatten(4, (self.cells, -1))  # [B, C, S, h, S, w]
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    def _histograms(self, blocks: Tensor) -> Tensor:
        cosine = F.normalize(blocks, dim=-1) @ self.codebook_MC.T
        bins = (1 + cosine) / 2 + EPS
        return bins / bins.sum(-1, keepdim=True)

    def distances(self, features_BCHW: Tensor) -> Tensor:
        """Global alignment distance D_align (Eq. 9) of each query to each pool image: [B, P]; smaller is better."""
        query = self._histograms(self._blocks(features_BCHW))
        rows = max(1, CHUNK_BYTES // max(1, self.histograms[0].numel() * self.histograms.element_size()))
        columns = []
        for pool in self.histograms.split(rows):
            entropy = (pool * pool.log()).sum(-1)  # KL(p || q) = sum p log p - sum p log q
            columns.append(torch.stack([(entropy - (pool * one.log()).sum(-1)).amax(2).mean(1) for one in query]))
        return torch.cat(columns, 1)

    def choose(self, features_BCHW: Tensor, shots: int) -> Tensor:
        """Indices of the K best aligned pool images of every query: [B, K], best first. Raises ValueError if K > P."""
        _check_count(shots, self.histograms.shape[0])
        return self.distances(features_BCHW).topk(shots, dim=1, largest=False).indices
