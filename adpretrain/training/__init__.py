"""Pretraining, from photographs to gradients."""
