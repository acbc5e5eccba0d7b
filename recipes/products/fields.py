"""The primitives of every image: random fields with a chosen spectrum, poses, signed distances, colours.

Legend: S image side in px, C colour channels (1 for a grey product, 3 for a coloured one). Images are float32
[S, S, C] in 0..1, fields float32 [S, S]. Lengths "in px" are px of a 256 px image; `size / 256` scales them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import fft

Array = NDArray[np.floating[Any]]
Draw = Callable[[Generator, "Pose"], tuple[Array, Array]]
"""One shot of a product: (generator, pose) -> image [S, S, C] and part [S, S], 1 where the product is."""


@lru_cache(maxsize=4)
def grid(size: int) -> tuple[Array, Array]:
    """Centred coordinates (x, y) of the pixel centres, each [S, S], from -1 to 1. Shared, so read only."""
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = (np.ascontiguousarray(a) for a in np.meshgrid(axis, axis))
    x.flags.writeable = y.flags.writeable = False
    return x, y


def loguniform(rng: Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def smoothstep(values: Array) -> Array:
    """Clip to 0..1 with zero slope at both ends."""
    t = np.clip(values, 0, 1)
    return t * t * (3 - 2 * t)


# --- random fields -----------------------------------------------------------------------------------------


def spectrum(
    size: int,
    wavelength: float,
    *,
    band: float = 0.0,
    slope: float = 0.0,
    angle: float = 0.0,
    stretch: float = 1.0,
) -> Array:
    """Amplitudes [S, S/2+1] of a random field with unit variance, to be drawn from by `field`.

    `wavelength` in px of a 256 px image. With `band` > 0 the field is narrow-band around it (a log-normal
    ring `band` nats wide: cells, blobs, weave); otherwise it holds every longer wavelength with amplitude
    ~ frequency**-slope and fades out below (noise, clouds). `stretch` > 1 makes it elongated along `angle`
    (radians; 0 = along x), as grain and brushing are.
    """
    fx = fft.rfftfreq(size).astype(np.float32)[None, :] * (size / 256)
    fy = fft.fftfreq(size).astype(np.float32)[:, None] * (size / 256)
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    radius = np.hypot(along * stretch, across).clip(1 / 512)
    if band > 0:
        amplitude = np.exp(-0.5 * (np.log(radius * wavelength) / band) ** 2)
    else:
        amplitude = radius**-slope * np.exp(-0.5 * (radius * wavelength) ** 2)
    amplitude[0, 0] = 0
    weight = np.full(amplitude.shape[1], 2.0)
    weight[0] = weight[-1] = 1.0
    return (amplitude * size**2 / np.sqrt(2 * (amplitude**2 * weight).sum())).astype(np.float32)


def field(amplitude: Array, rng: Generator) -> Array:
    """A new random field [S, S] with the given spectrum: zero mean, unit variance, periodic."""
    rows, columns = amplitude.shape
    noise = rng.standard_normal((rows, columns, 2), dtype=np.float32).view(np.complex64)[..., 0]
    noise *= amplitude
    return fft.irfft2(noise, s=(rows, rows), overwrite_x=True)


# --- poses -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    """Where the camera sees the product: a homography from centred output to centred source coordinates."""

    size: int
    matrix: NDArray[np.float64]  # [3, 3], acts on (x, y, 1) with x, y in -1..1

    def coords(self) -> tuple[Array, Array]:
        """Source coordinates (x, y), each [S, S], of every output pixel; the image spans -1..1."""
        x, y = grid(self.size)
        m = self.matrix.astype(np.float32)
        w = 1 / (m[2, 0] * x + m[2, 1] * y + m[2, 2])
        return (m[0, 0] * x + m[0, 1] * y + m[0, 2]) * w, (m[1, 0] * x + m[1, 1] * y + m[1, 2]) * w

    def warp(self, plane: Array, wrap: bool = False) -> Array:
        """Resample one plane [S, S] (bilinear). Outside it is 0, or with `wrap` its periodic continuation."""
        pad = self.size // 2 if wrap else 0
        if pad:
            plane = np.pad(plane, pad, mode="wrap")
        half = self.size / 2
        to_centred = np.array([[1 / half, 0, -1], [0, 1 / half, -1], [0, 0, 1]])
        to_pixels = np.array([[half, 0, half + pad], [0, half, half + pad], [0, 0, 1]])
        m = to_pixels @ self.matrix @ to_centred
        coefficients = (m / m[2, 2]).ravel()[:8].tolist()
        source = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
        out = source.transform(
            (self.size, self.size), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
        )
        return np.asarray(out)


def make_pose(
    size: int, angle: float, scale: float, shift: tuple[float, float], tilt: tuple[float, float] = (0, 0)
) -> Pose:
    """`angle` in radians, `scale` > 1 enlarges, `shift` in half image sides, `tilt` the perspective terms."""
    c, s = np.cos(angle) / scale, np.sin(angle) / scale
    rigid = np.array([[c, -s, -shift[0]], [s, c, -shift[1]], [0, 0, 1.0]])
    perspective = np.array([[1, 0, 0], [0, 1, 0], [tilt[0], tilt[1], 1.0]])
    return Pose(size, rigid @ perspective)


# --- shapes ------------------------------------------------------------------------------------------------


def cover(distance: Array, softness: float = 1.0) -> Array:
    """Antialiased coverage [S, S] of a signed distance in half image sides (negative inside)."""
    return np.clip(0.5 - distance * (distance.shape[0] / 2 / softness), 0, 1)


def circle(x: Array, y: Array, radius: float) -> Array:
    return np.hypot(x, y) - np.float32(radius)


def box(x: Array, y: Array, width: float, height: float, corner: float = 0.0) -> Array:
    """Signed distance to a rectangle of the given half sides with rounded corners."""
    qx, qy = np.abs(x) - np.float32(width - corner), np.abs(y) - np.float32(height - corner)
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    return outside + np.minimum(np.maximum(qx, qy), 0) - np.float32(corner)


def polygon(x: Array, y: Array, radius: float, corners: int, turn: float = 0.0) -> Array:
    """Signed distance to a regular polygon given by its inner radius."""
    step = 2 * np.pi / corners
    angle = (np.arctan2(y, x) + turn + step / 2) % step - step / 2
    return np.hypot(x, y) * np.cos(angle) - np.float32(radius)


def relief(height: Array, towards: float) -> Array:
    """Shading [S, S] of a height field lit from `towards` (radians): its slope along the light."""
    dx = np.empty_like(height)
    dy = np.empty_like(height)
    dx[:, 1:-1] = (height[:, 2:] - height[:, :-2]) * 0.5
    dy[1:-1] = (height[2:] - height[:-2]) * 0.5
    dx[:, 0] = dx[:, -1] = 0
    dy[0] = dy[-1] = 0
    return dx * np.float32(np.cos(towards)) + dy * np.float32(np.sin(towards))


# --- colours -----------------------------------------------------------------------------------------------


def random_colour(rng: Generator, value: float, saturation: float) -> Array:
    """An RGB colour [3] of mean `value` with a random hue."""
    hue = rng.uniform(0, 2 * np.pi)
    swing = np.cos(hue + np.array([0, 2, 4]) * np.pi / 3)
    return np.clip(value * (1 + saturation * swing), 0.01, 0.99).astype(np.float32)


def make_palette(rng: Generator, grey: float) -> Callable[[Array], Array]:
    """A map from tone [S, S] in 0..1 to image [S, S, C]: grey with probability `grey`, else a tinted ramp."""
    if rng.random() < grey:
        return lambda tone: tone[..., None]
    dark = random_colour(rng, rng.uniform(0.02, 0.2), rng.uniform(0, 0.8))
    light = random_colour(rng, rng.uniform(0.7, 0.95), rng.uniform(0, 0.35))
    if rng.random() < 0.5:  # a single hue, as most materials have
        hue = light / light.mean()
        dark = np.clip(dark.mean() * hue**2, 0, 1)
    return lambda tone: dark + (light - dark) * tone[..., None]
