"""The nearest token in every other photograph, for each token of K photographs: each pair of photographs is compared
once, by itself, so that a photograph can join or leave without computing the other pairs again, with the same bits.

Shapes: R banks, K photographs of T tokens each, N = K * T, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adpretrain.residual import CHUNK_BYTES, EPS, METRICS, full_product


@dataclass(frozen=True)
class LeaveOneOut:
    """For every token and photograph, the nearest token of that photograph.

    ``similarity_RKKT``: entry [r, i, j, t] says how near token t of photograph i is to the nearest one of photograph j:
    -||x - r||^2 / 2 ("l2"), or their cosine. It is -inf for i = j, except that the tokens of a single photograph are
    matched with its other tokens. ``index_RKKT``: which token of photograph j that is, int32.
    """

    similarity_RKKT: Tensor
    index_RKKT: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        bank_RNC: Tensor,
        images: int,
        metric: str = "l2",
        inside_N: Tensor | None = None,
        earlier: LeaveOneOut | None = None,
    ) -> LeaveOneOut:
        """Compare the photographs of R banks, whose tokens follow one another, ``images`` = K in each.

        Only tokens of ``inside_N`` are matched (bool, for a single bank; None = all); every photograph must have one.
        ``earlier``: the table of the first photographs, whose pairs are taken from there.
        Raises ValueError for an unknown metric, or if N is not a multiple of ``images``.
        """
        banks, size = bank_RNC.shape[:2]
        if metric not in METRICS:
            raise ValueError(f"matching metric {metric!r} is unknown; choose one of {METRICS}")
        if images < 1 or size % images:
            raise ValueError(f"{size} reference tokens cannot come from {images} images of one size")
        if images == 1 and inside_N is not None and int(inside_N.sum()) < 2:
            raise ValueError("a single reference needs at least 2 tokens in the region of interest: enlarge it")
        with torch.autocast(bank_RNC.device.type, enabled=False):
            bank_RNC = bank_RNC.to(torch.promote_types(bank_RNC.dtype, torch.float32))
            photographs = bank_RNC.unflatten(1, (images, -1)).unbind(1)
            masks = [None] * images if inside_N is None else inside_N.unflatten(0, (images, -1)).unbind(0)
            shape = (banks, images, images, size // images)
            similarity = torch.full(shape, -torch.inf, dtype=bank_RNC.dtype, device=bank_RNC.device)
            index = torch.zeros(shape, dtype=torch.int32, device=bank_RNC.device)
            done = 0 if earlier is None else earlier.images
            if earlier is not None and done > 1:
                similarity[:, :done, :done], index[:, :done, :done] = earlier.similarity_RKKT, earlier.index_RKKT
            for second in range(1 if done < 2 else done, images):
                for first in range(second):
                    both = photographs[first], photographs[second]
                    there, back = nearest_of_pair(*both, metric, masks[first], masks[second])
                    similarity[:, first, second], index[:, first, second] = there
                    similarity[:, second, first], index[:, second, first] = back
            if images == 1:
                one = photographs[0], photographs[0]
                within, _ = nearest_of_pair(*one, metric, masks[0], masks[0], same=True)
                similarity[:, 0, 0], index[:, 0, 0] = within
        return cls(similarity, index)

    @property
    def images(self) -> int:
        """The number of photographs K."""
        return self.similarity_RKKT.shape[1]

    def only(self, images: Sequence[int]) -> LeaveOneOut:
        """The table of some of the photographs, at least two."""
        kept = torch.tensor(images, device=self.index_RKKT.device)
        return LeaveOneOut(
            self.similarity_RKKT[:, kept][:, :, kept].contiguous(), self.index_RKKT[:, kept][:, :, kept].contiguous()
        )

    def matches(self, second: bool = False) -> Tensor:
        """The nearest token of all other photographs, among the N of its bank, for every token: [R, N] int64.

        ``second``: of all photographs but its own and the one in which the nearest lies.
        """
        photograph_R1KT = self.similarity_RKKT.max(2, keepdim=True).indices.transpose(1, 2)
        if second:
            nearest = photograph_R1KT.transpose(1, 2)
            others = self.similarity_RKKT.scatter(2, nearest, -torch.inf)
            photograph_R1KT = others.max(2, keepdim=True).indices.transpose(1, 2)
        token_RKT = self.index_RKKT.gather(2, photograph_R1KT.transpose(1, 2))[:, :, 0].long()
        return (photograph_R1KT[:, 0] * self.index_RKKT.shape[3] + token_RKT).flatten(1)


def nearest_of_pair(
    first_RTC: Tensor,
    second_RTC: Tensor,
    metric: str,
    inside_first_T: Tensor | None = None,
    inside_second_T: Tensor | None = None,
    same: bool = False,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For every token of the first photograph the nearest of the second, and for every token of the second that of the
    first: similarities [R, T] and indices [R, T] of each.

    One product serves both, because -||x - y||^2 / 2 = x.y - ||x||^2 / 2 - ||y||^2 / 2 (two more channels) and the
    cosine are symmetric; L2 features are first shifted by the mean of the first photograph, which reduces cancellation.
    At most CHUNK_BYTES of similarities exist at a time. ``same``: no token matches itself.
    """
    left, right = _prepared(first_RTC, second_RTC, metric)
    banks, size = first_RTC.shape[:2]
    there, back = list[Any](), None
    rows = max(1, CHUNK_BYTES // (banks * size * left.element_size()))
    for start in range(0, size, rows):
        similarity = full_product(left[:, start : start + rows], right.mT)
        if same:
            similarity.diagonal(start, 1, 2).fill_(-torch.inf)
        seen = similarity if inside_second_T is None else similarity.masked_fill(~inside_second_T, -torch.inf)
        there.append(seen.max(2))
        if inside_first_T is not None:
            similarity = similarity.masked_fill(~inside_first_T[start : start + rows, None], -torch.inf)
        value, index = similarity.max(1)
        if back is not None:
            better = value > back[0]
            value, index = torch.where(better, value, back[0]), torch.where(better, index + start, back[1])
        back = value, index
    assert back is not None
    values, indices = zip(*there, strict=True)
    return (torch.cat(values, 1), torch.cat(indices, 1)), back


def _prepared(first_RTC: Tensor, second_RTC: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Features whose product is the similarity; new tensors, since the last bits depend on where a tensor starts."""
    if metric == "cosine":
        first, second = (x / x.norm(dim=-1, keepdim=True).clamp_min(EPS) for x in (first_RTC, second_RTC))
        return first, second
    shift = first_RTC.mean(1, keepdim=True)
    first, second = first_RTC - shift, second_RTC - shift
    halves = [-0.5 * x.square().sum(-1, keepdim=True) for x in (first, second)]
    one = torch.ones_like(halves[0])
    return torch.cat([first, halves[0], one], -1), torch.cat([second, one, halves[1]], -1)


def leave_one_out_residuals(
    bank_RNC: Tensor, images: int, metric: str = "l2", inside_N: Tensor | None = None
) -> Tensor:
    """Residuals [R, N, C] of banks' own tokens, each against the tokens of the other images. See `LeaveOneOut`."""
    return residuals_to(bank_RNC, LeaveOneOut.of(bank_RNC, images, metric, inside_N).matches())


def residuals_to(bank_RNC: Tensor, match_RN: Tensor) -> Tensor:
    """The tokens of banks minus those they were matched with: [R, N, C]."""
    return bank_RNC - bank_RNC.gather(1, match_RN[..., None].expand(-1, -1, bank_RNC.shape[2]))
