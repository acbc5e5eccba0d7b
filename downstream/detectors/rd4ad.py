"""RD4AD, reverse distillation: a decoder reconstructs the frozen features from a bottleneck (Deng & Li 2022).

It is configuration B of ReContrast, with the loss that the authors released (Eq. 3 of Guo et al. 2023); form "A" has
the loss of their paper, which trains less stably. Steps and optimiser are those of Guo et al., who compare with it.
"""

from __future__ import annotations

from adpretrain.backbones import Extract
from downstream.detectors.recontrast import ReContrast, ReContrastConfig
from downstream.detectors.recontrast.forms import FORMS

DEFAULT = ReContrastConfig(form="B", hard_mining=False)


class RD4AD(ReContrast):
    """Three levels and their reconstructions -> cosine distances, upsampled and added -> smoothed map -> its maximum.

    It takes the features of any `Extract` whose levels make a pyramid. Raises ValueError for a form that trains an
    encoder.
    """

    name = "rd4ad"

    def __init__(self, extract: Extract, config: ReContrastConfig = DEFAULT) -> None:
        if FORMS[config.form].trains:
            raise ValueError(f'form {config.form!r} trains an encoder: choose "A" or "B", or the detector recontrast')
        super().__init__(extract, config)
