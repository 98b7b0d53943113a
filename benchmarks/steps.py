"""Whole steps of training on a GPU, of everything here, beside the best-known other code.

    python benchmarks/steps.py [NAME ...] --device cuda [--limit SECONDS] [--out FOLDER]

A name is one of `CONTESTS`, or what it begins with. Each contest runs in a process of its own, so that one that breaks
the GPU breaks no other, and may take its share of the time that is left; what it has found by then is kept. Figures go
to steps.json; how they are measured is in `steps_measure.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from children import GRACE, Child
from steps_show import table

HERE = Path(__file__).parent
# name -> objective, size, samples of a step, size in little; the most telling first, in case the time is over
CONTESTS = {
    "gpt": ("gpt", "long", 32, "tiny"),
    "bert-512": ("bert", "long", 64, "tiny"),
    "mae-base": ("mae", "base", 256, "tiny"),
    "simclr-resnet50": ("simclr", "resnet50", 256, "tiny"),
    "wav2vec2": ("wav2vec2", "long", 16, "tiny"),
    "simclr-vit": ("simclr", "vit", 256, "tiny-vit"),
    "bert-128": ("bert", "base", 256, "tiny"),
    "mae-large": ("mae", "large", 128, "tiny"),
}
SPARE = 1.6  # times its even share of the time that a contest may take: most take less


def merged(a: Any, b: Any) -> Any:
    """Dicts by key, lists one after the other; otherwise the later one."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {**a, **{key: merged(a[key], value) if key in a else value for key, value in b.items()}}
    return a + b if isinstance(a, list) and isinstance(b, list) else b


def pieces(command: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """What a contest finds; at the end how it ended, if that is not well."""
    child = Child(command, seconds)
    for line in child:
        if line.startswith("{"):
            yield json.loads(line)
    if child.over:
        yield {"notes": [f"stopped after {seconds:.0f} s: the time given was over"]}
    elif child.code:
        yield {"notes": [f"ended with {child.code}: {child.complaint}"], "broke": True}


def measured(name: str, args: argparse.Namespace, seconds: float) -> Iterator[dict[str, Any]]:
    """All that is known of a contest, after every piece."""
    objective, size, batch, little = CONTESTS[name]
    gpu = args.device != "cpu"
    given = {"--size": size if gpu else little, "--batch": batch if gpu else 4, "--device": args.device}
    given |= {
        "--threads": 8 if gpu else 1,
        "--backend": "inductor" if gpu else "",
        "--seconds": max(1.0, seconds - GRACE),
    }
    options = [str(part) for pair in given.items() for part in pair]
    found: dict[str, Any] = {"contest": name, "size": given["--size"]}
    for piece in pieces([sys.executable, str(HERE / "train.py"), objective, *options], seconds):
        found = merged(found, piece)
        yield found
    yield found


def chosen(names: list[str]) -> list[str]:
    for name in names:
        if not any(known.startswith(name) for known in CONTESTS):
            sys.exit(f"steps.py: there is no contest {name!r}; known: {', '.join(CONTESTS)}")
    return [known for known in CONTESTS if not names or known.startswith(tuple(names))]


def write(out: Path | None, results: list[dict[str, Any]]) -> None:
    if out:
        (out / "steps.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(CONTESTS))
    parser.add_argument("--device", default="cuda", help="cpu tries everything in little")
    parser.add_argument("--limit", type=float, default=540, help="seconds of all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names, end = chosen(args.names), time.monotonic() + args.limit
    results: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        left = end - time.monotonic()
        found = {"contest": name, "notes": ["left out: the time given was over"]}
        if left > 2 * GRACE:
            for found in measured(name, args, min(left - GRACE, SPARE * left / (len(names) - number))):
                write(args.out, [*results, found])
        results.append(found)
        write(args.out, results)
        print(table(found), end="\n\n", flush=True)
    if any(found.get("broke") or "sides" not in found for found in results):
        sys.exit("steps.py: not every contest gave figures; see above")


if __name__ == "__main__":
    main()
