"""Pretraining batches of residual features, computed step by step, and their token labels.

Shapes: B images, V views, L levels, C_l channels, H_l x W_l tokens, K references of an image, D reference draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from adpretrain.config import ReferencesConfig
from adpretrain.device import upload
from adpretrain.extractor import ADExtractor
from adpretrain.residual import as_map, tokens
from adpretrain.training.dataset import PretrainingSet, Requests
from adpretrain.training.loader import ImageBatch, Request, load_ahead
from adpretrain.training.streamed import StreamedSet


@dataclass(frozen=True)
class ResidualBatch:
    """Residuals of B images.

    ``views``: V lists of L levels [B, C_l, H_l, W_l]; ``masks``: bool [B, S, S], on the host, where labels are counted
    without waiting for the device; ``keys``: (epoch, index) of each image;
    ``contexts``: for cross attention, (b, residuals of the references) of consecutive images with equal K, L levels of
    [b, K * T_l, C_l]; else empty. ``encoded``: number of images that went through the backbone.
    """

    views: list[FeatureMaps]
    masks: Tensor
    keys: list[tuple[int, int]]
    contexts: list[tuple[int, list[Tensor]]]
    encoded: int = 0


def encode(extractor: ADExtractor, pixels: Tensor) -> FeatureMaps:
    """uint8 [B, 3, S, S] -> L levels of features, in batches of the size at which the device is fastest."""
    parts = pixels.split(16 if pixels.device.type == "cpu" else 128)  # more than 16 outgrow a CPU's caches
    encoded = [extractor.encode(extractor.preprocess.normalise(part)) for part in parts]
    return [torch.cat(level) for level in zip(*encoded, strict=True)]


def encode_batch(
    extractor: ADExtractor,
    batch: ImageBatch,
    features: dict[Any, list[Tensor]],
    watch: Callable[[str], object] = lambda phase: None,
) -> ResidualBatch:
    """A batch of images -> residuals of every view against each image's own references; the views have gradients if the
    backbone is not frozen.

    ``features``: the known features of photographs by name, L levels [T_l, C_l]; those of the batch are added. A
    photograph is always encoded together with its unit, so that its features do not depend on which ones were known.
    """
    watch("backbone")
    count, views = batch.views.shape[:2]
    encoded = encode(extractor, batch.views.flatten(0, 1))
    watch("references")
    for name in batch.forget:
        del features[name]
    for names, pixels in batch.units:
        with torch.no_grad():
            unit = [tokens(level) for level in encode(extractor, pixels)]
        features.update({name: [level[row] for level in unit] for row, name in enumerate(names)})
    watch("matching")
    residuals, contexts = _match(extractor, batch, encoded, features)
    levels = [level.unflatten(0, (count, views)) for level in residuals]
    by_view = [[level[:, view] for level in levels] for view in range(views)]
    seen = count * views + sum(len(names) for names, _ in batch.units)
    return ResidualBatch(by_view, batch.masks, batch.keys, contexts, seen)


def _match(
    extractor: ADExtractor, batch: ImageBatch, encoded: FeatureMaps, features: Mapping[Any, list[Tensor]]
) -> tuple[FeatureMaps, list[tuple[int, list[Tensor]]]]:
    """Residuals of all views, in order, and the contexts of `ResidualBatch`. Images with equal K are matched together,
    with one batched product per level."""
    if extractor.config.matching == "none":
        return encoded, []
    crossed = extractor.projector is not None and extractor.projector.needs_reference_residuals
    parts, contexts, start, views = [], [], 0, batch.views.shape[1]
    for (images, _), group in groupby(batch.sets, key=lambda each: (each[0], len(each[1]))):
        chosen = [names for _, names in group]
        stop = start + len(chosen) * images * views
        queries = [level[start:stop] for level in encoded]
        rows = [torch.stack([features[name][level] for name in chain(*chosen)]) for level in range(len(queries))]
        maps = [as_map(row, query) for row, query in zip(rows, queries, strict=True)]
        bank = extractor.bank_of(maps, len(chosen))
        parts.append(bank.residuals(queries))
        if crossed:
            contexts.append((len(chosen) * images, [level.repeat_interleave(images, 0) for level in bank.context]))
        start = stop
    return [torch.cat(level) for level in zip(*parts, strict=True)], contexts


class OnlineBatches:
    """Images loaded by worker processes, encoded and matched step by step: new views and references every epoch.

    With a pool of references (`adpretrain.config.ReferencesConfig`), as many of their features as fit are kept.
    ``watch`` is called with the phase that begins: "data" (waiting for images), "backbone", "references" or "matching".
    """

    def __init__(
        self,
        extractor: ADExtractor,
        data: PretrainingSet | StreamedSet,
        workers: int,
        device: torch.device,
        watch: Callable[[str], object] = lambda phase: None,
    ) -> None:
        self.extractor, self.data, self.workers, self.device, self.watch = extractor, data, workers, device, watch

    def _pools_that_fit(self, config: ReferencesConfig) -> int:
        """The number of pools that fit into the memory limit."""
        side = self.extractor.preprocess.image_size
        with torch.no_grad():
            levels = self.extractor.encode(torch.zeros(1, 3, side, side, device=self.device))
        return (config.cache_mb << 20) // (config.pool * sum(level.nbytes for level in levels))

    def __call__(self, steps: Iterable[list[Any]]) -> Iterator[ResidualBatch]:
        draws, features = self.data.draws, dict[Any, list[Tensor]]()
        kept = draws is not None and draws.config.pool > 0 and draws.config.cache_mb > 0
        requests: Iterable[Request] = map(Request, steps)
        if kept:
            assert draws is not None
            requests = Requests(steps, draws, self._pools_that_fit(draws.config))
        batches = load_ahead(self.data.load, requests, self.workers, self.device)
        while True:
            self.watch("data")
            batch = next(batches, None)
            if batch is None:
                return
            yield encode_batch(self.extractor, batch, features if kept else {}, self.watch)


LABELS = ("center", "nearest", "pixels")


def token_labels(masks_BSS: Tensor, grid: tuple[int, int], rule: str = "center", pixels: int = 32) -> Tensor:
    """Pixel masks -> bool token labels [B, H, W]. The paper says only that masks are downsampled. Rules:

    "center": the pixel at the centre of the token's patch is marked (torch's "nearest-exact"). "nearest": the pixel at
    its top left corner is marked (torch's "nearest", the released norm loss). "pixels": more than ``pixels`` marked
    pixels lie in the patch, scaled to 224 px (the released angle loss).

    Raises ValueError for an unknown rule.
    """
    masks = masks_BSS[:, None].float()
    if rule == "pixels":
        share = F.adaptive_avg_pool2d(masks, grid)[:, 0]
        # The margin is for rounding: exactly ``pixels`` of a 14 x 14 patch come out a little above in float32.
        return share * (224 * 224 / (grid[0] * grid[1])) > pixels + 1e-3
    if rule not in LABELS:
        raise ValueError(f"token label rule {rule!r} is unknown; choose one of {', '.join(LABELS)}")
    return F.interpolate(masks, size=grid, mode="nearest-exact" if rule == "center" else "nearest")[:, 0] > 0


@dataclass(frozen=True)
class LabelledBatch:
    """The input of the losses: ``views`` and ``contexts`` as in `ResidualBatch`; ``labels`` for the norm loss and
    ``angle_labels`` for the angle loss, L levels of bool [B, H_l, W_l], on the host."""

    views: list[FeatureMaps]
    labels: list[Tensor]
    angle_labels: list[Tensor]
    contexts: list[tuple[int, list[Tensor]]]


def label(
    batch: ResidualBatch, norm_rule: str = "center", angle_rule: str = "center", pixels: int = 32
) -> LabelledBatch:
    """Token labels of every level for the norm loss and for the angle loss, by the rules of `token_labels`."""
    grids = [(int(level.shape[2]), int(level.shape[3])) for level in batch.views[0]]
    made = {rule: [token_labels(batch.masks, grid, rule, pixels) for grid in grids] for rule in {norm_rule, angle_rule}}
    return LabelledBatch(batch.views, made[norm_rule], made[angle_rule], batch.contexts)


def thin(batch: LabelledBatch, keys: Sequence[tuple[int, int]], count: int, seed: int) -> LabelledBatch:
    """Keep ``count`` tokens of every image: its anomalous ones, at most half of them, and random normal ones.

    Neighbouring tokens say nearly the same, so a step on a few tokens of many images learns as much as one on all
    tokens of few. The choice derives from (seed, epoch, index) and is the same in every view. Maps become
    [B, C_l, 1, count]. Levels with fewer tokens stay whole.
    """
    views: list[FeatureMaps] = [[] for _ in batch.views]
    labels, angle_labels = [], []
    for level, marked in enumerate(batch.labels):
        size = marked[0].numel()
        if size <= count:
            chosen = torch.arange(size).expand(len(keys), -1)
        else:
            pairs = zip(marked.flatten(1), keys, strict=True)
            chosen = torch.stack([_choose(marked_T, count, (seed, *key, level)) for marked_T, key in pairs])
        there = upload(chosen, batch.views[0][level].device)
        for kept, view in zip(views, batch.views, strict=True):
            flat = view[level].flatten(2)
            kept.append(flat.gather(2, there[:, None].expand(-1, flat.shape[1], -1))[:, :, None])
        labels.append(marked.flatten(1).gather(1, chosen)[:, None])
        angle_labels.append(batch.angle_labels[level].flatten(1).gather(1, chosen)[:, None])
    return replace(batch, views=views, labels=labels, angle_labels=angle_labels)


def _choose(marked_T: Tensor, count: int, key: Sequence[int]) -> Tensor:
    order = torch.from_numpy(np.random.default_rng(np.random.SeedSequence(key)).permutation(marked_T.numel()))
    shuffled = marked_T[order]
    anomalous = order[shuffled][: count // 2]
    return torch.cat([anomalous, order[~shuffled], order[shuffled][count // 2 :]])[:count]
