"""The chart of `ssl bench ops`: for each case, how near everyone comes to what the machine allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .bench_run import BARE, COMPILED, EAGER, Result, Row

BLUE, GREY, DARK, PALE, INK, SOFT = "#2563a8", "#b9c0ca", "#7d8896", "#d9e4f0", "#1c2430", "#66707f"
COLOURS = {EAGER: DARK, COMPILED: DARK, BARE: PALE}
BAR, GAP, MARGIN = 0.19, 0.12, 1.1  # inches
MOST = 1.1  # of the limit; a short case may seem to pass it


def draw(out: Path, about: dict[str, Any], results: Sequence[Result]) -> None:
    """One group of bars a case, ours first; the text at the end of a bar is its time."""
    drawn = [(result, [row for row in result.rows if row.times]) for result in results]
    height = sum((len(rows) + 1) * BAR + GAP for _, rows in drawn)
    whole = height + MARGIN
    figure = Figure((8, whole))
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0.2, 0.4 / whole, 0.72, height / whole))
    place = 0.0
    for result, rows in drawn:
        across: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "fontsize": 8, "va": "center"}
        axis.text(-0.01, place, result.case.op, color=INK, fontweight="bold", ha="right", **across)
        axis.text(0.01, place, result.case.shape, color=SOFT, **across)
        for row in rows:
            place += BAR
            _bar(axis, place, result, row)
        place += BAR + GAP
    _dress(axis, place - GAP, about)
    kind = "" if about["gpu"] else "\nfigures of a CPU, which say nothing about a GPU"
    machine = f"{about['device']}, {about['dtype']}{kind}"
    title = f"Time that the machine must take at least, as a share of the time taken\n{machine}"
    figure.text(0.02, 1 - 0.1 / whole, title, fontsize=9, color=INK, va="top")
    figure.savefig(out, dpi=130, facecolor="white")


def _bar(axis: Any, place: float, result: Result, row: Row) -> None:
    of = min(result.share(row) or 0.0, MOST)
    mine = row.ours
    axis.barh(place, of, BAR * 0.82, color=BLUE if mine else COLOURS.get(row.name, GREY))
    graph = " in a graph" if row.times and row.replay and row.replay < row.times.median else ""
    small: dict[str, Any] = {"fontsize": 6.5, "va": "center"}
    axis.text(of + 0.008, place, f"{row.least:.3g} ms{graph}", color=BLUE if mine else SOFT, **small)
    axis.text(-0.01, place, row.name, ha="right", color=INK, fontweight="bold" if mine else "normal", **small)


def _dress(axis: Any, last: float, about: dict[str, Any]) -> None:
    axis.set_ylim(last, -BAR)
    axis.set_xlim(0, MOST + 0.12)
    axis.set_yticks([])
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.tick_params(labelsize=7, colors=SOFT, length=0)
    axis.grid(axis="x", color="#e6e9ee", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)
    if limits := about["ceilings"]:
        reached = f"{limits['flops'] / 1e12:.3g} TFLOP/s and {limits['bytes'] / 1e9:.4g} GB/s"
        axis.set_xlabel(f"100 %: {reached}, measured in the same run", fontsize=7, color=SOFT)
