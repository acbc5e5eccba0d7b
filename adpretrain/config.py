"""Configuration: frozen dataclasses (`adpretrain.parsing` reads them).

Every field is a key of the YAML files in recipes/configs and a flag of the recipe (``--loss.temperature 0.2``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from adpretrain.licences import stated_licence

# The smallest value that each number below may take.
LEAST = {
    **dict.fromkeys(["backbone.image_size", "projector.references", "projector.heads", "projector.layers"], 1),
    **dict.fromkeys(["optim.batch_size", "optim.epochs", "eval.shots", "cache.threads"], 1),
    **dict.fromkeys(["references.together", "references.refresh", "checkpoint_every", "log_every"], 1),
    **dict.fromkeys(["data.workers", "data.reservoir_mb", "references.pool", "references.cache_mb"], 0),
    **dict.fromkeys(
        ["loss.lambda_", "loss.norm_weight", "loss.radius", "loss.margin", "loss.token_pixels", "projector.mlp_ratio"],
        0,
    ),
    **dict.fromkeys(["optim.lr", "optim.weight_decay", "optim.steps", "optim.clip", "eval.every"], 0),
    **dict.fromkeys(["cache.draws", "cache.seed", "tokens", "seed"], 0),
}


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen feature network.

    Args:
        name: a name of `adpretrain.backbones.BACKBONES`, or timm/<model name>.
        image_size: side of the square input in pixels.
        resize: "squeeze" makes a square of the whole photograph; "crop" resizes its shorter side to ``crop_from`` and
            crops the centre (as the authors' released code does), which cuts off the ends of the longer side.
        crop_from: for "crop", the shorter side in pixels after resizing; null = the released code's value, which exists
            for image_size 224 (256), 320 (366) and 480 (512) only.
        revision: branch, tag or commit of the weights on the Hugging Face Hub; null = the newest.
        weights: a local file or folder of weights instead of the Hub's; a saved extractor never contains its path.
        levels: numbers, from 1, of the blocks (vision transformers) or stages (other networks) that give the features;
            null = the paper's.
        finest: stride in pixels to which finer maps are averaged down, which saves time in every search for nearest
            references; 0 leaves the maps as the network gives them.
        patch: for each level, the odd side (in tokens) of the neighbourhood over which every token is averaged, with
            zeros beyond the border; [] = 1 for every level.
    """

    name: str = "lite0"
    image_size: int = 224
    revision: str | None = None
    weights: str | None = None
    levels: list[int] | None = None
    resize: Literal["squeeze", "crop"] = "squeeze"
    crop_from: int | None = None
    finest: int = 0
    patch: list[int] = field(default_factory=list)


Architecture = Literal["learnable_kv", "linear", "mlp", "self_attention", "cross_attention", "self_cross_attention"]
ProjectorForm = Literal["paper", "released"]


@dataclass(frozen=True)
class ProjectorConfig:
    """The feature projector (ADPretrain Sec. 3.3).

    Args:
        architecture: the paper's learnable key/value attention, or an ablation of its Tab. 2b.
        references: number of learnable references N_r.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP, as a multiple of the feature width.
        layers: attention layers per level.
        form: "paper", or "released" for the exact form of the authors' checkpoints.
    """

    architecture: Architecture = "learnable_kv"
    references: int = 2048
    heads: int = 16
    mlp_ratio: float = 4.0
    layers: int = 1
    form: ProjectorForm = "paper"


@dataclass(frozen=True)
class DataConfig:
    """The pretraining set.

    Args:
        name: layout of the data set: a name of `adpretrain.data.DATASETS`, "auto" to detect it, or "shards" to stream
            the shards that recipes/write_shards.py wrote.
        root: its folder, or "hf://org/name" for a repository of the Hugging Face Hub.
        columns: those columns of a Hugging Face data set whose names are not guessed, such as {mask: segmentation}.
        held_out: names of categories that are kept out of training and scored while it runs.
        on_error: what to do about images that cannot be read or contradict their labels; all are checked before
            training (shards: before they are written). "fail" lists them and stops, "skip" lists them and leaves them
            out.
        workers: number of loader processes.
        reservoir_mb: shards only: MiB of encoded photographs that each process may hold, to draw references from and to
            shuffle the stream.
        reduced: decode JPEG files at 1/2, 1/4 or 1/8 of their size if that is enough. This is faster, but the pixels
            differ a little from those of scoring, which decodes whole files.
        licence: licence of the photographs, for the extractor's card: "own" if they are yours, or a name such as
            CC-BY-4.0; null = unknown. A folder named as a known set has that set's (`adpretrain.licences.DATA_SETS`).
    """

    name: str = "realiad"
    root: str = "data/Real-IAD"
    columns: dict[str, str] = field(default_factory=dict)
    held_out: list[str] = field(default_factory=list)
    on_error: Literal["fail", "skip"] = "fail"
    workers: int = 4
    reservoir_mb: int = 2048
    reduced: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        if self.licence is not None:
            stated_licence(self.licence, "data.licence")


