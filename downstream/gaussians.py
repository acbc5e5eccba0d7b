"""A multivariate Gaussian for every position, from one pass over the images (PaDiM Sec. III-B), and distances to it.

Sums are shifted by the mean of the first batch and kept in float64. Positions are handled a few at a time, so that the
largest temporary tensor takes only some MiB, whatever the grid.

With covariance C + eps I, two forms give the same distance:
- more images than channels: C + eps I = L L^T (Cholesky) and d^2 = ||L^-1 delta||^2, by a triangular solve;
- else: C = A^T A with the centred images A [n, D] / sqrt(n - 1), and by Woodbury's identity
  d^2 = (||delta||^2 - ||V delta||^2) / eps with V = K^-1 A, eps I + A A^T = K K^T: n / D of the memory and the time.
No matrix is inverted, because batched `torch.linalg.inv` and `solve` have given wrong numbers on CPUs.

Shapes: B images of a batch, n images in all, P positions, p positions of a chunk, D channels, F = n or D rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adpretrain.references import TooFewImages

CHUNK_BYTES = 8 << 20  # size of the float64 covariances handled at once
CANCELLED = 1e-3  # a difference below this share of ||delta||^2 has fewer than four correct digits in float32
FOLD = 64  # number of images whose products are added up together
PANELS = 8  # a lower triangle is computed and kept in so many panels; what is above their diagonal blocks is left out


@dataclass(frozen=True)
class Gaussians:
    """Means and factors, float32: ``factor_PFD`` is V [P, n, D] if ``low_rank``, else L [P, D, D]."""

    mean_PD: Tensor
    factor_PFD: Tensor
    eps: float
    low_rank: bool

    @torch.no_grad()
    def distances(self, rows_BPD: Tensor) -> Tensor:
        """Return Mahalanobis distances for every position: [B, P]. ValueError if positions or channels do not fit."""
        positions, width = self.mean_PD.shape
        if rows_BPD.ndim != 3 or tuple(rows_BPD.shape[1:]) != (positions, width):
            raise ValueError(f"expected rows of {positions} positions x {width} channels, got {tuple(rows_BPD.shape)}")
        if self.low_rank:
            return self._low_rank_distances(rows_BPD.to(self.mean_PD.dtype).transpose(0, 1)).T
        parts = []
        for chunk in _chunks(positions, width):
            delta_pBD = rows_BPD[:, chunk].to(self.mean_PD.dtype).transpose(0, 1) - self.mean_PD[chunk, None]
            solved = torch.linalg.solve_triangular(self.factor_PFD[chunk], delta_pBD.mT, upper=False)
            parts.append(solved.square().sum(1).sqrt())
        return torch.cat(parts).T

    def _low_rank_distances(self, rows_PBD: Tensor) -> Tensor:
        """Return distances [P, B]; positions where the two squares of Woodbury's form nearly cancel use float64.

        They cancel only for the images of the fit. The remaining error is the rounding of V: with features of standard
        deviation s, the relative error of d of such an image is up to about 5e-8 s^2 / eps, or 3e-4 if that is more.
        It is 3 % for s = 100 and eps = 0.01, for which float32 alone would give no correct digit.
        """
        whole = torch.cat([self._squares(rows_PBD, chunk) for chunk in _chunks(*self.mean_PD.shape)], 1)
        squared_PB = whole[0] - whole[1]
        close_P = (squared_PB < CANCELLED * whole[0]).any(1)
        for chunk in close_P.nonzero()[:, 0].split(FOLD):
            length, inside = self._squares(rows_PBD, chunk, torch.float64)
            squared_PB[chunk] = (length - inside).to(squared_PB.dtype)
        return (squared_PB.clamp_min(0) / self.eps).sqrt()

    def _squares(self, rows_PBD: Tensor, chunk: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ||delta||^2 and ||V delta||^2 of some positions: [2, p, B]."""
        delta_pBD = rows_PBD[chunk].to(dtype) - self.mean_PD[chunk, None].to(dtype)
        inside_pBn = delta_pBD @ self.factor_PFD[chunk].to(dtype).mT
        return torch.stack([delta_pBD.square().sum(2), inside_pBn.square().sum(2)])


