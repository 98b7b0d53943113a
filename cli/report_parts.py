"""What the page of `ssl report` says without the model: how the run went, its curves, recipe, data and environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from selfsup.kernel.errors import SelfsupError
from selfsup.plugins.common.charts import line_chart, short
from selfsup.plugins.common.page import Raw, cards, cite, facts, folded, listed, say, section, table, title
from selfsup.plugins.services.console import clock

from .explain import beside_paper, differs, shown
from .report_log import History
from .run_metrics import number

if TYPE_CHECKING:
    from selfsup.kernel.discovery import Plugins


def heading(log: History, paper: str) -> list[Raw]:
    """What was trained, and how it went."""
    names = [log.run.option(kind, "name") for kind in ("objective", "modality", "backbone")]
    about = f"{names[1]}, {names[2]}, preset {log.run.settings.get('preset', '?')}"
    sentence, good = ending(log)
    return [
        title(f"{names[0]}: {log.run.path.resolve().name}"),
        say(about, "soft"),
        *([cite(paper)] if paper else []),
        say(sentence, "" if good else "warn"),
        facts(_figures(log)),
    ]


def ending(log: History) -> tuple[str, bool]:
    """How the run ended, in a sentence, and whether that was as planned."""
    state, ended, total = log.run.state, log.outcome.get("ended"), log.run.total
    of = f"{log.done:,} of {total:,} steps" if total else f"{log.done:,} steps"
    if state == "running" or (state == "active" and not ended):
        return f"Going on: {of} so far.", True
    if ended == "done" or (total and log.done >= total and not ended):
        return f"Done: {of}.", True
    how = {None: "Interrupted", "failed": "Failed"}.get(ended, f"Stopped by {ended}")
    why = f": {log.outcome.get('error')}" if ended == "failed" else ""
    return f"{how} after {of}{why}. Go on with: ssl train --resume --out {log.run.path}", False


def _figures(log: History) -> dict[str, object]:
    """Steps, time, loss and throughput."""
    series, rates = log.series(), log.rates()
    out: dict[str, object] = {"steps": f"{log.done:,}"}
    taken = log.seconds()
    if taken:
        out["time in steps"] = clock(taken)
        for name, (_, values) in rates.items():
            # The mean over time, not over steps.
            known = [v for v in values if v]
            out[name] = short(float(f"{len(known) / sum(1 / v for v in known):.3g}")) if known else "-"
    if losses := [v for v in series.get("loss", ([], []))[1][-20:] if v is not None]:
        out[f"loss, mean of last {len(losses)}" if len(losses) > 1 else "loss"] = f"{sum(losses) / len(losses):.4g}"
    if memory := number(log.outcome.get("memory")):
        out["memory at most"] = f"{memory / 1e9:.3g} GB"
    for name, (_, values) in log.measured.items():
        if values and values[-1] is not None:
            out[name] = f"{values[-1]:.4g}"
    return out


def curves(log: History) -> Raw:
    """Everything that was logged, over the steps."""
    series = log.series()
    if not series:
        return section("Curves", say("Nothing was logged yet."))
    plain = {*log.measured, "learning rate"}
    charts = [line_chart(name, *both, smooth=name not in plain) for name, both in series.items()]
    note = say("Over steps: each value faint, the smoothed line strong; the number is where the line ends.", "note")
    return section("Curves", cards(charts), note)


def recipe(log: History, plugins: Plugins) -> Raw:
    """The settings beside the paper's; as they are where the plugins that they name are not installed."""
    from selfsup.kernel import compose

    size = log.data.get("samples")
    try:
        rows = beside_paper(plugins, compose.resolve(plugins, log.run.settings), size)
    except SelfsupError as why:
        flat = [(s, k, v) for s, own in log.run.settings.items() if isinstance(own, Mapping) for k, v in own.items()]
        listing = table(("", "this run"), [(f"{s}.{k}", shown(v)) for s, k, v in flat])
        return section("Recipe", say(f"It cannot be set beside the paper's: {why}", "warn"), listing)
    cells = [(f"{s}.{k}" if s else k, shown(run), shown(base)) for s, k, run, base in rows]
    marks = [differs(row) for row in rows]
    heads = ("", "this run", "paper")
    changed = [cell for cell, mark in zip(cells, marks, strict=True) if mark]
    parts = [
        say(f"{sum(marks)} of {len(rows)} settings differ from the paper's." if any(marks) else "As in the paper.")
    ]
    parts += [table(heads, changed)] if changed else []
    return section("Recipe", *parts, folded("all settings", table(heads, cells, marks)))


def data(log: History) -> Raw:
    """The first look at the data, and which samples could not be used."""
    notes, paths = log.data.get("notes") or [], log.run.option("data", "paths") or []
    parts = [listed([str(note) for note in notes or paths])] if notes or paths else [say("The built-in sample.")]
    if size := number(log.data.get("samples")):
        seen = log.done * log.batch
        of = "windows of" if log.run.option("data", "stream") else "times the"
        there = "each" if log.run.option("data", "stream") else "there are"
        parts.append(say(f"{seen:,.0f} samples seen: {seen / size:,.3g} {of} {size:,.0f} {there}."))
    return section("Data", *parts, *_skipped(log))


def _skipped(log: History) -> list[Raw]:
    count, reasons = number(log.outcome.get("skipped")), log.outcome.get("reasons")
    if count is None:
        return []
    if not count:
        return [say("Every sample that was read could be used.")]
    lines = [f"{name}: {why}" for name, why in reasons.items()] if isinstance(reasons, Mapping) else []
    more = "" if len(lines) >= count else f", the first {len(lines)} of them here"
    (one, was) = ("sample", "was") if count == 1 else ("samples", "were")
    return [say(f"{count:,.0f} {one} could not be used and {was} skipped{more}:", "warn"), listed(lines)]


def speed(log: History) -> Raw:
    """Throughput over the steps, and memory."""
    rates = log.rates()
    parts = [cards([line_chart(name, *both) for name, both in rates.items()])] if rates else []
    memory = number(log.outcome.get("memory"))
    device = log.environment.get("gpu") or log.environment.get("device", "the device")
    text = f"At most {memory / 1e9:.3g} GB of memory on the first process ({device})." if memory else (
        "How much memory it took is known when a run has ended."
    )  # fmt: skip
    return section("Speed and memory", *parts, say(text))


def environment(log: History) -> Raw:
    """Versions, machine, command and commit."""
    known = {k: v for k, v in log.environment.items() if k != "data" and v is not None}
    if not known:
        return section("Environment", say("environment.json is missing or damaged."))
    rows = [(key, _plain(value)) for key, value in known.items()]
    newest = log.run.checkpoint
    rows.append(("newest checkpoint", "none" if newest is None else f"step {newest:,}"))
    return section("Environment", table((), rows))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(own)}" for key, own in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return str(value)
