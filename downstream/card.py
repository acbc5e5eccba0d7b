"""The card of a fitted detector, and what it must say: a detector holds features of the product it was fitted on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from adpretrain.card import PLACEHOLDER, TAGS, table

if TYPE_CHECKING:
    from downstream.saved import DetectorConfig

NOTICE = (
    "A fitted detector holds features of the photographs it was fitted on: memory banks, means, references. Whoever "
    "can read it may learn much about the product from them. Share it only with those who may see the product."
)
_USAGE = """```python
from downstream.detectors import detector_from_pretrained

detector = detector_from_pretrained("{repo_id}")
prediction = detector.predict(images)  # [B, 3, {side}, {side}], through detector.extract's preprocess
print(prediction.scores)  # one score per image; prediction.maps holds one map each
```"""


def detector_card(config: DetectorConfig, repo_id: str = PLACEHOLDER) -> str:
    """README.md of a fitted detector."""
    data = ModelCardData(library_name="adpretrain", tags=[*TAGS, config.detector])
    network = {"extractor": "an extractor, saved beside", "given": "a function of its maker's"}.get(config.extract)
    if config.backbone is not None:
        network = f"the backbone `{config.backbone.name}`"
    prepared = config.images or config.preprocess
    facts = table(
        ("what", "value"),
        [
            ("detector", f"`{config.detector}`"),
            ("features", network or "those of its members"),
            ("input", f"{config.image_size} x {config.image_size} pixels" if prepared is None else prepared.in_words),
            ("options", f"`{json.dumps(config.options)}`"),
            ("tensors", ", ".join(f"`{name}` {shape}" for name, shape in config.tensors.items())),
            ("adpretrain", f"`{config.library_version}`"),
        ],
    )
    usage = _USAGE.format(repo_id=repo_id, side=config.image_size)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id}\n\n> **{NOTICE}**\n\n"
        f"An anomaly detector, fitted on photographs of one product. Made with `adpretrain`.\n\n"
        f"## Use\n\n{usage}\n\n## What it is\n\n{facts}\n"
    )