class PlainGaussians(Gaussians):
    """The same, whose distances are a few plain operations that torch.export turns into a graph.

    L is replaced by its inverse W, so that d^2 = ||W delta||^2 is a product. With V all squares are float64, because a
    graph cannot choose the positions that need it.
    """

    def distances(self, rows_BPD: Tensor) -> Tensor:
        dtype = torch.float64 if self.low_rank else self.mean_PD.dtype
        delta_PBD = (rows_BPD.to(dtype) - self.mean_PD.to(dtype)).transpose(0, 1)
        squared_PB = (delta_PBD @ self.factor_PFD.to(dtype).mT).square().sum(2)
        if self.low_rank:
            squared_PB = (delta_PBD.square().sum(2) - squared_PB).clamp_min(0) / self.eps
        return squared_PB.sqrt().to(self.mean_PD.dtype).T


def plain(gaussians: Gaussians) -> PlainGaussians:
    """Prepare Gaussians for a graph, as copies."""
    factor_PFD = gaussians.factor_PFD.clone().contiguous()
    if not gaussians.low_rank:
        unit = torch.eye(factor_PFD.shape[2], dtype=torch.float64, device=factor_PFD.device)
        for chunk in _chunks(*gaussians.mean_PD.shape):
            lower = gaussians.factor_PFD[chunk].double()
            factor_PFD[chunk] = torch.linalg.solve_triangular(lower, unit.expand_as(lower), upper=False).float()
    return PlainGaussians(gaussians.mean_PD.clone(), factor_PFD, gaussians.eps, gaussians.low_rank)


def _chunks(positions: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (8 * width * width))
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


def size_bytes(images: int, positions: int, width: int) -> int:
    """Return the bytes of the `Moments` of so many images, and of the factors computed from them."""
    return 4 * images * positions * width if images <= width else 8 * positions * _panels(width)[1]


class Moments:
    """Means and covariances of P positions, computed batch by batch.

    Up to D images are kept, in 4 n P D bytes; of more, the lower triangles of their products are summed, in about
    4.5 P D^2 bytes for any number. The factors overwrite either. ``expected`` is an upper bound of the number of
    images, if it is known: they are then stored in one tensor from the beginning. If it is None or turns out too small,
    the batches are joined at the end, which needs memory for one more batch, provided that the system takes back freed
    memory.
    """

    def __init__(self, expected: int | None = None) -> None:
        self.count = 0
        self.expected = expected
        self._shift_PD = torch.empty(0)
        self._batches: list[Tensor] = []  # [b, P, D] each
        self._pending = 0
        self._room_PND: Tensor | None = None
        self._sums: _Sums | None = None

    @torch.no_grad()
    def add(self, rows_BPD: Tensor) -> None:
        """Add a batch. Raises ValueError for one on MPS, which does not support the float64 of the sums."""
        if rows_BPD.device.type == "mps":
            raise ValueError("PaDiM computes sums in float64, which MPS does not support: choose device 'cpu'")
        images, positions, width = rows_BPD.shape
        if not self.count:
            self._shift_PD = rows_BPD.mean(0, dtype=torch.float64).float()
            if self.expected is not None and self.expected <= width:
                self._room_PND = self._shift_PD.new_empty(positions, self.expected, width)
        rows = rows_BPD.float() - self._shift_PD
        self.count += images
        if self._room_PND is not None and self.count > self._room_PND.shape[1]:  # the first batch was not the largest
            kept = self._room_PND[:, : self.count - images].transpose(0, 1)
            self._batches, self._pending = [kept], len(kept)
            self._room_PND = self.expected = None
        if self._room_PND is not None:
            self._room_PND[:, self.count - images : self.count] = rows.transpose(0, 1)
            return
        self._batches.append(rows)
        self._pending += images
        if self._sums is None and max(self.count, self.expected or 0) > width:
            self._sums = _Sums(self._shift_PD)
        if self._sums is not None and self._pending >= FOLD:
            self._fold()

    def _fold(self) -> None:
        assert self._sums is not None
        if self._batches:
            self._sums.add(self._batches)
        self._batches, self._pending = [], 0

    def gaussians(self, eps: float) -> Gaussians:
        """Compute the Gaussians of all images so far, which destroys the sums. Raises `TooFewImages` for fewer than 2,
        ValueError if ``eps`` is too small for the covariance to be positive definite in float64."""
        if self.count < 2:
            raise TooFewImages(f"a covariance needs at least 2 images, got {self.count}")
        if self._sums is not None:
            self._fold()
            mean_PD, factor_PFD = self._sums.cholesky(self.count, eps)
        else:
            mean_PD, factor_PFD = _low_rank(self._kept(), self.count, eps)
        low_rank = self._sums is None
        self._room_PND, self._sums = None, None
        return Gaussians(self._shift_PD + mean_PD, factor_PFD, eps, low_rank)

    def _kept(self) -> Tensor:
        """Return a tensor [P, at least n, D], whose first n rows are the images."""
        if self._room_PND is None:
            positions, width = self._shift_PD.shape
            self._room_PND = self._shift_PD.new_empty(positions, self.count, width)
            done = 0
            for rows in self._batches:
                self._room_PND[:, done : done + len(rows)] = rows.transpose(0, 1)
                done += len(rows)
            self._batches = []
        return self._room_PND


