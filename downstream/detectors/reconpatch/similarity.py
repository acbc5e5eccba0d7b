"""Similarities of patches, and the contrastive loss that uses them (ReConPatch Eq. 1 to 7).

Patches of normal images have no labels. Two similarities replace them: *pairwise*, how close two patches are, and
*contextual*, how many neighbours they share. Similar patches attract and the others repel each other.

Where the paper leaves a choice open:
- A patch is its own first neighbour (its distance to itself, 0, is within the bound that defines N_k). |N_k| is k, or
  more if distances tie, and R_k/2 of Eq. 4 is never empty. k/2 is rounded down, but is at least 1.
- Eq. 1 depends on the unit of the embeddings, which differs between backbones, and the paper gives no sigma.
  `scale_embeddings` lists the units to choose from.

Shapes: N patches of a batch, D channels of the embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.device import full_precision

SCALES = ("mean", "unit", "none")


def distance_matrix(z_ND: Tensor) -> Tensor:
    """Compute the Euclidean distances of all pairs, in the type of ``z_ND``: [N, N], with gradients.

    They come from one matrix product of rows centred on their mean, which reduces rounding errors. A distance that
    rounding cannot tell from 0 becomes 0 with gradient 0, because the gradient of the root is unbounded there.
    """
    z = z_ND - z_ND.detach().mean(0)
    norm_N = z.square().sum(1)
    sums = norm_N[:, None] + norm_N[None]
    squared = torch.addmm(sums, z, z.T, alpha=-2)
    near = squared <= 8 * torch.finfo(z.dtype).eps * sums.detach()  # a NaN compares false and so remains
    near |= torch.eye(len(z), dtype=torch.bool, device=z.device)
    return torch.where(near, 1, squared).sqrt().masked_fill(near, 0)


def scale_embeddings(z_ND: Tensor, scale: str) -> Tensor:
    """Scale the embeddings for Eq. 1 and 2: [N, D].

    ``scale``: "mean" divides by the root of the batch's mean squared distance (so that sigma = 1 is that mean for any
    backbone; Eq. 7 also uses mean distances); "unit" gives rows of length 1; "none" leaves Eq. 1 as printed.
    Raises ValueError for any other name.
    """
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is unknown; choose one of {', '.join(SCALES)}")
    if scale == "unit":
        return F.normalize(z_ND, dim=1)
    if scale == "mean":
        centred = z_ND - z_ND.mean(0)
        # The mean of ||z_i - z_j||^2 over all pairs, including i = j, is twice the variance.
        unit = (2 * centred.square().sum(1).mean()).sqrt()
        return centred / torch.where(unit > 0, unit, 1)
    return z_ND


def pairwise_similarity(distance_NN: Tensor, sigma: float = 1.0) -> Tensor:
    """Eq. 1: exp(-||z_i - z_j||^2 / sigma), in [0, 1]: [N, N]. Raises ValueError unless sigma > 0."""
    if not sigma > 0:
        raise ValueError(f"sigma {sigma}: the kernel's bandwidth must be positive")
    return torch.exp(-distance_NN.square() / sigma)


def neighbour_sets(distance_NN: Tensor, k: int) -> Tensor:
    """Return N_k: bool [N, N]; row i marks every j not farther from i than the k-th nearest of i, including i itself.

    Raises ValueError if k is not in 1..N.
    """
    count = len(distance_NN)
    if not 1 <= k <= count:
        raise ValueError(f"{k} neighbours among {count} patches; choose 1 to {count}, or larger batches")
    bound_N1 = distance_NN.topk(k, dim=1, largest=False).values[:, -1:]
    return distance_NN <= bound_N1


def reciprocal_sets(near_NN: Tensor) -> Tensor:
    """Return R_k (Eq. 3) from N_k: bool [N, N], symmetric; True if i and j are neighbours of each other."""
    return near_NN & near_NN.T


def shared_neighbours(near_NN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Eq. 2: |N_k(i) and N_k(j)| / |N_k(i)| if j is in N_k(i), else 0: [N, N], not symmetric."""
    near = near_NN.to(dtype)
    return near @ near.T / near.sum(1, keepdim=True) * near


def contextual_similarity(distance_NN: Tensor, k: int = 5) -> Tensor:
    """Eq. 2 to 5: shared neighbours, averaged over the k/2-nearest reciprocal neighbours of i (query expansion), then
    over both directions: [N, N], symmetric, in [0, 1]. Raises ValueError if k is not in 1..N."""
    shared = shared_neighbours(neighbour_sets(distance_NN, k), distance_NN.dtype)
    close = reciprocal_sets(neighbour_sets(distance_NN, max(1, k // 2))).to(distance_NN.dtype)
    expanded = close @ shared / close.sum(1, keepdim=True)
    return (expanded + expanded.T) / 2


def similarity(z_ND: Tensor, k: int = 5, alpha: float = 0.5, sigma: float = 1.0, scale: str = "mean") -> Tensor:
    """Eq. 6: alpha x pairwise + (1 - alpha) x contextual, the pseudo-labels of a batch: [N, N], without gradients.

    ``z_ND`` is g-bar(f-bar(p)), the output of the slow twins, in float32 or float64. Raises ValueError for an alpha
    outside [0, 1] and wherever the two similarities do.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: the weight of the pairwise similarity must be in 0..1")
    with full_precision(z_ND.device):
        distance_NN = distance_matrix(scale_embeddings(z_ND, scale))
        # A part without weight is not computed; the matrix products of the second are the slowest of a step.
        total = torch.zeros_like(distance_NN)
        if alpha > 0:
            total += alpha * pairwise_similarity(distance_NN, sigma)
        if alpha < 1:
            total += (1 - alpha) * contextual_similarity(distance_NN, k)
        return total


def relaxed_contrastive_loss(z_ND: Tensor, similarity_NN: Tensor, margin: float = 1.0) -> Tensor:
    """Eq. 7: sum over pairs of w delta^2 + (1 - w) max(m - delta, 0)^2, divided by N: a scalar with gradients.

    delta_ij = ||z_i - z_j|| / mean over n of ||z_i - z_n||, including n = i, so that the loss does not depend on the
    unit of ``z_ND`` and cannot be lowered by a collapse to a point. As in the equation, the gradient includes the mean.
    The pairs i = j add the constant m^2 (1 - w_ii) / N. Raises ValueError if there are no patches.
    """
    if len(z_ND) == 0:
        raise ValueError("there are no patches: the loss needs at least one")
    with torch.autocast(z_ND.device.type, enabled=False):
        distance_NN = distance_matrix(z_ND)
        mean_N1 = distance_NN.mean(1, keepdim=True).clamp_min(torch.finfo(z_ND.dtype).tiny)
        relative = distance_NN / mean_N1
        attract = similarity_NN * relative.square()
        repel = (1 - similarity_NN) * (margin - relative).clamp_min(0).square()
        return (attract + repel).sum() / len(z_ND)
