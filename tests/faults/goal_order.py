"""R3, R8, R9: what each step trains on is a function of (seed, step), however the work is shared and interrupted.

The batches of a run are made again by other numbers of processes, data workers and microbatches, and in parts, each by
another number and begun in the middle as a resume begins it. What is compared is the digest of every sample as training
sees it: its id, the decoded tensors, and its views and masks.

Then runs are stopped and resumed from the command line: several times within an epoch, exactly at its end, after the
last step. The usual DataLoader meets the same changes in the same run.
"""

from __future__ import annotations

import json
import pickle
import random
import signal
import tarfile
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import killed_at
import numpy as np
import runs
import torch
import xxhash
from PIL import Image
from result import Result
from torch.utils.data import DataLoader, Dataset

from selfsup.kernel import compose
from selfsup.kernel.contracts import Signal
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.loader import Loader, Reader

BATCH, SEED = 12, 3
TEXT = "modality.length=48 modality.tokenizer=bytes backbone.width=32 backbone.depth=1 backbone.heads=2"
KINDS = {
    "images, a mixture": ("simclr", "pictures", "modality.size=16 backbone.name=resnet"),
    "masked images": ("mae", "pictures", "modality.size=16 modality.patch=4 backbone.width=32 backbone.depth=1"),
    "packed rows of text, a mixture": ("bert", "texts", TEXT),
    "documents of text": ("gpt", "texts", f"{TEXT} modality.pack=false"),
    "sound, a mixture": ("wav2vec2", "sounds", "modality.longest=0.3"),
    "a stream of text": ("gpt", "tables", f"{TEXT} data.stream=31"),
    "streams of images, a mixture": ("simclr", "tars", "modality.size=16 backbone.name=resnet data.stream=29"),
}
SHORT = ("packed rows of text, a mixture", "streams of images, a mixture")


class Share(NamedTuple):
    """How the work on some steps is shared."""

    world: int = 1
    workers: int = 0
    microbatch: int = 0


def measure(work: Path, full: bool) -> Iterator[Result]:
    steps = 15 if full else 6
    for name in KINDS if full else SHORT:
        bench = Bench(work / name.replace(" ", "-"), *KINDS[name], steps)
        yield bench.shared(name, every_share() if full else [Share(2, 1), Share(3, 0, 1)])
        yield bench.resumed(name, 20 if full else 1)
    yield from interrupted(work / "runs", full)
    if full:
        yield killed_stream(work / "killed")


def every_share() -> list[Share]:
    worlds, workers = (1, 2, 3, 4, 6), (0, 1, 2, 4)
    return [Share(world, n, micro) for world in worlds for n in workers for micro in ((0, 1, 5) if n < 2 else (0,))]


