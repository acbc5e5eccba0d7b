"""The model card of an extractor: what a reader of its page on the Hub needs, written from its config.json.

`sections` gives the parts, `card` all of them in order under their metadata; hub/cards arranges the same parts around
a run's pictures. Results also become `model-index` metadata, which the Hub shows beside the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from adpretrain.backbones import BACKBONES
from adpretrain.backbones.table import find_entry
from adpretrain.saved import ExtractorConfig

METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1": "image max-F1",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1": "pixel max-F1",
    "aupro": "AUPRO",  # up to a false-positive rate of 0.3
}
TAGS = ["anomaly-detection", "industrial-inspection", "few-shot", "adpretrain"]
FEATURENORM = "FeatureNorm"
PLACEHOLDER = "ORG/NAME"  # in the card of a folder that is not published (yet)

_PROJECTED = """Features for industrial anomaly detection: a projector on top of the frozen backbone `{backbone}`,
pretrained on defects of other products. It works on *residual features* (a feature minus its nearest normal reference)
and needs a few photographs of good parts of *your* product."""

_RESIDUAL = """Features for industrial anomaly detection: the *residual features* (a feature minus its nearest normal
reference) of the frozen backbone `{backbone}`{scaled}.
It has no projector: nothing in it was trained on defects. It needs a few photographs of good parts of *your*
product."""

_SUMMARY = """{what} The plain norm of its features is an anomaly score;
PatchCore, PaDiM and other detectors run on them as on a backbone's. Made with `adpretrain`; the method is ADPretrain
(Yao et al., 2025)."""

_USAGE = """```sh
pip install adpretrain
adpretrain score --extractor {repo_id} --normal good/ --images new/ --out out/   # scores, heatmaps, a threshold
```

```python
from pathlib import Path
import torch
from adpretrain import ADExtractor, read_image
from downstream.detectors.featurenorm import FeatureNorm

extractor = ADExtractor.from_pretrained("{repo_id}")


def photographs(folder):
    return torch.stack([extractor.preprocess(read_image(path)) for path in sorted(Path(folder).iterdir())])


detector = FeatureNorm(extractor).fit([photographs("good")])  # 2 to 8 photographs of good parts, or more
prediction = detector.predict(photographs("new"))
print(prediction.scores)  # one score per photograph; prediction.maps holds one map each
```"""

_LIMITATIONS = """- Scores are comparable within one product and one set of references only. A threshold must come from
  normal photographs of the product itself (`adpretrain score` calibrates one and says what it can promise).
- The references must show good parts under the same camera, light and pose as the photographs to be scored. A reference
  with a defect hides that defect.
