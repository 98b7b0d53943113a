"""What was measured, for people: lines on the terminal, `ops.json`, and `ops.png`."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .bench_measure import Ceilings
from .bench_run import BARE, OURS, Result, Row

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "memeff",
    "inf-cl",
    "kornia",
)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; its time says nothing of a GPU's."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def about(place: torch.device, kind: torch.dtype, shapes: str, limits: Ceilings | None) -> dict[str, Any]:
    """The machine, the versions and the command."""
    gpu = place.type == "cuda"
    device = (
        torch.cuda.get_device_name(place) if gpu else f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
    )
    here = str(Path(__file__).parent)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "gpu": gpu,
        "shapes": shapes,
        "interpreted": interpreted(),
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "commit": _said_by("git", "-C", here, "rev-parse", "HEAD"),
        "changed": bool(_said_by("git", "-C", here, "status", "--porcelain")),
        "command": ["ssl", *sys.argv[1:]],
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "dtype": str(kind).removeprefix("torch."),
        "ceilings": asdict(limits) if limits else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _said_by(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def opening(found: dict[str, Any]) -> str:
    """What the figures are of."""
    lines = [f"{found['device']}, {found['dtype']}, torch {torch.__version__}"]
    if found["interpreted"]:
        lines.append("Triton's interpreter runs the kernels: they are checked, and nothing is timed.")
    elif not found["gpu"]:
        lines.append("These are figures of a CPU. They say nothing about the speed of a GPU.")
    if found["shapes"] == "small" and not found["interpreted"]:
        lines.append("At small shapes the time is that of calling, more than that of computing.")
    if limits := found["ceilings"]:
        lines.append(
            f"measured here: {limits['flops'] / 1e12:.3g} TFLOP/s in one large matrix product, "
            f"{limits['bytes'] / 1e9:.4g} GB/s in one large copy"
        )
    return "\n".join(lines)


WIDE = 110  # columns, where no terminal says how many there are


def say(result: Result, timed: bool) -> None:
    """A table of one case, and below it what there is to say of its rows."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = ("error", *(("ms", "+-", "replay", "x ours", "of limit", "MB") if timed else ()))
    grid.add_column("", no_wrap=True, min_width=22)
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    notes: dict[str, list[str]] = {}
    for row in result.rows:
        if row.error is not None or row.times is not None:
            error = "" if row.error is None else f"{row.error:.1e}"
            style = "" if row.state == "ok" else "red" if row.ours else "dim"
            grid.add_row(*(Text(cell, style) for cell in (row.name, error, *(_figures(result, row) if timed else []))))
        if row.note:
            notes.setdefault(row.note if row.state in ("ok", "wrong") else f"{row.state}: {row.note}", []).append(
                row.name
            )
    console.print(Text(result.case.name, "bold"), *([grid] if grid.row_count else []), sep="\n")
    for note, names in notes.items():
        bad = any(Row(name).ours for name in names) and result.failing()
        console.print(Text(f"  {'; '.join(names)}: {note}", "red" if bad else "dim"), soft_wrap=True)
    console.print()


def _figures(result: Result, row: Row) -> list[str]:
    """Median, half the distance between quartiles, and what follows from them."""
    if row.times is None:
        return [""] * 6
    ours, of = result.row(OURS), result.share(row)
    ratio = row.times.median / ours.times.median if ours and ours.times else None
    return [
        f"{row.times.median:.4g}",
        f"{(row.times.high - row.times.low) / (2 * row.times.median):.0%}",
        "" if row.replay is None else f"{row.replay:.4g}",
        "" if ratio is None else f"{ratio:.3g}",
        "" if of is None else f"{of:.0%}",
        "" if row.memory is None else f"{row.memory / 2**20:.4g}",
    ]


def close(results: Sequence[Result]) -> None:
    """A line for each case: ours, and the quickest of the others."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("")
    for head in ("ours, ms", "of limit", "quickest other", "x ours", "memory x ours"):
        grid.add_column(head, justify="right", no_wrap=True)
    for result in results:
        mine = _quickest(row for row in result.rows if row.ours)
        other = _quickest(row for row in result.rows if not row.ours and row.name != BARE)
        if mine is None:
            grid.add_row(result.case.name, Text((result.row(OURS) or Row(OURS, "failed")).state, "red"))
            continue
        of = result.share(mine)
        cells = [result.case.name, f"{mine.least:.4g}", "" if of is None else f"{of:.0%}"]
        if other is not None:
            memory = f"{other.memory / mine.memory:.3g}" if other.memory and mine.memory else ""
            cells += [other.name, f"{other.least / mine.least:.3g}", memory]
        grid.add_row(*cells)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    console.print(grid)


def _quickest(rows: Iterable[Row]) -> Row | None:
    timed = [row for row in rows if row.times is not None]
    return min(timed, key=lambda row: row.least, default=None)


def plain(result: Result) -> dict[str, Any]:
    """A case as JSON holds it; what is not finite is null."""
    case = result.case
    rows = []
    for row in result.rows:
        figures = asdict(row) | {"of_floor": result.share(row)}
        rows.append({key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in figures.items()})
    floor = {"flops": case.flops, "bytes": case.least, "ms": result.floor}
    return {"op": case.op, "shape": case.shape, "floor": floor, "rows": rows}


def write(folder: Path, found: dict[str, Any], results: Sequence[Result]) -> None:
    """`ops.json`, whole after every case."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**found, "cases": [plain(result) for result in results]}, indent=1, allow_nan=False)
    part = folder / "ops.json.part"
    part.write_text(text + "\n", "utf-8")
    part.replace(folder / "ops.json")


def drawn(folder: Path, found: dict[str, Any], results: Sequence[Result]) -> str:
    """Draw `ops.png` if there is anything to draw and something to draw with; say what was written."""
    kept = [result for result in results if any(row.times for row in result.rows)]
    if not kept:
        return f"written: {folder / 'ops.json'}"
    try:
        from .bench_chart import draw
    except ImportError:
        return f"written: {folder / 'ops.json'}; for a chart: pip install matplotlib"
    draw(folder / "ops.png", found, kept)
    return f"written: {folder / 'ops.json'}, {folder / 'ops.png'}"
