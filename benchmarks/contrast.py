"""What a contrastive loss and its gradients cost, against the plain formula that makes all similarities.

    python benchmarks/contrast.py
    python benchmarks/contrast.py --rows 16384 --width 256 --losses nt_xent clip_loss
    python benchmarks/contrast.py --device cuda --kind bfloat16 --rows 32768 --width 512

Rounds alternate between the two, so that a busy machine slows both; the time is the median of the rounds. The memory
is the peak above that of the same loss of a few rows, which has loaded what there is to load, each in a process of
its own. `rows` are the rows of the matrix of similarities; nt_xent has half as many samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup.triton_ops import contrast_clip, contrast_info_nce, contrast_nt_xent, contrast_sigmoid

MODULES = {
    "nt_xent": contrast_nt_xent,
    "clip_loss": contrast_clip,
    "sigmoid_loss": contrast_sigmoid,
    "info_nce": contrast_info_nce,
}


def arguments(loss: str, rows: int, width: int, device: str, kind: str) -> tuple[list[Tensor], dict[str, float]]:
    rows = rows // 2 if loss == "nt_xent" else rows
    x, y = (F.normalize(torch.randn(rows, width, device=device), dim=-1).to(getattr(torch, kind)) for _ in range(2))
    learned = {"clip_loss": [14.0], "sigmoid_loss": [10.0, -10.0]}.get(loss, [])
    arrays = [x, y, *(torch.tensor([value], device=device) for value in learned)]
    return [array.requires_grad_() for array in arrays], {} if learned else {"temperature": 0.1}


def step(f, arrays, options):
    torch.autograd.grad(f(*arrays, **options), arrays)
    if arrays[0].is_cuda:
        torch.cuda.synchronize()


def both(loss):
    return {"ours": getattr(MODULES[loss], loss), "plain": getattr(MODULES[loss], f"{loss}_reference")}


def seconds(loss, args):
    given = arguments(loss, args.rows, args.width, args.device, args.kind)
    times = {name: [] for name in both(loss)}
    for turn in range(args.rounds + 1):
        for name, f in both(loss).items():
            start = time.perf_counter()
            step(f, *given)
            times[name] += [time.perf_counter() - start] if turn else []  # the first loads and compiles
    return {name: statistics.median(of) for name, of in times.items()}


def peak(device):
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def memory(loss, name, args):
    """Bytes; run in a process of its own."""
    step(both(loss)[name], *arguments(loss, 64, args.width, args.device, args.kind))
    given = arguments(loss, args.rows, args.width, args.device, args.kind)
    before = peak(args.device)
    step(both(loss)[name], *given)
    return peak(args.device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kind", default="float32")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory(*args.memory_of, args))
        return
    peaks = {}  # first of all, as a process starts with the peak of the one that starts it
    for loss in args.losses:
        for name in both(loss):
            command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", loss, name]
            peaks[loss, name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for loss in args.losses:
        taken = seconds(loss, args)
        used = {name: peaks[loss, name] for name in taken}
        figures = {
            "loss": loss,
            "ms": {name: round(1e3 * value, 2) for name, value in taken.items()},
            "MB": {name: round(value / 2**20, 1) for name, value in used.items()},
            "time ours/plain": round(taken["ours"] / taken["plain"], 3),
            "memory ours/plain": round(used["ours"] / max(1, used["plain"]), 4),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
