"""`adpretrain info` describes a saved model without loading it or its backbone."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adpretrain.backbones import load_backbone
from adpretrain.backbones.table import find_entry
from adpretrain.card import FEATURENORM, METRICS, held_out_results
from adpretrain.passport import NO_LAWYERS, OPEN_QUESTION, in_a_product, passport_of
from adpretrain.residual import tokens
from adpretrain.saved import WEIGHTS_NAME, ExtractorConfig, provenance_of, read_config, saved_parts
from adpretrain.training.speed import count_flops
from downstream.commands.options import POSITIONAL, Command
from downstream.saved import is_detector, locate_model, part, parts_of, read_detector_config
from downstream.terminal import plain


@dataclass(frozen=True)
class Info(Command):
    """Describe an extractor or fitted detector: backbone, levels, size, training data, metrics.

    Args:
        model: a folder, "org/name" on the Hugging Face Hub, or "embedded"
        revision: branch, tag or commit on the Hub
        json: print a JSON object instead of text
    """

    model: str = field(metadata=POSITIONAL)
    revision: str | None = None
    json: bool = False

    def run(self) -> int:
        from downstream.commands.info import describe_model

        facts = describe_model(self.model, self.revision)
        if self.json:
            print(json.dumps(facts))
            return 0
        links = facts.pop("licences")
        width = max(map(len, facts))
        for name, value in facts.items():
            if value not in (None, "", [], {}):
                if isinstance(value, dict):
                    value = [f"{key} {part}" for key, part in value.items()]
                shown = ", ".join(map(str, value)) if isinstance(value, list) else value
                print(f"{name:<{width}}  {plain(shown)}")
        for link in links:
            print(f"{'licence':<{width}}  {plain(_in_a_line(link))}")
        print(f"{OPEN_QUESTION} {NO_LAWYERS}")
        return 0


def _in_a_line(link: Mapping[str, str]) -> str:
    source = f"; {link['source']}" if link["source"] else ""
    return f"{link['what']} {link['name']}: {link['licence']}, in a product: {link['product']}{source}"


def describe_model(model: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Return JSON values by name, in reading order; `adpretrain.hub.download.locate` finds ``model`` at ``revision``.

    Raises ValueError if the model is neither an extractor nor a fitted detector, or cannot be found or downloaded.
    """
    located = locate_model(model, revision=revision)
    folder = located.folder
    facts: dict[str, Any] = {"model": str(model), "commit": located.commit}
    facts |= _detector(folder) if is_detector(folder) else _extractor(folder)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    links = passport_of(folder)
    facts |= {"bytes on disk": sum(sizes), "folder": str(folder), "in a product": in_a_product(links)}
    return {**facts, "licences": [asdict(link) for link in links]}


def _extractor(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    provenance = config.provenance
    data = provenance_of(config, "data")
    metrics = {METRICS[r.metric]: round(r.value, 1) for r in held_out_results(config) if r.method == FEATURENORM}
    return {
        "kind": "extractor",
        **_backbone(config.backbone.name, config.backbone.revision),
        "levels": config.backbone.levels or list(find_entry(config.backbone.name).levels),
        "channels": config.channels,
        "input pixels": config.preprocess.image_size,
        "photographs": config.preprocess.in_words,
        "projector": config.projector.architecture if config.projector else "none",
        "parameters": _parameters(folder),
        **projector_cost(config, folder),
        "matching": config.matching,
        "local scale": "no" if config.local_scale is None else f"share {config.local_scale.share}",
        "training data": data.get("set") or data.get("name"),
        "training images": data.get("images"),
        "training categories": data.get("categories"),
        "steps": provenance.get("steps"),
        "seed": provenance.get("seed"),
        "held-out metrics, %": metrics,
        "git commit": provenance.get("git_commit"),
        "library version": config.library_version,
    }


def projector_cost(config: ExtractorConfig, folder: Path) -> dict[str, int]:
    """Count the parameters and FLOPs of the projector (ADPretrain Tab. 7); empty if there is no projector.

    Only matrix products at the extractor's input size count, a multiply-add as two FLOPs. "per image" is the cost of
    one image; "once" is that of the keys and values, computed once for given weights (with cross attention, once for
    the residuals of a reference). Backbone and projector are built on the meta device, to learn the number of tokens.
    """
    projector, _ = saved_parts(config, folder)
    if projector is None:
        return {}
    side = config.preprocess.image_size
    name, levels = config.backbone.name, config.backbone.levels or None
    try:
        with torch.device("meta"):
            finest, patch = config.backbone.finest, config.backbone.patch
            backbone = load_backbone(name, pretrained=False, image_size=side, levels=levels, finest=finest, patch=patch)
            shapes = [level.shape[1:] for level in backbone(torch.empty(1, 3, side, side))]
            inputs = [[torch.empty(count, *shape) for shape in shapes] for count in (1, 2)]
            references = [tokens(level) for level in inputs[0]]
        one, two = (count_flops(functools.partial(projector, images, references)) for images in inputs)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: the projector does not fit the backbone: {error}") from error
    return {
        "projector parameters": sum(parameter.numel() for parameter in projector.parameters()),
        "projector FLOPs per image": two - one,
        "projector FLOPs once": 2 * one - two,
    }


def _detector(folder: Path) -> dict[str, Any]:
    config = read_detector_config(folder)
    inside = {name: describe_model(part(folder, name))["kind"] for name in parts_of(vars(config))}
    return {
        "kind": f"fitted {config.detector} (holds features of its product)",
        **(_backbone(config.backbone.name, config.backbone.revision) if config.backbone else {}),
        "made of": inside,
        "input pixels": config.image_size,
        "options": config.options,
        "numbers kept": _parameters(folder),
        "library version": config.library_version,
    }


def _backbone(name: str, revision: str | None) -> dict[str, Any]:
    entry = find_entry(name)
    return {
        "backbone": name,
        "backbone weights": str(entry.source),
        "backbone revision": revision,
        "backbone licence": entry.licence,
        "backbone in a product": entry.terms.product,
    }


def _parameters(folder: Path) -> int:
    """Count the numbers in model.safetensors from its header."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}")
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read weights {path}: {error}") from error