@dataclass(frozen=True)
class ReferencesConfig:
    """Options by which images share reference draws, so that the backbone encodes fewer references.

    By default every image has its own draw, as in the paper. With any of these options, a single image still sees every
    set of K normal photographs of its category and view with equal probability over the epochs; the cost is less
    variety among the images of a batch, or of an epoch.

    Args:
        together: number of consecutive images of one category and view in a batch that share one draw; 1 = each has its
            own. Above 1 a batch has fewer categories and fewer reference sets, so its gradient is noisier.
        pool: number of photographs of each category and view that serve as references for ``refresh`` epochs, after
            which others are drawn; their features are kept. The residuals of these epochs come from the pool alone, so
            training may overfit a small one. 0 = all photographs, and no features are kept.
        refresh: number of epochs for which a pool is used.
        cache_mb: MiB of features that each process may keep; the least recently used pools are dropped first. It
            changes the running time, not the numbers; 0 keeps none, which changes the numbers by rounding only.
    """

    together: int = 1
    pool: int = 0
    refresh: int = 1
    cache_mb: int = 4096


@dataclass(frozen=True)
class LocalScaleConfig:
    """Residuals divided by how much the product itself varies where the reference was matched.

    Args:
        share: fraction of the scale that comes from the matched token's own neighbourhood; the rest is the mean over
            all references.
        weights: a factor for each level of the extractor's output; empty = 1 for every level.
    """

    share: float = 0.35
    weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"local_scale.share {self.share} must be between 0 and 1")
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"local_scale.weights {self.weights} must be positive numbers")


@dataclass(frozen=True)
class LossConfig:
    """Eq. 2-7 of ADPretrain. The defaults are the paper's; recipes/configs/released has the authors' run.

    Args:
        lambda_: weight of the angle loss; 0 leaves it out.
        norm_weight: weight of the norm loss; 0 leaves it out (the ablation of Tab. 2a).
        temperature: tau of the angle loss.
        radius: r of the norm loss.
        margin: delta r of the norm loss.
        angle_form: whether anchors come from the first view (paper) or from both (released).
        norm_form: Eq. 6 (paper) or the authors' code (released).
        total_form: Eq. 7 (paper), or the sum of its terms, which is twice as large (released).
        center: the angle's origin c: "residual" = mean of the unprojected residuals of all normal images, measured
            before training, unaugmented, with up to 4 references each (the released code); "projected" = running mean
            of the projected normal features (the paper's text).
        norm_label: which tokens the norm loss takes for anomalous: those whose mask is marked at the "center" of the
            patch, or at its top left corner ("nearest", the released norm loss), or that have more than
            ``token_pixels`` marked "pixels" (the released angle loss).
        angle_label: the same for the angle loss.
        token_pixels: number of marked pixels for "pixels", counted at 224 px.
        cross_process: the angle loss takes its negatives from the batches of all processes, as if one process had the
            whole batch; false = each process from its own batch only, which sends nothing.
    """

    lambda_: float = 1.0
    norm_weight: float = 1.0
    temperature: float = 0.15
    radius: float = 0.4
    margin: float = 0.75
    angle_form: Literal["paper", "released"] = "paper"
    norm_form: Literal["paper", "released"] = "paper"
    total_form: Literal["paper", "released"] = "paper"
    center: Literal["residual", "projected"] = "residual"
    norm_label: Literal["center", "nearest", "pixels"] = "center"
    angle_label: Literal["center", "nearest", "pixels"] = "center"
    token_pixels: int = 32
    cross_process: bool = True


