"""Inject every fault of docs/faults.md and write down what was survived.

    python tests/faults/chaos.py [GOAL ...] [--short] [--minutes M] [--out FILE]

A GOAL is the name of a file goal_NAME.py beside this one, or a goal that its first line names: damage, or R6. Without
one all are measured. Each file has a function `measure(work, full)` that injects real faults below the folder `work`
and gives a Result for each kind of them, as a list or one after the other; one without a fault says why it was
skipped. The exit code is 0 only if every fault was survived, and no goal failed to be measured.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
sys.path[:0] = [str(HERE), str(HERE.parent / "tools")]

import runs  # noqa: E402 - found beside this file
from result import Result  # noqa: E402

HEAD = ("goal", "fault", "injected", "survived", "figure", "stock")


@dataclass
class Report:
    """What was measured so far, and what was not."""

    command: str
    began: float = field(default_factory=time.monotonic)
    results: list[Result] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # which goal could not be measured, and why
    skipped: list[str] = field(default_factory=list)  # what this machine does not allow
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def survived(self) -> bool:
        return bool(self.results) and not self.failed and all(r.survived == r.injected for r in self.results)

    def text(self) -> str:
        """The page, as markdown."""
        injected, survived = (sum(getattr(r, name) for r in self.results) for name in ("injected", "survived"))
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        lines = [
            f"# Faults, {time.strftime('%Y-%m-%d')}",
            "",
            f"`{self.command}`",
            "",
            f"{survived:,} of {injected:,} faults survived as promised, in {clock(time.monotonic() - self.began)}.",
            f"Commit {commit()}; {machine()}. What the goals promise: [docs/faults.md](../../docs/faults.md).",
            "",
            row(HEAD),
            row(["---"] * len(HEAD)),
            *(row([str(getattr(result, name)) for name in HEAD]) for result in self.results),
            "",
            f"Durations: {took or 'none'}.",
            "",
            *listed("Not measured", self.failed),
            *listed("Skipped", self.skipped),
        ]
        return "\n".join(lines).rstrip() + "\n"


def main(words: Sequence[str]) -> int:
    asked = parse(words)
    report = Report(" ".join(["python", "tests/faults/chaos.py", *recorded(asked)]))
    path = asked.out or RESULTS / f"faults-{time.strftime('%Y-%m-%d')}.md"
    try:
        for goal in chosen(asked.goals):
            run(goal, report, full=not asked.short, minutes=asked.minutes)
            write(path, report)
    except KeyboardInterrupt:
        report.failed.append("interrupted by Ctrl-C: what came after is not measured")
        print("interrupted", file=sys.stderr)
    write(path, report)
    show(report, path)
    return 0 if report.survived else 1


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/faults/chaos.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("goals", nargs="*", metavar="GOAL", help="such as R6 or damage; all, if none is named")
    parser.add_argument("--short", action="store_true", help="the few faults that the tests inject")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="of the soak (R22); default 30")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/faults-DATE.md")
    return parser.parse_args(words)


def recorded(asked: argparse.Namespace) -> list[str]:
    """The command, without where it writes."""
    minutes = [] if asked.minutes == 30 else [f"--minutes {asked.minutes:g}"]
    return [*asked.goals, *(["--short"] if asked.short else []), *minutes]


def chosen(asked: Sequence[str], folder: Path = HERE) -> list[Path]:
    """The files of the goals asked for, in the order of their numbers; SystemExit names what there is."""
    files = {path: numbers(path) for path in sorted(folder.glob("goal_*.py"))}
    names = {path: {path.stem.removeprefix("goal_"), *(f"R{n}" for n in own)} for path, own in files.items()}
    if unknown := set(asked) - set().union(*names.values()):
        known = ", ".join(f"{p.stem.removeprefix('goal_')} ({', '.join(f'R{n}' for n in files[p])})" for p in files)
        raise SystemExit(f"there is no goal {', '.join(sorted(unknown))}; known: {known}")
    return sorted((p for p in files if not asked or names[p] & set(asked)), key=lambda p: (files[p] or [99], p.stem))


def numbers(path: Path) -> list[int]:
    """The goals that the first line of a file names."""
    first = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
    return [int(number) for number in re.findall(r"\bR(\d+)\b", first)]


def run(path: Path, report: Report, *, full: bool, minutes: float) -> None:
    """Measure one goal; whatever goes wrong is a line of the report, and the next goal is measured."""
    began = time.monotonic()
    try:
        for result in measured(path, full, minutes):
            if not result.injected:
                report.skipped.append(f"{result.goal} {result.fault}: {result.figure}")
                print(f"{result.goal:<4} {result.fault}: {result.figure}", flush=True)
                continue
            report.results.append(result)
            mark = "survived" if result.survived == result.injected else "NOT SURVIVED"
            stock = f"; stock: {result.stock}" if result.stock else ""
            count = f"{result.survived} of {result.injected} {mark}"
            print(f"{result.goal:<4} {result.fault}: {count}; {result.figure}{stock}", flush=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        traceback.print_exc()
        reason = str(error).strip().replace("\n", " ")[:300]
        report.failed.append(f"{path.stem}: {type(error).__name__}: {reason}")
        print(f"---- {path.stem} could not be measured: {type(error).__name__}: {reason}", flush=True)
    report.seconds[path.stem.removeprefix("goal_")] = time.monotonic() - began


def measured(path: Path, full: bool, minutes: float) -> Iterator[Result]:
    module = importlib.import_module(path.stem)
    takes = inspect.signature(module.measure).parameters
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", ignore_cleanup_errors=True) as work:
        try:
            yield from module.measure(Path(work), full, **({"minutes": minutes} if "minutes" in takes else {}))
        finally:
            runs.end_all()


def write(path: Path, report: Report) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.text(), "utf-8")


def show(report: Report, path: Path) -> None:
    """The table, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD, title=f"{clock(time.monotonic() - report.began)}, written to {path}")
    for result in report.results:
        style = None if result.survived == result.injected else "bold red"
        table.add_row(*(str(getattr(result, name)) for name in HEAD), style=style)
    console = Console()
    console.print(table)
    for reason in [*report.failed, *report.skipped]:
        console.print(f"not measured: {reason}", markup=False)


def listed(what: str, reasons: Sequence[str]) -> list[str]:
    return [f"{what}:", "", *(f"- {reason}" for reason in reasons), ""] if reasons else [f"{what}: nothing.", ""]


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """What it ran on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.release()}"
    return f"{cores} cores, {memory:.0f} GiB, {system}, Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
