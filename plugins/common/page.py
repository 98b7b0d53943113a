"""One HTML page that needs nothing else: no network, no script, light and dark, readable on a phone.

Whatever is put on it is escaped here; a `Raw` string was made by this code.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NewType

import numpy as np

from .charts import wave
from .pictures import fitted, png
from .seen import Seen

Raw = NewType("Raw", str)
LEAST, MOST = 96, 192  # pixels of the longer side of a picture
SHORT = 40  # characters of a text that stands beside pictures
LONGEST = 1_500  # characters of a text that are shown
ADDRESS = re.compile(r"https?://[\w./~#?=&%:+-]*[\w/]")

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #ffffff; --ink: #1c2430; --soft: #66707f; --edge: #dcdfe4;
  --accent: #2563a8; --raw: #a9c3e0; --mark: #ffe08a; --guess: #bfe8c5; --warn: #b3401a; --gap: #d6d9de; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --card: #1c2229; --ink: #e4e8ee; --soft: #98a3b3;
  --edge: #323a45; --accent: #74b0f0; --raw: #3d5a7a; --mark: #6b5410; --guess: #1f5a2f; --warn: #f0916b;
  --gap: #39414c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-top: 10px; border-top: 1px solid var(--edge); }
p { margin: 6px 0; max-width: 76ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
code, .code { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.soft, .note { color: var(--soft); } .note { font-size: 12.5px; margin: 4px 0 0; } .warn { color: var(--warn); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px; margin: 16px 0; }
.fact { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 8px 12px; min-width: 0; }
.fact span { display: block; overflow-wrap: anywhere; color: var(--soft); font-size: 12.5px; }
.fact b { font-size: 18px; overflow-wrap: anywhere; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 12px; }
.card, .sample { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 12px;
  margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 14px; margin-bottom: 4px;
  overflow-wrap: anywhere; }
figcaption b { flex: none; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
.grid { stroke: var(--edge); } .raw, .line { fill: none; stroke-linejoin: round; }
.raw { stroke: var(--raw); stroke-width: 1; } .line { stroke: var(--accent); stroke-width: 1.8; }
.dot { fill: var(--accent); } .bad { stroke: var(--warn); stroke-width: 1.5; }
.wave { height: 64px; } .wave path { fill: var(--accent); stroke: var(--accent); stroke-width: 1; }
.gap { fill: var(--gap); }
.scatter { max-width: 420px; margin: 0 auto; } .scatter circle { fill-opacity: .75; }
.hue { fill: var(--soft); background: var(--soft); }
HUES
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; margin: 8px 0; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 5px; }
.samples { display: flex; flex-wrap: wrap; gap: 10px; } .samples .sample { flex: 1 1 100%; }
.samples .narrow { flex: 1 1 min(500px, 100%); }
.sample > p { font-size: 12.5px; color: var(--soft); margin: 0 0 6px; }
.seen { display: flex; flex-wrap: wrap; gap: 12px; }
.seen figure { margin: 0; min-width: 0; max-width: 100%; } .seen .wide { flex: 1 1 300px; }
.seen figcaption { font-size: 12.5px; color: var(--soft); }
.narrow .seen { display: grid; grid-template-columns: repeat(auto-fit, minmax(88px, 1fr)); }
.narrow figure { display: flex; flex-direction: column; } .narrow .seen figcaption { flex: 1; }
.seen img { display: block; width: 100%; max-width: 224px; height: auto; border-radius: 4px; }
.pixels { image-rendering: pixelated; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-width: none; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 2px; }
mark.guess { background: var(--guess); border-bottom: 2px solid currentColor; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 3px 14px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; } tr + tr td { border-top: 1px solid var(--edge); }
td:first-child { min-width: 8em; }
tr.differs td { background: color-mix(in srgb, var(--mark) 45%, transparent); }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
ul { padding-left: 20px; margin: 6px 0; } li { overflow-wrap: anywhere; }
"""
HUES = ("#3b78c2", "#e0812b", "#3f9b52", "#cc4646", "#8a63b8", "#8c6450", "#d673b0", "#7f8791", "#a9a531", "#2fa8b8")
STYLE = STYLE.replace("HUES", " ".join(f".hue-{n} {{ fill: {hue}; background: {hue}; }}" for n, hue in enumerate(HUES)))


def page(name: str, parts: Sequence[Raw]) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def title(text: str) -> Raw:
    """The heading of the page."""
    return Raw(f"<h1>{escape(text)}</h1>")


