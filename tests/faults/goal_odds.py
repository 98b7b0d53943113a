"""R21: clocks that jump, logs that cannot be written, ten thousand old checkpoints, two jobs on one run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import runs
from result import Result

from selfsup.kernel import state

LAUNCHER = str(Path(__file__).with_name("odd_things.py"))
DAY = 86_400


def measure(work: Path, full: bool) -> Iterator[Result]:
    runs.train(work / "whole", steps=8).finish()
    if full:
        yield clock(work / "clock", work / "whole", [DAY, -DAY, 3600, -3600, 1e9])
        yield silent(work / "silent", work / "whole")
        yield two(work / "two", 10)
    yield logs(work / "logs", work / "whole", [0, 3] if full else [3])
    yield crowd(work / "crowd", work / "whole", 10_000 if full else 300)


def same(folder: Path, whole: Path) -> bool:
    """Whether a run is done, and ended as the one that nothing disturbed."""
    return (folder / "status").read_text() == "DONE\n" and runs.difference(folder, whole) is None


def clock(work: Path, whole: Path, jumps: list[float]) -> Result:
    """A run, its list and going on with it, each under a clock that jumps to and fro."""
    right = 0
    for jump in jumps:
        start, folder = [LAUNCHER, "clock", str(jump)], work / f"run{jump:+.0f}"
        job = runs.train(folder, steps=8, start=start)
        runs.wait_for_step(folder, job, 3)
        job.kill()
        runs.train(folder, steps=8, start=start).finish()
        said = subprocess.run(
            [sys.executable, *start, "runs", str(folder), "--json"], capture_output=True, text=True, check=True
        )
        (facts,) = json.loads(said.stdout)
        right += same(folder, whole) and facts["state"] == "done" and facts["age"] >= 0
    figure = f"done, bitwise equal, listed as done: {right}/{len(jumps)}"
    return Result("R21", "the clock jumps, at every other look at it", len(jumps), right, figure)


def logs(work: Path, whole: Path, firsts: list[int]) -> Result:
    """No log can be written: metrics, and the curves of TensorBoard."""
    right = 0
    for first in firsts:
        folder = work / f"run{first}"
        job = runs.train(folder, "--set", "tensorboard.every=1", steps=8, start=[LAUNCHER, "logs", str(first)])
        said = job.finish()
        told = "warning: metrics.jsonl ends here" in said and "warning: the curves for TensorBoard end here" in said
        right += told and runs.difference(folder, whole) in (None, "steps, losses or learning rates in metrics.jsonl")
    figure = f"warned once, trained to the end, bitwise equal: {right}/{len(firsts)}"
    return Result("R21", "the disk of the logs is full", len(firsts), right, figure)


def silent(work: Path, whole: Path) -> Result:
    """Nobody takes what a run prints: a full disk, a pipe whose reader has gone."""
    right = 0
    read, gone = os.pipe()
    os.close(read)
    for name, output in (("full", os.open("/dev/full", os.O_WRONLY)), ("gone", gone)):
        folder = work / name
        words = runs.words(folder, steps=8, sets=runs.SMALL)
        done = subprocess.run([sys.executable, *runs.CLI, *words], stdout=output, stderr=subprocess.PIPE, check=False)
        os.close(output)
        right += done.returncode == 0 and b"warning: the output ends here" in done.stderr and same(folder, whole)
    return Result("R21", "the output cannot be written", 2, right, f"exit code 0, bitwise equal: {right}/2")


def two(work: Path, times: int) -> Result:
    """A second job on the folder of a run is refused, and the first one does not notice."""
    folder, right = work / "run", 0
    first = runs.train(folder, steps=100_000)
    end = time.monotonic() + runs.PATIENCE
    while not state.folders(folder / "checkpoints") and time.monotonic() < end:
        time.sleep(0.2)
    for number in range(times):
        shutil.rmtree(work / "other", ignore_errors=True)
        words = runs.words(folder, steps=100_000, sets=runs.SMALL)
        done = subprocess.run([sys.executable, *runs.CLI, *words], capture_output=True, text=True, check=False)
        named = f"process {first.pid} on" in done.stderr and "works on the run in" in done.stderr
        right += done.returncode == 1 and named and first.running and number >= 0
    first.kill(15)
    code = first.wait()
    figure = f"refused by the process's number {right}/{times}; the first ends as it should: exit code {code}"
    return Result("R21", "a second job on the folder of a run", times, right if code == 75 else 0, figure)


def crowd(work: Path, whole: Path, count: int) -> Result:
    """Many old checkpoints: a run goes on and saves as if they were few; the first save deletes them."""
    folder = work / "run"
    shutil.copytree(whole, folder)
    (newest, *older) = state.folders(folder / "checkpoints")
    for other in older:
        shutil.rmtree(other)
    for number in range(9, count + 8):  # which share the bytes of one
        shutil.copytree(newest, newest.with_name(f"step-{number:08d}"), copy_function=os.link)
    began = time.perf_counter()
    found, damaged = state.newest(folder / "checkpoints")
    start = time.perf_counter() - began
    began = time.perf_counter()
    state.retain(folder / "checkpoints", 2)
    first = time.perf_counter() - began
    began = time.perf_counter()
    state.retain(folder / "checkpoints", 2)
    later = time.perf_counter() - began
    left = len(state.folders(folder / "checkpoints"))
    ok = found is not None and not damaged and left == 2 and start < 2 and later < 0.1
    figure = f"found in {start:.2f} s; all but 2 deleted beside training in {first:.1f} s; then {later * 1000:.0f} ms"
    return Result("R21", f"{count:,} old checkpoints", 1, int(ok), figure)
