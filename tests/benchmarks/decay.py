"""What Adam's weight decay does to the learnable references over a schedule as long as Real-IAD's (docs/released.md).

  python tests/benchmarks/decay.py

47,000 steps on a small projector (32 channels, 64 references) and drawn residuals; 20 minutes on a core.
"""

from __future__ import annotations

import torch

from adpretrain.config import ProjectorConfig
from adpretrain.losses import norm_loss
from adpretrain.projector import FeatureProjector

STEPS, EVERY = 47_000, 9_400
WAYS = {
    "float32, decay 5e-4": (torch.float32, 5e-4),
    "float32, no decay": (torch.float32, 0.0),
    "bfloat16, decay 5e-4": (torch.bfloat16, 5e-4),
}


def run(dtype: torch.dtype, decay: float, steps: int = STEPS, every: int = EVERY) -> list[tuple[float, float]]:
    """(deviation of the references, variation of the attention's output over its size), every so many steps."""
    torch.manual_seed(0)
    model = FeatureProjector([32], ProjectorConfig(references=64, heads=4, form="released")).train().to(dtype)
    adam = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [round(0.7 * steps), round(0.9 * steps)])
    draw = torch.Generator().manual_seed(1)
    kinds = 0.6 * torch.randn(8, 32, generator=draw)  # of normal residuals
    found = []
    for step in range(steps + 1):
        normal = 0.3 * kinds[torch.randint(8, (128,), generator=draw)] + 0.15 * torch.randn(128, 32, generator=draw)
        marked = torch.rand(128, generator=draw) < 0.06
        residuals = normal + marked[:, None] * 0.5 * torch.randn(128, 32, generator=draw)
        maps = residuals.view(2, 64, 32).mT.reshape(2, 32, 8, 8).to(dtype)
        if step % every == 0:
            deviation, spread, size = model.vitals([maps])[0].tolist()
            found.append((deviation, spread / max(size, 1e-12)))
        projected = model([maps])[0].float().flatten(2).mT.flatten(0, 1)
        adam.zero_grad()
        (2 * norm_loss(projected, marked, form="released")).backward()
        adam.step()
        schedule.step()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (dtype, decay) in WAYS.items():
        for number, (deviation, variation) in enumerate(run(dtype, decay)):
            print(f"{name}: step {number * EVERY}: deviation {deviation:.3f}, variation {variation:.2g}", flush=True)
