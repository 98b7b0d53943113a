"""The options that say what to train: the same for `train`, `check` and `explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from selfsup.kernel.errors import ConfigError, nearest

from .installed import complete_files, complete_names

if TYPE_CHECKING:
    from selfsup.kernel.config import Settings
    from selfsup.kernel.discovery import Plugins

DOTTED = {
    "plugin": "objective.name",
    "preset": "preset",
    "modality": "modality.name",
    "backbone": "backbone.name",
    "steps": "train.steps",
    "epochs": "train.epochs",
    "batch": "train.batch",
    "max_bad_fraction": "data.max_bad_fraction",
    "seed": "train.seed",
    "device": "train.device",
}


@dataclass(frozen=True)
class Asked:
    """What the command line selects: a run file, and flags that win over it."""

    file: Path | None
    flags: dict[str, Any]
    data: Sequence[str]
    changes: Sequence[str]  # --set

    def layers(self, plugins: Plugins, file: Path | None = None) -> list[Settings]:
        """The settings for `compose.resolve`, in order; `file` stands in where no run file was named."""
        from selfsup.kernel.config import merge, nest, parse_set, read_toml

        dotted = {DOTTED[flag]: value for flag, value in self.flags.items() if value is not None}
        if "train.epochs" in dotted and "train.steps" not in dotted:
            dotted["train.steps"] = None  # a recipe's number of steps would win over the epochs asked for
        if self.data:
            dotted["data.paths"] = list(self.data)
        if self.file:
            file = _checked(self.file, plugins)
        return [*([read_toml(file)] if file else []), merge(nest(dotted), parse_set(self.changes))]

    @property
    def names_nothing(self) -> bool:
        """Whether neither a run file nor an objective was named."""
        return self.file is None and self.flags["plugin"] is None


def _checked(file: Path, plugins: Plugins) -> Path:
    """The run file, if it is one; otherwise what was probably meant."""
    if file.is_dir():
        if (file / "run.toml").is_file():
            raise ConfigError(
                f"{file} is the folder of a run: go on with it by `ssl train --resume --out {file}`, "
                f"or begin another one like it from {file / 'run.toml'}"
            )
        raise ConfigError(f"{file} is a folder, not a run file; name data with --data {file}")
    if not file.exists():
        if str(file) in plugins.names("objectives"):
            raise ConfigError(f"there is no run file {str(file)!r}; for the objective of that name: --plugin {file}")
        hint = nearest(file.name, [path.name for path in file.parent.glob("*.toml")])
        raise ConfigError(f"there is no run file {str(file)!r}; {hint}")
    return file


def oversized(batch: int, samples: int) -> list[str]:
    """A note where `train` would refuse the batch, for commands that do not."""
    if batch <= samples:
        return []
    return [f"a batch of {batch:,} is larger than the data: to train, choose --batch {samples} or less"]


def _devices(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in ("auto", "cpu", "cuda", "cuda:0") if name.startswith(incomplete)]


_OPTIONS = (
    click.argument("file", metavar="[RUN.toml]", required=False, type=click.Path(path_type=Path)),
    click.option("--plugin", metavar="NAME", shell_complete=complete_names("objectives"), help="The objective."),
    click.option(
        "--data",
        multiple=True,
        metavar="PATH",
        shell_complete=complete_files,
        help="Folder, files, glob, table, tar shards or hub name; may be given several times. Default: a small sample.",
    ),
    click.option("--preset", metavar="NAME", help="A recipe of the plugin. Default: base; tiny for the sample."),
    click.option("--modality", metavar="NAME", shell_complete=complete_names("modalities"), help="Kind of data."),
    click.option("--backbone", metavar="NAME", shell_complete=complete_names("backbones"), help="Kind of network."),
    click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps."),
    click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="Passes over the data."),
    click.option("--batch", type=click.IntRange(min=1), help="Samples behind a step, over all processes."),
    click.option(
        "--max-bad-fraction",
        type=click.FloatRange(min=0, max=1),
        help="Share of samples that may be unusable before the run stops. Default: 0.01.",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Of all randomness."),
    click.option("--device", metavar="NAME", shell_complete=_devices, help="cpu, cuda, cuda:1 or auto."),
    click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="SECTION.OPTION=VALUE",
        help="Any option, as in objective.temperature=0.2; may be given several times.",
    ),
)


def selection(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that select a run, as one argument `asked`."""

    @wraps(command)
    def gathered(*, file: Path | None, data: Sequence[str], changes: Sequence[str], **others: Any) -> Any:
        flags = {flag: others.pop(flag) for flag in DOTTED}
        return command(asked=Asked(file, flags, data, changes), **others)

    for decorate in reversed(_OPTIONS):
        gathered = decorate(gathered)
    return gathered
