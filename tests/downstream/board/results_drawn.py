"""Results with drawn scores, sealed like measured ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from downstream.board.result import PER_IMAGE, Result, digest_of, sealed

HARDWARE = {"processor": "drawn", "cores": 2, "threads": 1, "device": "cpu", "torch": "2.13"}


def measured(
    product: str, draw: int, scores: Sequence[float], labels: Sequence[int], images: str = "", aupro: float | None = 0.5
) -> dict[str, Any]:
    metrics: dict[str, float | None] = {name: metric(scores, labels) for name, metric in PER_IMAGE.items()}
    return {
        "product": product,
        "draw": draw,
        "extractor": 0,
        "images": images or hashlib.sha256(f"{product} {draw}".encode()).hexdigest(),
        "labels": list(labels),
        "scores": list(scores),
        "metrics": {**metrics, "aupro": aupro},
        "notes": [],
        "fit": 1.0,
        "score": 2.0,
    }


def drawn_scores(quality: float, seed: int, count: int = 60) -> tuple[list[float], list[int]]:
    """Scores of defective and normal photographs whose means lie ``quality`` standard deviations apart."""
    rng, labels = np.random.default_rng(seed), [index % 2 for index in range(count)]
    return [float(rng.normal(quality * label)) for label in labels], labels


def result(
    features: str = "lite0",
    detector: str = "padim",
    data: str = "tiles",
    quality: float = 1.0,
    seed: int = 0,
    draws: int = 1,
    products: Sequence[str] = ("tile",),
    setting: str = "K=4",
    licence: tuple[str, str] = ("Apache-2.0", "yes"),
    latency: float | None = 0.02,
    **changes: Any,
) -> Result:
    options = {"sigma": 4.0}
    own = [
        measured(product, draw, *drawn_scores(quality, seed + 100 * draw + 10000 * number))
        for draw in range(draws)
        for number, product in enumerate(products)
    ]
    weights = {"part": "backbone weights", "name": "lite0", "licence": "Apache-2.0", "product": "yes", "source": ""}
    trained_on = {
        "part": "pretraining data",
        "name": "drawn",
        "licence": licence[0],
        "product": licence[1],
        "source": "",
    }
    content = {
        "extractor": {
            "name": features,
            "revision": None,
            "digest": hashlib.sha256(features.encode()).hexdigest(),
            "features": "pretrained",
            "backbone": "lite0",
            "weights": "0" * 64,
            "random_weights": None,
            "image_size": 224,
            "parameters": 692_688,
            "licences": [weights, trained_on],
            "product": licence[1],
        },
        "detector": {"name": detector, "options": options, "digest": digest_of([detector, options])},
        "data": {
            "name": data,
            "layout": "mvtec",
            "digest": hashlib.sha256(data.encode()).hexdigest(),
            "images": 60,
            "products": list(products),
        },
        "protocol": {"name": "few-shot", "setting": setting, "seed": 0, "draws": draws},
        "overlap": {"answer": "none", "why": "drawn"},
        "measured": own,
        "latency": latency,
        "library_version": "0.3.0",
        "hardware": HARDWARE,
        "command": "adpretrain evaluate <drawn>",
    }
    return sealed({**content, **changes})
