"""Choosing the K normal references: at random, spread by k-means, or aligned with each query (ADPretrain App. C).

Shapes: P pool images, C channels, H x W tokens, S x S grid cells of G = (H / S) * (W / S) tokens each, N_c centres per
cell, M = S^2 N_c histogram bins, K references.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.data.samples import TooFewImages

CELLS, CENTRES = 5, 5  # S and N_c of the paper
EPS = 1e-8
CHUNK_BYTES = 64 << 20


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
    from sklearn.cluster import KMeans  # a second of imports, which other choices need not wait for

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

    Raises ValueError for an empty pool, `TooFewImages` for one of fewer tokens per cell than centres.
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
