"""All cases that `ssl bench ops` measures, in the order in which it does."""

from __future__ import annotations

from . import bench_contrast, bench_heads, bench_masks, bench_patches, bench_rest
from .bench_case import Case


def cases(full: bool) -> list[Case]:
    """At the sizes of a training on one GPU, or at small and ragged ones."""
    families = (bench_contrast, bench_heads, bench_patches, bench_masks, bench_rest)
    return [case for family in families for case in family.cases(full)]
