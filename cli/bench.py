"""Measure ops of `selfsup.triton_ops` beside plain torch and other people's packages, after checking each."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from selfsup.kernel.errors import ConfigError, ContractError, nearest

if TYPE_CHECKING:
    from .bench_case import Case
    from .bench_run import Result

_path = click.Path(path_type=Path)
KINDS = ("bfloat16", "float16", "float32")


@click.group(invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure ops beside plain torch and other people's packages, after checking each."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@bench.command()
@click.argument("names", nargs=-1)
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1 or auto.")
@click.option("--dtype", type=click.Choice(KINDS), help="Of the arrays. Default: bfloat16 on a GPU, float32 on a CPU.")
@click.option("--shapes", type=click.Choice(["full", "small"]), help="Default: full on a GPU, small on a CPU.")
@click.option(
    "--peers",
    metavar="NAMES",
    help="Whom to measure beside ours: beginnings of names such as eager,compiled,liger, or none, or all. "
    "Default: all on a GPU, eager on a CPU.",
)
@click.option("--rounds", type=click.IntRange(min=3), help="Turns that each takes. Default: 30 on a GPU, 7 on a CPU.")
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=4.0, show_default=True,
    help="The turns of one contestant take at most so long, but three are taken.",
)  # fmt: skip
@click.option("--limit", type=click.FloatRange(min=0, min_open=True), help="Begin no case after so many seconds.")
@click.option("--check-only", is_flag=True, help="Check, and time nothing.")
@click.option("--out", metavar="FOLDER", type=_path, help="Where ops.json and ops.png are written.")
@click.option("--list", "only_list", is_flag=True, help="Name the cases, and measure none.")
def ops(names: tuple[str, ...], device: str, only_list: bool, **given: Any) -> None:
    """Check ops against float64, then time them beside plain torch and other people's packages.

    NAMES are names of ops, all if none is given. What is timed is forward and backward together, where there is a
    gradient. What is wrong is not timed; if an op of ours is, the exit code is 1.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that sees memory greets on stderr
    from .bench_cases import cases as all_cases

    place = _device(device)
    given["shapes"] = given["shapes"] or ("full" if place.type == "cuda" else "small")
    cases = _chosen(all_cases(given["shapes"] == "full"), names)
    if only_list:
        for case in cases:
            click.echo(case.name)
        return
    failing = _measure(cases, place, **given)
    if failing:
        raise ContractError("\n       ".join([f"of {len(cases)} cases {len(failing)} did not pass:", *failing]))


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"there is no device {name!r}; choose cpu, cuda, cuda:1 or auto") from None
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"nothing is measured on {name!r}; choose cpu, cuda, cuda:1 or auto")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"torch sees {torch.cuda.device_count()} GPUs here, so there is no {name!r}")
    return place


def _chosen(cases: list[Case], names: tuple[str, ...]) -> list[Case]:
    known = {case.op for case in cases}
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no case of an op {name!r}; {nearest(name, known)}")
    return [case for case in cases if not names or case.op in names]


def _measure(
    cases: list[Case],
    place: Any,
    *,
    shapes: str,
    peers: str | None,
    rounds: int | None,
    seconds: float,
    limit: float | None,
    check_only: bool,
    out: Path | None,
    dtype: str | None,
) -> list[str]:
    """Measure everything and show it; why ops of ours did not pass."""
    import torch

    from . import bench_show as show
    from .bench_measure import Meter, ceilings
    from .bench_run import Bench, Plan, run_all

    start, gpu, timed = time.monotonic(), place.type == "cuda", not (check_only or show.interpreted())
    if gpu:
        torch.cuda.set_device(place)
    kind = getattr(torch, dtype or ("bfloat16" if gpu else "float32"))
    plan = Plan(place, kind, rounds or (30 if gpu else 7), seconds, timed, _peers(peers, gpu))
    meter = Meter(place)
    limits = ceilings(meter, kind, small=shapes == "small") if timed else None
    about = show.about(place, kind, shapes, limits)
    click.echo(show.opening(about))
    results: list[Result] = []
    for result in run_all(Bench(plan, limits, meter), cases, start + limit if limit else None):
        results.append(result)
        show.say(result, timed)
        if out:
            show.write(out, about, results)
    if timed and len(results) > 1:
        show.close(results)
    if out:
        click.echo(show.drawn(out, about, results))
    return [line for result in results for line in result.failing()]


def _peers(given: str | None, gpu: bool) -> tuple[str, ...] | None:
    """Beginnings of names; None for all."""
    if given == "all" or (given is None and gpu):
        return None
    if given == "none":
        return ()
    return tuple(name.strip() for name in (given or "eager").split(",") if name.strip())
