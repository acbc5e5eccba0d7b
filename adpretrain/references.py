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
from adpretrain.leave_one_out import LeaveOneOut, residuals_to
from adpretrain.local_scale import LocalScale
from adpretrain.residual import SearchIndex, as_map, residual_tokens, search_index, tokens

CELLS, CENTRES = 5, 5  # S and N_c of the paper
EPS = 1e-8
CHUNK_BYTES = 64 << 20


class TooFewImages(ValueError):
    """Fewer normal images than a method needs; raised only if more images would help."""


class ReferenceBank:
    """The features of K normal photographs of one product, or of K for each of R groups of images, for matching.

    ``levels``: L tensors [R, K * T_l, C_l], the tokens of a photograph together and in order. Bank r belongs to B / R
    consecutive images of a batch: R = 1 is one bank for all, R = B one for each image. ``grids``: (H_l, W_l) of
    each level. ``metric`` finds the nearest reference, and ``local_scale`` scales residuals. Leave-one-out tables,
    scales, search indices and attention context are computed when they are first needed, and kept. ``inside``: which
    tokens of a single bank are within the region of interest, L levels of bools [N_l], every photograph having some;
    the others are never matched and count for nothing. None = all.

    Raises ValueError if a level is not a whole number of photographs.
    """

    def __init__(
        self,
        levels: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        metric: str = "l2",
        local_scale: LocalScale | None = None,
        inside: Sequence[Tensor] | None = None,
    ) -> None:
        self.levels, self.grids, self.metric, self.local_scale = list(levels), list(grids), metric, local_scale
        self.inside = None if inside is None else list(inside)
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
        levels = [tokens(level).reshape(banks, -1, level.shape[1]).contiguous() for level in features]
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
    def tables(self) -> list[LeaveOneOut]:
        """The nearest tokens of the photographs among one another, for each level."""
        levels = zip(self.levels, self._masks, strict=True)
        return [LeaveOneOut.of(level, self.shots, self.metric, inside) for level, inside in levels]

    @cached_property
    def scales(self) -> list[Tensor] | None:
        """The divisors of the residuals, L levels [R, N_l]; None without a local scale."""
        if self.local_scale is None:
            return None
        return self.local_scale.scales(self.levels, self.grids, self.metric, self.inside, self.tables)

    @cached_property
    def indices(self) -> list[SearchIndex] | None:
        """The `search_index` of every level; None if there is more than one bank."""
        if self.banks != 1:
            return None
        levels = zip(self.levels, self._masks, strict=True)
        return [search_index(level[0], self.metric, inside_N=inside) for level, inside in levels]

    @property
    def _masks(self) -> Sequence[Tensor | None]:
        return [None] * len(self.levels) if self.inside is None else self.inside

    @cached_property
    def context(self) -> list[Tensor]:
        """The references' (scaled) residuals among themselves, inside, for cross attention: L levels [R, N_l, C_l]."""
        out = []
        for level, (bank_RNC, inside) in enumerate(zip(self.levels, self._masks, strict=True)):
            context = residuals_to(bank_RNC, self.tables[level].matches())
            context = context if self.scales is None else context / self.scales[level][..., None]
            out.append(context if inside is None else context[:, inside])
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

    def photographs(self) -> FeatureMaps:
        """The features of the K photographs of a shared bank: L levels [K, C_l, H_l, W_l]."""
        assert self.banks == 1
        each = (level[0].unflatten(0, (self.shots, -1)) for level in self.levels)
        return [x_KTC.transpose(1, 2).unflatten(2, grid) for x_KTC, grid in zip(each, self.grids, strict=True)]

    def joined(self, other: ReferenceBank) -> ReferenceBank:
        """The photographs of this single bank, then those of another. Leave-one-out tables that are here already are
        extended: only pairs with a new photograph are compared. Raises ValueError if only one has a region of interest.
        """
        assert self.banks == other.banks == 1
        assert self.grids == other.grids
        if (self.inside is None) != (other.inside is None):
            raise ValueError("references with and without a region of interest cannot be joined: give both the same")
        levels = [torch.cat(pair, 1) for pair in zip(self.levels, other.levels, strict=True)]
        inside = self.inside and [torch.cat(pair) for pair in zip(self.inside, other.inside or (), strict=True)]
        bank = ReferenceBank(levels, self.grids, self.metric, self.local_scale, inside)
        if earlier := self.__dict__.get("tables"):
            parts = zip(bank.levels, bank._masks, earlier, strict=True)
            bank.tables = [LeaveOneOut.of(x, bank.shots, self.metric, mask, table) for x, mask, table in parts]
        return bank

    def without(self, images: Sequence[int]) -> ReferenceBank:
        """The bank without these photographs, and their part of the leave-one-out tables. Raises ValueError if none
        remain."""
        kept = [image for image in range(self.shots) if image not in images]
        levels = [level.unflatten(1, (self.shots, -1))[:, kept].flatten(1, 2) for level in self.levels]
        inside = self.inside and [mask.unflatten(0, (self.shots, -1))[kept].flatten() for mask in self.inside]
        bank = ReferenceBank(levels, self.grids, self.metric, self.local_scale, inside)
        if len(kept) > 1 and "tables" in self.__dict__:
            bank.tables = [table.only(kept) for table in self.tables]
        return bank

    def within(self, inside: Sequence[Tensor]) -> ReferenceBank:
        """A single bank, of which only the tokens ``inside`` are matched: L levels of bools [N_l]."""
        assert self.banks == 1
        return ReferenceBank(self.levels, self.grids, self.metric, self.local_scale, inside)

    def leave_one_out(self) -> FeatureMaps:
        """Residuals of each photograph of a shared bank as if it were new, with the other K - 1 as references: L levels
        [K, C_l, H_l, W_l]. Raises ValueError if K < 2.

        Matching with `without` for every photograph would compare every pair of tokens K - 1 times, because the scales
        depend on which photograph is left out; here each pair is compared once.
        """
        assert self.banks == 1
        if self.shots < 2 and self.metric != "none":
            raise ValueError(f"leave-one-out needs at least 2 references, got {self.shots}")
        maps = self.photographs()
        if self.metric == "none":
            return maps
        if self.shots == 2:  # the scale of a single reference is measured in another way
            alone = [self.without([i]).residuals([level[i : i + 1] for level in maps]) for i in range(2)]
            return [torch.cat(level) for level in zip(*alone, strict=True)]
        return [as_map(self._left_out(level), maps[level]) for level in range(len(maps))]

    def _left_out(self, level: int) -> Tensor:
        """Residuals [K, T, C] on one level. Without photograph i, a token that was matched there is matched with its
        second choice, which only changes the scales."""
        bank_1NC, table, (height, width) = self.levels[level], self.tables[level], self.grids[level]
        match_N = table.matches()[0]
        residual_NC = residuals_to(bank_1NC, match_N[None])[0]
        shape = (self.shots, height * width)
        residual_KTC = residual_NC.unflatten(0, shape)
        if self.local_scale is None:
            return residual_KTC
        norm_KT = residual_NC.norm(dim=1).view(shape)
        second_KT = residuals_to(bank_1NC, table.matches(second=True))[0].norm(dim=1).view(shape)
        match_KT, mask = match_N.view(shape), self._masks[level]
        photograph_KT, scale_KT, parts = match_KT // shape[1], torch.zeros_like(norm_KT), list[Tensor]()
        for image in range(self.shots):
            rest = torch.tensor([other for other in range(self.shots) if other != image], device=norm_KT.device)
            norms = torch.where(photograph_KT == image, second_KT, norm_KT)[rest]
            inside = None if mask is None else mask.view(shape)[rest].flatten()
            scale_KT[rest] = self.local_scale.smoothed(norms.flatten()[None], height, width, inside).view_as(norms)
            parts.append(residual_KTC[image] / scale_KT.flatten()[match_KT[image]][:, None])
        return torch.stack(parts)

    def apply(self, change: Callable[[Tensor], Tensor]) -> ReferenceBank:
        """The bank with ``change`` applied to its features, such as a move to a device."""
        inside = self.inside and [change(mask) for mask in self.inside]
        return ReferenceBank(list(map(change, self.levels)), self.grids, self.metric, self.local_scale, inside)


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

    ``inside_PHW``: the tokens in the region of interest (bool; None = all). Cells that hold fewer of them than centres
    give none, and tokens are compared only where both are inside; an image without such a token is infinitely far.

    Raises ValueError for an empty pool, `TooFewImages` for a pool with fewer tokens per cell than centres.
    """

    def __init__(
        self,
        features_PCHW: Tensor,
        cells: int = CELLS,
        centres: int = CENTRES,
        seed: int = 0,
        inside_PHW: Tensor | None = None,
    ) -> None:
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
        self.inside = None if inside_PHW is None else self._blocks(inside_PHW[:, None])[..., 0]  # [P, S^2, G]
        found = []
        for cell in range(blocks.shape[1]):
            own = blocks[:, cell].flatten(0, 1) if self.inside is None else blocks[:, cell][self.inside[:, cell]]
            if len(own) >= centres:
                kmeans = KMeans(centres, n_init=3, random_state=seed).fit(own.cpu().numpy())
                found.append(kmeans.cluster_centers_)
        if not found:
            raise TooFewImages(
                f"no cell of a {cells} x {cells} grid holds {centres} tokens of the region of interest of {images} "
                "normal images: enlarge the region, or give more images"
            )
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

    def distances(self, features_BCHW: Tensor, inside_BHW: Tensor | None = None) -> Tensor:
        """Global alignment distance D_align (Eq. 9) of each query to each pool image: [B, P]; smaller is better.
        ``inside_BHW``: the queries' tokens in the region of interest; None = all."""
        query = self._histograms(self._blocks(features_BCHW))
        inside = None if inside_BHW is None else self._blocks(inside_BHW[:, None])[..., 0]  # [B, S^2, G]
        rows = max(1, CHUNK_BYTES // max(1, self.histograms[0].numel() * self.histograms.element_size()))
        columns = []
        for start, pool in enumerate(self.histograms.split(rows)):
            entropy = (pool * pool.log()).sum(-1)  # KL(p || q) = sum p log p - sum p log q
            mask = None if self.inside is None else self.inside[start * rows :][: len(pool)]
            column = []
            for number, one in enumerate(query):
                own = None if inside is None else inside[number].expand(len(pool), -1, -1)
                both = own if mask is None else mask if own is None else mask & own
                column.append(_largest(entropy - (pool * one.log()).sum(-1), both))
            columns.append(torch.stack(column))
        return torch.cat(columns, 1)

    def choose(self, features_BCHW: Tensor, shots: int) -> Tensor:
        """Indices of the K best aligned pool images of every query: [B, K], best first. Raises ValueError if K > P."""
        _check_count(shots, self.histograms.shape[0])
        return self.distances(features_BCHW).topk(shots, dim=1, largest=False).indices


def _largest(divergence: Tensor, inside: Tensor | None) -> Tensor:
    """The largest divergence in a cell, averaged over cells: [P, S^2, G] -> [P]; cells without tokens inside are left
    out."""
    if inside is None:
        return divergence.amax(2).mean(1)
    cells = inside.any(2)
    largest = divergence.masked_fill(~inside, -torch.inf).amax(2).masked_fill(~cells, 0)
    return (largest.sum(1) / cells.sum(1)).masked_fill(~cells.any(1), torch.inf)
