"""What is measured: an op on arrays of one shape, beside the same in plain torch and in other people's packages."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from selfsup.kernel.errors import ContractError
from selfsup.kernel.random import key_of

Arrays = Sequence[Any]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """Another implementation of the same function.

    `load` imports it and gives a function of the case's arrays; `prepare` changes the arrays before any clock runs;
    `spoils` is of those that write into their inputs, which are then made anew for every call; `differs` says why its
    results cannot be compared, as where it draws other random numbers.
    """

    load: Callable[[], Call]
    prepare: Callable[[Arrays], Arrays] | None = None
    spoils: bool = False
    differs: str = ""
    only_gpu: bool = True


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    `call(op, *arrays)` calls the op or its reference; `products` are the matrix products (rows, inner, columns) that
    any method must take, forward and backward, `least` the bytes that any must move. `truth` is for shapes at which
    the reference in float64 finds no memory; `spare` is the share of integers that rounding may decide;
    `in_place` is of what changes its arrays, of which everyone then has copies.
    """

    op: str
    shape: str
    make: Callable[[Draw], Arrays]
    call: Call
    products: tuple[tuple[int, int, int], ...] = ()
    least: int = 0
    peers: Mapping[str, Peer] = field(default_factory=dict)
    truth: Call | None = None
    spare: float = 0.0
    in_place: bool = False

    @property
    def name(self) -> str:
        """As tables and files have it."""
        return f"{self.op} {self.shape}"

    @property
    def flops(self) -> int:
        """Of the products."""
        return sum(2 * a * b * c for a, b, c in self.products)

    def ours(self, *arrays: Any) -> Any:
        """The op."""
        return self.call(find(self.op), *arrays)

    def reference(self, *arrays: Any) -> Any:
        """The specification in plain torch."""
        return self.plain()(*arrays)

    def plain(self) -> Call:
        """The specification as a function that a compiler can read."""
        call, reference = self.call, find(self.op, "_reference")
        return lambda *arrays: call(reference, *arrays)


KEY = key_of(0, "bench")  # of everything that an op draws
HOMES = {  # of ops whose file has another name
    "random_bits": "philox",
    "take_image_patches": "take_patches",
    "random_mask": "masks_random",
    "tube_mask": "masks_tube",
    "block_mask": "masks_block",
    "span_mask": "masks_span",
}


def find(op: str, ending: str = "") -> Call:
    """An op of `selfsup.triton_ops`, or what stands beside it under its name and an ending."""
    public = getattr(importlib.import_module("selfsup.triton_ops"), op, None)
    home = f"selfsup.triton_ops.{HOMES.get(op, op)}"
    if not callable(public) and importlib.util.find_spec(home):  # not shown by the package
        public = getattr(importlib.import_module(home), op, None)
    if not callable(public):
        raise ContractError(f"there is no op {op!r} in selfsup.triton_ops")
    found = getattr(importlib.import_module(public.__module__), f"{op}{ending}", None)
    if not callable(found):
        raise ContractError(f"{public.__module__} has no {op}{ending}")
    return cast(Call, found)


def borrowed(module: str, name: str) -> Call:
    """A function of another package, imported now."""
    return cast(Call, getattr(importlib.import_module(module), name))


class Draw:
    """Makes the arrays of a case, from a seed, on a device and in a type."""

    def __init__(self, device: torch.device, kind: torch.dtype, seed: int) -> None:
        self.device, self.kind = device, kind
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, learned: bool = True) -> Tensor:
        """Normal numbers of this deviation."""
        x = torch.randn(shape, device=self.device, generator=self.generator)
        return (x * scale).to(self.kind).requires_grad_(learned)

    def units(self, rows: int, width: int, near: Tensor | None = None, learned: bool = True) -> Tensor:
        """Rows of length 1; where `near` is given, each is nearer to the row of the same number than to others."""
        x = torch.randn(rows, width, device=self.device, generator=self.generator)
        x = torch.nn.functional.normalize(x, dim=-1)
        if near is not None:
            x = torch.nn.functional.normalize(x + 0.5 * near.detach()[:rows].float(), dim=-1)
        return x.to(self.kind).requires_grad_(learned)

    def whole(self, most: int, *shape: int) -> Tensor:
        """Integers from 0 to most - 1: int64."""
        return torch.randint(most, shape, device=self.device, generator=self.generator)

    def subset(self, rows: int, of: int, count: int) -> Tensor:
        """For each row, `count` of the numbers below `of`, none twice, rising: int64 [rows, count]."""
        order = torch.rand(rows, of, device=self.device, generator=self.generator).argsort(1)
        return order[:, :count].sort(1).values

    def number(self, value: float, learned: bool = True) -> Tensor:
        """A learned number, float32 []."""
        return torch.tensor(value, device=self.device).requires_grad_(learned)
