"""CFLOW: the likelihood of every feature vector at its position, by normalising flows (Gudovskiy et al. 2022).

Each level has a flow of its own: affine coupling blocks (RealNVP) that turn the vectors of normal images into samples
of a standard normal distribution. All parts depend on the vector's position, through sines and cosines of its row and
column, so that one small flow serves all positions.

Levels become one map as in the paper: log-likelihoods per channel are shifted so that their largest is 0, and their
exponentials, between 0 and 1, are upsampled and added; the map is the largest possible sum minus this sum. The paper
shifts by the largest value of the test set. We shift by that of the normal images [ours], so that a score does not
depend on what it is scored with; a vector that is more likely than any normal one counts as the likeliest.

The authors' code differs from the paper in its loss, see ``loss``, and turns the vectors of a block by a random
rotation where we shuffle channels: for C channels a rotation takes C^2 numbers and C^3 operations to draw.

Shapes: B images, L levels, C channels and H x W tokens of a level, N vectors, P channels of the position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.embedding import EmbeddingConfig, chosen_levels, settle_levels
from downstream.learning import Learner, learn
from downstream.lessons import LearningConfig, Lesson, Normals
from downstream.maps import check_sigma, gaussian_blur, highest, highest_tokens, upsample
from downstream.network_weights import drawn_network, weights_of, with_weights
from downstream.roi import RegionOfInterest

LOSSES = ("released", "paper")
STAGES = (2, 3, 4)  # of a WideResNet-50 in the paper
WARM, LOWEST = 0.08, 1e-3  # share of the steps in which the learning rate rises, and its last factor; as released
MOST_BLOCKS = 100
NO_CHANGE = 2 * math.log(math.expm1(5))  # 0.1 softplus(x / 2) * 2 is 1 here


@dataclass(frozen=True)
class CFLOWConfig:
    """Options of `CFLOW`.

    Args:
        levels: levels of the extract, counted from 0 (-1 = the last); null = all; "paper" = stages 2 to 4 of a network
            with stages, else all.
        blocks: number of coupling blocks of each flow.
        clamp: largest logarithm by which a block scales a channel.
        positions: P, the channels of the position, a multiple of 4.
        vectors: N, the vectors of each level in a step.
        loss: "released" averages -log sigmoid(log-likelihood / C) as the authors' code does, which cares less for
            vectors that are likely already; "paper" averages -log-likelihood / C.
        learning_rate: largest learning rate of Adam; it rises in the first steps, then falls along a cosine.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels; the paper smooths nothing.
        training: steps and images per step [ours]; the authors take some hundred thousand steps for a product of
            MVTec AD, each on vectors of 32 images.
    """

    levels: list[int] | Literal["paper"] | None = "paper"
    blocks: int = 8
    clamp: float = 1.9
    positions: int = 128
    vectors: int = 256
    loss: Literal["released", "paper"] = "released"
    learning_rate: float = 2e-4
    sigma: float = 0.0
    training: LearningConfig = field(default_factory=lambda: LearningConfig(steps=5000, batch_size=8))

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if self.positions < 4 or self.positions % 4:
            raise ValueError(f"positions {self.positions} must be a positive multiple of 4, such as 128")
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise ValueError(f"blocks {self.blocks} must be at least 1, and at most {MOST_BLOCKS}")
        if self.vectors < 1:
            raise ValueError(f"vectors {self.vectors} must be at least 1")
        for name in ("clamp", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r} is unknown; choose one of {', '.join(LOSSES)}")


DEFAULT = CFLOWConfig()


def position_code(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of the column, then of the row, at wavelengths from 2 pi to 10000 * 2 pi: [H, W, P]."""
    rates = torch.exp(torch.arange(0, channels // 2, 2) * (-math.log(1e4) / (channels // 2)))
    column, row = (torch.arange(side)[:, None] * rates for side in (width, height))
    code_WP, code_HP = (torch.stack([x.sin(), x.cos()], 2).flatten(1) for x in (column, row))
    parts = (code_WP[None].expand(height, -1, -1), code_HP[:, None].expand(-1, width, -1))
    return torch.cat(parts, 2)


class Coupling(nn.Module):
    """One block: a small network makes of half of the channels, and of the position, how the other half is scaled and
    shifted. Then every channel has a scale and a shift of its own, and all are shuffled."""

    order: Tensor  # [C]: the channel that comes to each place

    def __init__(self, width: int, positions: int, clamp: float) -> None:
        super().__init__()
        self.halves, self.clamp = (width - width // 2, width // 2), clamp
        inner = self.halves[0] + positions
        self.network = nn.Sequential(nn.Linear(inner, 2 * inner), nn.ReLU(), nn.Linear(2 * inner, 2 * self.halves[1]))
        self.scale = nn.Parameter(torch.full((width,), NO_CHANGE))
        self.shift = nn.Parameter(torch.zeros(width))
        self.register_buffer("order", torch.randperm(width))

    def forward(self, x_NC: Tensor, position_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors after the block [N, C] and the logarithms of its Jacobian's determinant [N]."""
        kept, changed = x_NC.split(self.halves, 1)
        # A tenth of what the network gives: at first, a block hardly changes anything.
        raw, shift = (0.1 * self.network(torch.cat([kept, position_NP], 1)).to(x_NC.dtype)).chunk(2, 1)
        log_scale = self.clamp * raw.tanh()
        overall_C = 0.1 * F.softplus(self.scale, beta=0.5)
        out_NC = torch.cat([kept, changed * log_scale.exp() + shift], 1) * overall_C + self.shift
        return out_NC[:, self.order], log_scale.sum(1) + overall_C.log().sum()


class Flow(nn.Module):
    """The flow of one level, which gives the log-likelihood of vectors at their positions."""

    def __init__(self, width: int, config: CFLOWConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(width, config.positions, config.clamp) for _ in range(config.blocks))

    def forward(self, x_NC: Tensor, position_NP: Tensor) -> Tensor:
        """Log-likelihoods divided by C: with z the output of the blocks, (log N(z; 0, 1) + log |det dz/dx|) / C [N]."""
        width, log_det_N = x_NC.shape[1], torch.zeros_like(x_NC[:, 0])
        for block in self.blocks:
            x_NC, more = block(x_NC, position_NP)
            log_det_N = log_det_N + more
        return (log_det_N - x_NC.square().sum(1) / 2) / width - math.log(2 * math.pi) / 2


class Flows(Learner):
    """The flows of L levels; its loss is the sum of theirs, which share no weights."""

    def __init__(self, widths: Sequence[int], config: CFLOWConfig) -> None:
        super().__init__()
        if min(widths) < 2:
            raise ValueError(f"a flow halves the channels of a level, which has {min(widths)}: choose other levels")
        self.widths, self.config = list(widths), config
        self.levels = nn.ModuleList(Flow(width, config) for width in widths)

    def likelihoods(self, features: FeatureMaps) -> list[Tensor]:
        """L levels [B, C, H, W] -> log-likelihoods per channel of each [B, H, W]."""
        found = []
        for flow, level_BCHW in zip(self.levels, features, strict=True):
            vectors_NC, positions_NP = self._vectors(level_BCHW)
            found.append(flow(vectors_NC, positions_NP).view(-1, *level_BCHW.shape[2:]))
        return found

    def forward(self, lesson: Lesson) -> Tensor:
        """Draw N vectors of each level among those in the region, and average their losses."""
        losses = []
        for flow, level_BCHW in zip(self.levels, chosen_levels(lesson.features, self.config.levels), strict=True):
            inside_BHW = None if lesson.region is None else lesson.region.inside(level_BCHW[:, 0])
            numbers = torch.arange(level_BCHW[:, 0].numel(), device=level_BCHW.device)
            numbers = numbers if inside_BHW is None else numbers[inside_BHW.flatten()]
            drawn = torch.randperm(len(numbers), generator=lesson.generator)[: self.config.vectors]
            chosen = numbers[drawn.to(numbers.device)]
            vectors_NC, positions_NP = self._vectors(level_BCHW)
            found_N = flow(vectors_NC[chosen], positions_NP[chosen])
            losses.append((F.softplus(-found_N) if self.config.loss == "released" else -found_N).mean())
        return torch.stack(losses).sum()

    def _vectors(self, level_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors [B * H * W, C] of a level and their positions [B * H * W, P]."""
        level = level_BCHW.float()
        count, _, height, width = level.shape
        code_HWP = position_code(height, width, self.config.positions).to(level.device)
        codes = code_HWP.expand(count, -1, -1, -1)
        return level.permute(0, 2, 3, 1).flatten(0, 2), codes.flatten(0, 2)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": self.config.learning_rate}]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.groups())

    def rate(self, done: float) -> float:
        """A cosine from 1 to `LOWEST`, which is reached from 0.1 along a line while done < `WARM`."""
        if done < WARM:
            return 0.1 + done / WARM * (self.rate(WARM) - 0.1)
        return LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * done)) / 2


class CFLOW(Detector):
    """Flows of the levels -> likelihoods, relative to the largest of the normal images -> upsampled, added, negated
    map -> its maximum. ``losses`` [steps] are those of the last `fit`."""

    name = "cflow"
    options = CFLOWConfig
    learns = True

    flows: Flows
    likeliest_L: Tensor

    def __init__(self, extract: Extract, config: CFLOWConfig = DEFAULT) -> None:
        settled = settle_levels(EmbeddingConfig(config.levels), extract, STAGES).levels
        super().__init__(extract, replace(config, levels=settled))
        self.losses: list[float] = []

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Train the flows, then find the largest likelihood that each gives a vector of the normal images."""
        training, lessons = self.config.training, Normals(normals)
        widths = [level.shape[1] for level in self._levels(lessons.features([0]))]
        flows = drawn_network(partial(Flows, widths, self.config), training.seed, lessons.images.device)
        self.losses = learn(flows, lessons, training, "training the flows", self.workplace, progress, self.config)
        self.flows = flows
        self.likeliest_L = torch.stack([self._likeliest(lessons, number) for number in range(len(lessons))]).amax(0)

    @torch.no_grad()
    def _likeliest(self, lessons: Normals, number: int) -> Tensor:
        grids = self.flows.likelihoods(self._levels(lessons.features([number])))
        region = lessons.region and lessons.region.pick([number])
        return torch.stack([highest_tokens(grid_1HW, 0.0, region)[0] for grid_1HW in grids])

    def _levels(self, features: FeatureMaps) -> FeatureMaps:
        return chosen_levels(features, self.config.levels)

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        unlike = []
        for grid_BHW, likeliest in zip(self.flows.likelihoods(self._levels(features)), self.likeliest_L, strict=True):
            probability_BHW = (grid_BHW - likeliest).clamp_max(0).exp()
            unlike.append(1 - upsample(probability_BHW, self.side, region=region))
        maps = gaussian_blur(torch.stack(unlike).sum(0), self.config.sigma)
        return Prediction(highest(maps, region=region), maps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights of the flows, which describe THE PRODUCT'S FEATURES, and the largest likelihoods."""
        return {"likeliest": self.likeliest_L, **weights_of(self.flows)}, {"widths": self.flows.widths}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.likeliest_L = tensors["likeliest"]
        self.flows = with_weights(partial(Flows, facts["widths"], self.config), tensors)
