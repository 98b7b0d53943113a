"""Draw the curves of a run: `python docs/curves.py RUN FILE.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def draw(run: Path, out: Path) -> None:
    """Loss and metrics against the step, one panel each."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [row["step"] for row in rows]
    panels = {"loss": [row["loss"] for row in rows]}
    panels |= {name: [row["metrics"][name] for row in rows] for name in rows[0]["metrics"]}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.6), layout="constrained")
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        axis.plot(steps, values, linewidth=1, color="#2b6cb0")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