- A photograph is {prepared}: a defect of a few pixels in a large photograph can vanish. Crop first.
- Missing or swapped parts (logical anomalies) are found only where they change local appearance.
- Products, cameras and defects unlike those it was measured on may behave differently; measure on your own.
- It assists an inspection. It is not a safety device."""


@dataclass(frozen=True)
class Result:
    """One measured number: ``metric`` (a key of `METRICS`), ``value`` in %, of a ``method`` on a split of a data set,
    and the ``command`` that gives it again."""

    dataset: str
    split: str
    method: str
    metric: str
    value: float
    command: str

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is unknown; choose one of {', '.join(METRICS)}")
        if not 0 <= self.value <= 100:
            raise ValueError(f"{self.metric} of {self.dataset} is {self.value}; expected per cent, 0 to 100")


def card(
    config: ExtractorConfig, repo_id: str = PLACEHOLDER, results: Sequence[Result] = (), licence: str | None = None
) -> str:
    """The whole README.md. ``results``: besides the held-out ones of the pretraining, which the config holds."""
    parts = sections(config, repo_id, results)
    text = "\n\n".join(f"## {title}\n\n{parts[key]}" for key, title in TITLES.items() if key in parts)
    return f"{metadata(config, repo_id, results, licence)}\n\n# {parts['title']}\n\n{parts['summary']}\n\n{text}\n"


TITLES = {
    "usage": "Use",
    "backbone": "Backbone",
    "training": "Training",
    "results": "Results",
    "limitations": "Limitations",
}


def metadata(config: ExtractorConfig, repo_id: str, results: Sequence[Result], licence: str | None = None) -> str:
    """The card's front matter, ``---`` lines included."""
    entry = find_entry(config.backbone.name) if _known(config) else None
    data = ModelCardData(
        license=licence,
        library_name="adpretrain",
        pipeline_tag="image-feature-extraction",
        tags=TAGS,
        base_model=entry.source.repo_id or None if entry else None,
        model_name=repo_id,
        eval_results=[_eval_result(result) for result in (*held_out_results(config), *results)] or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _eval_result(result: Result) -> EvalResult:
    return EvalResult(
        task_type="image-feature-extraction",
        task_name="anomaly detection",
        dataset_type=re.sub(r"[^a-z0-9]+", "-", result.dataset.lower()).strip("-") or "unnamed",
        dataset_name=result.dataset,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_name=f"{METRICS[result.metric]} in %, {result.method}",
        metric_value=round(result.value, 2),
        metric_args={"command": result.command},
    )


def sections(config: ExtractorConfig, repo_id: str, results: Sequence[Result] = ()) -> dict[str, str]:
    """Markdown of every part of the card, by name; "results" only where there are any."""
    parts = {
        "title": repo_id,
        "summary": _summary(config),
        "usage": _USAGE.format(repo_id=repo_id),
        "backbone": _backbone(config),
        "training": _training(config),
        "limitations": _LIMITATIONS.format(prepared=config.preprocess.in_words),
    }
    if everything := [*held_out_results(config), *results]:
        parts["results"] = _results(everything, held_out_results(config))
    return parts


def _summary(config: ExtractorConfig) -> str:
    scaled = ", divided by how much good parts vary where the reference was matched" if config.local_scale else ""
    what = _RESIDUAL if config.projector is None else _PROJECTED
    return _SUMMARY.format(what=what.format(backbone=config.backbone.name, scaled=scaled))


def held_out_results(config: ExtractorConfig) -> list[Result]:
    """What the pretraining measured on categories it did not train on, from the config's provenance."""
    measured, data = provenance_of(config, "held_out_metrics"), provenance_of(config, "data")
    name = f"{data.get('set') or data.get('name', 'unknown')}, held-out categories"
    command = "accelerate launch recipes/pretrain.py --config config.yaml"
    return [
        Result(name, f"step {measured.get('step', '?')}", method, metric, 100 * measured[prefix + metric], command)
        for method, prefix in ((FEATURENORM, ""), (f"{FEATURENORM} without the projector", "raw_"))
        for metric in METRICS
        if isinstance(measured.get(prefix + metric), int | float) and 0 <= measured[prefix + metric] <= 1
    ]


def provenance_of(config: ExtractorConfig, part: str) -> Mapping[str, Any]:
    """A part of the provenance, which may hold anything; empty if it is no mapping."""
    found = config.provenance.get(part)
    return found if isinstance(found, Mapping) else {}


def _known(config: ExtractorConfig) -> bool:
    return config.backbone.name in BACKBONES or config.backbone.name.startswith("timm/")


def _backbone(config: ExtractorConfig) -> str:
    entry = find_entry(config.backbone.name) if _known(config) else None
    commit = f", commit `{config.backbone.revision}`" if config.backbone.revision else ""
    source = f"`{entry.source}`{commit}" if entry else "unknown"
    return table(
        ("what", "value"),
        [
            ("name", f"`{config.backbone.name}`"),
            ("weights", source),
            ("licence of the weights", entry.licence if entry else "unknown"),
            ("levels", ", ".join(map(str, config.backbone.levels or [])) or "default"),
            ("channels", ", ".join(map(str, config.channels))),
            ("input", config.preprocess.in_words),
        ],
    )


def _training(config: ExtractorConfig) -> str:
    """Everything the provenance holds, but for the metrics: hyper-parameters, data, commit, versions."""
    rows: list[tuple[str, str]] = []
    if config.projector is not None:
        rows += _flat(json.loads(json.dumps(vars(config.projector))), "projector.")
    rows += [("matching", f"`{config.matching}`"), ("norm", f"`{config.norm}`")]
    if config.local_scale is not None:
        rows += _flat(vars(config.local_scale), "local_scale.")
    rows += _flat({key: value for key, value in config.provenance.items() if key != "held_out_metrics"})
    return table(("what", "value"), rows)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", f"`{json.dumps(value) if not isinstance(value, str) else value}`"))
    return rows


def _results(results: Sequence[Result], held_out: Sequence[Result]) -> str:
    """A line for every method on every split, a column for every metric, and the commands."""
    metrics = [metric for metric in METRICS if any(result.metric == metric for result in results)]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        line = lines.setdefault((result.dataset, result.split, result.method), {})
        line[result.metric] = f"{result.value:.1f}"
    rows = [[*key, *(values.get(metric, "–") for metric in metrics)] for key, values in lines.items()]
    text = table(("data set", "split", "method", *(METRICS[metric] for metric in metrics)), rows)
    commands = "\n".join(dict.fromkeys(result.command for result in results))
    note = "\n\nThe held-out categories may have chosen the kept step: they are no test set." if held_out else ""
    return f"In %; AUPRO up to a false-positive rate of 0.3.\n\n{text}\n\n```sh\n{commands}\n```{note}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what a cell holds cannot end it."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
