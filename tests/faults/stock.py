"""How the usual formats keep the same tensors: what they make of a fault is measured beside what we do.

    python stock.py FORMAT FOLDER COUNT    kill COUNT processes while they save over what is there; print what was lost

Each is used as its documentation shows, into the same place every time.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

Tensors = dict[str, Tensor]
SHAPE = (64, 64)
MANY = 512  # tensors: 8 MB


def tensors(seed: int, count: int = 2) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {f"layer{n}.weight": torch.randn(SHAPE, generator=g) for n in range(count)}


def empty(count: int = 2) -> Tensors:
    """What `dcp.load` fills."""
    return {f"layer{n}.weight": torch.full(SHAPE, float("nan")) for n in range(count)}


def save_dcp(x: Tensors, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process saves alone
        dcp.save(dict(x), checkpoint_id=str(folder / "dcp"), no_dist=True)


def load_dcp(folder: Path, count: int = 2) -> Tensors:
    found = empty(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=str(folder / "dcp"), no_dist=True)
    return found


def save_torch(x: Tensors, folder: Path) -> None:
    torch.save(x, folder / "model.pt")


def load_torch(folder: Path, count: int = 2) -> Tensors:
    return torch.load(folder / "model.pt", weights_only=True)


def save_safetensors(x: Tensors, folder: Path) -> None:
    save_file(x, folder / "model.safetensors")


def load_safetensors(folder: Path, count: int = 2) -> Tensors:
    return load_file(folder / "model.safetensors")


FORMATS: dict[str, tuple[Callable[[Tensors, Path], None], Callable[[Path, int], Tensors]]] = {
    "safetensors": (save_safetensors, load_safetensors),
    "torch.save": (save_torch, load_torch),
    "dcp": (save_dcp, load_dcp),
}


def outcome(name: str, folder: Path, truth: Tensors) -> str:
    """What loading gives: "right", "wrong" where it gives other values without a word, or "refused"."""
    logging.disable()  # torch logs what it raises, with a traceback
    try:
        found = FORMATS[name][1](folder, len(truth))
    except (Exception, CheckpointException):  # which is no Exception
        return "refused"
    finally:
        logging.disable(logging.NOTSET)
    return "right" if same(found, truth) else "wrong"


def same(found: Tensors, truth: Tensors) -> bool:
    return found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)


def killed_saves(name: str, folder: Path, count: int) -> int:
    """How often nothing can be loaded any more after a kill within a save over what was there."""
    old, new = tensors(1, MANY), tensors(2, MANY)
    save, _ = FORMATS[name]
    folder.mkdir(parents=True)
    save(old, folder)
    began = time.perf_counter()
    save(old, folder)
    took = time.perf_counter() - began
    draw = random.Random(0)
    lost = 0
    for _ in range(count):
        shutil.rmtree(folder)
        folder.mkdir()
        save(old, folder)
        if (child := os.fork()) == 0:
            save(new, folder)
            os._exit(0)
        time.sleep(took * draw.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lost += all(outcome(name, folder, x) != "right" for x in (old, new))
    return lost


if __name__ == "__main__":
    print(killed_saves(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])), "of", sys.argv[3], "lost")
