"""How a checkpoint is written: beside training, by every process together, whole or not at all.

Each process copies its share of the state, which is all that training waits for, and a thread writes the copy:
what FSDP2 splits goes into files of each process, all else into those of the first one. When all have written,
flushed and digested their files, the first process names the whole in a manifest and renames the folder, which
makes it a checkpoint: at the end of a step, where all agree that they have, or at once where it is alone. A run
that is killed before that leaves a hidden folder, which the next save removes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import distributed, state
from .errors import DivergedError, SelfsupError, StateError

Tensors = Mapping[str, Mapping[str, Any]]  # group -> name -> tensor, or anything split over processes
Share = dict[str, dict[str, tuple[Tensor, list[int] | None]]]  # the part of this process, and where it begins if split
SPLIT = "DCP_SHARDING_INFO"  # the key under which torch.distributed.checkpoint looks for where parts begin


class Saver:
    """Writes the checkpoints of a run below `root`, one at a time; all processes call each method together."""

    def __init__(self, root: Path) -> None:
        self.root, self.step = root, 0
        self._thread: Thread | None = None
        self._failure: SelfsupError | None = None
        self._needed = 0.0  # bytes, at most
        self._copies: dict[str, Tensor] = {}  # written over each time: fresh memory is slow

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun and not yet committed."""
        return self._thread is not None

    def begin(self, step: int, tensors: Tensors, facts: Mapping[str, Any], trained: Collection[str] = ()) -> None:
        """Copy the state and begin to write it. Training may change it at once.

        A state in which a tensor of `trained`, or one beside the model's, is not finite, or another one holds a NaN,
        is never committed.
        """
        if self.busy:
            raise RuntimeError("the checkpoint before this one was not committed")
        self.step, self._failure = step, None
        share: Share = {group: dict(self._share(listed)) for group, listed in tensors.items()}
        size = distributed.total(torch.tensor(sum(part.nbytes for part, _ in _parts(share)), dtype=torch.float64))
        self._needed = float(size) + (1 << 20)
        if distributed.rank() == 0:
            self._try(self._prepare)
        if distributed.anyone(self._failure is not None):
            raise self._fail()
        work = (self._write, share, json.dumps({"step": step, **facts}), frozenset(trained))
        self._thread = Thread(target=self._try, args=work, daemon=True)
        self._thread.start()

    def commit(self, wait: bool) -> Path | None:
        """The checkpoint, if it was written everywhere; None while it is not, unless told to wait.

        Raises StateError, with all good checkpoints untouched, if it cannot be written, DivergedError if it must not.
        """
        if self._thread is None:
            return None
        if wait:
            self._thread.join()
        if distributed.anyone(self._thread.is_alive()):
            return None
        self._thread = None
        if distributed.world() > 1 and not distributed.anyone(self._failure is not None) and distributed.rank() == 0:
            self._try(self._rename)
        if distributed.anyone(self._failure is not None):
            raise self._fail()
        return self._final

    @property
    def _final(self) -> Path:
        return self.root / f"step-{self.step:08d}"

    @property
    def _work(self) -> Path:
        return self.root / f".{self._final.name}"

    def _share(self, tensors: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Tensor, list[int] | None]]]:
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                part = tensor.to_local()
                begins = list(tensor.__create_chunk_list__()[0].offsets)  # type: ignore[no-untyped-call]
                wanted = part.numel() > 0 or distributed.rank() == 0
            else:
                part, begins, wanted = tensor, None, distributed.rank() == 0
            if wanted:
                copy = self._copies.get(name)
                if copy is None or (copy.shape, copy.dtype) != (part.shape, part.dtype):
                    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                    self._copies[name] = copy
                yield name, (copy.copy_(part.detach()), begins)

    def _try(self, work: Any, *given: Any) -> None:
        try:
            work(*given)
        except DivergedError as cause:
            self._failure = cause
        except Exception as cause:  # whatever it is, what was not written must not be committed
            kept = next(iter(state.folders(self.root)), None)
            rest = f"the newest on disk is {kept}" if kept else "there is none on disk yet"
            room = f"it needs {self._needed / 1e6:.0f} MB and {_free(self.root) / 1e6:.0f} MB are free"
            self._failure = StateError(
                f"the checkpoint of step {self.step} could not be written below {self.root}: {cause}; {room}; {rest}"
            )
            self._failure.__cause__ = cause

    def _fail(self) -> SelfsupError:
        if distributed.rank() == 0:
            shutil.rmtree(self._work, ignore_errors=True)
        return self._failure or StateError(
            f"another process could not write its part of the checkpoint of step {self.step}, and says why"
        )

    def _prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        _sync(self.root.parent)
        for leftover in self.root.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if _free(self.root) < self._needed:
            raise OSError("there is too little room")
        self._work.mkdir()

    def _write(self, share: Share, facts: str, trained: frozenset[str]) -> None:
        if broken := _not_finite(share, trained):
            raise DivergedError(
                f"after {self.step} steps the state is not finite ({', '.join(broken[:3])}) and was not saved; the "
                f"checkpoints in {self.root} are from before. Often optimizer.lr is too high"
            )
        files = [path for group, parts in share.items() for path in _write_group(self._work, group, parts)]
        if distributed.rank() == 0:
            (self._work / state.STATE).write_text(facts, "utf-8")
            files.append(self._work / state.STATE)
        for path in files:
            _sync(path)
        sizes = {path.name: {"size": path.stat().st_size, "xxh3_128": state.digest(path)} for path in files}
        (self._work / f"part-{distributed.rank()}.json").write_text(json.dumps(sizes), "utf-8")
        if distributed.world() == 1:  # nobody else has to have written too
            self._rename()

    def _rename(self) -> None:
        files: dict[str, Any] = {}
        for part in sorted(self._work.glob("part-*.json")):
            files |= json.loads(part.read_text("utf-8"))
            part.unlink()
        manifest = {"schema": state.SCHEMA, "step": self.step, "torch": torch.__version__, "files": files}
        path, old = self._work / state.MANIFEST, self._work.with_name(f"{self._work.name}.old")
        path.write_text(json.dumps({**manifest, "digest": state.digest_of(manifest)}), "utf-8")
        _sync(path)
        _sync(self._work)
        if self._final.exists():  # damaged, or written by a run that was killed just after; half deleted it would be so
            self._final.rename(old)
        self._work.rename(self._final)
        _sync(self.root)
        shutil.rmtree(old, ignore_errors=True)


