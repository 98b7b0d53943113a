"""Find plugins by entry point: one group a kind, the entry point's name is the plugin's name.

Listing needs no import; a run imports only what it uses. A name that two distributions claim is given in full,
`distribution:name`. `SELFSUP_DISABLE=a,b` hides plugins by name, `distribution:name`, or either with its kind before
it (`objectives.simclr`); `SELFSUP_TRACE=1` prints every hook call to stderr.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .errors import ContractError, PluginError, nearest
from .importing import watched

OURS = "selfsup"  # the distribution whose services and commands keep their names
KINDS = ("objectives", "modalities", "backbones", "services", "commands")
SINGULAR = dict(zip(KINDS, ("objective", "modality", "backbone", "service", "command"), strict=True))


@dataclass(frozen=True)
class Found:
    """An installed plugin, not imported."""

    kind: str
    name: str
    entry: EntryPoint

    @property
    def owner(self) -> str:
        """The name of the distribution that brings it."""
        return (self.entry.dist.name if self.entry.dist else None) or "unknown"

    @property
    def distribution(self) -> str:
        """Name and version of the distribution that brings it."""
        return f"{self.owner} {self.entry.dist.version}" if self.entry.dist else self.owner

    @property
    def full_name(self) -> str:
        """What means this plugin, whoever else claims its name."""
        return f"{self.owner}:{self.name}"

    def __str__(self) -> str:
        return f"the {SINGULAR[self.kind]} {self.name!r} of {self.distribution}"

    def load(self) -> Any:
        """Import it; whatever goes wrong, or does not fit, becomes an error that says how to go on without it."""
        without = f"SELFSUP_DISABLE={self.kind}.{self.name}"
        if self.kind != "commands":  # it imports torch, which may take long too
            from .fitness import misfit
        try:
            with watched(str(self), without, ours=self.owner == OURS):
                plugin = self.entry.load()
            why = None if self.kind == "commands" else misfit(self.kind, plugin, self.owner)
        except KeyboardInterrupt:
            raise
        except BaseException as cause:  # pytest's Skipped, say, is no Exception
            said = f"{self} could not be imported: {type(cause).__name__}: {cause}. Go on without it: {without}"
            raise PluginError(said) from cause
        if why:
            raise PluginError(f"{self} {why}. Go on without it: {without}")
        return plugin


class Plugins:
    """What is installed, and the hooks of the services in use. A value: nothing here is global."""

    def __init__(self) -> None:
        self.damaged: dict[str, str] = {}  # distribution -> what is wrong with its entry points
        self.loaded: dict[tuple[str, str], tuple[Found, Any]] = {}  # (kind, name) -> the plugin itself
        self.asked: set[str] = set()  # services that the settings of a run name
        self.left_out: dict[str, str] = {}  # strangers' services that cannot be used, and why
        self._found: dict[str, dict[str, list[Found]]] = {kind: {} for kind in KINDS}
        hidden = [name.strip() for name in os.environ.get("SELFSUP_DISABLE", "").split(",")]
        for found in _installed(self.damaged):
            if not any(_hides(name, found) for name in hidden):
                self._found[found.kind].setdefault(found.name, []).append(found)
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

    def claims(self, kind: str, name: str) -> list[Found]:
        """Who has this name, which may be `distribution:name`."""
        owner, _, bare = name.rpartition(":")
        return [f for f in self._found[kind].get(bare, ()) if not owner or _same(owner, f.owner)]

    def find(self, kind: str, name: str) -> Found:
        """The one plugin of this name; none and several are errors that say what exists.

        Services and commands are in use without being named, so there a stranger cannot take a name of ours.
        """
        found = self.claims(kind, name)
        if not found:
            hint = nearest(name.rpartition(":")[2], self._found[kind])
            raise PluginError(f"there is no {SINGULAR[kind]} called {name!r}; {hint}")
        ours = [f for f in found if f.owner == OURS]
        if len(ours) == 1 and kind in ("services", "commands"):
            return ours[0]
        if len({(f.distribution, f.entry.value) for f in found}) > 1:
            claims = sorted(found, key=lambda f: f.distribution)
            raise PluginError(
                f"the {SINGULAR[kind]} {name!r} is claimed by {' and by '.join(f.distribution for f in claims)}; "
                f"say which, as in {claims[0].full_name}, hide one, as in SELFSUP_DISABLE={claims[-1].full_name}, "
                "or uninstall it"
            )
        return found[0]

    def load(self, kind: str, name: str) -> Any:
        """Import the plugin of this name, once."""
        if (kind, name) not in self.loaded:
            found = self.find(kind, name)
            for other in self.claims(kind, name):
                if other.distribution != found.distribution:
                    self._warn(f"{other} is left out: {found.distribution} has that name; in full: {other.full_name}")
            self.loaded[kind, name] = found, found.load()
        return self.loaded[kind, name][1]

    def leave_out(self, name: str, cause: Exception) -> None:
        """Go on without a service that cannot be used, loudly; an error if it is ours or was asked for."""
        claims = self.claims("services", name)
        known = isinstance(cause, PluginError)
        why = str(cause) if known else f"{claims[0]} cannot be made: {type(cause).__name__}: {cause}"
        if name in self.asked or any(f.owner == OURS for f in claims):
            raise cause if known or claims[0].owner == OURS else PluginError(why) from cause
        self.left_out[name] = why
        self._warn(f"a service is left out of this run: {why}")

    def serve(self, settings: dict[str, Any]) -> None:
        """Make and register the services of these settings; a stranger's that fails leaves them, unless asked for."""
        for name in self.names("services"):
            if name in settings and not self.manager.has_plugin(name):
                try:
                    self.register(self.load("services", name)(**settings[name]), name)
                except Exception as cause:
                    self.leave_out(name, cause)
                    del settings[name]

    def register(self, service: Any, name: str | None = None) -> None:
        """Add a service to the hooks; an unknown hook or a wrong argument is an error naming it."""
        try:
            self.manager.register(service, name)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as cause:
            if self.manager.is_registered(service):  # or every later one would fail with it
                self.manager.unregister(service)
            raise PluginError(f"the service {name!r} does not fit the hooks: {cause}") from cause

    def answered(self, hook: str, value: Any, kind: type) -> None:
        """Refuse what a hook returned that is not of the kind it promises, naming the services that may have."""
        if not isinstance(value, kind):
            own = [str(impl.plugin_name) for impl in reversed(getattr(self.hook, hook).get_hookimpls())]
            names = " or ".join(
                str(self.find("services", name)) if self.claims("services", name) else name for name in own
            )
            raise ContractError(f"{hook} of {names} returned a {type(value).__name__}, not a {kind.__name__}")

    def apart(self, hook: str) -> Iterator[Callable[..., Any]]:
        """A hook of one service after the other, in the order of a call, so that one that raises hides it from none."""
        for own in reversed(getattr(self.hook, hook).get_hookimpls()):
            others = [service for service in self.manager.get_plugins() if service is not own.plugin]
            yield self.manager.subset_hook_caller(hook, others)

    def _warn(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {text}", file=sys.stderr)


def _installed(damaged: dict[str, str]) -> Iterator[Found]:
    """Every plugin there is, whatever other distributions hold."""
    try:
        known = entry_points()
        every = {kind: list(known.select(group=f"selfsup.{kind}")) for kind in KINDS}
    except Exception:  # one file that cannot be read hides all, so each is read by itself
        every = _one_by_one(damaged)
    for kind, entries in every.items():
        for entry in entries:
            if re.fullmatch(r"[\w.-]+", entry.name) and re.fullmatch(r"[\w.]+\s*:\s*[\w.]+", entry.value):
                yield Found(kind, entry.name, entry)
            else:
                damaged[Found(kind, entry.name, entry).distribution] = (
                    f"its entry point {entry.name!r} = {entry.value!r} is not of the form name = module:attribute"
                )


def _one_by_one(damaged: dict[str, str]) -> dict[str, list[EntryPoint]]:
    out: dict[str, list[EntryPoint]] = {kind: [] for kind in KINDS}
    seen: set[str] = set()
    for distribution in distributions():
        name = str(distribution.name)
        try:
            own = [] if _plain(name) in seen else list(distribution.entry_points)
        except Exception as cause:
            damaged[name] = f"its entry points cannot be read: {type(cause).__name__}: {cause}"
            continue
        seen.add(_plain(name))
        for kind, entries in out.items():
            entries += [entry for entry in own if entry.group == f"selfsup.{kind}"]
    return out


def _hides(name: str, found: Found) -> bool:
    kind, _, rest = name.partition(".")
    owner, _, bare = (rest if kind == found.kind else name).rpartition(":")
    return bare == found.name and (not owner or _same(owner, found.owner))


def _same(one: str, other: str) -> bool:
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
