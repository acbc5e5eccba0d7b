"""Procedural products with defects, written in the Real-IAD layout: a pretraining set that needs no download.

`make_synthetic(root)` writes the set; `python recipes/draw_products.py --help` is the same on the
command line. A product is a function from TEXTURES or OBJECTS whose parameters are drawn once; each image
of it draws a pose, nuisances that are normal, a light and a camera anew, and perhaps one defect of DEFECTS.
"""

from products.defects import DEFECTS
from products.product import PRODUCTS, Product, Rendering, make_product, render
from products.write import make_synthetic

__all__ = ["DEFECTS", "PRODUCTS", "Product", "Rendering", "make_product", "make_synthetic", "render"]
