"""What a run leaves for people beside its checkpoints: `run.toml`, `environment.json`, and `outcome.json` at its end.

    {"ended": "done" | "SIGTERM" | "failed" ..., "error": null | why it failed, "steps": 100, "of": 100, "loss": 2.1,
     "seconds": 8.5, "samples_per_second": 940.0, "memory": bytes at most, "skipped": how many samples,
     "reasons": {sample: why it could not be used} of the first few}

`seconds` and the rate are of the last process that worked on the run. No outcome: the run goes on, or was killed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfsup.kernel import distributed
from selfsup.kernel.config import to_toml
from selfsup.kernel.discovery import SINGULAR
from selfsup.kernel.errors import ConfigError, SelfsupError, StateError
from selfsup.kernel.hookspecs import hookimpl
from selfsup.plugins.services.console import resident

if TYPE_CHECKING:
    from selfsup.kernel.config import Settings
    from selfsup.kernel.discovery import Plugins
    from selfsup.kernel.loop import Report, Run


ENVIRONMENT, OUTCOME = "environment.json", "outcome.json"
NAMED = 20  # samples that could not be used, in the outcome


class Outcome:
    """A service that keeps the newest report, unread until the run ends, and the time that the steps took.

    On the first process it leaves `outcome.json` in the folder of the run.
    """

    def __init__(self) -> None:
        self.report: Report | None = None
        self.began = self.seconds = 0.0

    @hookimpl(trylast=True)
    def run_started(self, run: Run) -> None:
        """Start the clock; how the run ended before is history."""
        self.began = time.perf_counter()
        if run.folder and distributed.rank() == 0 and run.first < run.total:
            with suppress(OSError):
                (run.folder / OUTCOME).unlink(missing_ok=True)

    @hookimpl(tryfirst=True)  # before a service that may stop the run
    def step_finished(self, report: Report) -> None:
        """Keep it."""
        self.report = report

    @hookimpl(tryfirst=True)  # before the last checkpoint is written
    def run_finished(self, run: Run, error: BaseException | None) -> None:
        """Stop the clock, when the device is done too, and write how it went."""
        if self.report is not None and error is None:
            self.report.loss.item()
        self.seconds = time.perf_counter() - self.began
        if run.folder and distributed.rank() == 0 and (self.report or error):
            with suppress(OSError):  # a full disk, say, is no reason to end otherwise
                _replace(run.folder / OUTCOME, json.dumps(self._told(run, error), indent=1) + "\n")

    def _told(self, run: Run, error: BaseException | None) -> dict[str, Any]:
        figures: dict[str, Any] = {"loss": None, "seconds": rounded(self.seconds), "samples_per_second": None}
        if error is None:  # after one, a GPU may not even be read
            figures = self.figures(run)
        why = None if error is None else str(error) if isinstance(error, SelfsupError) else repr(error)
        return {
            "ended": "failed" if error else run.reason or "done",
            "error": why,
            "steps": run.done,
            "of": run.total,
            **figures,
            "memory": torch.cuda.max_memory_reserved(run.device) if run.device.type == "cuda" else resident(),
            "skipped": len(run.skipped),
            "reasons": {run.source.name(index): reason for index, reason in list(run.skipped.items())[:NAMED]},
        }

    def figures(self, run: Run) -> dict[str, Any]:
        """The last loss and the rate over all steps of this process, to the digits that mean something."""
        if self.report is None:
            return {"loss": None, "seconds": 0.0, "samples_per_second": None}
        loss, count = float(self.report.loss), run.done - run.first
        return {
            "loss": rounded(loss) if math.isfinite(loss) else None,
            "seconds": rounded(self.seconds),
            "samples_per_second": rounded(run.batch * count / max(self.seconds, 1e-9)),
        }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def write_facts(run: Run, folder: Path, weights_from: Path | None) -> None:
    """Write what the run runs on and began with, and last the settings, by which a folder is known to hold a run."""
    # The number of steps is written even where epochs gave it, so that going on needs no second guess.
    settings = {**run.config, "train": {**run.config["train"], "steps": run.total}}
    try:
        data = {"samples": len(run.source), "notes": list(run.source.notes)}
        facts = {**environment(run), "data": data, "from": str(weights_from.absolute()) if weights_from else None}
        _replace(folder / ENVIRONMENT, json.dumps(facts, indent=1) + "\n")
        for name, text in found_in_data(run).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _replace(folder / name, text)
        _replace(folder / "run.toml", to_toml(settings))
    except OSError as cause:
        raise StateError(f"the run folder {folder} cannot be written: {cause.strerror}") from None


def found_in_data(run: Run) -> dict[str, str]:
    """What modalities learned, such as tokenizers, by file name; below the tower's name where several did."""
    kinds = {id(kind): (tower, kind) for tower, kind in run.loader.reader.modalities.items()}  # towers may share one
    learned = [(tower, kind.files()) for tower, kind in kinds.values() if kind.files()]
    several = len(learned) > 1
    return {f"{tower}/{name}" if several else name: text for tower, files in learned for name, text in files.items()}


def began_with(folder: Path) -> Path | None:
    """The run whose weights the run in a folder began with."""
    try:
        found = json.loads((folder / ENVIRONMENT).read_text("utf-8"))["from"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Path(found) if found else None


def owners(plugins: Plugins, config: Settings) -> dict[str, str]:
    """{"objective simclr": "selfsup 0.1.0"} of all that settings name."""
    used = {(kind, config[SINGULAR[kind]]["name"]) for kind in ("objectives", "modalities", "backbones")}
    for own in config["towers"].values():
        used |= {("modalities" if section == "modality" else "backbones", o["name"]) for section, o in own.items()}
    used |= {("services", name) for name in plugins.names("services") if name in config}
    there = sorted((kind, name) for kind, name in used if plugins.claims(kind, name))
    return {f"{SINGULAR[kind]} {name}": plugins.find(kind, name).distribution for kind, name in there}


def refuse_others(folder: Path, plugins: Plugins, config: Settings) -> None:
    """Refuse to go on with a run whose plugins are of other distributions than when it began."""
    try:
        began = json.loads((folder / ENVIRONMENT).read_text("utf-8"))["plugins"].items()
    except (OSError, ValueError, KeyError, AttributeError):
        return
    now = owners(plugins, config)
    for name, owner in began:
        kind, _, bare = name.partition(" ")
        if name in now and now[name].split()[0] != str(owner).split()[0]:
            raise ConfigError(
                f"the {kind} {bare!r} was of {owner} when this run began and is of {now[name]} now; to go on, hide "
                f"that one: SELFSUP_DISABLE={now[name].split()[0]}:{bare}"
            )


def environment(run: Run) -> dict[str, Any]:
    """What the run runs on: versions, plugins, machine, command line, commit."""
    gpu = {"gpu": torch.cuda.get_device_name(run.device)} if run.device.type == "cuda" else {}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "selfsup": version("selfsup"),
        "plugins": owners(run.plugins, run.config),
        "platform": platform.platform(),
        "device": str(run.device),
        **gpu,
        "processes": distributed.world(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of the current folder, with "-dirty" where files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(text, "utf-8")
    work.replace(path)
