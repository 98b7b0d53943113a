"""What a checkpoint holds, and its safe, verified form on disk (law 7).

    checkpoints/step-00000100/
        model.safetensors       every parameter and buffer of the objective
        optimizer.safetensors   the optimizer's tensors
        state.json              the rest: step, settings, the optimizer's numbers, what was skipped
        manifest.json           size and xxh3-128 of each file, versions, and its own digest

A checkpoint is written under a temporary name, flushed to the disk and renamed, so it is there whole
or not at all; it is verified before any tensor of it is used. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import StateError

SCHEMA = 1
MANIFEST, STATE = "manifest.json", "state.json"

Tensors = Mapping[str, Mapping[str, Any]]


def save(root: Path, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step below `root` and return its folder.

    Raises StateError, with the last good checkpoint untouched, when it cannot be written.
    """
    final = root / f"step-{step:08d}"
    work = root / f".{final.name}.{os.getpid()}"
    needed = sum(t.nbytes for group in tensors.values() for t in group.values()) + (1 << 20)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sync(root.parent)
        if (free := shutil.disk_usage(root).free) < needed:
            raise OSError(f"it needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        _write(work, tensors, {"step": step, **facts})
        old = work.with_name(f"{work.name}.old")
        if final.exists():  # damaged, or written by a run that was killed just after; half deleted it would be damaged
            final.rename(old)
        work.rename(final)
        _sync(root)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as cause:
        shutil.rmtree(work, ignore_errors=True)
        kept = next(iter(folders(root)), None)
        rest = f"the newest on disk is {kept}" if kept else "there is none on disk yet"
        raise StateError(f"the checkpoint of step {step} could not be written below {root}: {cause}; {rest}") from cause
    if damage := verify(final):
        raise StateError(f"the checkpoint {final} does not read back as it was written: {damage}")
    return final


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors and facts of a checkpoint; StateError if it does not verify."""
    if damage := verify(folder):
        raise StateError(f"the checkpoint {folder} is damaged: {damage}")
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, json.loads((folder / STATE).read_text("utf-8"))


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line about each newer one that does not."""
    damaged: list[str] = []
    for folder in folders(root):
        damage = verify(folder)
        if damage is None:
            return folder, damaged
        damaged.append(f"{folder.name} is damaged and was not used: {damage}")
    return None, damaged


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest.pop("digest") != _digest_of(manifest):
            return f"{MANIFEST} does not match its own digest"
        if manifest["schema"] != SCHEMA:
            return f"it has schema {manifest['schema']}, this version reads {SCHEMA}"
        for name, fact in manifest["files"].items():
            if (size := (folder / name).stat().st_size) != fact["size"]:
                return f"{name} has {size} bytes instead of {fact['size']}"
            if _digest(folder / name) != fact["xxh3_128"]:
                return f"{name} does not match its digest"
    except FileNotFoundError as cause:
        return f"{Path(cause.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        return f"{MANIFEST} cannot be read: {cause}"
    return None


def folders(root: Path) -> list[Path]:
    """The checkpoints below `root`, newest first, verified or not."""
    return sorted(root.glob("step-*"), reverse=True)


def retain(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints that verify, damaged ones older than those, and leftovers."""
    good = 0
    for folder in folders(root):
        if good >= keep:
            shutil.rmtree(folder, ignore_errors=True)
        elif verify(folder) is None:
            good += 1
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write(work: Path, tensors: Tensors, facts: Mapping[str, Any]) -> None:
    for name, group in tensors.items():
        save_file(_unshared(group), work / f"{name}.safetensors")
    (work / STATE).write_text(json.dumps(facts), "utf-8")
    files = {p.name: {"size": p.stat().st_size, "xxh3_128": _digest(p)} for p in sorted(work.iterdir())}
    manifest = {"schema": SCHEMA, "step": facts["step"], "torch": torch.__version__, "files": files}
    (work / MANIFEST).write_text(json.dumps({**manifest, "digest": _digest_of(manifest)}), "utf-8")
    for path in work.iterdir():
        _sync(path)
    _sync(work)


def _unshared(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors refuses tensors that share memory (tied weights): all but the first are copied."""
    seen: set[int] = set()
    out = {}
    for name, tensor in group.items():
        tensor = tensor.detach().contiguous()
        shared = tensor.untyped_storage().data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes
        out[name] = tensor.clone() if shared else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return out


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
