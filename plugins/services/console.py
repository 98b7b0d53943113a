"""Show a run to people: what it is made of, then a bar in a terminal, or a line now and then elsewhere.

The loss and the metrics are read every few steps only, as reading waits for the device (law 5).
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from selfsup.kernel import distributed
from selfsup.kernel.config import about
from selfsup.kernel.hookspecs import hookimpl
from selfsup.kernel.loader import Endless

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType

    from selfsup.kernel.loop import Report, Run

LARGE = 10_000_000  # parameters; a step of a paper's batch with more takes a CPU minutes, and gigabytes
NAMED = 5  # bad samples that are shown one by one; the rest are counted


class Lasting:
    """What a run prints to, stdout: where it cannot be written, as on a full disk, the run goes on in silence."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.failed = stream, False

    def write(self, text: str) -> int:
        """Print, if that works."""
        return self._unless_failed(self.stream.write, text)

    def flush(self) -> None:
        """Have it out, if that works."""
        self._unless_failed(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _unless_failed(self, do: Any, *args: str) -> int:
        try:
            return 0 if self.failed else do(*args) or 0
        except OSError as cause:
            self.failed = True
            with suppress(OSError):
                print(f"warning: the output ends here, it cannot be written: {cause.strerror}", file=sys.stderr)
            return 0


class Bar(Progress):
    """A bar, and under it the newest readings, over as many lines as they take."""

    readings = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar first: in one line with the readings it would lose its place to them."""
        yield from super().get_renderables()
        yield Text(self.readings)


class Console:
    """Print the start, the progress and what was skipped, on the first process."""

    def __init__(
        self,
        *,
        every: Annotated[int, about("steps between two readings of the loss", ge=1)] = 10,
        pause: Annotated[float, about("seconds between two lines where there is no terminal", ge=0)] = 10.0,
        style: Annotated[Literal["auto", "bar", "lines", "off"], about("auto: a bar in a terminal")] = "auto",
    ) -> None:
        self.every, self.pause, self.style = every, pause, style
        self.terminal = Terminal(highlight=False, file=cast(IO[str], Lasting(sys.stdout)))
        self.bar: Bar | None = None
        self.silent = style == "off"

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Say what the run is made of."""
        self.silent = self.style == "off" or distributed.rank() > 0
        self.began = self.since = self.stepped = time.perf_counter()
        self.shown_at = 0.0  # of the newest line, on the same clock
        self.window: Counter[str] = Counter()  # unit -> how much since the last reading
        self.bad: set[int] = set()  # samples, by index; each epoch meets them again
        if self.silent:
            return
        for label, text in opening(run):
            self._line(label, text)
        if self.style == "bar" or (self.style == "auto" and self.terminal.is_terminal):
            self._start_bar(run)

    @hookimpl(tryfirst=True)  # before a service that may stop the run
    def step_finished(self, run: Run, report: Report) -> None:
        """Count; every few steps, read and show."""
        if self.silent:
            return
        self._name_bad(run, report)
        self.window["samples"] += run.batch
        self.window.update({unit: much * distributed.world() for unit, much in report.amount.items()})
        done, now = report.step.number + 1, time.perf_counter()
        last = done == run.total
        if self.bar:
            if done % self.every == 0 or done == run.first + 1 or last:
                self._show(run, report, done)
            self.bar.update(self.task, completed=done, refresh=last or now - self.shown_at > 0.25)
            self.shown_at = now if now - self.shown_at > 0.25 else self.shown_at
        elif done == run.first + 1 or last or (done % self.every == 0 and now - self.shown_at >= self.pause):
            self._show(run, report, done)
            self.shown_at = now
        self.stepped = time.perf_counter()

    @hookimpl
    def measured(self, run: Run, values: Mapping[str, float]) -> None:
        """Show what was measured, above the bar."""
        if self.silent:
            return
        self._print(f"step {run.done}/{run.total} · {sentence(values)}")
        now = time.perf_counter()  # what measuring took is no part of the rates
        self.since, self.stepped = self.since + now - self.stepped, now

    @hookimpl(tryfirst=True)
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Leave the terminal as it was."""
        if self.bar:
            self.bar.stop()
            self.bar = None
        if not self.silent and len(self.bad) > NAMED:
            self._line("skipped", f"{len(self.bad)} samples in all, for reasons like those of the first {NAMED} above")

    def _start_bar(self, run: Run) -> None:
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.terminal, auto_refresh=False)
        self.task = self.bar.add_task("", total=run.total, completed=run.first)
        self.bar.start()

    def _show(self, run: Run, report: Report, done: int) -> None:
        values = readings(report)  # waits for the device, so that the clock below is right
        now = time.perf_counter()
        rates = [f"{much / (now - self.since):,.3g} {unit}/s" for unit, much in self.window.items()]
        self.since, self.window = now, Counter()
        facts = [f"{name} {value:.4g}" for name, value in values.items()]
        if self.bar:
            self.bar.readings = " · ".join([*facts, *rates, memory(run.device)])
            return
        left = (now - self.began) / (done - run.first) * (run.total - done)
        facts = [f"step {done}/{run.total}", *facts, *rates, f"{clock(left)} left", memory(run.device)]
        self._print(" · ".join(facts))

    def _print(self, text: str) -> None:
        self.terminal.print(Text(text), soft_wrap=not self.bar)  # above a bar, lines keep to the width of the terminal
        self.terminal.file.flush()

    def _line(self, label: str, text: str) -> None:
        if not self.terminal.is_terminal:  # a file gets whole lines, whatever their length
            self.terminal.print(Text(f"{label:<10}{text}"), soft_wrap=True)
            return
        line = Table.grid()
        line.add_column(width=10)
        line.add_column(overflow="fold")
        line.add_row(Text(label, "bold"), Text(text))
        self.terminal.print(line)

    def _name_bad(self, run: Run, report: Report) -> None:
        for index, reason in report.bad.items():
            if index in self.bad:
                continue
            self.bad.add(index)
            if len(self.bad) <= NAMED:
                self._line("skipped", f"{run.source.name(index)}: {reason}")


def opening(run: Run) -> list[tuple[str, str]]:
    """What a run is made of: (label, text) lines."""
    config, options = run.config, run.config["train"]
    trained = sum(p.numel() for p in run.objective.parameters() if p.requires_grad)
    parts = f"{config['modality']['name']}, {config['backbone']['name']}, {million(trained)} parameters"
    precision = options["precision"]
    if precision == "auto":
        precision = "bf16" if run.device.type == "cuda" else "fp32"
    several = f" x {distributed.world()} ({options['parallel']})" if distributed.world() > 1 else ""
    lines = [(config["objective"]["name"], f"{parts}, preset {config['preset']}")]
    lines += [("data" if not n else "", note) for n, note in enumerate(run.source.notes)]
    turns, of = run.total * run.batch / len(run.source), "windows" if isinstance(run.source, Endless) else "epochs"
    lines += [("train", f"{run.total:,} steps of {run.batch:,} samples, {turns:,.3g} {of}, seed {run.seed}")]
    describe = getattr(run.plugins.manager.get_plugin("optimizer"), "describe", None)
    lines += [("optimizer", str(describe(run.batch)))] if describe else []
    lines += [("device", f"{run.device}{several}, {precision}")]
    lines += [("folder", str(run.folder))] if run.folder else []
    if run.device.type == "cpu" and trained >= LARGE:
        ask = f"{million(trained)} parameters and {run.batch:,} samples a step ask much time and memory of a CPU"
        smaller = "--preset tiny is small, " if config["preset"] != "tiny" else ""
        lines += [("note", f"{ask}; {smaller}--batch N takes fewer")]
    return lines + [("note", note) for note in run.notes]


def million(count: int) -> str:
    """95012345 -> "95.0 M"; small numbers stay as they are."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def readings(report: Report) -> dict[str, float]:
    """The loss and the metrics, in one read of the device."""
    tensors = {"loss": report.loss, **report.metrics}
    values = torch.stack([t.detach().float().reshape(()) for t in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def sentence(values: Mapping[str, float]) -> str:
    """{"validation/loss": 1.9, "validation/accuracy": 0.5} -> "validation loss 1.9, accuracy 0.5"."""
    said: list[str] = []
    section = ""
    for name, value in values.items():
        before, (section, _, rest) = section, name.rpartition("/")
        said.append(f"{rest if section == before else f'{section} {rest}'} {value:.4g}")
    return ", ".join(said)


def memory(device: torch.device) -> str:
    """The most memory used so far: of the GPU, or of this process."""
    used = float(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else resident()
    return f"{used / 1e9:.3g} GB"


def resident() -> float:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def clock(seconds: float) -> str:
    """90 -> "1:30"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
