"""Draw the curves of a run: `python docs/curves.py RUN FILE.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

WIDE = 4  # panels in a row


def draw(run: Path, out: Path) -> None:
    """Loss and metrics against the step, one panel each."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    lines = [row for row in rows if "loss" in row]  # the others hold what services measured
    steps = [row["step"] for row in lines]
    panels = {"loss": [row["loss"] for row in lines]}
    panels |= {name: [row["metrics"][name] for row in lines] for name in lines[0]["metrics"]}
    rows = -(-len(panels) // WIDE)
    figure, axes = plt.subplots(rows, WIDE, figsize=(2.6 * WIDE, 2.1 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(axes.flat, panels.items(), strict=False):
        axis.plot(steps, values, linewidth=1, color="#2b6cb0")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