class Bench:
    """The batches of one kind of data."""

    def __init__(self, work: Path, objective: str, data: str, sets: str, steps: int) -> None:
        self.steps, self.draw = steps, random.Random(SEED)
        settings: dict[str, Any] = {"objective": {"name": objective}, "preset": "tiny", "train": {}, "data": {}}
        settings["train"] = {"batch": BATCH, "steps": steps, "seed": SEED, "device": "cpu"}
        for option in sets.split():
            (section, key), value = option.split("=")[0].split("."), option.split("=")[1]
            settings.setdefault(section, {})[key] = {"false": False}.get(value, value)
        settings["data"] |= {"paths": make(work, data), "cache": str(work / "cache"), "workers": 0}
        plugins = Plugins()
        self.run = compose.start(plugins, compose.resolve(plugins, settings))
        self.run.objective.eval()
        self.fresh = pickle.dumps(self.run.loader.reader)  # as a new process has it
        self.whole = self.digests(Share(), 0, steps, pickle.loads(self.fresh))

    def shared(self, name: str, shares: Sequence[Share]) -> Result:
        """All steps, shared otherwise."""
        wrong = sum(self.digests(share, 0, self.steps, pickle.loads(self.fresh)) != self.whole for share in shares)
        seen = sum(map(len, self.whole))
        figure = f"{wrong} differences of {len(shares)} sharings, each of {seen} samples in {self.steps} steps"
        usual = usual_workers() if name == SHORT[0] else ""
        fault = f"{name}: other numbers of processes, workers, microbatches"
        return Result("R9", fault, len(shares), len(shares) - wrong, figure, usual)

    def resumed(self, name: str, plans: int) -> Result:
        """The steps in parts, each begun by a new process that shares the work otherwise."""
        wrong = parts = 0
        for _ in range(plans):
            cuts = sorted(self.draw.sample(range(1, self.steps), min(3, self.steps - 1)))
            found: list[list[str]] = []
            marks = None
            for first, last in zip([0, *cuts], [*cuts, self.steps], strict=True):
                reader = pickle.loads(self.fresh)
                # A stream may go on from its marks, as a checkpoint keeps them, or read again what lies before.
                if marks and self.draw.random() < 0.5:
                    reader.source.recall(json.loads(json.dumps(marks)))
                share = Share(self.draw.choice((1, 2, 3, 6)), self.draw.choice((0, 1, 2)), self.draw.choice((0, 1, 5)))
                found += self.digests(share, first, last, reader)
                marks = reader.source.news()[0] if hasattr(reader.source, "news") else None
                parts += 1
            wrong += found != self.whole
        figure = f"{wrong} differences of {plans} runs in {parts} parts"
        return Result("R8", f"{name}: resumed with other numbers of all three", plans, plans - wrong, figure)

    def digests(self, share: Share, first: int, last: int, reader: Reader) -> list[list[str]]:
        """The digests of every step's samples, in the order of the global batch."""
        out: list[list[str]] = [[] for _ in range(first, last)]
        for rank in range(share.world):
            with (
                mock.patch("selfsup.kernel.distributed.world", return_value=share.world),
                mock.patch("selfsup.kernel.distributed.rank", return_value=rank),
            ):
                loader = Loader(reader, batch=BATCH, microbatch=share.microbatch, workers=share.workers, timeout=60)
                for step, parts in enumerate(loader.steps(first, last)):
                    for part in parts:
                        out[step] += self.samples(part, first + step)
        return out

    @torch.no_grad()
    def samples(self, part: dict[str, Any], step: int) -> list[str]:
        shown = self.run.objective.show(part, self.run.step(step), guess=False)
        signals = [value for value in part.values() if isinstance(value, Signal)]
        return [
            digest([ident, [s.x[i] for s in signals], [s.segments[i] for s in signals if s.segments is not None],
                    [values[i] for values in shown.values()]])
            for i, ident in enumerate(part["ids"].tolist())
        ]  # fmt: skip


def digest(value: Any) -> str:
    out = xxhash.xxh3_128()
    feed(out, value)
    return out.hexdigest()


def feed(out: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        out.update(f"{value.dtype} {value.shape}".encode())
        out.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple):
        for part in value:
            feed(out, part)
    else:
        out.update(repr(value).encode())


def make(work: Path, data: str) -> list[str]:
    """Two sets of samples, of which the first has three times the weight of the second."""
    draw = np.random.default_rng(SEED)
    for part, count in (("a", 17), ("b", 30)):
        (folder := work / part).mkdir(parents=True)
        if data in ("pictures", "tars"):
            for n in range(count):
                Image.fromarray(draw.integers(0, 255, (24, 20, 3), np.uint8)).save(folder / f"{n:02d}.png")
        if data == "sounds":
            for n in range(count):
                with wave.open(str(folder / f"{n:02d}.wav"), "wb") as file:
                    file.setparams((1, 2, 16000, 0, "NONE", ""))
                    file.writeframes(draw.integers(-9999, 9999, 6000 + 100 * n, np.int16).tobytes())
        if data in ("texts", "tables"):
            write_texts(folder, data, [" ".join(draw.choice(runs.WORDS, 3 + 4 * n)) for n in range(count)])
        if data == "tars":
            write_tars(folder, sorted(folder.iterdir()))
    return [f"{work / 'a'}@3", f"{work / 'b'}@1"]


def write_texts(folder: Path, data: str, texts: Sequence[str]) -> None:
    if data == "texts":
        for n, text in enumerate(texts):
            (folder / f"{n:02d}.txt").write_text(text)
    else:
        for shard in range(3):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[shard::3]]
            (folder / f"{shard}.jsonl").write_text("".join(lines))


def write_tars(folder: Path, files: Sequence[Path]) -> None:
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for file in files[shard::3]:
                tar.add(file, file.name)
    for file in files:
        file.unlink()


EPOCH = 6  # steps: 24 documents in batches of 4


def stopping(work: Path, step: int) -> dict[str, str]:
    """The environment in which a run stops after a step."""
    return {**runs.listening(work), "FAULTS_STOP_AT": str(step)}


