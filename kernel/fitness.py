"""Whether what an entry point names can be a plugin of its kind: found when it is loaded, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pluggy

from . import hookspecs
from .config import schema
from .contracts import CONTRACT, Backbone, Modality, Objective
from .errors import nearest

BASES: dict[str, type] = {"objectives": Objective, "modalities": Modality, "backbones": Backbone}
STATED = {"objectives": ("towers", "presets"), "modalities": ("field",)}  # what a class of a kind must say of itself
HOOKS = [name for name, hook in vars(hookspecs).items() if hasattr(hook, "selfsup_spec")]


def misfit(kind: str, plugin: Any, owner: str) -> str | None:
    """Why this cannot be a plugin of its kind, in words that go on after its name; None if it can."""
    if kind == "commands":
        return None
    if not inspect.isclass(plugin):
        return f"is no class but a {type(plugin).__name__}"
    why = _contract(plugin, owner) or (_hooks(plugin) if kind == "services" else _members(kind, plugin))
    return why or _options(plugin, len(getattr(plugin, "towers", ())))


def _contract(plugin: Any, owner: str) -> str | None:
    number = getattr(plugin, "contract", CONTRACT)
    if number == CONTRACT and isinstance(number, int):
        return None
    made = f"was made for contract {number!r} of plugins, and this selfsup has contract {CONTRACT}"
    newer = isinstance(number, int) and number > CONTRACT
    return f"{made}; upgrade {'selfsup' if newer else f'it: ssl plugins install --upgrade {owner}'}"


def _members(kind: str, plugin: Any) -> str | None:
    if not issubclass(plugin, BASES[kind]):
        return f"is no {BASES[kind].__name__}: the class {plugin.__name__} does not inherit from it"
    if missing := sorted(plugin.__abstractmethods__):
        return f"lacks {', '.join(f'{name}()' for name in missing)}, which every {BASES[kind].__name__} has"
    for name in STATED.get(kind, ()):
        if not hasattr(plugin, name):
            return f"does not say its {name}, as every {BASES[kind].__name__} does"
    if kind == "objectives":
        if not (isinstance(plugin.towers, tuple) and plugin.towers):
            return f"has towers = {plugin.towers!r}, which is no tuple of names"
        if not (isinstance(plugin.presets, Mapping) and "base" in plugin.presets):
            return 'has no preset "base"'
    return None


def _hooks(plugin: Any) -> str | None:
    """What is wrong with the hooks of a service."""
    own = {name: found.selfsup_impl for name in dir(plugin) if hasattr(found := getattr(plugin, name), "selfsup_impl")}
    if not own:
        return f"listens to nothing: no method of the class {plugin.__name__} is marked with hookimpl"
    for name, options in own.items():
        if (name := options["specname"] or name) not in HOOKS and not options["optionalhook"]:
            return f"does not fit the hooks: there is no hook {name!r}; {nearest(name, HOOKS)}"
    trial = pluggy.PluginManager("selfsup")
    trial.add_hookspecs(hookspecs)
    try:
        trial.register(plugin)
    except (pluggy.PluginValidationError, ValueError) as cause:
        return f"does not fit the hooks: {cause}"
    return None


def _options(plugin: Any, towers: int) -> str | None:
    """What is wrong with the signature that is the schema of its options."""
    try:
        signature = inspect.signature(plugin.__init__)
        options = {name: None for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
        signature.bind(None, *[None] * towers, **options)
        schema(plugin)
    except Exception as cause:  # whatever its annotations do when they are evaluated
        return f"has options that cannot be read: {type(cause).__name__}: {cause}"
    return None
