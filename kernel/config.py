"""From files and flags to typed options.

A plugin's options are the keyword-only arguments of its `__init__`, annotated:

    temperature: Annotated[float, about("of the softmax", gt=0)] = 0.1

A run is a nested dictionary of sections: `objective`, `modality`, `backbone`, `train`, one section for
each service, and `towers.NAME.modality|backbone` where a tower differs from the others. Layers of
settings are merged, later ones win; then each section is checked against its schema, and what comes
out holds every option, so that `run.toml` says all.
"""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from .errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = dict[str, Any]
LARGEST = 10_000_000  # bytes of a run file
SECTIONS = ("objective", "modality", "backbone", "towers", "train")


def about(text: str, **limits: Any) -> Any:
    """Describe an option and its range (`gt`, `ge`, `lt`, `le`), for use in `Annotated`."""
    return pydantic.Field(description=text, **limits)


class TrainOptions:
    """The options of the loop itself: the section `train`."""

    def __init__(
        self,
        *,
        steps: Annotated[int | None, about("optimizer steps; wins over epochs", ge=1)] = None,
        epochs: Annotated[float, about("passes over the data", gt=0)] = 100.0,
        batch: Annotated[int, about("samples behind one optimizer step, over all processes", ge=1)] = 256,
        microbatch: Annotated[
            int, about("samples behind one forward pass of one process; 0: all, or as many as fit a GPU", ge=0)
        ] = 0,
        seed: Annotated[int, about("of all randomness", ge=0)] = 0,
        device: Annotated[str, about("cpu, cuda, cuda:1 or auto")] = "auto",
        precision: Annotated[Literal["auto", "fp32", "bf16"], about("auto: bf16 on a GPU, fp32 elsewhere")] = "auto",
        compile: Annotated[bool, about("torch.compile the repeated parts of the towers")] = False,
        parallel: Annotated[Literal["ddp", "fsdp"], about("how several processes share a model")] = "ddp",
        clip: Annotated[float, about("largest norm of the gradient; 0 leaves it alone", ge=0)] = 0.0,
        timeout: Annotated[float, about("seconds to wait for another process", gt=0)] = 600.0,
    ) -> None:
        """Nothing is kept: the signature is the schema."""


def schema(factory: Callable[..., Any]) -> type[pydantic.BaseModel]:
    """The options of a plugin class as a pydantic model, from the signature of its `__init__`."""
    init: Any = factory.__init__ if inspect.isclass(factory) else factory
    hints = typing.get_type_hints(init, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if p.default is p.empty else p.default)
        for name, p in inspect.signature(init).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    title = getattr(factory, "__name__", "options")
    strict = pydantic.ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), arbitrary_types_allowed=True
    )
    return pydantic.create_model(title, __config__=strict, **fields)


def check(section: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Settings:
    """Validate a section against its schema and fill in the defaults."""
    model = schema(factory)
    for key in options:
        if key not in model.model_fields:
            raise ConfigError(f"{section} has no option {key!r}; {nearest(key, model.model_fields)}")
    # TOML has no null, so an option that may be left open is written as "none".
    given = {key: None if value == "none" and _may_be_none(model, key) else value for key, value in options.items()}
    try:
        return model(**given).model_dump()
    except pydantic.ValidationError as cause:
        first = cause.errors()[0]
        name = f"{section}.{first['loc'][0]}"
        said = first["msg"].lower().replace("tuple", "list").replace("valid list", "list in brackets, as in [1, 2]")
        raise ConfigError(f"{name} = {first['input']!r}: {said}") from None


def _may_be_none(model: type[pydantic.BaseModel], option: str) -> bool:
    return type(None) in typing.get_args(model.model_fields[option].annotation)


def merge(*layers: Mapping[str, Any]) -> Settings:
    """Merge nested settings; later layers win. A section that changes its `name` starts afresh."""
    out: Settings = {}
    for layer in layers:
        for key, value in layer.items():
            old = out.get(key)
            if isinstance(value, Mapping) and isinstance(old, dict):
                renamed = "name" in value and value["name"] != old.get("name", value["name"])
                out[key] = merge(value) if renamed else merge(old, value)
            else:
                out[key] = merge(value) if isinstance(value, Mapping) else value
    return out


def nest(dotted: Mapping[str, Any]) -> Settings:
    """{"a.b": c} -> {"a": {"b": c}}"""
    out: Settings = {}
    for key, value in dotted.items():
        *sections, name = key.split(".")
        here = out
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
    return out


def parse_set(items: Iterable[str]) -> Settings:
    """`a.b=c` from the command line; c is TOML, or else a plain string."""
    dotted: Settings = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"--set takes section.option=value, as in train.batch=64; it got {item!r}")
        try:
            dotted[key.strip()] = tomllib.loads(f"x = {text}")["x"]
        except (tomllib.TOMLDecodeError, RecursionError):
            dotted[key.strip()] = text.strip()
    return nest(dotted)


def read_toml(path: Path) -> Settings:
    """The settings in a run file."""
    try:
        if path.stat().st_size > LARGEST:
            raise OSError(f"it has more than {LARGEST:,} bytes")
        return dict(tomllib.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"there is no run file {str(path)!r}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as cause:
        raise ConfigError(f"{path} cannot be read as TOML: {cause}") from None


def to_toml_value(value: Any) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {to_toml_value(v)}' for key, v in value.items())} }}"
    if isinstance(value, str | None):  # a JSON string is one of TOML, but for surrogates and DEL
        return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def to_toml(settings: Mapping[str, Any], prefix: str = "") -> str:
    """Nested settings as a TOML file; an option that is None is written as "none"."""
    plain = {k: v for k, v in settings.items() if not isinstance(v, Mapping)}
    lines = [f"[{prefix}]"] if prefix and plain else []
    lines += [f"{key} = {to_toml_value(value)}" for key, value in plain.items()]
    blocks = ["\n".join(lines)] if lines else []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            blocks.append(to_toml(value, f"{prefix}.{key}" if prefix else key).rstrip("\n"))
    return "\n\n".join(filter(None, blocks)) + "\n"
