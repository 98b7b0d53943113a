"""Which kernels the time of a step goes to, by torch.profiler; on a CPU, which operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 2
LISTED = 12
LONGEST = 100  # characters of a kernel's name


def profiled(step: Callable[[], None], gpu: bool) -> dict[str, Any]:
    """The longest kernels: name, milliseconds and calls a step, share of the time of all; and the sum of that time."""
    wanted = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=wanted) as found:
        for _ in range(STEPS):
            step()
    rows = []
    for event in found.key_averages():
        # What an optimizer or a person calls a stretch of time is no kernel.
        named = getattr(event, "is_user_annotation", False) or event.key.startswith(("Optimizer.", "ProfilerStep"))
        if named or (gpu and event.device_type != DeviceType.CUDA):
            continue
        micro = event.self_device_time_total if gpu else event.self_cpu_time_total
        rows.append({"name": event.key[:LONGEST], "ms": micro / 1e3 / STEPS, "calls": event.count / STEPS})
    total = sum(row["ms"] for row in rows)
    rows = sorted(rows, key=lambda row: -row["ms"])[:LISTED]
    return {"kernels": [{**row, "share": row["ms"] / max(total, 1e-9)} for row in rows], "kernels_ms": total}


def busy(found: dict[str, Any], seconds: float) -> float:
    """The share of a step's time in which a kernel ran; beside it the GPU waits for the host."""
    return min(1.0, found["kernels_ms"] / 1e3 / seconds)
