"""Residual features: a feature minus its nearest normal reference (ADPretrain Sec. 3.1).

Shapes: B images, T = H * W tokens per image, C channels, R = 1 (shared) or B banks, N reference tokens per bank,
K reference images (N = K * T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.backbones.base import FeatureMaps
from adpretrain.device import full_precision

METRICS = ("l2", "cosine")
MATCHING = (*METRICS, "none")  # "none": the features themselves, as if every reference were zero
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


class SearchIndex(NamedTuple):
    """A bank, or R banks, prepared for searching: everything that does not depend on the queries.

    ``rows``: [N', C + 1] or [R, N', C + 1], float32 (or float64), the bank shifted by its mean (L2) or of unit length
    (cosine); the last column is added to every similarity; N' is N rounded up to whole blocks by padding rows, which
    never match; nor do rows outside a region of interest. ``shift``: the mean [1, C] or [R, 1, C], to be subtracted
    from the queries; None for cosine.
    """

    rows: Tensor
    shift: Tensor | None


def search_index(
    bank: Tensor, metric: str = "l2", query_dtype: torch.dtype = torch.float32, inside_N: Tensor | None = None
) -> SearchIndex:
    """Prepare a bank [N, C], or banks [R, N, C], once for many searches: in float32, or in float64 if the bank or the
    queries are. ``inside_N``: which rows of a bank can be matched (bool); None = all."""
    with torch.no_grad(), torch.autocast(bank.device.type, enabled=False):
        widest = torch.promote_types(bank.dtype, query_dtype)
        bank = bank.to(torch.promote_types(widest, torch.float32))
        size, shift = bank.shape[-2], None
        if metric == "cosine":
            bank = bank / bank.norm(dim=-1, keepdim=True).clamp_min(EPS)
            offset = torch.zeros_like(bank[..., :1])
        else:
            shift = (bank if inside_N is None else bank[inside_N]).mean(dim=-2, keepdim=True)
            bank = bank - shift
            offset = -0.5 * bank.square().sum(-1, keepdim=True)
        # The offset is one more channel, so that a chunk is a single GEMM without a second pass.
        rows = F.pad(torch.cat([bank, offset], -1), (0, 0, 0, -size % BLOCK))
        rows[..., size:, -1] = -torch.inf
        if inside_N is not None:
            rows[:size, -1].masked_fill_(~inside_N, -torch.inf)
        return SearchIndex(rows, shift)


def similarities(query: Tensor, index: SearchIndex) -> Tensor:
    """Similarity of each query to each row, larger if nearer: queries [Q, C] -> [Q, N'], or [R, Q, C] -> [R, Q, N'].

    -||x - r||^2 / 2 up to a term of the query alone (L2), or the cosine times ||x||; -inf for rows that never match.
    """
    query = query.to(index.rows.dtype)
    if index.shift is not None:
        query = query - index.shift
    return full_product(F.pad(query, (0, 1), value=1.0), index.rows.mT)


def full_product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product without rounding to TF32 or bfloat16, which would change the neighbours."""
    if torch.compiler.is_compiling():  # a compiled graph runs under its caller's settings
        return left @ right
    with full_precision(left.device):
        return left @ right


def nearest_reference(
    query_BTC: Tensor,
    bank_RNC: Tensor,
    metric: str = "l2",
    chunk_bytes: int | None = CHUNK_BYTES,
    index: SearchIndex | None = None,
) -> Tensor:
    """Index of the nearest reference of every query token: [B, T] int64, exact search.

    L2: argmin ||x - r|| = argmax (x.r - ||r||^2 / 2); cosine: argmax x.r / ||r||. Either is one GEMM per chunk in
    float32 (autocast is off: half precision picks other neighbours), batched if every image has its own bank. For L2,
    features are first shifted by the bank's mean, which reduces cancellation. At most ``chunk_bytes`` of similarities
    exist at a time; None = all at once, which leaves no loop in an exported graph. Ties go to the lowest index.
    ``index``: a shared bank's `search_index`, if there is one already.

    Raises ValueError if metric, channels or batch sizes do not fit.
    """
    _check(query_BTC, bank_RNC, metric)
    with torch.no_grad(), torch.autocast(query_BTC.device.type, enabled=False):
        if bank_RNC.shape[0] == 1:  # one bank for all: a single tall matrix
            if index is None:
                index = search_index(bank_RNC[0], metric, query_BTC.dtype)
            return _search(query_BTC.flatten(0, 1), index, chunk_bytes).view(query_BTC.shape[:2])
        return _search(query_BTC, search_index(bank_RNC, metric, query_BTC.dtype), chunk_bytes)


def _search(query: Tensor, index: SearchIndex, chunk_bytes: int | None) -> Tensor:
    """Nearest row for every query: [Q, C] -> [Q] in one bank, or [R, Q, C] -> [R, Q] in as many banks."""
    if chunk_bytes is None:
        chunks: Sequence[Tensor] = [query]
    else:
        row_bytes = index.rows[..., 0].numel() * index.rows.element_size()
        chunks = query.split(max(1, chunk_bytes // row_bytes), dim=-2)
    best = []
    for chunk in chunks:
        # Two short stages instead of one long argmax, which torch does not vectorise (3x faster on a CPU).
        blocks = similarities(chunk, index).unflatten(-1, (-1, BLOCK))
        block = blocks.amax(-1).argmax(-1, keepdim=True)
        inside = blocks.gather(-2, block[..., None].expand(*block.shape, BLOCK))[..., 0, :]
        best.append(block[..., 0] * BLOCK + inside.argmax(-1))
    return torch.cat(best, dim=-1)


def residual_tokens(
    query_BTC: Tensor,
    bank_RNC: Tensor,
    metric: str = "l2",
    chunk_bytes: int | None = CHUNK_BYTES,
    scale_RN: Tensor | None = None,
    index: SearchIndex | None = None,
) -> Tensor:
    """x - x*, with x* the nearest (un-normalised) reference, divided by the scale of x* if given: [B, T, C]. Metric
    "none" returns x itself."""
    if metric == "none":
        return query_BTC
    index_BT = nearest_reference(query_BTC, bank_RNC, metric, chunk_bytes, index)
    if bank_RNC.shape[0] == 1:
        residual = query_BTC - bank_RNC[0][index_BT]
        return residual if scale_RN is None else residual / scale_RN[0][index_BT][..., None]
    residual = query_BTC - bank_RNC.gather(1, index_BT[..., None].expand(-1, -1, bank_RNC.shape[2]))
    return residual if scale_RN is None else residual / scale_RN.gather(1, index_BT)[..., None]


def residual_features(features: FeatureMaps, references: Sequence[Tensor], metric: str = "l2") -> FeatureMaps:
    """Residual features r = x - argmin_{x' in R_l} ||x - x'|| of every level (ADPretrain Sec. 3.1).

    ``features``: L levels [B, C_l, H_l, W_l]; ``references``: L levels [R, N_l, C_l], R = 1 (one bank for the
    batch) or B (one per image). ``metric``: "l2" (the paper) or "cosine" (the released code: nearest by angle,
    then the un-normalised match is subtracted); "none" leaves the features as they are. Returns maps of the features'
    shapes. `adpretrain.references.ReferenceBank` does the same, and scales the residuals.

    Raises ValueError if metric, levels, channels or batch sizes do not fit.
    """
    if len(features) != len(references):
        raise ValueError(f"features have {len(features)} levels but references have {len(references)}")
    levels = zip(features, references, strict=True)
    return [as_map(residual_tokens(tokens(feature), bank, metric), feature) for feature, bank in levels]