def save(root: Path, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step below `root`, here and now, and return its folder."""
    saver = Saver(root)
    saver.begin(step, tensors, facts)
    folder = saver.commit(wait=True)
    assert folder is not None
    return folder


def _parts(share: Share) -> Iterator[tuple[Tensor, list[int] | None]]:
    return (part for parts in share.values() for part in parts.values())


def _not_finite(share: Share, trained: Collection[str]) -> list[str]:
    """A buffer may hold infinities by design: a mask that is added to scores."""
    found = []
    for group, parts in share.items():
        for name, (part, _) in parts.items():
            strict = group != "model" or name in trained
            if part.is_floating_point() and not (part.isfinite() if strict else ~part.isnan()).all():
                found.append(name if group == "model" else f"{group} {name}")
    return found


def _write_group(work: Path, group: str, parts: Mapping[str, tuple[Tensor, list[int] | None]]) -> list[Path]:
    """Write what is whole into one file, and this process's parts of what is split into another."""
    whole = {name: part for name, (part, begins) in parts.items() if begins is None}
    split = {name: part for name, (part, begins) in parts.items() if begins is not None}
    places = {name: {"saved_offsets": begins} for name, (_, begins) in parts.items() if begins is not None}
    rank, world = distributed.rank(), distributed.world()
    written = []
    if whole or (rank == 0 and not split):
        written.append(work / f"{group}.safetensors")
        save_file(whole, written[-1])
    if split:
        written.append(work / f"{group}-{rank + 1:05d}-of-{world:05d}.safetensors")
        save_file(split, written[-1], metadata={"format": "pt", SPLIT: json.dumps(places)})
    return written


def _free(folder: Path) -> float:
    """Bytes that are free on the disk of a folder; not a number where nobody knows."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.nan


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
