"""The model card of an extractor: what a reader of its page on the Hub needs, written from its config.json.

Its text is card.md, a template. Results also become `model-index` metadata, which the Hub shows beside the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import StrictUndefined, Template

from adpretrain.backbones import BACKBONES
from adpretrain.backbones.table import find_entry
from adpretrain.passport import NO_LAWYERS, OPEN_QUESTION, in_a_product, in_words, passport
from adpretrain.saved import PLACEHOLDER, ExtractorConfig, provenance_of

METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1": "image max-F1",
    "image_accuracy_at_best_f1": "image accuracy at max-F1",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1": "pixel max-F1",
    "aupro": "AUPRO",  # up to a false-positive rate of 0.3
}
TAGS = ["anomaly-detection", "industrial-inspection", "few-shot", "adpretrain"]
FEATURENORM = "FeatureNorm"

TEMPLATE = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Result:
    """One measured number: ``metric`` (a key of `METRICS`), ``value`` in %, of a ``method`` on a split of a data set,
    and the ``command`` that reproduces it."""

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
    config: ExtractorConfig,
    repo_id: str = PLACEHOLDER,
    results: Sequence[Result] = (),
    licence: str | None = None,
    pictures: int = 0,
    curves: bool = False,
) -> str:
    """The whole README.md. ``results`` are added to the held-out ones of the pretraining, which the config holds.
    ``pictures``: number of files assets/heatmap-1.png, ... beside it; ``curves``: whether assets/curves.png exists."""
    held_out = held_out_results(config)
    everything = [*held_out, *results]
    template = Template(TEMPLATE.read_text(encoding="utf-8"), undefined=StrictUndefined, keep_trailing_newline=True)
    return template.render(
        config=config,
        repo_id=repo_id,
        metadata=metadata(config, repo_id, results, licence),
        backbone=_backbone(config),
        licences=_licences(config),
        training=_training(config),
        results=_results(everything) if everything else "",
        commands=list(dict.fromkeys(result.command for result in everything)),
        held_out=held_out,
        pictures=pictures,
        curves=curves,
    )


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
            ("levels", ", ".join(map(str, config.backbone.levels or [])) or "default"),
            ("channels", ", ".join(map(str, config.channels))),
            ("input", config.preprocess.in_words),
        ],
    )


def _licences(config: ExtractorConfig) -> str:
    links = passport(config)
    rows = [(k.what, k.name, k.licence, k.product, k.terms, f"<{k.source}>" if k.source else "") for k in links]
    chain = table(("what", "name", "licence", "in a product", "terms", "source"), rows)
    return f"**In a product: {in_a_product(links)}.** {in_words(links)}\n\n{chain}\n\n{OPEN_QUESTION} {NO_LAWYERS}"


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


def _results(results: Sequence[Result]) -> str:
    """A line for every method on every split, a column for every metric."""
    metrics = [metric for metric in METRICS if any(result.metric == metric for result in results)]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        line = lines.setdefault((result.dataset, result.split, result.method), {})
        line[result.metric] = f"{result.value:.1f}"
    rows = [[*key, *(values.get(metric, "–") for metric in metrics)] for key, values in lines.items()]
    return table(("data set", "split", "method", *(METRICS[metric] for metric in metrics)), rows)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes and line breaks within cells are escaped."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
