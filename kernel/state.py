"""What a checkpoint holds, and how it is verified and read (law 7); `saving.py` writes it.

    checkpoints/step-00000100/
        model.safetensors       every parameter and buffer of the objective
        optimizer.safetensors   the optimizer's tensors
        state.json              the rest: step, settings, the optimizer's numbers, what was skipped
        manifest.json           size and xxh3-128 of each file, versions, and its own digest

What FSDP2 splits over processes lies in files of theirs, model-00002-of-00004.safetensors, in the form that
torch.distributed.checkpoint gives safetensors; its reader fills tensors that are whole or split in any other way.
A checkpoint is verified before any tensor of it is used. No pickle is written or read.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as fill

from .errors import StateError

SCHEMA = 1
MANIFEST, STATE = "manifest.json", "state.json"
WRONG = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)  # what files that lie lead to


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors, whole and on the CPU, and facts of a checkpoint; StateError if it does not verify."""
    if damage := verify(folder):
        raise StateError(f"the checkpoint {folder} is damaged: {damage}")
    listed = contents(folder)
    with ours(folder):
        tensors = {g: {n: torch.empty(s, dtype=d) for n, (s, d) in group.items()} for g, group in listed.items()}
    read(folder, {name: tensor for group in tensors.values() for name, tensor in group.items()})
    return tensors, facts(folder)


@contextmanager
def ours(folder: Path) -> Iterator[None]:
    """Whatever a library raises over files whose digests are right: they were not damaged, they were made so."""
    try:
        yield
    except (*WRONG, SafetensorError, CheckpointException) as cause:
        said = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise StateError(f"the checkpoint {folder} cannot be read: {said}") from cause


def facts(folder: Path) -> dict[str, Any]:
    """What state.json holds."""
    with ours(folder):
        return dict(json.loads((folder / STATE).read_text("utf-8")))


def contents(folder: Path) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """The (size, dtype) of each tensor as a whole, by "model" or "optimizer" and its name.

    Raises StateError if a header lies: a digest that fits says that a file is whole, not that it is honest.
    """
    found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {"model": {}}
    with ours(folder):
        known: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
        for index, info in sorted(known.storage_data.items(), key=lambda pair: pair[0].fqn):
            group = Path(info.relative_path).name.partition(".")[0].partition("-")[0]
            tensor = known.state_dict_metadata[index.fqn]
            if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
                raise ValueError(f"the parts of {index.fqn} are not the whole of it")
            found.setdefault(group, {})[index.fqn] = (tensor.size, tensor.properties.dtype)
    return found


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The size of each tensor."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def misfit(have: Mapping[str, torch.Size], want: Mapping[str, torch.Size]) -> str:
    """How the tensors of a checkpoint differ from a model's: counts, and one of each sort by name."""
    kinds = {
        "missing": [name for name in want if name not in have],
        "unknown here": [name for name in have if name not in want],
        "of another shape": [name for name in want if name in have and have[name] != want[name]],
    }
    return ", ".join(f"{len(names)} tensors are {kind} ({names[0]})" for kind, names in kinds.items() if names)


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors from a checkpoint, by name; of one that is split over processes each reads its own part."""
    with warnings.catch_warnings(), ours(folder):
        # Each process reads alone and has no need to plan with others; torch warns that it does so.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        fill(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


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
        if manifest.pop("digest") != digest_of(manifest):
            return f"{MANIFEST} does not match its own digest"
        if manifest["schema"] != SCHEMA:
            return f"it has schema {manifest['schema']}, this version reads {SCHEMA}"
        for name, fact in manifest["files"].items():
            if Path(name).name != name or (folder / name).exists() > (folder / name).is_file():
                return f"{MANIFEST} names {name!r}, which is no file of it"
            if (size := (folder / name).stat().st_size) != fact["size"]:
                return f"{name} has {size} bytes instead of {fact['size']}"
            if digest(folder / name) != fact["xxh3_128"]:
                return f"{name} does not match its digest"
        if strangers := {path.name for path in folder.glob("*.safetensors")} - set(manifest["files"]):
            return f"{min(strangers)} does not belong to it"
    except FileNotFoundError as cause:
        return f"{Path(cause.filename).name} is missing"
    except WRONG as cause:
        return f"{MANIFEST} cannot be read: {cause}"
    return None


def folders(root: Path) -> list[Path]:
    """The checkpoints below `root`, newest first, verified or not."""
    return sorted(root.glob("step-*"), reverse=True)


def retain(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints that verify, and damaged ones older than those."""
    good = 0
    for folder in folders(root):
        if good >= keep:
            shutil.rmtree(folder, ignore_errors=True)
        elif verify(folder) is None:
            good += 1


def digest(path: Path) -> str:
    """The xxh3-128 of a file."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The xxh3-128 of what a manifest says."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
