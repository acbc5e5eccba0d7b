"""What the licences of the backbones' weights say of their use in a product.

Read from the texts by engineers, not by lawyers: before a product ships, read the licence itself at its ``source``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Product = Literal["yes", "with conditions", "no", "unknown"]
UNKNOWN = "see its page on the Hub"


@dataclass(frozen=True)
class Licence:
    """Whether weights under a licence may be used in a ``product`` that is sold or earns money; ``terms``: what it asks
    for, in one sentence; ``source``: the address of its text."""

    product: Product
    terms: str
    source: str


LICENCES: dict[str, Licence] = {
    "Apache-2.0": Licence(
        "yes",
        "Whoever passes the weights on adds a copy of the licence and of the notices.",
        "https://www.apache.org/licenses/LICENSE-2.0",
    ),
    "MIT": Licence(
        "yes",
        "Whoever passes the weights on adds the copyright notice and the licence.",
        "https://opensource.org/license/mit",
    ),
    "BSD-3-Clause": Licence(
        "yes",
        "Whoever passes the weights on adds the copyright notice and the licence, and does not advertise with the "
        "authors' names.",
        "https://opensource.org/license/bsd-3-clause",
    ),
    "DINOv3 License": Licence(
        "with conditions",
        "Whoever passes on the weights, or what is derived from them, does so under this licence only and adds a copy "
        "of it; military, nuclear and weapons uses are forbidden, as is what trade controls forbid.",
        "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    ),
    "NVIDIA Open Model License": Licence(
        "with conditions",
        "Whoever passes the weights on adds a copy of the licence and NVIDIA's notice; use must agree with NVIDIA's "
        "terms for trustworthy AI.",
        "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
    ),
    "CC-BY-NC-SA-4.0": Licence(
        "no",
        "Commercial use is forbidden.",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    ),
    UNKNOWN: Licence("unknown", "The publisher of the weights says on their page what is allowed.", ""),
}
