"""Pretrain on the marked defects of your own products, and use the result if it helps:
python examples/pretrain_own.py my-products/ my-extractor/

my-products/ is laid out like MVTec AD, with several products; more options: adpretrain pretrain --help.
"""

import sys

from adpretrain import ADExtractor
from downstream.cli import main as adpretrain


def main(data: str, out: str, *options: str) -> int:
    code = adpretrain(["pretrain", "--data", data, "--out", out, *options])
    if code not in (0, 3):  # 0: the projector helps on products that were held out; 3: it does not
        return code
    extractor = ADExtractor.from_pretrained(out)
    print(f"{out}: {'with' if extractor.projector is not None else 'without'} a projector; use it with")
    print(f"adpretrain score --extractor {out} --normal shots/ --images line3/ --out results/")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) >= 3 else __doc__)
