"""Fused operations for GPU pretraining: each with its reference in plain torch, a lean CPU path and Triton kernels."""

from ._masks import Masked
from .augment import AugmentPlan, augment
from .contrast_clip import clip_loss
from .contrast_info_nce import info_nce
from .contrast_nt_xent import nt_xent
from .contrast_sigmoid import sigmoid_loss
from .cross_entropy import cross_entropy
from .distill_cross_entropy import distill_cross_entropy
from .ema import ema
from .gumbel_quantize import gumbel_quantize
from .linear_cross_entropy import linear_cross_entropy
from .masks_block import block_mask
from .masks_random import random_mask
from .masks_span import Spans, span_mask
from .masks_tube import tube_mask
from .patch_mse import patch_mse, patch_mse_with_spread
from .philox import random_bits
from .restore_patches import restore_patches
from .take_patches import take_image_patches, take_patches

__all__ = [
    "AugmentPlan",
    "Masked",
    "Spans",
    "augment",
    "block_mask",
    "clip_loss",
    "cross_entropy",
    "distill_cross_entropy",
    "ema",
    "gumbel_quantize",
    "info_nce",
    "linear_cross_entropy",
    "nt_xent",
    "patch_mse",
    "patch_mse_with_spread",
    "random_bits",
    "random_mask",
    "restore_patches",
    "sigmoid_loss",
    "span_mask",
    "take_image_patches",
    "take_patches",
    "tube_mask",
]