def section(name: str, *parts: Raw) -> Raw:
    """A heading, and what stands below it."""
    anchor = re.sub(r"\W+", "-", name.lower()).strip("-")
    return Raw(f'<section id="{anchor}"><h2>{escape(name)}</h2>\n' + "\n".join(parts) + "</section>")


def say(text: object, kind: str = "") -> Raw:
    """A paragraph."""
    return Raw(f"<p{_class(kind)}>{escape(str(text))}</p>")


def cite(text: str) -> Raw:
    """A paragraph whose web addresses can be followed."""
    made, end = "", 0
    for found in ADDRESS.finditer(text):
        address = escape(found[0])
        made += f'{escape(text[end : found.start()])}<a href="{address}" rel="noreferrer">{address}</a>'
        end = found.end()
    return Raw(f'<p class="soft">{made}{escape(text[end:])}</p>')


def facts(values: Mapping[str, object]) -> Raw:
    """A few figures that are seen first."""
    made = "".join(
        f'<div class="fact"><span>{escape(name)}</span><b>{escape(str(value))}</b></div>'
        for name, value in values.items()
    )
    return Raw(f'<div class="facts">{made}</div>')


def cards(figures: Sequence[str]) -> Raw:
    """Figures side by side, as many as fit."""
    return Raw(f'<div class="grid-of">{"".join(figures)}</div>')


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], differs: Sequence[bool] = ()) -> Raw:
    """Rows of texts; those that differ are marked."""
    head = "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    marks = differs or [False] * len(rows)
    body = "".join(
        f"<tr{_class('differs' if marked else '')}>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for row, marked in zip(rows, marks, strict=True)
    )
    return Raw(f'<div class="scroll"><table>{head}{body}</table></div>')


def listed(texts: Sequence[str]) -> Raw:
    """A list."""
    return Raw("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")


def folded(summary: str, *parts: Raw) -> Raw:
    """What is shown on demand."""
    return Raw(f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>")


def legend(names: Mapping[str, str]) -> Raw:
    """What the colours mean: {class of the colour: name}."""
    made = "".join(f'<span><i class="{hue}"></i>{escape(name)}</span>' for hue, name in names.items())
    return Raw(f'<div class="legend">{made}</div>')


def samples(seen: Seen) -> Raw:
    """Each sample, and what training makes of it, by caption."""
    return Raw(f'<div class="samples">{"".join(_sample(n, seen.of(p)) for p, n in enumerate(seen.names))}</div>')


def _sample(name: str, values: Mapping[str, Any]) -> str:
    broad = [caption for caption, value in values.items() if _is_broad(value)]
    made = "".join(
        f"<figure{_class('wide' if caption in broad else '')}>"
        f"<figcaption>{escape(caption)}</figcaption>{shown(value)}</figure>"
        for caption, value in values.items()
    )
    kind = "sample" if broad else "sample narrow"
    return f'<div class="{kind}"><p>{escape(name)}</p><div class="seen">{made}</div></div>'


def _is_broad(value: Any) -> bool:
    """Whether it takes the width that it is given, unlike pictures and short texts."""
    return len(value) > SHORT if isinstance(value, str) else not is_picture(value)


def is_picture(value: Any) -> bool:
    """Whether a `Shown` is one."""
    return isinstance(value, np.ndarray) and value.ndim == 3


def is_curve(value: Any) -> bool:
    """Whether a `Shown` is one."""
    return isinstance(value, np.ndarray) and value.ndim == 1


def shown(value: Any) -> Raw:
    """A text, marked text, picture or curve of the contract (`Shown`)."""
    if isinstance(value, str):
        cut = value[:LONGEST] + (" …" if len(value) > LONGEST else "")
        return say(cut, "text")
    if is_picture(value):
        return picture(value)
    if is_curve(value):
        return Raw(wave(value))
    made, left = "", LONGEST
    for text, mark in value:
        words = escape(text[:left])
        made += f'<mark class="{escape(mark)}">{words}</mark>' if mark else words
        left -= len(text)
        if left <= 0:
            made += " …"
            break
    return Raw(f'<p class="text">{made}</p>')


def picture(pixels: Any) -> Raw:
    """A picture in the page itself."""
    kind = "pixels" if max(pixels.shape[:2]) < LEAST else ""  # so small that each can be seen
    pixels = fitted(pixels, LEAST, MOST)
    height, width, _ = pixels.shape
    data = b64encode(png(pixels)).decode()
    return Raw(f'<img{_class(kind)} width="{width}" height="{height}" alt="" src="data:image/png;base64,{data}">')


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
