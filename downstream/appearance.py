"""Compare a photograph as a whole with the normals: brightness, contrast, colour, sharpness, layout.

Features that are compared patch by patch, and scaled by what is usual there, miss much that is wrong everywhere, such
as another exposure, a lens out of focus or a camera upside down. So each photograph is also measured as a whole,
without a network, and its nonconformity `unlike` is the largest of these distances, each in units of its spread:

- brightness: the mean of the gray values; contrast: the logarithm of their standard deviation;
- colour: the means of two opponent axes, red - green and (red + green) / 2 - blue;
- sharpness (which noise also raises): the logarithm of the mean absolute Laplacian of the gray values;
- layout: the root mean square distance to the nearest normal between thumbnails of 8 x 8 gray values minus their mean.

All but the layout are measured from the median of the normals. The spread is sqrt(s^2 + f^2 (1 + 8 / n)), where s is
1.2533 times the mean absolute deviation (for a normal distribution the standard deviation, but less sensitive to one
odd photograph) and f is a floor below which there should be no alarm: even a lamp or an exposure control that is said
to be constant drifts by a few per cent (`FLOORS`). With few normals s is uncertain, and the floor counts more: about
twice as much for n = 3. The spread of the layout is computed likewise, from distances of normals to their nearest one.

Shape legend: N normals, B photographs, S side in pixels, F numbers of a photograph, C measured values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

MEASURES = ("brightness", "contrast", "colour", "colour", "sharpness", "layout")
# Brightness: 3 % of the range; layout: half of that; each colour axis: 1 % (side by side, people see half of that);
# contrast: 10 % and sharpness: 15 %, which compression and sensor noise cause, depending on the kind of picture.
FLOORS = np.array([0.03, 0.10, 0.01, 0.01, 0.15, 0.015])
FEW = 8.0  # with this number of normals, the squared floor counts twice
THUMBNAIL = 8
_STEP = 1 / 255  # one gray level, added before taking a logarithm
_LUMA = (0.299, 0.587, 0.114)


def appearance(pixels: Tensor, roi: Tensor | None = None) -> NDArray[np.float64]:
    """Measure a photograph as the network sees it, uint8 [3, S, S]: five values and the 64 of the thumbnail, [F].

    ``roi``: the region of interest, bool [S, S]; the values are those of its pixels, and cells of the thumbnail without
    any have the mean of the others.
    """
    if roi is not None:
        return _within(pixels, roi)
    red, green, blue = pixels.float().div(255)
    gray_SS = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    inner = gray_SS[1:-1, 1:-1]
    around = gray_SS[:-2, 1:-1] + gray_SS[2:, 1:-1] + gray_SS[1:-1, :-2] + gray_SS[1:-1, 2:]
    laplacian = (4 * inner - around).abs().mean() if inner.numel() else gray_SS.new_zeros(())
    values = torch.stack(
        [
            gray_SS.mean(),
            (gray_SS.std(correction=0) + _STEP).log(),
            (red - green).mean(),
            ((red + green) / 2 - blue).mean(),
            (laplacian + _STEP).log(),
        ]
    )
    thumbnail = F.adaptive_avg_pool2d(gray_SS[None], THUMBNAIL).flatten()
    return torch.cat([values, thumbnail - thumbnail.mean()]).double().numpy()


def _within(pixels: Tensor, roi_SS: Tensor) -> NDArray[np.float64]:
    red, green, blue = pixels.float().div(255)
    gray_SS = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    around = gray_SS[:-2, 1:-1] + gray_SS[2:, 1:-1] + gray_SS[1:-1, :-2] + gray_SS[1:-1, 2:]
    whole = roi_SS[1:-1, 1:-1] & roi_SS[:-2, 1:-1] & roi_SS[2:, 1:-1] & roi_SS[1:-1, :-2] & roi_SS[1:-1, 2:]
    laplacian = (4 * gray_SS[1:-1, 1:-1] - around).abs()[whole]
    gray_n = gray_SS[roi_SS]
    values = torch.stack(
        [
            gray_n.mean(),
            (gray_n.std(correction=0) + _STEP).log(),
            (red - green)[roi_SS].mean(),
            ((red + green) / 2 - blue)[roi_SS].mean(),
            ((laplacian.mean() if laplacian.numel() else gray_n.new_zeros(())) + _STEP).log(),
        ]
    )
    share = F.adaptive_avg_pool2d(roi_SS[None].float(), THUMBNAIL).flatten()
    thumbnail = F.adaptive_avg_pool2d((gray_SS * roi_SS)[None], THUMBNAIL).flatten() / share
    seen = share > 0
    thumbnail = torch.where(seen, thumbnail - thumbnail[seen].mean(), 0.0)
    return torch.cat([values, thumbnail]).double().numpy()


@dataclass(frozen=True)
class Unlike:
    """How far photographs are from the normals: ``values`` [B], and for each the measure with the largest distance."""

    values: NDArray[np.float64]
    measures: tuple[str, ...]


class Normals:
    """The appearance of N normals, rows [N, F] of `appearance`. Raises ValueError if there are none."""

    def __init__(self, rows: ArrayLike) -> None:
        self.rows_NF = np.atleast_2d(np.asarray(rows, dtype=np.float64))
        if self.rows_NF.size == 0:
            raise ValueError("no normal photographs to compare the appearance with")

    def unlike(self, rows: ArrayLike) -> Unlike:
        """Compare photographs, rows [B, F], that are not among the normals."""
        rows_BF = np.asarray(rows, dtype=np.float64).reshape(-1, self.rows_NF.shape[1])
        distances_BC = _distances(rows_BF, self.rows_NF)
        return Unlike(distances_BC.max(1), tuple(MEASURES[worst] for worst in distances_BC.argmax(1)))

    def leave_one_out(self) -> NDArray[np.float64]:
        """Compare every normal with the N - 1 others: values [N], empty if there is only one."""
        count = len(self.rows_NF)
        if count < 2:
            return np.empty(0)
        return np.array([_distances(self.rows_NF[[i]], np.delete(self.rows_NF, i, axis=0)).max() for i in range(count)])


def _distances(rows_BF: NDArray[np.float64], normals_NF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distances of every measure, [B, C], in units of the normals' spread."""
    few = len(MEASURES) - 1
    centre_C, values_NC = np.median(normals_NF[:, :few], axis=0), normals_NF[:, :few]
    away_BC = np.abs(rows_BF[:, :few] - centre_C)
    spread_C = _spread(np.abs(values_NC - centre_C).mean(0), FLOORS[:few], len(normals_NF))
    nearest_B = _apart(rows_BF[:, few:], normals_NF[:, few:]).min(1)
    apart_NN = _apart(normals_NF[:, few:], normals_NF[:, few:])
    np.fill_diagonal(apart_NN, np.inf)
    typical = apart_NN.min(1).mean() if len(normals_NF) > 1 else 0.0
    layout_B = nearest_B / _spread(typical, FLOORS[few], len(normals_NF))
    return np.column_stack([away_BC / spread_C, layout_B])


def _spread(deviation: ArrayLike, floor: ArrayLike, count: int) -> NDArray[np.float64]:
    return np.sqrt((1.2533 * np.asarray(deviation)) ** 2 + np.asarray(floor) ** 2 * (1 + FEW / count))


def _apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square distance of every thumbnail in ``a`` from every one in ``b``."""
    squares = (a**2).mean(1)[:, None] + (b**2).mean(1)[None] - 2 * a @ b.T / a.shape[1]
    return np.sqrt(np.clip(squares, 0, None))
