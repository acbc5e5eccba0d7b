"""Residual features: a feature minus its nearest normal reference (ADPretrain Sec. 3.1).

Shapes: B images, T = H * W tokens per image, C channels, R = 1 (shared) or B banks, N reference tokens per bank,
K reference images (N = K * T).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.backbones.base import FeatureMaps, References

METRICS = ("l2", "cosine")
CHUNK_BYTES = 64 << 20  # the largest [queries x bank] block of similarities held at once
BLOCK = 64
EPS = 1e-12


def tokens(feature_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, T, C]."""
    return feature_BCHW.flatten(2).transpose(1, 2)


def as_map(tokens_BTC: Tensor, like_BCHW: Tensor) -> Tensor:
    """[B, T, C] -> [B, C, H, W], the inverse of `tokens`."""
    return tokens_BTC.transpose(1, 2).reshape(tokens_BTC.shape[0], -1, *like_BCHW.shape[2:])


def _check(query_BTC: Tensor, bank_RNC: Tensor, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"matching metric {metric!r} is unknown; choose one of {METRICS}")
    if bank_RNC.ndim != 3 or bank_RNC.shape[0] not in (1, query_BTC.shape[0]) or bank_RNC.shape[1] == 0:
        raise ValueError(
            f"references of shape {tuple(bank_RNC.shape)} do not fit a batch of {query_BTC.shape[0]} images: "
            "expected [1, N, C] (shared) or [B, N, C] (per image) with N > 0"
        )
    if bank_RNC.shape[2] != query_BTC.shape[2]:
        raise ValueError(
            f"features have {query_BTC.shape[2]} channels but references have {bank_RNC.shape[2]}: "
            "were they made with another backbone or other levels?"
        )


def nearest_reference(
    query_BTC: Tensor,
    bank_RNC: Tensor,
    metric: str = "l2",
    chunk_bytes: int = CHUNK_BYTES,
    exclude_self: bool = False,
) -> Tensor:
    """Index of the nearest reference of every query token: [B, T] int64, exact search.

    L2: argmin ||x - r|| = argmax (x.r - ||r||^2 / 2); cosine: argmax x.r / ||r||. Either is one GEMM a chunk in
    float32 (autocast is left out: half precision picks other neighbours), on features shifted by the bank's mean
    (L2), which keeps the subtraction of near-equal numbers small. At most ``chunk_bytes`` of similarities exist
    at a time. Ties go to the lowest index. ``exclude_self``: the queries are the bank's own tokens in its order,
    and none may match itself.

    Raises ValueError if metric, channels or batch sizes do not fit.
    """
    _check(query_BTC, bank_RNC, metric)
    with torch.no_grad(), torch.autocast(query_BTC.device.type, enabled=False):
        dtype = torch.promote_types(query_BTC.dtype, torch.float32)
        query, bank = query_BTC.to(dtype), bank_RNC.to(dtype)
        if metric == "cosine":
            bank = bank / bank.norm(dim=2, keepdim=True).clamp_min(EPS)
            offset = bank.new_zeros(bank.shape[:2])
        else:
            centre = bank.mean(dim=1, keepdim=True)
            query, bank = query - centre, bank - centre
            offset = -0.5 * bank.square().sum(2)
        # The offset rides along as one more channel, so that a chunk is a single GEMM and no second pass.
        query = F.pad(query, (0, 1), value=1.0)
        bank = torch.cat([bank, offset[..., None]], 2)
        if bank.shape[0] == 1:  # one bank for all: a single tall matrix
            return _best_rows(query.flatten(0, 1), bank[0], chunk_bytes, exclude_self).view(query.shape[:2])
        return torch.stack([_best_rows(q, r, chunk_bytes, exclude_self) for q, r in zip(query, bank, strict=True)])


