"""R12: a value that is not finite is noticed in the step it comes up in, by all processes alike, and never kept.

The model is a toy whose step takes a millisecond. A service on PYTHONPATH, which nobody installed, spoils the gradient
of one process or the learning rate of one step, and writes down what each process saw.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributions
import runs
import torch
from result import Result

from selfsup.kernel import state

TOYS = Path(__file__).parents[1] / "cli" / "toy_plugins.py"
STEPS, AT = 12, 5  # steps of a run; the one that is spoiled, from 0
SETS = "train.batch=8 data.workers=0 checkpoints.steps=1 watchdog.patience=3"
SPOILER = """
import json, os
import torch
import xxhash
from selfsup.kernel import distributed
from selfsup.kernel.hookspecs import hookimpl

AT = int(os.environ["FAULTS_AT"])

class Spoiler:
    @hookimpl
    def run_started(self, run):
        self.number, rank = -1, os.environ.get("FAULTS_RANK")
        if rank is not None and int(rank) == distributed.rank():
            weight = next(p for p in run.objective.parameters() if p.requires_grad)
            weight.register_hook(lambda g: g * float("nan") if self.number == AT else g)

    @hookimpl(trylast=True)
    def step_started(self, run, step):
        self.number = step.number
        if "FAULTS_RATE" in os.environ and step.number == AT:
            for group in run.optimizer.param_groups:
                group["lr"] = float(os.environ["FAULTS_RATE"])

    @hookimpl(tryfirst=True)
    def step_finished(self, run, report):
        weights = [p.detach().numpy().tobytes() for p in run.objective.parameters()]
        row = {"step": report.step.number, "finite": bool(report.finite), "ids": report.ids.tolist(),
               "weights": xxhash.xxh3_64_hexdigest(b"".join(weights)),
               "whole": all(p.isfinite().all().item() for p in run.objective.parameters())}
        with open(run.folder / f"seen-{distributed.rank()}.jsonl", "a") as file:
            file.write(json.dumps(row) + chr(10))
