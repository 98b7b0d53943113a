"""Find plugins by entry point: one group a kind, the entry point's name is the plugin's name.

Listing needs no import; a run imports only what it uses. `SELFSUP_DISABLE=a,b` hides plugins by name
(or as `kind.name`, `objectives.simclr`), `SELFSUP_TRACE=1` prints every hook call to stderr.
"""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from . import hookspecs
from .errors import PluginError, nearest

KINDS = ("objectives", "modalities", "backbones", "services", "commands")
SINGULAR = dict(zip(KINDS, ("objective", "modality", "backbone", "service", "command"), strict=True))


@dataclass(frozen=True)
class Found:
    """An installed plugin, not imported."""

    kind: str
    name: str
    entry: EntryPoint

    @property
    def distribution(self) -> str:
        """Name and version of the distribution that brings it."""
        return f"{self.entry.dist.name} {self.entry.dist.version}" if self.entry.dist else "unknown"

    def summary(self) -> str:
        """The first line of its module's docstring, read without importing anything."""
        source = source_of(self.entry.module)
        text = ast.get_docstring(ast.parse(source.read_text("utf-8"))) if source else None
        return text.partition("\n")[0].strip() if text else ""

    def load(self) -> Any:
        """Import it; whatever goes wrong becomes an error that says how to go on without it."""
        try:
            return self.entry.load()
        except (Exception, SystemExit) as cause:
            raise PluginError(
                f"the {SINGULAR[self.kind]} {self.name!r} of {self.distribution} could not be imported: "
                f"{type(cause).__name__}: {cause}. Go on without it: SELFSUP_DISABLE={self.kind}.{self.name}"
            ) from cause


def source_of(module: str) -> Path | None:
    """The file of a module, found without running any of its parents' code."""
    path: Any = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if find and (spec := find(name, path)):
                break
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


class Plugins:
    """What is installed, and the hooks of the services in use. A value: nothing here is global."""

    def __init__(self) -> None:
        blocked = {name.strip() for name in os.environ.get("SELFSUP_DISABLE", "").split(",")}
        self._found: dict[str, dict[str, list[Found]]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for entry in entry_points(group=f"selfsup.{kind}"):
                if not blocked & {entry.name, f"{kind}.{entry.name}"}:
                    self._found[kind].setdefault(entry.name, []).append(Found(kind, entry.name, entry))
        self.manager = pluggy.PluginManager("selfsup")
        self.manager.add_hookspecs(hookspecs)
        if os.environ.get("SELFSUP_TRACE"):
            self.manager.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))
            self.manager.enable_tracing()

    @property
    def hook(self) -> pluggy.HookRelay:
        """Call the hooks of all registered services."""
        return self.manager.hook

    def names(self, kind: str) -> list[str]:
        """The names of all plugins of a kind."""
        return sorted(self._found[kind])

    def find(self, kind: str, name: str) -> Found:
        """The one plugin of this name; none and several are errors that say what exists."""
        found = self._found[kind].get(name)
        if not found:
            hint = nearest(name, self._found[kind])
            raise PluginError(f"there is no {SINGULAR[kind]} called {name!r}; {hint}")
        claims = {f.distribution for f in found}
        if len(claims) > 1:
            raise PluginError(
                f"the {SINGULAR[kind]} {name!r} is claimed by {' and by '.join(sorted(claims))}; uninstall one of them"
            )
        return found[0]

    def load(self, kind: str, name: str) -> Any:
        """Import the plugin of this name."""
        return self.find(kind, name).load()

    def register(self, service: Any, name: str | None = None) -> None:
        """Add a service to the hooks; an unknown hook or a wrong argument is an error naming it."""
        try:
            self.manager.register(service, name)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as cause:
            raise PluginError(f"the service {name!r} does not fit the hooks: {cause}") from cause
