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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as fill

from .errors import StateError

SCHEMA = 1
MANIFEST, STATE = "manifest.json", "state.json"


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors, whole and on the CPU, and facts of a checkpoint; StateError if it does not verify."""
    if damage := verify(folder):
        raise StateError(f"the checkpoint {folder} is damaged: {damage}")
    tensors = {
        group: {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in listed.items()}
        for group, listed in contents(folder).items()
    }
    read(folder, {name: tensor for group in tensors.values() for name, tensor in group.items()})
    return tensors, facts(folder)


def facts(folder: Path) -> dict[str, Any]:
    """What state.json holds."""
    known: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8"))
    return known


def contents(folder: Path) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """The (size, dtype) of each tensor as a whole, by "model" or "optimizer" and its name.

    Raises StateError if a header lies: a digest that fits says that a file is whole, not that it is honest.
    """
    try:
        known: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise StateError(f"the checkpoint {folder} cannot be read: {type(cause).__name__}: {cause}") from cause
    found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {"model": {}}
    parts: dict[str, int] = {}
    for index, info in sorted(known.storage_data.items(), key=lambda pair: pair[0].fqn):
        group = Path(info.relative_path).name.partition(".")[0].partition("-")[0]
        tensor = known.state_dict_metadata[index.fqn]
        found.setdefault(group, {})[index.fqn] = (tensor.size, tensor.properties.dtype)
        parts[index.fqn] = parts.get(index.fqn, 0) + info.shape.numel()
    for name, tensor in known.state_dict_metadata.items():
        if parts[name] != tensor.size.numel():
            raise StateError(f"the checkpoint {folder} cannot be read: the parts of {name} are not the whole of it")
    return found


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors from a checkpoint, by name; of one that is split over processes each reads its own part."""
    with warnings.catch_warnings():
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
            if (size := (folder / name).stat().st_size) != fact["size"]:
                return f"{name} has {size} bytes instead of {fact['size']}"
            if digest(folder / name) != fact["xxh3_128"]:
                return f"{name} does not match its digest"
        if strangers := {path.name for path in folder.glob("*.safetensors")} - set(manifest["files"]):
            return f"{min(strangers)} does not belong to it"
    except FileNotFoundError as cause:
        return f"{Path(cause.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
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
