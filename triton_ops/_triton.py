"""Triton; or, on platforms that have none, what lets files that hold kernels be imported, whose CPU paths need none."""

from __future__ import annotations

from typing import Any

__all__ = ["tl", "triton"]


class Absent:
    """In place of a module: any part of it is itself, and as a decorator, or constexpr, it gives back what it gets."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, given: Any = None, **options: Any) -> Any:
        return self if given is None else given


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = Absent()
