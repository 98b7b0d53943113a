"""Charts as SVG without a library: curves over steps, waveforms, and scatter plots. They take the page's colours.

Curves over steps show the values (of very many, the least and largest of each of `COLUMNS` parts) behind a line
that is smoothed by a Gaussian of 2 % of the steps. The axis leaves out the most extreme 1 % where that more than
halves what it spans; the chart says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from .pictures import Curve, envelope, limits, spans

Values = np.ndarray[Any, np.dtype[np.float64]]
WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 20
COLUMNS = 280
SMOOTHED = 0.02  # of the steps
MANY = 200  # values, of which 1 % may be left out
DOTS = 60  # curves of fewer values show each


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about `count`, from `low` to `high`."""
    rough = (high - low) / count
    if not rough > 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda one: abs(math.log(one / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """12500 -> "12.5k"; 0.00012 -> "1.2e-4"."""
    if value == 0:
        return "0"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.4g}{unit}"
    text = f"{value:.4g}"
    if abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        text = f"{float(digits):g}e{int(power)}"
    return text


def smoothed(steps: Values, values: Values) -> tuple[Values, Values]:
    """The values under a Gaussian, at no more than `COLUMNS` steps: (steps, values)."""
    width = SMOOTHED * max(float(steps[-1] - steps[0]), 1.0)
    at = np.linspace(steps[0], steps[-1], min(len(steps), COLUMNS))
    out = np.empty(len(at))
    for place, step in enumerate(at):
        first, last = np.searchsorted(steps, [step - 4 * width, step + 4 * width + 1e-9])
        weights = np.exp(-0.5 * ((steps[first:last] - step) / width) ** 2)
        out[place] = np.average(values[first:last], weights=weights) if weights.sum() > 0 else np.nan
    return at, out


def span(values: Values) -> tuple[float, float, int]:
    """What the axis shows, and how many values lie beyond."""
    low, high = float(values.min()), float(values.max())
    if len(values) >= MANY:
        ordered, left_out = np.sort(values), len(values) // 200
        least, most = float(ordered[left_out]), float(ordered[-1 - left_out])
        if most - least < 0.5 * (high - low):
            low, high = least, most
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - margin, high + margin
    return low, high, int(((values < low) | (values > high)).sum())


def line_chart(name: str, steps: Sequence[float], values: Sequence[float | None], *, smooth: bool = True) -> str:
    """One chart of values over steps; None is a value that was not finite."""
    known = np.array([v is not None and math.isfinite(v) for v in values], bool)
    x, y = np.array(steps, float), np.array([math.nan if v is None else v for v in values], float)
    if not known.any():
        return _figure(name, "", f"none of {len(y)} values is finite", "")
    low, high, beyond = span(y[known])
    first, last = float(x[0]), float(x[-1])
    if first == last:
        first, last = first - 0.5, last + 0.5
    axes = _Axes(first, last, low, high)
    raw = _path(axes, *_thinned(x, np.where(known, y, np.nan)))
    few, plain = int(known.sum()) <= DOTS, int(known.sum()) <= DOTS or not smooth
    lines = f'<path class="{"line" if plain else "raw"}" d="{raw}"/>'
    final = float(y[known][-1])
    if few:
        lines += "".join(
            f'<circle class="dot" cx="{axes.x(a):.1f}" cy="{axes.y(b):.1f}" r="2"/>'
            for a, b in zip(x[known], y[known], strict=True)
        )
    if not plain:
        at, soft = smoothed(x[known], y[known])
        final = float(soft[-1])
        lines += f'<path class="line" d="{_path(axes, at, soft)}"/>'
    lines += "".join(f'<path class="bad" d="M{axes.x(a):.1f} {HEIGHT - BOTTOM}v-8"/>' for a in x[~known][:COLUMNS])
    notes = [f"{beyond:,} of {len(y):,} values lie beyond the axis"] if beyond else []
    notes += [f"{int((~known).sum()):,} values are not finite"] if not known.all() else []
    return _figure(name, short(final), "; ".join(notes), _svg(name, axes, lines))


class _Axes(NamedTuple):
    """From values to places in the drawing."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _thinned(x: Values, y: Values) -> tuple[Values, Values]:
    """The same curve of few points: the least and largest value of each part."""
    if len(x) <= 2 * COLUMNS:
        return x, y
    low, high = envelope(y, COLUMNS)
    at = np.linspace(x[0], x[-1], len(low))
    return at.repeat(2), np.stack([low, high], 1).ravel()


def _path(axes: _Axes, x: Values, y: Values) -> str:
    """Lines between neighbours that are both there."""
    parts = []
    for first, last in spans(np.isfinite(y)):
        points = " ".join(f"{axes.x(a):.1f} {axes.y(b):.1f}" for a, b in zip(x[first:last], y[first:last], strict=True))
        parts.append(f"M{points}" + ("h.1" if last - first == 1 else ""))
    return "".join(parts)


def _svg(name: str, axes: _Axes, lines: str) -> str:
    across = [tick for tick in ticks(axes.first, axes.last) if axes.first <= tick <= axes.last]
    up = [tick for tick in ticks(axes.low, axes.high) if axes.low <= tick <= axes.high]
    marks = "".join(
        f'<path class="grid" d="M{LEFT} {axes.y(t):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 5}" y="{axes.y(t) + 3.5:.1f}" text-anchor="end">{short(t)}</text>'
        for t in up
    )
    for tick in across:
        at = axes.x(tick)
        side = "end" if at > WIDTH - 24 else "middle"
        marks += f'<text x="{min(at, WIDTH - RIGHT):.1f}" y="{HEIGHT - 5}" text-anchor="{side}">{short(tick)}</text>'
    box = f"{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}"
    inner = (
        f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" viewBox="{box}">'
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} over steps">'
        f"{marks}{inner}{lines}</svg></svg>"
    )


def _figure(name: str, final: str, note: str, drawing: str) -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="card"><figcaption>{escape(name)}<b>{final}</b></figcaption>{drawing}{said}</figure>'


def wave(curve: Curve, columns: int = 320, height: int = 56) -> str:
    """A curve [N] without axes; a grey band where it has nothing."""
    low, high = envelope(np.asarray(curve, float), columns)
    bottom, top = limits(curve)
    scale = (height - 4) / (top - bottom)
    count, wide = len(low), columns / len(low)
    gaps = "".join(
        f'<rect class="gap" x="{a * wide:.1f}" y="0" width="{(b - a) * wide:.1f}" height="{height}"/>'
        for a, b in spans(np.isnan(low))
    )
    floor = 2 + (top - max(bottom, 0.0)) * scale
    strokes: list[str] = []
    for first, last in spans(np.isfinite(low)):
        if count == len(curve):  # few values: a bar each, from 0
            bars = (f"M{n * wide:.1f} {floor:.1f}V{2 + (top - low[n]) * scale:.1f}h{wide:.1f}V{floor:.1f}z"
                    for n in range(first, last))  # fmt: skip
            strokes += bars
            continue
        x = [(place + 0.5) * wide for place in range(first, last)]
        over = [f"{a:.1f} {2 + (top - b) * scale:.1f}" for a, b in zip(x, high[first:last], strict=True)]
        under = [f"{a:.1f} {2 + (top - b) * scale:.1f}" for a, b in zip(x, low[first:last], strict=True)]
        strokes.append("M" + " ".join(over + under[::-1]) + "z")
    return (
        f'<svg class="wave" viewBox="0 0 {columns} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="curve of {len(curve)} values">{gaps}<path d="{"".join(strokes)}"/></svg>'
    )


def scatter(title: str, points: Values, labels: Sequence[int], side: int = 300) -> str:
    """Points [N, 2] on equal axes; label n has the class `hue-n`, -1 the class `hue`."""
    low, high = points.min(0), points.max(0)
    middle, reach = (low + high) / 2, float((high - low).max()) or 1.0
    places = (points - middle) / reach * (side - 16) + side / 2
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{side - y:.1f}" r="3" class="{f"hue-{label}" if label >= 0 else "hue"}"/>'
        for (x, y), label in zip(places, labels, strict=True)
    )
    drawing = f'<svg class="scatter" viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title)}">{dots}</svg>'
    return f'<figure class="card"><figcaption>{escape(title)}</figcaption>{drawing}</figure>'
