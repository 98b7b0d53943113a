"""R8: saved by some processes, wrapped in one way, loaded by others, wrapped in another: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from result import Result

SCRIPT = Path(__file__).with_name("reshard.py")


def run(processes: int, *words: str) -> None:
    """The script in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)


def measure(work: Path, full: bool) -> list[Result]:
    """Every way of saving against every way of loading."""
    saved = [(1, "ddp"), (2, "ddp"), (3, "fsdp"), (4, "fsdp")] if full else [(3, "fsdp")]
    loaded = (1, 2, 3, 8) if full else (1, 2)
    folders = {(world, parallel): work / f"saved-{parallel}-{world}" for world, parallel in saved}
    for (world, parallel), folder in folders.items():
        run(world, "save", str(folder), parallel)
    for world in loaded:
        wrapped = ("ddp", "fsdp") if world > 1 else ("ddp",)
        run(world, "load", *(word for folder in folders.values() for way in wrapped for word in (str(folder), way)))
    results = []
    for (world, parallel), folder in folders.items():
        said = {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}
        wrong = ", ".join(f"{name}: {text}" for name, text in said.items() if text != "equal")
        equal = sum(text == "equal" for text in said.values())
        parts = len(list(folder.glob("checkpoints/step-*/*-of-*.safetensors")))
        fault = f"saved by {world} ({parallel if world > 1 else 'alone'}), loaded as {', '.join(said)}"
        figure = f"{equal} of {len(said)} bitwise equal; {parts} files of parts{'; ' + wrong if wrong else ''}"
        results.append(Result("R8", fault, len(said), equal, figure))
    return results
