"""What a loss and its gradients cost, against the plain formula that makes all similarities, or all logits.

    python benchmarks/losses.py
    python benchmarks/losses.py --rows 16384 --width 256 --losses nt_xent clip_loss
    python benchmarks/losses.py --losses linear_cross_entropy linear_cross_entropy_of_all --rounds 1
    python benchmarks/losses.py --device cuda --kind bfloat16 --rows 32768 --width 512

Rounds alternate between the two, so that a busy machine slows both; the time is the median of the rounds, and on a CPU
the best of the processor's time, which others on the machine change least, is there too. The memory is the peak above
that of the same loss of a few rows, which has loaded what there is to load, each in a process of its own.

--rows and --width are of contrastive losses: the rows of the matrix of similarities, of which nt_xent has half as many
samples. linear_cross_entropy has 8,192 tokens of width 256, 15 % or all of them with a label, and 30,522 classes;
cross_entropy 1,024 rows of as many logits, or 4,096 of 1,000. The plain formula has float32 inside, and takes all rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F

CONTRASTIVE = {
    "nt_xent": "contrast_nt_xent",
    "clip_loss": "contrast_clip",
    "sigmoid_loss": "contrast_sigmoid",
    "info_nce": "contrast_info_nce",
}
CROSS_ENTROPIES = {  # rows, share of them with a label, classes
    "linear_cross_entropy": (8192, 0.15, 30_522),
    "linear_cross_entropy_of_all": (8192, 1.0, 30_522),
    "cross_entropy": (1024, 1.0, 30_522),
    "cross_entropy_of_1000": (4096, 1.0, 1000),
}
LOSSES = [*CONTRASTIVE, *CROSS_ENTROPIES]
HEAD = 256  # the width of tokens


def contrastive(loss, args, few):
    rows = 64 if few else args.rows // 2 if loss == "nt_xent" else args.rows
    x, y = (F.normalize(torch.randn(rows, args.width), dim=-1) for _ in range(2))
    learned = {"clip_loss": [14.0], "sigmoid_loss": [10.0, -10.0]}.get(loss, [])
    return [x, y], [torch.tensor([value]) for value in learned], {} if learned else {"temperature": 0.1}


def classified(loss, few):
    rows, share, classes = CROSS_ENTROPIES[loss]
    rows = 16 if few else rows
    labels = torch.randint(classes, (rows,))
    labels[torch.rand(rows) >= share] = -100
    if loss.startswith("linear"):
        return [torch.randn(rows, HEAD), torch.randn(classes, HEAD).mul_(0.05)], labels
    return [torch.randn(rows, classes).mul_(2)], labels  # in place, or the peak would be before the loss


def arguments(loss, args, few=False) -> tuple[list[Tensor], list[Tensor], dict[str, float]]:
    """(all arrays, those with a gradient, options)."""
    torch.manual_seed(0)
    if loss in CONTRASTIVE:
        arrays, numbers, options = contrastive(loss, args, few)
        rest = []
    else:
        arrays, labels = classified(loss, few)
        numbers, options, rest = [], {}, [labels.to(args.device)]
    arrays = [array.to(args.device, getattr(torch, args.kind)).requires_grad_() for array in arrays]
    arrays += [number.to(args.device).requires_grad_() for number in numbers]
    return arrays + rest, arrays, options


def step(f, arrays, learned, options):
    torch.autograd.grad(f(*arrays, **options), learned)
    if learned[0].is_cuda:
        torch.cuda.synchronize()


def both(loss):
    name = loss.split("_of_")[0]
    module = importlib.import_module(f"selfsup.triton_ops.{CONTRASTIVE.get(name, name)}")
    return {"ours": getattr(module, name), "plain": getattr(module, f"{name}_reference")}


def seconds(loss, args):
    """The time of each, by the clock and of the processor: {name: [a pair for each round]}."""
    given = arguments(loss, args)
    times = {name: [] for name in both(loss)}
    for turn in range(args.rounds + 1):
        for name, f in both(loss).items():
            start = time.perf_counter(), time.process_time()
            step(f, *given)
            taken = time.perf_counter() - start[0], time.process_time() - start[1]
            times[name] += [taken] if turn else []  # the first loads and compiles
    return times


def peak(device):
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def memory(loss, name, args):
    """Bytes; run in a process of its own."""
    step(both(loss)[name], *arguments(loss, args, few=True))
    given = arguments(loss, args)
    before = peak(args.device)
    step(both(loss)[name], *given)
    return peak(args.device) - before


def figures(loss, times, peaks, device):
    clock = {name: statistics.median(wall for wall, _ in of) for name, of in times.items()}
    processor = {name: min(used for _, used in of) for name, of in times.items()}
    found = {
        "loss": loss,
        "ms": {name: round(1e3 * value, 2) for name, value in clock.items()},
        "MB": {name: round(value / 2**20, 1) for name, value in peaks.items()},
        "time ours/plain": round(clock["ours"] / clock["plain"], 3),
        "memory ours/plain": round(peaks["ours"] / max(1, peaks["plain"]), 4),
    }
    if device == "cpu":
        found["processor's time ours/plain"] = round(processor["ours"] / processor["plain"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
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
            peaks[loss, name] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    for loss in args.losses:
        times = seconds(loss, args)
        print(json.dumps(figures(loss, times, {name: peaks[loss, name] for name in times}, args.device)), flush=True)


if __name__ == "__main__":
    main()
