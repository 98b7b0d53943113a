"""How an op is held to what it promises: on a CPU, in Triton's interpreter, on a GPU, and compiled for absent ones.

A test that takes the fixture `device` runs wherever it can: on the GPU if there is one, otherwise by the op's CPU
path, and once more in the interpreter (../test_kernels_interpreted.py), which is slow, so its arrays are small.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
SHARED = {"cuda": 101_376, "hip": 65_536}  # bytes that a block may have on any card of the maker
ROUNDING = torch.finfo(torch.float32).eps


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"))  # of a GPU, by `poisoned`
    if INTERPRETED:
        items[:] = [item for item in ours if "device" in getattr(item, "fixturenames", ())]
    if not config.getoption("--slow"):
        dear = [item for item in items if INTERPRETED or "compile_ahead" in getattr(item, "fixturenames", ())]
        left_out = set(dear) - set(every_other(dear))
        items[:] = [item for item in items if item not in left_out]


def every_other(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Half of the combinations of parameters, as the white squares of a chess board: each value with half of the
    values of each other parameter, and, where there are three parameters, each pair of values. The whole board costs
    minutes in the interpreter and in the compilers, and is for --slow.
    """
    seen: dict[tuple[str, ...], dict[tuple[int, ...], int]] = {}  # (function, parameters) -> values -> their number
    squares: dict[pytest.Item, dict[tuple[str, ...], int]] = {}
    for item in items:
        given, function = getattr(item, "callspec", None), item.nodeid.partition("[")[0]
        names = [m.args[0] for m in item.iter_markers("parametrize")]
        marked = [tuple(re.split(r"\s*,\s*", n) if isinstance(n, str) else n) for n in names]
        values = given.params if given else {}
        alone = [(name,) for name in values if not any(name in names for names in marked)]  # of fixtures
        squares[item] = {}
        for names in (*marked, *alone):
            numbers = seen.setdefault((function, *names), {})
            squares[item][(function, *names)] = numbers.setdefault(tuple(id(values[n]) for n in names), len(numbers))

    def white(item: pytest.Item) -> bool:
        choices = [place for key, place in squares[item].items() if len(seen[key]) > 1]
        return len(choices) < 2 or sum(choices) % 2 == 0

    return [item for item in items if white(item)]


@pytest.fixture
def device() -> torch.device:
    """Where arrays are made for an op whose kernel is tried, if one can be."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, or of the largest integers, so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def without_waiting(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """`with without_waiting():` an op that makes the host wait for the GPU is an error."""

    @contextmanager
    def watch() -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    return watch


Arrays = Sequence[Any]


def outputs_and_gradients(f: Callable[..., Any], arrays: Arrays) -> list[Tensor]:
    """What f makes of the arrays, and the gradients of a sum that weighs each of its floats differently."""
    found = f(*arrays)
    found = [x for x in (found if isinstance(found, tuple) else (found,)) if x.is_floating_point()]
    total = sum(
        (x.double() * torch.linspace(1, 3, x.numel(), dtype=torch.float64, device=x.device).view_as(x)).sum()
        for x in found
    )
    learned = [x for x in arrays if isinstance(x, Tensor) and x.requires_grad]
    return [x.detach() for x in (*found, *(torch.autograd.grad(total, learned) if learned else ()))]


@pytest.fixture
def gradients_of() -> Callable[[Callable[..., Any], Arrays], list[Tensor]]:
    return outputs_and_gradients


@pytest.fixture
def as_exact_as_torch() -> Callable[..., None]:
    """as_exact_as_torch(op, reference, draw): each result and gradient errs at most twice as much as torch's own.

    `draw(seed)` gives the arrays, in the type to be tried. The error is relative to the result of the reference in
    float64, in the norm over all elements and several draws; `slack` is what any of them may err. The interpreter,
    which takes a thousand times as long, has half of the draws.
    """

    def hold(
        op: Callable[..., Any],
        reference: Callable[..., Any],
        draw: Callable[[int], Arrays],
        *,
        slack: float = ROUNDING,
        seeds: int = 4,
    ) -> None:
        squares: dict[tuple[str, int], float] = {}
        for seed in range(max(1, seeds // 2) if INTERPRETED else seeds):
            arrays = draw(seed)
            true = outputs_and_gradients(reference, [exact(x) for x in arrays])
            for who, f in (("ours", op), ("torch's", reference)):
                found = outputs_and_gradients(f, arrays)
                assert len(found) == len(true)
                for index, (got, want) in enumerate(zip(found, true, strict=True)):
                    assert got.shape == want.shape, (who, index, got.shape, want.shape)
                    assert got.isfinite().all(), (who, index)
                    for key, value in ((who, got.double() - want), ("size", want)):
                        squares[key, index] = squares.get((key, index), 0.0) + float(value.square().sum())
        for index in range(len(true)):
            ours, theirs, size = (squares[who, index] ** 0.5 for who in ("ours", "torch's", "size"))
            assert ours <= 2 * theirs + slack * size + 1e-30, f"number {index}: {ours / size:.2e}, {theirs / size:.2e}"

    return hold


def exact(x: Any) -> Any:
    """A float tensor in float64, as learned as it was; all else as it is."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


@pytest.fixture(params=TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")
def compile_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """compile_ahead(kernel, {"x_ptr": "*fp32", ...}, BLOCK=128) -> the compiled kernel, for each target.

    What the kernel does not take, such as num_warps, is an option of the compiler. Pointers are as aligned as torch's.
    Torch is taken to be built for the target.
    """
    triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile(kernel: Any, signature: Mapping[str, str], **constants: Any) -> Any:
        options = {k: constants.pop(k) for k in set(constants) - set(kernel.arg_names)}
        whole = {**signature, **dict.fromkeys(constants, "constexpr")}
        order = {name: whole[name] for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(order) if order[name].startswith("*")}
        source = ASTSource(kernel, order, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
        return triton.compile(source, target=GPUTarget(*request.param), options=options)

    compile.backend = request.param[0]  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.version, "hip", "7" if request.param[0] == "hip" else None)
    return compile


@pytest.fixture
def spilled(tmp_path: Path) -> Callable[[Any], int]:
    """spilled(compiled) -> bytes of a thread's own memory, where registers go that do not fit."""

    def measure(compiled: Any) -> int:
        if "cubin" not in compiled.asm:
            found = re.search(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])
            assert found is not None
            return int(found[1])
        from triton.backends import nvidia

        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        found = re.search(r"STACK:(\d+)", usage)
        assert found is not None
        return int(found[1])

    return measure


@pytest.fixture
def assert_fits(compile_ahead: Any, spilled: Callable[[Any], int]) -> Callable[[Any], None]:
    """assert_fits(compiled): it finds room on the cards of its target, and every register is one."""

    def hold(compiled: Any) -> None:
        assert compiled.metadata.shared <= SHARED[compile_ahead.backend]
        assert spilled(compiled) == 0

    return hold
