"""Feature projectors: learnable key/value attention (ADPretrain Sec. 3.3) and the paper's ablation architectures.

Shapes: B images, T tokens, C channels (also the hidden width), N_r learnable references, h heads, L levels,
M tokens of reference residuals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones.base import FeatureMaps
from adpretrain.config import Architecture, ProjectorConfig, ProjectorForm
from adpretrain.residual import as_map, tokens

ARCHITECTURES, FORMS = get_args(Architecture), get_args(ProjectorForm)
MOST_LAYERS = 64


class Attention(nn.Module):
    """Multi-head attention with keys and values from any context. ``forward(x [B,T,C], key_value) -> [B,T,C]``.

    The inner width is C, rounded up to a multiple of the heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = -(-width // heads) * heads
        self.query = nn.Linear(width, inner)
        self.key_value = nn.Linear(width, 2 * inner)
        self.out = nn.Linear(inner, width)

    @torch.no_grad()
    def start_as_released(self) -> None:
        """Initialise as torch's multi-head attention does: Xavier's bounds for one matrix [3 C, C] of queries, keys and
        values, and zero biases."""
        parts = (self.query, self.key_value)
        together = torch.empty(sum(part.out_features for part in parts), self.query.in_features)
        rows = nn.init.xavier_uniform_(together).split([part.out_features for part in parts])
        for part, weight in zip(parts, rows, strict=True):
            part.weight.copy_(weight)
        for layer in (*parts, self.out):
            nn.init.zeros_(layer.bias)

    def _split(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def project_context(self, context_BMC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [.., h, M, C/h] of a context; independent of the queries, so done once per forward."""
        key, value = self.key_value(context_BMC).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(self, x_BTC: Tensor, key_value: tuple[Tensor, Tensor]) -> Tensor:
        query_BTC = self.query(x_BTC)
        key, value = (part.to(query_BTC.dtype) for part in key_value)
        if key.shape[0] == 1:  # one context for all: the batch becomes one long row of queries
            query_BTC = query_BTC.flatten(0, 1)[None]
        attended = F.scaled_dot_product_attention(self._split(query_BTC), key, value)
        return self.out(attended.transpose(1, 2).flatten(2)).view_as(x_BTC)


class MLP(nn.Module):
    """x + fc2(gelu(gate(fc1(x)))); the gate is the released checkpoints' squeeze-and-excitation over tokens."""

    def __init__(self, width: int, ratio: float, squeeze_excite: bool = False, residual: bool = True) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.residual = residual
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.squeeze: nn.Linear | None = None
        if squeeze_excite:
            reduced = max(8, (hidden // 16 + 4) // 8 * 8)  # hidden / 16, rounded to a multiple of 8
            self.squeeze, self.excite = nn.Linear(hidden, reduced), nn.Linear(reduced, hidden)

    def forward(self, x_BTC: Tensor) -> Tensor:
        hidden = self.fc1(x_BTC)
        if self.squeeze is not None:
            pooled = hidden.mean(dim=1, keepdim=True)
            hidden = hidden * torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))
        out = self.fc2(F.gelu(hidden))
        return out + x_BTC if self.residual else out


class LearnableKeyValueProjector(nn.Module):
    """One level's projector: x <- x - Attention(x, R_h, R_h); x <- MLP(x) + x, per layer (ADPretrain Sec. 3.3).

    R are N_r learnable references, R_h = Linear(R) is shared by all layers. The attention output, made of learnt
    normal patterns, is subtracted instead of added. Neither the paper nor the released code has a layer norm: the
    norm of a residual is the signal.

    The paper says only that R starts at random. In its form both output layers start at zero (our choice), so that an
    untrained projector returns its input and training starts from the residual norm, a working detector. In the
    "released" form all layers start as the authors' do: torch's defaults, with Xavier's uniform weights for queries,
    keys and values, Kaiming's normal ones for the projection of R, and no biases in the attention.

    Keys and values do not depend on the image: training projects them once per forward, inference once per set of
    weights. The cache is dropped by `train`, by loading weights and by moving, and is used only while the parameters
    that it was made from are unchanged.
    """

    def __init__(self, width: int, references: int, heads: int, mlp_ratio: float, layers: int, form: str) -> None:
        super().__init__()
        self.references = nn.Parameter(torch.randn(references, width))
        self.reference_projection = nn.Linear(width, width)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.mlp = nn.ModuleList(MLP(width, mlp_ratio, form == "released") for _ in range(layers))
        if form == "released":
            nn.init.kaiming_normal_(self.reference_projection.weight)
            for attention in self.attention:
                attention.start_as_released()  # type: ignore[operator]
        else:
            for name, parameter in self.named_parameters():
                if ".out." in name or ".fc2." in name:
                    nn.init.zeros_(parameter)
        self._cache: tuple[Any, list[tuple[Tensor, Tensor]], list[Tensor]] | None = None

    @torch.no_grad()
    def vitals(self, x_BTC: Tensor) -> Tensor:
        """[3]: the standard deviation of the references; that of the first attention's output over tokens (root mean
        square over channels); and the root mean square of that output.

        An output that hardly varies over tokens has become a constant: the references have died.
        """
        attention = self.attention[0]
        output_NC = attention(x_BTC, self._project_references()[0]).flatten(0, 1).float()
        spread = output_NC.var(0, correction=0).mean().sqrt()
        return torch.stack([self.references.float().std(), spread, output_NC.square().mean().sqrt()])

    def _project_references(self) -> list[tuple[Tensor, Tensor]]:
        hidden = self.reference_projection(self.references)[None]
        return [attention.project_context(hidden) for attention in self.attention]  # type: ignore[operator]

    def _weights(self) -> list[Tensor]:
        sources: list[Tensor] = [self.references, *self.reference_projection.parameters()]
        for attention in self.attention:
            sources += list(attention.key_value.parameters())  # type: ignore[union-attr]
        return sources

    def _cache_key(self) -> Any:
        device = self.references.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in self._weights()]
        return autocast, torch.is_inference_mode_enabled(), versions

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, h, N_r, C/h] of every layer, cached while evaluating without gradients."""
        return self._project_references() if self.training or torch.is_grad_enabled() else self._cached()

    @torch.compiler.disable  # addresses and versions exist outside graphs only
    def _cached(self) -> list[tuple[Tensor, Tensor]]:
        key = self._cache_key()
        if self._cache is None or self._cache[0] != key:
            # The parameters are held so that newer weights cannot get their addresses, which are part of the key.
            # Contiguous heads are faster to attend to, and are made once.
            projected = [(k.contiguous(), v.contiguous()) for k, v in self._project_references()]
            self._cache = (key, projected, [p.detach() for p in self._weights()])
        return self._cache[1]

    def forward(self, x_BTC: Tensor, reference_residuals_BMC: Tensor | None = None) -> Tensor:
        return _subtract_and_refine(x_BTC, self.attention, self.mlp, self.keys_values())

    def train(self, mode: bool = True) -> LearnableKeyValueProjector:
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> LearnableKeyValueProjector:
        self._cache = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}


def _subtract_and_refine(
    x_BTC: Tensor, attentions: nn.ModuleList, mlps: nn.ModuleList, keys_values: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    for attention, mlp, key_value in zip(attentions, mlps, keys_values, strict=True):
        x_BTC = mlp(x_BTC - attention(x_BTC, key_value))
    return x_BTC


class FixedKeyValueProjector(nn.Module):
    """A trained `LearnableKeyValueProjector` with its keys and values as constants, for an exported graph.

    It shares the other weights with ``level``; a later change of the learnable references does not reach it.
    """

    def __init__(self, level: LearnableKeyValueProjector) -> None:
        super().__init__()
        self.attention, self.mlp = level.attention, level.mlp
        with torch.no_grad():
            for layer, (key, value) in enumerate(level.eval().keys_values()):
                self.register_buffer(f"key_{layer}", key)
                self.register_buffer(f"value_{layer}", value)

    def forward(self, x_BTC: Tensor, reference_residuals_BMC: Tensor | None = None) -> Tensor:
        constants = [(getattr(self, f"key_{i}"), getattr(self, f"value_{i}")) for i in range(len(self.mlp))]
        return _subtract_and_refine(x_BTC, self.attention, self.mlp, constants)


class AblationTransformer(nn.Module):
    """The paper's attention ablations (Tab. 2b): self attention, cross attention, or one after the other.

    Self attention is the vanilla Transformer's (added). Cross attention takes keys and values from the residuals
    of the normal references and, like the learnable form it is compared with, subtracts.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, layers: int, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = [kind for _ in range(layers) for kind in kinds]
        self.attention = nn.ModuleList(Attention(width, heads) for _ in self.kinds)
        self.mlp = nn.ModuleList(MLP(width, mlp_ratio) for _ in range(layers))

    def forward(self, x_BTC: Tensor, reference_residuals_BMC: Tensor | None = None) -> Tensor:
        per_layer = len(self.kinds) // len(self.mlp)
        for index, (kind, attention) in enumerate(zip(self.kinds, self.attention, strict=True)):
            if kind == "self":
                x_BTC = x_BTC + attention(x_BTC, attention.project_context(x_BTC))  # type: ignore[operator]
            else:
                assert reference_residuals_BMC is not None  # FeatureProjector.forward has refused it
                x_BTC = x_BTC - attention(x_BTC, attention.project_context(reference_residuals_BMC))  # type: ignore[operator]
            if (index + 1) % per_layer == 0:
                x_BTC = self.mlp[index // per_layer](x_BTC)
        return x_BTC


class Pointwise(nn.Sequential):
    """The linear and MLP ablations: the same map at every token."""

    def forward(self, x_BTC: Tensor, reference_residuals_BMC: Tensor | None = None) -> Tensor:
        return super().forward(x_BTC)


def _level(width: int, config: ProjectorConfig) -> nn.Module:
    heads, ratio, layers = config.heads, config.mlp_ratio, config.layers
    match config.architecture:
        case "learnable_kv":
            return LearnableKeyValueProjector(width, config.references, heads, ratio, layers, config.form)
        case "linear":
            return Pointwise(nn.Linear(width, width))
        case "mlp":
            return Pointwise(MLP(width, ratio, residual=False))
        case "self_attention":
            return AblationTransformer(width, heads, ratio, layers, ["self"])
        case "cross_attention":
            return AblationTransformer(width, heads, ratio, layers, ["cross"])
        case _:
            return AblationTransformer(width, heads, ratio, layers, ["self", "cross"])


class FeatureProjector(nn.Module):
    """One projector per level: residual features -> pretrained AD features of the same shapes.

    Form "released" has the exact layers of the authors' checkpoints (squeeze-and-excitation in the MLP) and their
    initialisation. Raises ValueError for an unknown architecture or form, or impossible sizes.
    """

    def __init__(self, channels: Sequence[int], config: ProjectorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ProjectorConfig()
        if config.architecture not in ARCHITECTURES:
            raise ValueError(
                f"projector architecture {config.architecture!r} is unknown; choose one of {ARCHITECTURES}"
            )
        if config.form not in FORMS:
            raise ValueError(f"projector form {config.form!r} is unknown; choose one of {FORMS}")
        layers, references, heads, mlp_ratio = config.layers, config.references, config.heads, config.mlp_ratio
        if not 1 <= layers <= MOST_LAYERS or min(references, heads) < 1 or not 0 < mlp_ratio < math.inf:
            raise ValueError(
                f"a projector of {layers} layers, {references} references, {heads} heads and mlp_ratio {mlp_ratio}: "
                f"expected 1 to {MOST_LAYERS} layers, the others positive"
            )
        self.levels = nn.ModuleList(_level(width, config) for width in channels)

    def vitals(self, residuals: FeatureMaps) -> Tensor:
        """`LearnableKeyValueProjector.vitals` of every level: [L, 3]; [0, 3] for the ablations, which have no
        learnable references. ``residuals``: L levels [B, C_l, H_l, W_l]."""
        pairs = zip(self.levels, residuals, strict=True)
        found = [level.vitals(tokens(x)) for level, x in pairs if isinstance(level, LearnableKeyValueProjector)]
        return torch.stack(found) if found else residuals[0].new_zeros(0, 3)

    @property
    def needs_reference_residuals(self) -> bool:
        """Whether `forward` must be given the residuals of the references among themselves."""
        return "cross" in self.config.architecture

    def forward(self, residuals: FeatureMaps, reference_residuals: Sequence[Tensor] | None = None) -> FeatureMaps:
        """L levels [B, C_l, H_l, W_l] -> the same shapes.

        ``reference_residuals``, L levels [R, M_l, C_l] with R = 1 or B, feeds the cross-attention ablations only.
        Raises ValueError for a wrong number of levels, an empty batch, or missing reference residuals.
        """
        if len(residuals) != len(self.levels):
            raise ValueError(f"got {len(residuals)} levels of residuals; this projector has {len(self.levels)}")
        if residuals[0].shape[0] == 0:
            raise ValueError(f"residuals {tuple(residuals[0].shape)} hold no images; give at least one")
        if self.needs_reference_residuals and reference_residuals is None:
            raise ValueError(f"projector architecture {self.config.architecture!r} needs reference_residuals")
        contexts = reference_residuals if reference_residuals is not None else [None] * len(residuals)
        return [
            as_map(level(tokens(residual), context), residual)
            for level, residual, context in zip(self.levels, residuals, contexts, strict=True)
        ]
