"""Fused operations for GPU pretraining."""

from .contrast_clip import clip_loss
from .contrast_info_nce import info_nce
from .contrast_nt_xent import nt_xent
from .contrast_sigmoid import sigmoid_loss

__all__ = ["clip_loss", "info_nce", "nt_xent", "sigmoid_loss"]
