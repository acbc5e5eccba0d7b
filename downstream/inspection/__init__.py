"""A new product inspected from a few normal photographs: references, threshold, scores, pictures, report, export."""
