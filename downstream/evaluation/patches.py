"""Patch features of a product in two dimensions, with and without the extractor: to look at, not to measure.

Shapes: b images of a batch, S side in pixels, C channels, H x W tokens, n sampled patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adpretrain.backbones import Extract

MARKED = 0.25  # share of a token's pixels that makes it a defective patch
PERPLEXITY = 30.0


def sampled_patches(
    extract: Extract, batches: Iterable[tuple[Tensor, NDArray[np.bool_]]], number: int = 400, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Up to ``number`` normal and as many defective patches of the last level: features [n, C], defective [n].

    ``batches``: images [b, 3, S, S] with masks [b, S, S]. The same seed and images give the same patches, whatever
    the features, so that two pictures show the same ones.
    """
    features, marks = [], []
    for images, masks in batches:
        with torch.no_grad():
            level = extract(images)[-1].float().cpu()
        grid = (int(level.shape[2]), int(level.shape[3]))
        share = F.adaptive_avg_pool2d(torch.from_numpy(masks).float()[:, None], grid)[:, 0]
        features.append(level.permute(0, 2, 3, 1).flatten(0, 2).numpy())
        marks.append(share.flatten().numpy())
    feature_NC, share_N = np.concatenate(features), np.concatenate(marks)
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(share_N == 0), np.flatnonzero(share_N >= MARKED)]
    chosen = [rng.permutation(group)[:number] for group in groups]
    rows = np.concatenate(chosen)
    return feature_NC[rows], np.repeat([False, True], [len(group) for group in chosen])


def in_two_dimensions(feature_NC: NDArray[np.float32], seed: int = 0) -> tuple[NDArray[np.float32], str]:
    """[n, C] -> [n, 2] and the method's name: UMAP if umap-learn is installed, else t-SNE. n must be at least 5."""
    if len(feature_NC) < 5:
        raise ValueError(f"{len(feature_NC)} patches are too few for a picture; at least 5 are needed")
    umap = _umap()
    if umap is not None:
        return np.asarray(umap.UMAP(random_state=seed).fit_transform(feature_NC)), "UMAP"
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(feature_NC) - 1) / 4)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(feature_NC), "t-SNE"


def _umap() -> Any:
    try:
        import umap
    except ImportError:
        return None
    return umap