def _low_rank(room_PND: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean [P, D] and V [P, n, D] of the first n = ``count`` rows of every position.

    V overwrites the rows, without the gaps of unused rows, so that its layout is the same as after loading.
    """
    positions, _, width = room_PND.shape
    mean_PD = room_PND.new_empty(positions, width)
    factor_PnD = room_PND.flatten()[: positions * count * width].view(positions, count, width)
    for chunk in _chunks(positions, width):
        rows = room_PND[chunk, :count].double()
        mean = rows.mean(1)
        rows = rows.sub_(mean[:, None]).div_((rows.shape[1] - 1) ** 0.5)
        mean_PD[chunk] = mean
        factor_PnD[chunk] = torch.linalg.solve_triangular(_cholesky(rows @ rows.mT, eps), rows, upper=False)
    return mean_PD, factor_PnD


def _panels(width: int) -> tuple[list[tuple[int, int, slice]], int]:
    """Return panels of columns of a lower triangle, each as (start, stop, slice of its stored numbers), and the total
    number of stored numbers."""
    panels, total, step = [], 0, max(64, -(-width // PANELS))
    for start in range(0, width, step):
        stop = min(start + step, width)
        size = (width - start) * (stop - start)
        panels.append((start, stop, slice(total, total + size)))
        total += size
    return panels, total


class _Sums:
    """Sums of rows and lower triangles of sums of their products, in float64."""

    def __init__(self, shift_PD: Tensor) -> None:
        positions, self.width = shift_PD.shape
        self.total_PD = shift_PD.new_zeros(shift_PD.shape, dtype=torch.float64)
        self.panels, size = _panels(self.width)
        self.products_PT = shift_PD.new_zeros(positions, size, dtype=torch.float64)

    def _products(self, chunk: slice) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop, kept in self.panels:
            yield start, stop, self.products_PT[chunk, kept].unflatten(1, (self.width - start, stop - start))

    def add(self, batches: list[Tensor]) -> None:
        """Add batches [b, P, D]."""
        for chunk in _chunks(*self.total_PD.shape):
            rows = torch.cat([batch[:, chunk] for batch in batches]).double().transpose(0, 1).contiguous()
            self.total_PD[chunk] += rows.sum(1)
            for start, stop, product in self._products(chunk):
                product.baddbmm_(rows[:, :, start:].mT, rows[:, :, start:stop])

    def cholesky(self, count: int, eps: float) -> tuple[Tensor, Tensor]:
        """Return mean [P, D] and L [P, D, D], float32, which overwrites the products.

        Products that are still needed are not overwritten, because the 4 D^2 bytes of L per position are fewer.
        """
        positions, width = self.total_PD.shape
        numbers = self.products_PT.flatten().view(torch.float32)[: positions * width * width]
        factor_PDD = numbers.view(positions, width, width)
        mean_PD = self.total_PD / count
        for chunk in _chunks(len(mean_PD), width):
            mean = mean_PD[chunk]
            lower = mean.new_zeros(len(mean), width, width)  # Cholesky reads only the lower triangle
            for start, stop, product in self._products(chunk):
                lower[:, start:, start:stop] = product
            lower.baddbmm_(mean[:, :, None], mean[:, None], alpha=-count).div_(count - 1)
            factor_PDD[chunk] = _cholesky(lower, eps)
        return mean_PD.float(), factor_PDD


def _cholesky(matrix: Tensor, eps: float) -> Tensor:
    """Return lower Cholesky factors of matrix + eps I. Raises ValueError if one is not positive definite."""
    matrix.diagonal(dim1=1, dim2=2).add_(eps)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise ValueError(f"eps {eps} is too small for the covariances of these features: try a larger one")
    return factor