def _best_rows(query_QC: Tensor, bank_NC: Tensor, chunk_bytes: int, exclude_self: bool) -> Tensor:
    """argmax over the bank of query . bank, by chunks of queries: [Q]."""
    size = bank_NC.shape[0]
    padding = -size % BLOCK
    if padding:
        bank_NC = F.pad(bank_NC, (0, 0, 0, padding))
        bank_NC[size:, -1] = -torch.inf
    rows = max(1, chunk_bytes // (bank_NC.shape[0] * bank_NC.element_size()))
    best = []
    for start in range(0, query_QC.shape[0], rows):
        similarity = query_QC[start : start + rows] @ bank_NC.T
        if exclude_self:
            similarity.diagonal(start).fill_(-torch.inf)
        # Two short stages instead of one long argmax, which torch does not vectorise (3x faster on a CPU).
        blocks = similarity.unflatten(1, (-1, BLOCK))
        block = blocks.amax(2).argmax(1)
        inside = blocks[torch.arange(blocks.shape[0], device=block.device), block].argmax(1)
        best.append(block * BLOCK + inside)
    return torch.cat(best)


def residual_tokens(
    query_BTC: Tensor, bank_RNC: Tensor, metric: str = "l2", chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """x - x*, with x* the nearest (un-normalised) reference: [B, T, C]."""
    index_BT = nearest_reference(query_BTC, bank_RNC, metric, chunk_bytes)
    if bank_RNC.shape[0] == 1:
        return query_BTC - bank_RNC[0][index_BT]
    return query_BTC - bank_RNC.gather(1, index_BT[..., None].expand(-1, -1, bank_RNC.shape[2]))


def residual_features(
    features: FeatureMaps, references: References, metric: str = "l2", chunk_bytes: int = CHUNK_BYTES
) -> FeatureMaps:
    """Residual features r = x - argmin_{x' in R_l} ||x - x'|| of every level (ADPretrain Sec. 3.1).

    ``features``: L levels [B, C_l, H_l, W_l]; ``references``: L levels [R, N_l, C_l], R = 1 (one bank for the
    batch) or B (one per image). ``metric``: "l2" (the paper) or "cosine" (the released code: nearest by angle,
    then the un-normalised match is subtracted). Returns maps of the features' shapes.

    Raises ValueError if metric, levels, channels or batch sizes do not fit.
    """
    if len(features) != len(references):
        raise ValueError(f"features have {len(features)} levels but references have {len(references)}")
    return [
        as_map(residual_tokens(tokens(feature), bank, metric, chunk_bytes), feature)
        for feature, bank in zip(features, references, strict=True)
    ]


def leave_one_out_residuals(bank_NC: Tensor, images: int, metric: str = "l2", per_image: int = 0) -> Tensor:
    """Residuals of a bank's own tokens, those of each image against the other images': [N, C].

    ``bank_NC`` holds the tokens of ``images`` = K photographs, one after the other. With a single photograph there
    is nothing to leave out, so its tokens are matched with the photograph's other tokens, never with themselves.
    ``per_image`` > 0 takes only about that many evenly spaced tokens of each photograph as queries.

    Raises ValueError if N is not a multiple of ``images``.
    """
    if images < 1 or bank_NC.shape[0] % images:
        raise ValueError(f"{bank_NC.shape[0]} reference tokens cannot come from {images} images of one size")
    parts_KTC = bank_NC.view(images, -1, bank_NC.shape[1])
    step = max(1, parts_KTC.shape[1] // per_image) if per_image else 1
    if images == 1:
        index = nearest_reference(parts_KTC, parts_KTC, metric, exclude_self=True)[0]
        return (bank_NC - bank_NC[index])[::step]
    residuals = []
    for image in range(images):
        others = torch.cat([parts_KTC[:image], parts_KTC[image + 1 :]]).flatten(0, 1)
        residuals.append(residual_tokens(parts_KTC[image : image + 1, ::step], others[None], metric)[0])
    return torch.cat(residuals)
