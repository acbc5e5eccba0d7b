"""The layouts of benchmarks, one per file: where photographs, labels and masks are."""