@dataclass(frozen=True)
class OptimConfig:
    """Adam with a step schedule.

    Args:
        lr: learning rate.
        weight_decay: L2 penalty of Adam. On float32 weights it erases the learnable references, whose gradient is far
            smaller than the penalty's; the paper gives no value.
        weights: precision of the projector's weights during training. The released run has bfloat16, whose coarse
            rounding cancels the decay of all but the smallest weights; it needs precision bf16.
        batch_size: images per process and step (two views each).
        epochs: passes over the set.
        steps: number of steps; 0 = computed from ``epochs``.
        milestones: fractions of the training at which the rate is multiplied by 0.1.
        clip: largest gradient norm; 0 = no clipping.
        precision: "no" (float32), "bf16" or "fp16" autocast of backbone and projector.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    weights: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 32
    epochs: int = 10
    steps: int = 0
    milestones: list[float] = field(default_factory=lambda: [0.7, 0.9])
    clip: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"


@dataclass(frozen=True)
class EvalConfig:
    """Scoring of the held-out categories during training, with FeatureNorm.

    Args:
        every: steps between evaluations; 0 = only at the end.
        shots: references per category.
        keep: which projector is published: the "last" one, or the "best" one on the held-out categories (mean of image
            AUROC and AUPRO), which may be the untrained one; without such categories it is the last. A benchmark's test
            set never decides.
    """

    every: int = 0
    shots: int = 4
    keep: Literal["last", "best"] = "last"


@dataclass(frozen=True)
class CacheConfig:
    """Residuals computed once before training (`adpretrain.training.batches.CachedBatches`).

    Args:
        draws: number of reference draws kept for every image; 0 = no cache, everything is computed step by step.
        folder: where the cache is kept for the next run; "" = in memory only.
        seed: seed of the cached draws and views; runs with other seeds can share them.
        threads: number of images prepared at a time.
    """

    draws: int = 0
    folder: str = ""
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run.

    Args:
        run: folder of the run; the same command in the same folder resumes.
        shots: the possible numbers of references K, one of which is drawn for each image.
        references: whether images share draws, and whether references come from a pool whose features are kept.
        matching: nearest reference by "l2" (paper) or "cosine" (released code); "none" = the features themselves,
            without references (the ablation of Tab. 2a).
        learns: the "projector" on a frozen backbone, or the "backbone" itself, without a projector (the ablation of
            Tab. 2a, which gives worse results in the paper).
        local_scale: divide residuals by how much the product varies at the matched place (`adpretrain.local_scale`);
            null = do not, like the paper.
        augment: "epoch" draws new views every epoch; "once" keeps each image's first two views; "none" has one plain
            view (no angle loss).
        cache: keep the residuals of every image in memory instead of computing them step by step.
        tokens: number of tokens per image and level that enter the losses (anomalous ones first, up to half); 0 = all.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of metrics.jsonl.
        tracker: also log to TensorBoard.
        seed: seed of all random numbers.
        deterministic: let torch use only algorithms that give the same bits every time. Only GPUs need this, and it
            makes them slower.
    """

    run: str = "runs/pretrain"
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    shots: list[int] = field(default_factory=lambda: [1, 4, 8])
    references: ReferencesConfig = field(default_factory=ReferencesConfig)
    matching: Literal["l2", "cosine", "none"] = "l2"
    learns: Literal["projector", "backbone"] = "projector"
    local_scale: LocalScaleConfig | None = None
    augment: Literal["epoch", "once", "none"] = "epoch"
    cache: CacheConfig = field(default_factory=CacheConfig)
    tokens: int = 0
    checkpoint_every: int = 500
    log_every: int = 10
    tracker: bool = True
    seed: int = 42
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots {self.shots} must list numbers of at least 1")
        for key, least in LEAST.items():
            value = attrgetter(key)(self)
            if value < least:
                raise ValueError(f"{key} {value} must be a number of at least {least}")
        if self.loss.temperature <= 0:
            raise ValueError(f"loss.temperature {self.loss.temperature} must be positive")
        if not all(0 < share <= 1 for share in self.optim.milestones):
            raise ValueError(
                f"optim.milestones {self.optim.milestones} must be fractions of the training, above 0 and up to 1"
            )
        needed, shared = max(self.shots) + self.references.together, self.references
        if 0 < shared.pool < needed:
            raise ValueError(
                f"references.pool {shared.pool} is too small: K = {max(self.shots)} references of "
                f"{shared.together} images together need {needed} photographs; 0 takes all"
            )
        if self.cache.draws and (shared.together > 1 or shared.pool):
            raise ValueError("cache.draws keeps the residuals themselves: leave references.together and .pool out")
        if self.data.name == "shards" and (self.cache.draws or shared.together > 1 or shared.pool):
            raise ValueError("a stream of shards is read once: leave cache.draws, references.together and .pool out")
        if self.cache.draws and self.augment == "epoch":
            raise ValueError("cache.draws keeps each view once: set augment to 'once' or 'none'")
        if self.cache.draws and "cross" in self.projector.architecture:
            raise ValueError("cross attention needs the references themselves: set cache.draws to 0")
        if self.matching == "none" and (self.cache.draws or self.local_scale or "cross" in self.projector.architecture):
            raise ValueError(
                "matching 'none' has no references: leave out cache.draws, local_scale and cross attention, or choose "
                "l2 or cosine"
            )
        if self.learns == "backbone" and (self.cache.draws or self.references.pool or self.local_scale):
            raise ValueError(
                "learns 'backbone' changes the features at every step: leave out cache.draws, references.pool and "
                "local_scale"
            )
        if self.optim.weights == "bfloat16" and self.optim.precision != "bf16":
            raise ValueError(f"optim.weights bfloat16 needs optim.precision bf16, not {self.optim.precision!r}")
        if not self.loss.lambda_ and not self.loss.norm_weight:
            raise ValueError("loss.lambda_ and loss.norm_weight are both 0: nothing would be learnt")
        if self.augment == "none" and self.loss.lambda_:
            raise ValueError("augment 'none' has no second view for the angle loss: set loss.lambda_ to 0")