def interrupted(work: Path, full: bool) -> Iterator[Result]:
    """Runs from the command line: 24 documents, 2 epochs and a half."""
    total = 15
    sets = ["--set", "modality.pack=false", "--set", "checkpoints.minutes=60"]
    runs.train(work / "whole", *sets, steps=total, environment=stopping(work, 0)).finish()
    chains = {"stopped at the end of an epoch": [EPOCH]}
    if full:
        chains["stopped three times within an epoch"] = [1, 3, 5]
        chains["stopped at the end of each epoch, and before and after it"] = [5, 6, 7, 11, 12, 13]
    for fault, stops in chains.items():
        folder = work / fault.replace(" ", "-")
        for number, step in enumerate(stops):
            workers = ["--set", f"data.workers={(0, 2, 1)[number % 3]}"]
            runs.train(folder, *sets, *workers, steps=total, environment=stopping(work, step)).finish(75)
        runs.train(folder, *sets, "--set", "data.workers=1", steps=total, environment=stopping(work, 0)).finish()
        ours, again = runs.samples(folder)
        theirs, _ = runs.samples(work / "whole")
        wrong = runs.difference(folder, work / "whole") or (ours != theirs and "the samples of steps differ") or ""
        figure = f"same samples and bitwise the same weights, {again} steps twice{'; NOT: ' + wrong if wrong else ''}"
        usual = usual_resume() if stops == [EPOCH] else ""
        yield Result("R3", fault, len(stops), 0 if wrong or again else len(stops), figure, usual)
    yield after_the_end(work / "whole", sets, total)


def killed_stream(work: Path) -> Result:
    """kill -9, and another number of workers each time: a stream goes on where its newest checkpoint says."""
    (folder := work / "tables").mkdir(parents=True)
    write_texts(folder, "tables", [" ".join(random.Random(n).choices(runs.WORDS, k=5 + 9 * n)) for n in range(20)])
    sets = ["--data", str(folder), "--set", "data.stream=7"]
    runs.train(work / "whole", *sets, steps=24).finish()
    kills = [4, 7, 5]
    for workers, time in enumerate(kills):
        start = [str(Path(killed_at.__file__)), "after the optimizer", str(time)]
        own = [*sets, "--set", f"data.workers={workers}"]
        runs.train(work / "run", *own, steps=24, start=start).finish(-signal.SIGKILL)
    runs.train(work / "run", *sets, steps=24).finish()
    wrong = runs.difference(work / "run", work / "whole")
    marks = "marks" in runs.newest(work / "run")[1]
    figure = f"bitwise the same weights{', NOT: ' + wrong if wrong else ''}; marks are {'' if marks else 'NOT '}kept"
    return Result("R3", "a stream, kill -9, other workers", len(kills), 0 if wrong or not marks else len(kills), figure)


def after_the_end(folder: Path, sets: Sequence[str], total: int) -> Result:
    """A run that is done is started again: it says so, and changes nothing."""
    before = runs.newest(folder)[0]["model"]
    said = runs.train(folder, *sets, steps=total).finish()
    says = f"this run was done before: {total} of {total} steps" in said
    after = runs.newest(folder)[0]["model"]
    same = all(torch.equal(before[name], after[name]) for name in before)
    figure = f"exit code 0, {'says' if says else 'DOES NOT SAY'} that nothing was left to do"
    return Result("R3", "resumed after the last step", 1, int(says and same), figure)


class Numbers(Dataset[Any]):
    """What a user of the stock loader writes: a sample and its random augmentation."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item()


def stock(workers: int) -> list[tuple[int, float]]:
    """An epoch of torch's DataLoader, seeded as its documentation has it."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=workers, generator=generator)
    return [(int(i), float(x)) for index, noise in loader for i, x in zip(index, noise, strict=True)]


def usual_workers() -> str:
    one, two = stock(1), stock(2)
    differ = sum(a != b for a, b in zip(one, two, strict=True))
    return f"torch DataLoader, seeded, 1 and 2 workers: {differ} of {len(one)} samples augmented differently"


def usual_resume() -> str:
    """The loader has no state: a run that goes on in the middle of an epoch begins with a new one."""
    epoch = [index for index, _ in stock(0)]
    half = len(epoch) // 2
    seen = epoch[:half] + epoch[: len(epoch) - half]
    return f"torch DataLoader, resumed within an epoch: {len(set(epoch)) - len(set(seen))} of {len(epoch)} never seen"
