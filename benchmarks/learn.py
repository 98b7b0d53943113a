"""Learn something that means something within minutes on a GPU, through the command line that everyone uses.

    python benchmarks/learn.py [NAME ...] --data FOLDER [--limit SECONDS] [--out FOLDER] [--little]

Names are those of `TASKS`, or what they begin with. FOLDER holds what the tasks name, each in the place named there;
what is absent is said and skipped. Figures go to learn.json: seconds, rates, every validation, and what `ssl eval` says
of the end. With --little the same commands run for a few steps on a CPU, on data that is made up where FOLDER has none.

The goal of `gpt` is the validation loss that nanoGPT states for this configuration (README, train_shakespeare_char),
1.4697. That is the best of twenty estimates in its run; here it is the best of twenty measurements of the whole last
tenth of the text. What the end of the run reaches is stated beside.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from children import GRACE, Child

from selfsup.cli.run_metrics import read_log

SHAKESPEARE = "text_tinyshakespeare/input.txt"
MNIST, TRASH = "image_mnist", "image_trashnet"
TABLES = "--data {data}/train.parquet --test {data}/test.parquet --label label --limit {many}"
FOLDERS = "--data {data}/train --test {data}/test"
# Of the end of the run alone: `ssl eval probe` would fit raw photos as well, which takes a processor many minutes.
PROBED = (
    "--set online.judge=probe --set online.data={data}/train --set online.test={data}/test --set online.every=100000"
)
LOSS = "validation/loss"


@dataclass(frozen=True)
class Task:
    """A run and how it is judged: arguments of `ssl train` and `ssl eval`, with {data} and {work} for folders."""

    data: str  # in the folder of data
    train: str
    judged: dict[str, str]
    little: str = ""  # further settings, for a few steps on a CPU
    goal: float | None = None  # of the best validation loss


TASKS = {
    "gpt": Task(
        SHAKESPEARE,
        "--plugin gpt --preset characters --data {work}/first-nine-tenths.txt "
        "--set validation.data={work}/last-tenth.txt --set validation.every=250",
        {"perplexity": "--data {work}/last-tenth.txt"},
        "--set backbone.width=32 --set backbone.depth=1 --set backbone.heads=2 --set modality.length=32 "
        "--set validation.every=2",
        goal=1.4697,
    ),
    "simclr-mnist": Task(
        MNIST,
        "--plugin simclr --preset tiny --data {data}/train.parquet --batch 256 --steps 1500 --set backbone.small=true",
        {"knn": TABLES.replace("{many}", "10000"), "probe": TABLES.replace("{many}", "3000")},
        "--set backbone.small=false --set modality.size=8",
    ),
    "mae-mnist": Task(
        MNIST,
        "--plugin mae --preset tiny --data {data}/train.parquet --batch 256 --steps 3000",
        {"knn": TABLES.replace("{many}", "10000"), "probe": TABLES.replace("{many}", "3000")},
    ),
    "simclr-trashnet": Task(
        TRASH,
        "--plugin simclr --preset base --data {data}/train --batch 256 --steps 1000 --set modality.size=128 "
        f"--set backbone.depth=18 {PROBED}",
        {"knn": FOLDERS},
        "--set modality.size=32",
    ),
    "mae-trashnet": Task(
        TRASH,
        "--plugin mae --preset base --data {data}/train --batch 256 --steps 2000 --set modality.size=128 "
        f"--set backbone.width=384 --set backbone.heads=6 --set optimizer.lr=5e-4 {PROBED}",
        {"knn": FOLDERS},
        "--set modality.size=32 --set backbone.width=24 --set backbone.depth=1",
    ),
}


@dataclass
class Learning:
    """Tasks one after the other, and what came of them."""

    args: argparse.Namespace
    work: Path
    end: float = field(init=False)
    results: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.args.limit

    def run(self, name: str) -> None:
        task, found = TASKS[name], {"task": name}
        self.results.append(found)
        data = self.args.data / task.data
        if not data.exists() and self.args.little:
            data = made_up(self.work, task.data)
        if not data.exists():
            found["skipped"] = f"there is no {data}"
        elif self.end - time.monotonic() < 2 * GRACE:
            found["skipped"] = "the time given was over"
        else:
            work = self.work / name
            work.mkdir()
            if task.data == SHAKESPEARE:
                tenths(data, work)
            self.learn(task, found, {"data": data, "work": work})
        self.write()
        print(told(found), flush=True)

    def learn(self, task: Task, found: dict[str, Any], where: dict[str, Path]) -> None:
        """Train, then judge; what is found is written at once."""
        folder = where["work"] / "run"
        more = f"{task.little} --batch 16 --steps 3 --device cpu" if self.args.little else ""
        found["train"] = self.ssl(f"train {task.train} {more} --out {folder} --json", where)
        measured = read_log(folder / "metrics.jsonl").measured
        found["measured"] = [{"step": step, **values} for step, values in measured]
        losses = [(values[LOSS], step) for step, values in measured if LOSS in values]
        if task.goal is not None and losses:
            found |= {"best": min(losses), "last": losses[-1], "goal": task.goal, "met": min(losses)[0] <= task.goal}
        self.write()
        if "failed" in found["train"] or not (folder / "checkpoints").exists():
            return
        for judge, given in task.judged.items():
            more = "--limit 40 --device cpu" if self.args.little else ""
            found[judge] = self.ssl(f"eval {judge} {folder} {given} {more} --json", where)
            self.write()

    def ssl(self, given: str, where: dict[str, Path]) -> dict[str, Any]:
        """The last line of a command, which is JSON; or why there is none. Its other lines are passed on."""
        command = [part.format(**where) for part in given.split()]
        start, last = time.monotonic(), ""
        child = Child([sys.executable, "-m", "selfsup.cli", *command], max(1.0, self.end - start - GRACE))
        for line in child:
            last = line.strip() or last
            print(line, end="", flush=True)
        found: dict[str, Any] = {"command": "ssl " + " ".join(command), "process_seconds": time.monotonic() - start}
        with suppress(ValueError):
            found |= json.loads(last)
        if child.over:
            found["note"] = "the time given was over"
        elif child.code:
            found["failed"] = f"ended with {child.code}: {child.complaint}"
        return found

    def write(self) -> None:
        if self.args.out:
            (self.args.out / "learn.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")


def tenths(text: Path, work: Path) -> None:
    """The first nine tenths of the characters, and the last one, as nanoGPT splits them."""
    whole = text.read_text("utf-8")
    cut = int(0.9 * len(whole))
    (work / "first-nine-tenths.txt").write_text(whole[:cut], "utf-8")
    (work / "last-tenth.txt").write_text(whole[cut:], "utf-8")


def told(found: dict[str, Any]) -> str:
    """The figures of a task in a few lines."""
    lines = [f"== {found['task']}: {found['skipped']}; skipped"] if "skipped" in found else [f"== {found['task']}"]
    train = found.get("train", {})
    if "seconds" in train:
        lines.append(f"{train['steps']} steps in {train['seconds']:.1f} s, {train['samples_per_second']} samples/s")
    if "best" in found:
        (best, step), (last, end), met = found["best"], found["last"], "met" if found["met"] else "not met"
        lines.append(f"validation loss {best:.4f} at step {step} (goal {found['goal']}: {met})")
        lines.append(f"validation loss at the end, step {end}: {last:.4f}")
    for row in found.get("measured", [])[-1:]:
        lines += [f"{key} at the end: {value:.4f}" for key, value in row.items() if key.startswith("online")]
    for judge in ("perplexity", "knn", "probe"):
        for key, row in found.get(judge, {}).get("rows", {}).items():
            figure = row.get("nats", row.get("accuracy"))
            lines.append(f"{judge}, {key}: {'no figure' if figure is None else f'{figure:.4f}'}")
    for key, part in found.items():
        if isinstance(part, dict):
            lines += [f"{key}: {part[word]}" for word in ("note", "failed") if word in part]
    return "\n".join(lines)


def made_up(work: Path, name: str) -> Path:
    """Data that says nothing, in the place and form of the real one."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    place = work / "made-up" / name
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    if name == SHAKESPEARE:
        place.write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 40, "utf-8")
        return place
    pixels = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        rows = []
        for number in range(count):
            file = place / part / str(number % 2) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (28, 28), dtype=np.uint8)).save(file)
            rows.append({"image": {"bytes": file.read_bytes(), "path": None}, "label": number % 2})
        pq.write_table(pa.Table.from_pylist(rows), place / f"{part}.parquet")
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, default=Path(".data"))
    parser.add_argument("--limit", type=float, default=540, help="seconds of all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--little", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        if not any(known.startswith(name) for known in TASKS):
            sys.exit(f"learn.py: there is no task {name!r}; known: {', '.join(TASKS)}")
    with tempfile.TemporaryDirectory() as work:
        learning = Learning(args, Path(work))
        for name in TASKS:
            if not args.names or name.startswith(tuple(args.names)):
                learning.run(name)
    parts = [(found["task"], part) for found in learning.results for part in found.values() if isinstance(part, dict)]
    if failed := dict.fromkeys(task for task, part in parts if "failed" in part):
        sys.exit(f"learn.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
