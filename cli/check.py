"""Take one step on a few samples and show shapes, loss and memory; write nothing."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from selfsup.kernel.errors import DivergedError

from .installed import plugins_of
from .selection import Asked, oversized, selection

if TYPE_CHECKING:
    from selfsup.kernel.config import Settings
    from selfsup.kernel.discovery import Plugins
    from selfsup.kernel.loop import Run

FEW = 8  # samples, where --batch does not say


@click.command()
@selection
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(context: click.Context, asked: Asked, as_json: bool) -> None:
    """Take one step on a few samples and show shapes, loss and memory; write nothing.

    Exits with 1 and the reason if something fails. --batch checks a whole batch instead of a few samples.
    """
    plugins = plugins_of(context)
    from selfsup.kernel import compose, distributed

    settings = compose.resolve(plugins, *asked.layers(plugins))
    batch = settings["train"]["batch"]
    run, found = _step(plugins, _small(settings, asked))
    run.notes += oversized(batch, len(run.source))

    if distributed.rank() == 0:
        if as_json:
            click.echo(json.dumps(found))
        else:
            _print(run, found)
    distributed.barrier()  # the process ends without leaving the group: see cli/main.py


def _small(settings: Settings, asked: Asked) -> Settings:
    """The settings asked for, but for one step, a few samples and no output."""
    settings["train"]["steps"] = 1
    if asked.flags["batch"] is None:
        settings["train"]["batch"] = min(FEW, settings["train"]["batch"])
    if "workers" in settings.get("data", {}):
        settings["data"]["workers"] = 0
    if "console" in settings:
        settings["console"]["style"] = "off"
    return settings


def _step(plugins: Plugins, settings: Settings) -> tuple[Run, dict[str, Any]]:
    from selfsup.kernel import compose, loop
    from selfsup.plugins.services.console import memory, readings

    from .outcome import Outcome

    outcome = Outcome()
    plugins.register(outcome, "outcome")
    run = compose.start(plugins, settings)
    for name in ("validation", "online"):  # their data could be opened; to measure on all of it may take long
        if plugins.manager.has_plugin(name):
            plugins.manager.unregister(name=name)
    found: dict[str, Any] = {"signals": shapes(run), "parameters": sizes(run)}
    loop.train(run)
    report = outcome.report
    if report is None or not bool(report.finite):
        raise DivergedError("the loss or the gradient of the first step is not finite")
    loss, *metrics = readings(report).items()
    return run, {
        **found,
        "loss": loss[1],
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics},
        "gradient_norm": float(report.norm),
        "no_gradient": [n for n, v in zip(run.parameter_names, report.norms.tolist(), strict=True) if v == 0],
        "memory": memory(run.device),
        "seconds": round(outcome.seconds, 3),
    }


def shapes(run: Run) -> dict[str, dict[str, Any]]:
    """What each signal of the first batch looks like: raw, and behind the tower of its name."""
    import torch

    from selfsup.kernel.contracts import Signal, Tower
    from selfsup.kernel.loader import to_device

    out: dict[str, dict[str, Any]] = {}
    batch = to_device(run.loader.read(0)[0], run.device)
    run.objective.eval()
    for name, signal in batch.items():
        if isinstance(signal, Signal):
            out[name] = {"raw": list(signal.x.shape), "dtype": str(signal.x.dtype).removeprefix("torch.")}
            tower = getattr(run.objective, name, None)
            if isinstance(tower, Tower):
                plain = tower.modality.plain(signal) if tower.modality else signal
                with torch.no_grad():
                    out[name]["tokens"] = list(tower(plain).x.shape)
    run.objective.train()
    return out


def sizes(run: Run) -> dict[str, int]:
    """How many parameters each part of the objective has."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in run.objective.named_children()}
    return {name: count for name, count in counts.items() if count}


def _print(run: Run, found: dict[str, Any]) -> None:
    from selfsup.plugins.services.console import opening

    lines = [line for line in opening(run) if line[0] not in ("train", "optimizer", "folder")]
    for name, signal in found["signals"].items():
        behind = f" -> tokens {signal['tokens']}" if "tokens" in signal else ""
        lines.append(("signal", f"{name}: raw {signal['raw']} {signal['dtype']}{behind}"))
    lines += [("part", f"{name}: {count:,} parameters") for name, count in found["parameters"].items()]
    metrics = "".join(f", {k} {'nan' if v is None else f'{v:.4g}'}" for k, v in found["metrics"].items())
    lines += [("loss", f"{found['loss']:.4g}{metrics}")]
    without = found["no_gradient"]
    idle = f"; none in {', '.join(without[:3])}{'...' if len(without) > 3 else ''}" if without else ""
    lines += [("gradient", f"norm {found['gradient_norm']:.4g}{idle}")]
    lines += [("memory", f"{found['memory']} at most, with {run.batch} samples a step")]
    lines += [("time", f"{found['seconds']:.3g} s to read the samples and take the step, the first of its process")]
    for label, text in [*lines, ("ok", "one step was taken; nothing was written")]:
        click.echo(f"{click.style(f'{label:<10}', bold=True)}{text}")
