"""Fused operations for GPU pretraining."""
