"""How well do photographs score each other that nobody has labelled? MuSc on the test photographs of data sets alone,
or on all of a set that has no split.

  python recipes/studies/mutual_scoring.py --sets ../shared/data/board/cookies_aws ../shared/data/board/mvtec_bottle

The features are those of the embedded extractor's backbone. Labels and masks are used for the metrics only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from adpretrain import ADExtractor
from adpretrain.data import index_dataset
from adpretrain.parsing import parse_flags
from downstream.evaluation.networks import RAW, Contender, Networks
from downstream.evaluation.protocols import Part, Trial
from downstream.evaluation.trial import Settings, run_trial

METRICS = ("image_auroc", "pixel_auroc", "aupro")


@dataclass(frozen=True)
class Options:
    """Options of the study.

    Args:
        sets: folders of data sets
    """

    sets: list[Path] = field(default_factory=list)


def main() -> None:
    networks = Networks(ADExtractor.from_pretrained("embedded").backbone)
    print("| product | photographs | with a defect | image AUROC / pixel AUROC / AUPRO | minutes |")
    print("| --- | ---: | ---: | --- | ---: |")
    for root in parse_flags(Options, description=__doc__).sets:
        samples = index_dataset("auto", root)
        samples = [sample for sample in samples if sample.split == "test"] or samples
        for product in sorted({sample.category for sample in samples}):
            own = tuple(sample for sample in samples if sample.category == product)
            trial = Trial(product, "unlabelled", 0, (Part(product, train=own, references=(), test=own),))
            (record,) = run_trial(trial, Contender("musc", RAW), networks, Settings(pictures=0))
            values = [record["metrics"][name] for name in METRICS]
            metrics = " / ".join("–" if value is None else f"{100 * value:.1f}" for value in values)
            defects = sum(sample.anomalous for sample in own)
            minutes = sum(record["seconds"].values()) / 60
            print(f"| {product} | {len(own)} | {defects} | {metrics} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
