"""Pretraining: what a step is made of, from photographs to gradients."""
