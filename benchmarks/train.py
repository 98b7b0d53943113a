"""Training steps a second of an objective here and in the best-known other code, on the same model.

    python benchmarks/train.py wav2vec2 [--size small|base] [--steps N] [--threads N] [--json] [--profile]
    python benchmarks/train.py gpt --size long --device cuda --batch 32        on a GPU, in bf16: see `steps_measure.py`

On a CPU: both sides have the same weights, batch, threads and optimizer, in fp32 without dropout. A step
is all that training needs on a batch that is loaded: masks, negatives and noise, forward, backward and
AdamW. Steps of both sides alternate in one process; medians are reported, and the peak memory of each
side in a process of its own. Nothing is timed unless both sides give the same loss for the same choices.

What is compared is in the file `train_NAME.py` beside this one: its `SIZES` are makers of a `Contest`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from contest import Contest
from torch import Tensor, nn

CHECKED = 4  # samples, where nobody says how many
TOLERANCE = 1e-4  # of the loss, relative
SIDES = ("ours", "theirs")


def stepper(model: nn.Module, loss_of: Callable[[int], Tensor]) -> Callable[[int], None]:
    """A training step: loss, gradient, update."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(number: int) -> None:
        loss_of(number).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def steppers(contest: Contest) -> dict[str, Callable[[int], None]]:
    return {side: stepper(getattr(contest, side), getattr(contest, f"loss_of_{side}")) for side in SIDES}


def timed(steps: dict[str, Callable[[int], None]], count: int) -> dict[str, list[float]]:
    """Seconds of each of `count` steps a side, in turns, after one to warm up."""
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(count + 1):
        for side, step in steps.items():
            start = time.perf_counter()
            step(number)
            seconds[side].append(time.perf_counter() - start)
    return {side: taken[1:] for side, taken in seconds.items()}


def peak_memory(args: argparse.Namespace, side: str) -> float:
    """Peak resident memory of three steps of one side, in GB, in a process of its own."""
    command = [sys.executable, __file__, args.objective, "--size", args.size, "--threads", str(args.threads)]
    out = subprocess.run([*command, "--memory-of", side], check=True, capture_output=True, text=True).stdout
    return float(out)


def print_memory(contest: Contest, side: str) -> None:
    """What `peak_memory` reads."""
    for other in SIDES:
        if other != side:
            delattr(contest, other)
    step = stepper(getattr(contest, side), getattr(contest, f"loss_of_{side}"))
    for number in range(3):
        step(number)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def compare(args: argparse.Namespace, make: Callable[[], Contest]) -> dict[str, Any]:
    # First, while this process is small: on Linux a process starts with the peak of the one that started it.
    memory = {side: peak_memory(args, side) for side in SIDES}
    contest = make()
    ours, theirs = (loss.item() for loss in contest.losses())
    if abs(ours - theirs) > TOLERANCE * abs(theirs):
        sys.exit(f"the losses differ: {ours} here, {theirs} in {contest.peer}; nothing was timed")
    seconds = timed(steppers(contest), args.steps)
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    return {
        "objective": args.objective,
        "size": args.size,
        "peer": contest.peer,
        "loss": {"ours": ours, "theirs": theirs},
        "parameters": sum(p.numel() for p in contest.ours.parameters()),
        "batch": contest.samples,
        "steps": args.steps,
        "threads": args.threads,
        "seconds": seconds,
        "samples_per_second": {side: contest.samples / median for side, median in medians.items()},
        "ratio": medians["theirs"] / medians["ours"],
        "peak_gb": memory,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def profile(contest: Contest) -> None:
    """Where the time of one step goes, by operator."""
    for side, step in steppers(contest).items():
        step(0)
        with torch.profiler.profile() as found:
            step(1)
        table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
        print(f"{side}\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem.removeprefix("train_") for path in Path(__file__).parent.glob("train_*.py"))
    parser.add_argument("objective", choices=names)
    parser.add_argument("--size", default="small")
    parser.add_argument("--steps", type=int, default=5, help="of each side, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes, and time nothing")
    parser.add_argument("--device", help="measure on this device, piece by piece, and print each piece as JSON")
    parser.add_argument("--batch", type=int, help="with --device: samples of a step; halved until all fit")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="with --device")
    parser.add_argument("--backend", default="inductor", help="with --device: of torch.compile; empty: none")
    parser.add_argument("--seconds", type=float, default=1e9, help="with --device: begin nothing new after so many")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = importlib.import_module(f"train_{args.objective}").SIZES
    if args.size not in sizes:
        parser.error(f"{args.objective} has no size {args.size!r}; known: {', '.join(sizes)}")
    make = sizes[args.size]
    if args.device:
        on_device(args, make)
    elif args.memory_of:
        print_memory(make(), args.memory_of)
    elif args.profile:
        profile(make())
    else:
        found = compare(args, make)
        print(json.dumps(found, indent=2) if args.json else table(found))


def on_device(args: argparse.Namespace, make: Callable[..., Contest]) -> None:
    """One line of JSON for every piece that is found, so that what comes before an end counts."""
    from steps_measure import Plan, measure

    from selfsup.kernel.precision import pick_device

    until = time.monotonic() + args.seconds
    plan = Plan(pick_device(args.device), args.batch or CHECKED, args.precision, args.backend, until=until)
    if not plan.gpu:  # to see that it works: no figure of a CPU means anything here
        plan = replace(plan, rounds=2, turn=0.02, most=2)
    for piece in measure(make, plan):
        print(json.dumps(piece), flush=True)


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['objective']} {found['size']}, {found['parameters'] / 1e6:.1f} million parameters, batch "
        f"{found['batch']}, {found['threads']} threads, {found['cpu']}, torch {found['torch']}",
        f"{'':8}{'s a step':>12}{'samples/s':>12}{'peak GB':>10}{'loss':>14}",
    ]
    for side in SIDES:
        rate, memory, loss = (found[key][side] for key in ("samples_per_second", "peak_gb", "loss"))
        lines.append(f"{side:8}{found['batch'] / rate:12.3f}{rate:12.3f}{memory:10.2f}{loss:14.4f}")
    lines.append(f"ratio {found['ratio']:.2f} against {found['peer']} (transformers {found['transformers']})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
