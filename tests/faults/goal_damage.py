"""R6: whatever happens to the files of a checkpoint is found before a tensor of it is used, and the one before is used.

Bits are flipped, files cut, deleted, emptied, swapped, and exchanged for those of another step. The checkpoints are
those that a run wrote. The usual formats meet the same flips in the same run: they have no digests of what they hold.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import runs
import stock
from result import Result

from selfsup.kernel import state
from selfsup.kernel.errors import StateError

Fault = Callable[[Path], None]


def measure(work: Path, full: bool) -> Iterator[Result]:
    flips, cuts, reads = (1000, 100, 1000) if full else (60, 10, 20)
    keep = ("--set", "checkpoints.keep=9")
    runs.train(work / "run", *keep, steps=4).finish()
    yield from kinds(Bench(work / "run" / "checkpoints"), flips, cuts, reads, usual_flips(work / "stock", flips))
    if full:
        runs.torchrun(work / "split", 2, *keep, "--set", "train.parallel=fsdp", steps=4).finish()
        yield from kinds(Bench(work / "split" / "checkpoints", "split over two processes, "), flips, cuts, reads)


def kinds(bench: Bench, flips: int, cuts: int, reads: int, usual: str = "") -> Iterator[Result]:
    """Every kind of damage to one checkpoint, and none."""
    yield bench.try_all("one bit flipped", ((path, flipped(bit)) for path, bit in bench.bits(flips)), usual)
    yield bench.try_all("a file cut short", ((path, cut(size)) for path, size in bench.sizes(cuts)))
    yield bench.try_all("a file emptied", ((path, cut(0)) for path in bench.files()))
    yield bench.try_all("a file deleted", ((path, Path.unlink) for path in bench.files()))
    yield bench.try_all("a file of the step before", ((path, bench.of_the_step_before) for path in bench.changed()))
    yield bench.try_all("two files swapped", ((path, swapped(other)) for path, other in bench.pairs()))
    yield bench.try_all("a file added", ((path, bench.added) for path in bench.tensors()))
    alarms = sum(bool(state.newest(bench.root)[1]) for _ in range(reads))
    yield Result("R6", f"{bench.name}none: it is whole", reads, reads - alarms, f"{alarms} false alarms")


class Bench:
    """The newest of several checkpoints, which is damaged again and again, and mended after each time."""

    def __init__(self, root: Path, name: str = "") -> None:
        self.root, self.name = root, name
        self.newest, self.before = state.folders(root)[:2]
        self.whole = self.newest.with_name("whole")
        shutil.copytree(self.newest, self.whole)
        self.draw = random.Random(0)

    def try_all(self, name: str, faults: Iterable[tuple[Path, Fault]], usual: str = "") -> Result:
        """Do one damage after the other, and see that each is named, and the checkpoint before it is used."""
        named = used = count = 0
        for path, fault in faults:
            fault(path)
            count += 1
            found, damaged = state.newest(self.root)
            named += len(damaged) == 1 and self.newest.name in damaged[0] and refused(self.newest)
            used += found == self.before
            shutil.rmtree(self.newest)
            shutil.copytree(self.whole, self.newest)
        figure = f"{named} of {count} found before a tensor was used; {used} times the one before was"
        return Result("R6", f"{self.name}{name}", count, min(named, used), figure, usual)

    def files(self) -> list[Path]:
        return sorted(self.newest.iterdir())

    def tensors(self) -> list[Path]:
        return sorted(self.newest.glob("*.safetensors"))

    def changed(self) -> list[Path]:
        return [path for path in self.files() if path.read_bytes() != (self.before / path.name).read_bytes()]

    def bits(self, count: int) -> Iterator[tuple[Path, int]]:
        """Half of them anywhere, half in a file chosen first, so that the small ones are hit too."""
        for number in range(count):
            files = self.files()
            weights = [path.stat().st_size for path in files] if number % 2 else None
            path = self.draw.choices(files, weights)[0]
            yield path, self.draw.randrange(8 * path.stat().st_size)

    def sizes(self, count: int) -> Iterator[tuple[Path, int]]:
        for number in range(count):
            files = self.files()
            path = files[number % len(files)]
            yield path, path.stat().st_size - 1 if number < len(files) else self.draw.randrange(path.stat().st_size)

    def pairs(self) -> list[tuple[Path, Path]]:
        files = self.files()
        every = [(a, b) for n, a in enumerate(files) for b in files[n + 1 :]]
        return [(a, b) for a, b in every if a.read_bytes() != b.read_bytes()]

    def of_the_step_before(self, path: Path) -> None:
        shutil.copy(self.before / path.name, path)

    def added(self, path: Path) -> None:
        """Whole in itself, and of another checkpoint: a part that one more process might have written."""
        shutil.copy(self.before / path.name, path.with_name("other.safetensors"))


def refused(folder: Path) -> bool:
    try:
        state.load(folder)
    except StateError:
        return True
    return False


def flipped(bit: int) -> Fault:
    def fault(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    return fault


def cut(size: int) -> Fault:
    return lambda path: path.write_bytes(path.read_bytes()[:size]) and None


def swapped(other: Path) -> Fault:
    def fault(path: Path) -> None:
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(ours)

    return fault


def usual_flips(work: Path, count: int) -> str:
    """What the usual formats make of as many flipped bits, anywhere in their files."""
    told = []
    truth = stock.tensors(0)
    for name, (save, _) in stock.FORMATS.items():
        (folder := work / name).mkdir(parents=True)
        save(truth, folder)
        draw = random.Random(0)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        wrong = 0
        for _ in range(count):
            path = draw.choices(files, [f.stat().st_size for f in files])[0]
            whole = path.read_bytes()
            flipped(draw.randrange(8 * len(whole)))(path)
            wrong += stock.outcome(name, folder, truth) == "wrong"
            path.write_bytes(whole)
        told.append(f"{name} {wrong} of {count} silently wrong")
    return ", ".join(told)
