"""Whose code an error came from: the plugin, its distribution and version, found by the frames it passed through."""

from __future__ import annotations

from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from selfsup.kernel.discovery import OURS, Found, Plugins
from selfsup.kernel.errors import PluginError, SelfsupError

if TYPE_CHECKING:
    from selfsup.kernel.loop import Run


def raise_named(plugins: Plugins, error: BaseException, run: Run | None = None) -> NoReturn:
    """Raise the error of a run again, by the name of the plugin it came from and with what is left of the run.

    What a person can mend is told already; where no plugin is to be found, it is raised as it is.
    """
    found = culprit(plugins, error)
    by = getattr(error, "by", None)
    if found is None or (isinstance(error, SelfsupError) and by is None):
        raise error
    from selfsup.kernel import state

    when = f"after {run.done} of {run.total} steps" if run else "before the first step"
    said = str(error) if by is not None else f"{type(error).__name__}: {error}"
    kept = state.folders(run.folder / "checkpoints") if run and run.folder else []
    rest = f"; the newest checkpoint is {kept[0]}" if kept else ""
    raise PluginError(f"{found} failed {when}: {said}{rest}") from error


def culprit(plugins: Plugins, error: BaseException) -> Found | None:
    """The plugin in whose code an error arose, or that broke a promise; None if there is none."""
    loaded = [(found, plugin) for (kind, _), (found, plugin) in plugins.loaded.items() if kind != "commands"]
    if (by := getattr(error, "by", None)) is not None:
        return _of(by, loaded) or _in(type(by).__module__, loaded)
    frames: list[FrameType] = [frame for frame, _ in walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        owner = _of(frame.f_locals.get("self"), loaded) or _in(frame.f_globals.get("__name__", ""), loaded)
        if owner:
            return owner
    return _in_text(str(error), loaded)


def _of(thing: Any, loaded: list[tuple[Found, Any]]) -> Found | None:
    """The plugin that an object is made of."""
    return next((found for kind in type(thing).__mro__ for found, plugin in loaded if plugin is kind), None)


def _in(module: str, loaded: list[tuple[Found, Any]]) -> Found | None:
    """The plugin that a module belongs to: its own, or any of a stranger's package."""
    for found, _ in loaded:
        own = found.entry.module
        package = own if found.owner == OURS else own.partition(".")[0]
        if module == own or f"{module}.".startswith(f"{package}."):
            return found
    return None


def _in_text(text: str, loaded: list[tuple[Found, Any]]) -> Found | None:
    """The plugin whose file comes last in the traceback that a data worker sent as text."""
    import sys

    files = {getattr(sys.modules.get(found.entry.module), "__file__", None): found for found, _ in loaded}
    places = {text.rfind(f'File "{Path(file)}"'): found for file, found in files.items() if file}
    last = max(places, default=-1)
    return places[last] if last >= 0 else None
