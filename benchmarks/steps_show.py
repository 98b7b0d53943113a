"""What was found about a contest, as a table for people."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "",
    "ms a step",
    "samples/s",
    "MFU %",
    "peak GB",
    "largest",
    "data",
    "forward",
    "backward",
    "update",
    "busy %",
)
PHASES = ("data", "forward", "backward", "optimizer")
KERNELS = 6  # of each side that are listed
COMPILED = ", compiled"


def table(found: dict[str, Any]) -> str:
    """Figures of everyone, the ratios, where the time goes, and who is absent and why."""
    sides = found.get("sides", {})
    lines = [opening(found)]
    if sides:
        rows = [COLUMNS, *(row(name, side, found) for name, side in sides.items())]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join([cell.rjust(w) for cell, w in zip(line, wide, strict=True)]) for line in rows]
    lines += ratios(sides)
    lines += [f"{name}: {side['note']}" for name, side in sides.items() if side.get("note")]
    lines += [line for name, side in sides.items() for line in inside(name, side)]
    lines += [f"{name} is absent: {why}" for name, why in found.get("absent", {}).items()]
    return "\n".join([*lines, *found.get("notes", [])])


def opening(found: dict[str, Any]) -> str:
    if "parameters" not in found:
        return f"== {found['contest']}"
    what = f"{found['parameters'] / 1e6:.1f} million parameters, {found['precision']}"
    if "batch" in found:
        what += f", {found['batch']} samples of {found['amount']:g} {found['unit']}"
    if "ceiling" in found:
        model = found["flops_of_sample"]["model"]
        what += f", {model / 1e9:.2f} GFLOP each; one product reaches {found['ceiling'] / 1e12:.1f} TFLOP/s"
    attention = found.get("attention_of_peer")
    theirs = f"theirs is {found['peer']}{f', attention: {attention}' if attention else ''}"
    versions = f"torch {found['torch']}, transformers {found['transformers']}"
    little = "; on a CPU, in little: it works, and no figure means anything" if found["device"] == "cpu" else ""
    return f"== {found['contest']}: {what}\n{theirs}; {versions}; {found['device']}{little}"


def row(name: str, side: dict[str, Any], found: dict[str, Any]) -> tuple[str, ...]:
    if side.get("state") != "ok":
        return (name, str(side.get("state", "no figure")), *[""] * (len(COLUMNS) - 2))
    phases = side.get("phases", {})
    whole = sum(phases.values()) or 1.0
    largest = side.get("largest_batch")
    more = largest and str(side.get("note_on_largest", "")).startswith("no larger")
    return (
        name,
        f"{1e3 * side['seconds']:.2f}",
        f"{side['samples_per_second']:,.1f}",
        f"{100 * side['mfu']:.1f}",
        f"{side['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in side else "",
        "" if largest is None else f"{'>= ' if more else ''}{largest}",
        *(f"{100 * phases[phase] / whole:.0f} %" if phases else "" for phase in PHASES),
        f"{100 * side['busy']:.0f}" if "busy" in side else "",
    )


def ratios(sides: dict[str, Any]) -> list[str]:
    """Each figure of ours over the best of the others under the same conditions, and the best over the best."""
    rates = {name: side["samples_per_second"] for name, side in sides.items() if side.get("state") == "ok"}
    plain = {name: rate for name, rate in rates.items() if not name.endswith(COMPILED)}
    said = []
    compiled = {name: rate for name, rate in rates.items() if name not in plain}
    for kind, some in {"as they are": plain, "compiled": compiled, "the best of each": rates}.items():
        others = {name: rate for name, rate in some.items() if not name.startswith("ours")}
        ours = {name: rate for name, rate in some.items() if name in ("ours", "ours" + COMPILED)}
        if others and ours:
            best = max(others, key=lambda name: others[name])
            said.append(f"{kind}: {max(ours.values()) / others[best]:.2f} times {best}")
    return ["ours, " + "; ".join(said)] if said else []


def inside(name: str, side: dict[str, Any]) -> list[str]:
    """The longest kernels, and where the host waited."""
    lines = []
    if side.get("kernels"):
        lines.append(f"{name}, kernels of a step, {side['kernels_ms']:.2f} ms in all:")
        for k in side["kernels"][:KERNELS]:
            lines.append(f"  {100 * k['share']:4.1f} %  {k['ms']:8.3f} ms  {k['calls']:6.0f} calls  {k['name']}")
    for place, count in side.get("waits", {}).items():
        lines.append(f"{name}: the host waits {count} time{'s' * (count > 1)} a step at {place}")
    return lines