"""
ENTRY_POINTS = f"[selfsup.services]\nspoiler = faults_spoiler:Spoiler\n{distributions.TOYS}"


def measure(work: Path, full: bool) -> Iterator[Result]:
    work.mkdir(parents=True, exist_ok=True)
    plugins = installed(work / "plugins")
    if full:
        yield one_sample(work / "sample", plugins)
        yield a_spike(work / "spike", plugins, "1e30")
        yield a_spike(work / "endless", plugins, "inf")
        yield stopped(work / "stopped", plugins)
    yield one_process(work / "process", plugins, 4 if full else 2)


def installed(folder: Path) -> dict[str, str]:
    """A distribution of the toys and the spoiler; the environment that finds it."""
    distributions.install(folder, "faults-spoiler", ENTRY_POINTS, faults_spoiler=SPOILER)
    shutil.copy(TOYS, folder)
    return distributions.on_path(folder)


def numbers(folder: Path, spoiled: int | None = None) -> Path:
    """Files of a number each; one of them is none."""
    folder.mkdir(parents=True)
    for number in range(48):
        (folder / f"{number:02}.num").write_text("nan" if number == spoiled else str(number))
    return folder


def train(run: Path, data: Path, plugins: dict[str, str], policy: str, **faults: Any) -> runs.Job:
    environment = {**plugins, **{name: str(value) for name, value in {"FAULTS_AT": AT, **faults}.items()}}
    sets = f"{SETS} watchdog.policy={policy}"
    return runs.train(run, "--data", str(data), steps=STEPS, sets=sets, plugin="guess", environment=environment)


def one_sample(work: Path, plugins: dict[str, str]) -> Result:
    """One sample that decodes to NaN: the steps that hold it are left out, and no other."""
    run = work / "run"
    train(run, numbers(work / "data", spoiled=17), plugins, "skip").finish()
    rows = seen(run)[0]
    bad = [row["step"] for row in rows if not row["finite"]]
    holding = [row["step"] for row in rows if 17 in [ident & (1 << 40) - 1 for ident in row["ids"]]]
    right = bad == holding != [] and all(row["whole"] for row in rows) and kept(run) == (0, STEPS)
    figure = f"left out in the same step {len(bad)} of {len(holding)} times, NaN in 0 checkpoints"
    return Result("R12", "NaN in one sample", len(holding), len(bad) * right, figure)


def one_process(work: Path, plugins: dict[str, str], processes: int) -> Result:
    """NaN in the gradient of one process: all leave out the step, and go on alike."""
    data, run = numbers(work / "data"), work / "run"
    environment = {**plugins, "FAULTS_AT": str(AT), "FAULTS_RANK": str(processes - 1)}
    more = ("--data", str(data))
    options = f"{SETS} watchdog.policy=skip"
    runs.torchrun(run, processes, *more, steps=STEPS, sets=options, plugin="guess", environment=environment).finish()
    logs = seen(run)
    bad = [[row["step"] for row in log if not row["finite"]] for log in logs]
    alike = all([row["weights"] for row in log] == [row["weights"] for row in logs[0]] for log in logs)
    before, after = (logs[0][number]["weights"] for number in (AT - 1, AT))
    right = len(logs) == processes and bad == [[AT]] * processes and alike and before == after and kept(run)[0] == 0
    figure = f"{processes} of {processes} left out step {AT} in step {AT}, weights alike after each step"
    name = f"NaN in the gradient of one of {processes} processes"
    return Result("R12", name, 1, int(right), figure if right else f"{bad}", usual())


def a_spike(work: Path, plugins: dict[str, str], rate: str) -> Result:
    """A learning rate that is far too large for one step: the run ends within its patience, and healthy states stay."""
    run = work / "run"
    job = train(run, numbers(work / "data"), plugins, "skip", FAULTS_RATE=rate)
    code, said = job.wait(), job.said()
    rows = seen(run)[0]
    first = next((row["step"] for row in rows if not row["finite"]), None)
    at_once = rows[-1]["step"] == AT and "the state is not finite" in said  # the update itself: it is not saved
    later = first == AT + 1 and f"step {first}: the loss is" in said
    broken, _ = kept(run)
    healthy = [folder for folder in (run / "checkpoints").glob("step-*") if _largest(folder) < 1e6]
    right = code == 1 and (at_once or later) and broken == 0 and healthy
    what = "weights not finite in that step" if at_once else "loss not finite in the next step"
    figure = f"{what}, seen in the same; ended after {len(rows) - 1 - AT} more steps; "
    figure += f"{len(healthy)} healthy checkpoints kept, NaN in {broken}"
    return Result("R12", f"learning rate of {rate} for one step", 1, int(bool(right)), figure)


def stopped(work: Path, plugins: dict[str, str]) -> Result:
    """By default the run ends at once, names step, samples and parameters, and keeps the batch."""
    run = work / "run"
    job = train(run, numbers(work / "data", spoiled=17), plugins, "stop")
    code, said = job.wait(), job.said()
    rows = seen(run)[0]
    right = code == 1 and not rows[-1]["finite"] and "17.num" in said and kept(run)[0] == 0
    right = right and all(row["finite"] for row in rows[:-1]) and any((run / "bad").glob("step-*/*.safetensors"))
    return Result("R12", "NaN in one sample, policy stop", 1, int(right), "ended in the step it came up in, by name")


def seen(run: Path) -> list[list[dict[str, Any]]]:
    """What each process wrote down."""
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(run.glob("seen-*.jsonl"))]


def kept(run: Path) -> tuple[int, int]:
    """(How many of its checkpoints hold a value that is not finite, the step of the newest.)"""
    folders = sorted((run / "checkpoints").glob("step-*"))
    return sum(not math.isfinite(_largest(folder)) for folder in folders), int(folders[-1].name.removeprefix("step-"))


def _largest(folder: Path) -> float:
    """The largest absolute value in a checkpoint; NaN if it holds one."""
    tensors = [t for group in state.load(folder)[0].values() for t in group.values() if t.numel()]
    return float(torch.stack([t.double().abs().max() for t in tensors]).max())


def usual() -> str:
    """The same in the few lines that everyone writes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    bad = 0
    for step in range(STEPS):
        x = torch.randn(8, 4)
        x[0, 0] = math.nan if step == AT else x[0, 0]
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        torch.save(model.state_dict(), saved := io.BytesIO())
        saved.seek(0)
        bad += any(not t.isfinite().all() for t in torch.load(saved).values())
    return f"a loop of torch without a check: NaN in {bad} of {STEPS} checkpoints"
