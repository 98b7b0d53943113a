"""From names to something that runs: settings -> towers -> objective -> run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import distributed, state
from .config import SECTIONS, Settings, TrainOptions, check, merge, nest, read_toml
from .contracts import Modality, Objective, Raw, Tower
from .discovery import Plugins
from .errors import ConfigError, DataError, PluginError, SelfsupError, StateError, nearest
from .loader import Endless, Loader, Reader, Source
from .loop import Run, calibrate
from .precision import compile_units, pick_device

Kept = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]  # tensors and facts of a checkpoint
NOTHING = "none"  # the name of the modality of a tower that is fed tokens
FREE = {"steps", "epochs", "microbatch", "device", "precision", "compile", "parallel", "timeout"}


def resolve(plugins: Plugins, *layers: Mapping[str, Any], alone: bool = False) -> Settings:
    """Merge layers of settings over the objective's recipe, check every section and fill in its defaults.

    A layer may name a `preset`; without one it is "base", or "tiny" where no data is named. With `alone`, for looking
    at a run, it does not matter whether what strangers' services wrote down in its settings can be used.
    """
    asked = merge(*layers)
    preset = asked.pop("preset", None)
    services = plugins.names("services")
    if alone:
        asked = {section: own for section, own in asked.items() if section in (*SECTIONS, *services)}
    for section in asked:
        if section not in (*SECTIONS, *services):
            raise ConfigError(f"there is no section {section!r}; {nearest(section, (*SECTIONS, *services))}")
    if "name" not in asked.get("objective", {}):
        raise ConfigError(f"name an objective with --plugin; known: {', '.join(plugins.names('objectives'))}")
    objective = plugins.load("objectives", asked["objective"]["name"])
    preset = preset or ("base" if asked.get("data", {}).get("paths") or "tiny" not in objective.presets else "tiny")
    if preset not in objective.presets:
        raise ConfigError(
            f"{asked['objective']['name']} has no preset {preset!r}; {nearest(preset, objective.presets)}"
        )
    recipe = merge(*(nest(objective.presets[name]) for name in dict.fromkeys(("base", preset))))
    if "epochs" in asked.get("train", {}):  # asked for, they win over steps that are not
        recipe.get("train", {}).pop("steps", None)
    settings = merge(_renamed(plugins, recipe, asked), asked)
    out: Settings = {"preset": preset, "objective": _named("objective", objective, settings["objective"])}
    out["modality"] = _plugin(plugins, "modality", settings.get("modality", {}))
    out["backbone"] = _plugin(plugins, "backbone", settings.get("backbone", {}))
    out["towers"] = _towers(plugins, objective, settings)
    out["train"] = check("train", TrainOptions, settings.get("train", {}))
    plugins.asked |= set() if alone else settings.keys()
    for name in services:
        try:
            out[name] = check(name, plugins.load("services", name), settings.get(name, {}))
        except SelfsupError as cause:
            plugins.leave_out(name, cause)
    return out


def _renamed(plugins: Plugins, recipe: Settings, asked: Settings) -> Settings:
    """The recipe for the modality asked for, where that is a kind of the recipe's (code is text) or has its name."""
    own, other = (layer.get("modality", {}).get("name", NOTHING) for layer in (recipe, asked))
    loaded = (plugins.load("modalities", name) for name in (other, own))
    if NOTHING in (own, other) or not (other.endswith(f":{own}") or issubclass(*loaded)):
        return recipe
    return {**recipe, "modality": {**recipe["modality"], "name": other}}


def _named(section: str, factory: Any, options: Mapping[str, Any]) -> Settings:
    rest = {key: value for key, value in options.items() if key != "name"}
    return {"name": options["name"], **check(section, factory, rest)}


def _plugin(plugins: Plugins, section: str, options: Mapping[str, Any], where: str | None = None) -> Settings:
    if "name" not in options:
        raise ConfigError(f"name a {section} with --{section} or in the section [{section}]")
    if section == "modality" and options["name"] == NOTHING:
        return {"name": NOTHING}
    kind = "modalities" if section == "modality" else "backbones"
    return _named(where or section, plugins.load(kind, options["name"]), options)


def _towers(plugins: Plugins, objective: type[Objective], settings: Settings) -> Settings:
    """What each tower has of its own, whole: its modality or backbone where it differs from the common one."""
    out: Settings = {}
    for tower, own in settings.get("towers", {}).items():
        if tower not in objective.towers:
            raise ConfigError(f"this objective has no tower {tower!r}; {nearest(tower, objective.towers)}")
        out[tower] = {}
        for section, options in own.items():
            if section not in ("modality", "backbone"):
                raise ConfigError(f"a tower has a modality and a backbone, not {section!r}")
            whole = merge({section: settings.get(section, {})}, {section: options})[section]
            out[tower][section] = _plugin(plugins, section, whole, f"towers.{tower}.{section}")
    return out


def modalities(plugins: Plugins, settings: Settings) -> dict[str, Modality]:
    """The modality of each tower that has one, by the tower's name."""
    out: dict[str, Modality] = {}
    made: dict[str, Modality] = {}
    for tower in plugins.load("objectives", settings["objective"]["name"]).towers:
        options = settings["towers"].get(tower, {}).get("modality", settings["modality"])
        if options["name"] != NOTHING:
            key = json.dumps(options)
            made[key] = made.get(key) or _make(plugins, "modalities", options)
            out[tower] = made[key]
    return out


def _make(plugins: Plugins, kind: str, options: Mapping[str, Any], *towers: Tower) -> Any:
    own = {key: value for key, value in options.items() if key != "name"}
    return plugins.load(kind, options["name"])(*towers, **own)


def open_source(plugins: Plugins, settings: Settings, kinds: Mapping[str, Modality], paths: Sequence[str]) -> Source:
    """The samples behind `paths`, as they are stored; the modalities learn from them what they still have to."""
    source: Source | None = plugins.hook.open_data(paths=list(paths), modalities={m.field: m for m in kinds.values()})
    if source is None:
        raise DataError("no service opens data: the service `data` is disabled, and no other one answered")
    plugins.answered("open_data", source, Source)
    if isinstance(source, Endless):
        source.seed = settings["train"]["seed"]
    for modality in kinds.values():
        if distributed.rank() == 0:
            modality.learn(source)
        if files := json.loads(distributed.alike(json.dumps(dict(modality.files())))):
            modality.load(files)
    return source


def rows(settings: Settings, kinds: Mapping[str, Modality], source: Source, folder: Path | None) -> Source:
    """What training goes through: the samples as they are stored or, of one modality, as it lays them out."""
    if len(kinds) > 1:
        return source
    modality, max_bad_fraction = next(iter(kinds.values())), settings.get("data", {}).get("max_bad_fraction", 0.01)
    return modality.rows(source, settings["train"]["seed"], folder, max_bad_fraction)


def build(plugins: Plugins, settings: Settings, kinds: Mapping[str, Modality] | None = None) -> Objective:
    """The objective with its towers, at the random initialisation that the seed gives."""
    torch.manual_seed(settings["train"]["seed"])
    kinds = modalities(plugins, settings) if kinds is None else kinds
    towers = []
    for name in plugins.load("objectives", settings["objective"]["name"]).towers:
        backbone = _make(plugins, "backbones", settings["towers"].get(name, {}).get("backbone", settings["backbone"]))
        modality = kinds.get(name)
        stem = Raw() if modality is None or backbone.wants_raw else modality.stem(backbone.width)
        towers.append(Tower(stem, backbone, modality))
    objective: Objective = _make(plugins, "objectives", settings["objective"], *towers)
    return objective


def start(
    plugins: Plugins,
    settings: Settings,
    folder: Path | None = None,
    resume: bool = False,
    weights_from: Path | None = None,
) -> Run:
    """Everything a run is made of, at its first step or where its newest good checkpoint left it.

    `folder` None keeps nothing on disk. `weights_from` is a run whose newest weights to begin with.
    """
    options = settings["train"]
    device = pick_device(options["device"], int(os.environ.get("LOCAL_RANK", "0")))
    distributed.join(device, options["timeout"])
    plugins.serve(settings)
    kinds = modalities(plugins, settings)
    notes: list[str] = []
    kept = _newest(folder, notes) if resume and folder else None
    given = state.load(newest_checkpoint(weights_from)) if weights_from else None
    facts = state.facts(kept) if kept else {}
    _recall(kinds, given[1] if given else facts)
    source = open_source(plugins, settings, kinds, settings.get("data", {}).get("paths", []))
    source = rows(settings, kinds, source, folder)
    if isinstance(source, Endless) and not options["steps"]:
        raise ConfigError("a stream has no end, so train.epochs says nothing of it; name the steps, as in --steps 1000")
    objective = build(plugins, settings, kinds).to(device).train()
    loader = _loader(settings, source, kinds, objective)
    if weights_from and given:
        load_weights(objective, given, weights_from)
    if options["compile"]:
        compile_units(objective)
    model = distributed.Wrapped(objective, options["parallel"], device)
    total = options["steps"] or math.ceil(options["epochs"] * len(source) / options["batch"])
    run = Run(plugins, settings, objective, model, loader, device, folder, total)
    run.optimizer = plugins.hook.build_optimizer(objective=objective, batch=options["batch"])
    if run.optimizer is None:
        raise ConfigError("no service builds an optimizer: the service `optimizer` is disabled")
    plugins.answered("build_optimizer", run.optimizer, Optimizer)
    run.notes += notes
    plugins.hook.run_composed(run=run)
    if kept:
        _resume(run, kept, facts["settings"])
    if run.first == 0:
        calibrate(run)
    return run


def _loader(settings: Settings, source: Any, kinds: dict[str, Modality], objective: Objective) -> Loader:
    options, data = settings["train"], settings.get("data", {})
    workers = data.get("workers", "auto")
    if workers == "auto":
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(getattr(source, "workers", 8), cores // 2)  # some sources gain nothing by more
    reader = Reader(source, kinds, objective.collator(**kinds), options["seed"])
    loader = Loader(
        reader, batch=options["batch"], microbatch=options["microbatch"], workers=workers, timeout=options["timeout"]
    )
    if loader.microbatch < loader.share and not objective.divisible:
        raise ConfigError(
            f"{settings['objective']['name']} compares the samples of a batch with each other, so a microbatch of "
            f"{loader.microbatch} would change what it learns; leave train.microbatch out or choose a smaller batch"
        )
    if options["batch"] > len(source):
        others = {name: recipe for name, recipe in objective.presets.items() if name != settings["preset"]}
        fitting = [name for name, recipe in others.items() if recipe.get("train.batch", math.inf) <= len(source)]
        of = "the window of the stream" if isinstance(source, Endless) else "the data"
        smaller = "".join(f", or --preset {name}" for name in fitting)
        raise ConfigError(
            f"a batch of {options['batch']} is larger than {of}, which has {len(source)} samples; "
            f"choose --batch {len(source)} or less{smaller}"
        )
    return loader


def _newest(folder: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint that verifies, if there is any, as the first process finds it.

    Notes say which, and what is damaged.
    """
    found, damaged = state.newest(folder / "checkpoints") if distributed.rank() == 0 else (None, [])
    name, *damaged = json.loads(distributed.alike(json.dumps([found.name if found else None, *damaged])))
    if name is None and damaged:
        raise StateError(f"no checkpoint below {folder} can be used, and none was changed; {'; '.join(damaged)}")
    notes += damaged if name else [f"there is no checkpoint below {folder} yet; the run starts from its beginning"]
    if name and not (found := folder / "checkpoints" / name).exists():
        raise StateError(f"the first process found {found}, which is not here: all processes must share {folder}")
    return found


def _recall(kinds: Mapping[str, Modality], facts: Mapping[str, Any]) -> None:
    """Give the modalities back what they had learned."""
    for tower, modality in kinds.items():
        if files := facts.get("modality", {}).get(tower):
            modality.load(files)


def _resume(run: Run, kept: Path, settings: Settings) -> None:
    """Go on from a checkpoint; refuse settings, beside those it holds, that would make it another run."""
    for name in run.plugins.left_out.keys() & settings.keys():
        raise PluginError(f"this run had a service that cannot be used now: {run.plugins.left_out[name]}")
    for name, old, new in _differences(settings, json.loads(json.dumps(run.config)), run.plugins):
        raise ConfigError(
            f"{name} was {old!r} when this run began and is {new!r} now, which would make it another run; "
            f"leave it as it was, or begin anew with --from {run.folder} and another --out"
        )
    run.restore(kept)
    run.notes.append(f"resumed at step {run.first} of {run.total}")


def _differences(old: Settings, new: Settings, plugins: Plugins) -> list[tuple[str, Any, Any]]:
    """What differs in settings that a run may not change: (dotted name, before, now)."""
    out = []
    services = [name for name in plugins.names("services") if name in new]
    for section in ("objective", "modality", "backbone", "towers", "train", *services):
        was, now = old.get(section, {}), new.get(section, {})
        if section in services:
            fixed = set(getattr(plugins.load("services", section), "fixed", ()))
        else:
            fixed = (set(was) | set(now)) - (FREE if section == "train" else set())
        out += [(f"{section}.{k}", was.get(k), now.get(k)) for k in sorted(fixed) if was.get(k) != now.get(k)]
    return out


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run that verifies; StateError says what there is instead."""
    if not (folder / "run.toml").exists():
        near = nearest(folder.name, [p.parent.name for p in folder.absolute().parent.glob("*/run.toml")])
        raise StateError(f"{str(folder)!r} is not the folder of a run; {near}")
    found, damaged = state.newest(folder / "checkpoints")
    if found is None:
        raise StateError(f"the run {folder} has no checkpoint that can be used{''.join('; ' + d for d in damaged)}")
    return found


def load_weights(objective: Objective, kept: Kept, folder: Path) -> int:
    """Put the weights of a checkpoint of the run in `folder` into an objective of its shapes; the step they are of."""
    tensors, facts = kept
    try:
        objective.load_state_dict(tensors["model"])
    except RuntimeError as cause:
        kind = ", ".join(facts["settings"][section]["name"] for section in ("objective", "backbone"))
        why = state.misfit(state.sizes(tensors["model"]), state.sizes(objective.state_dict())) or cause
        raise StateError(f"the weights of {folder} ({kind}) do not fit this model: {why}") from None
    return int(facts["step"])


def restore(
    folder: Path, plugins: Plugins, device: str = "cpu", initial: bool = False
) -> tuple[Objective, Settings, int]:
    """The objective of a run in eval mode, its settings and its step; `initial` leaves out the training."""
    kept = state.load(newest_checkpoint(folder))
    settings = resolve(plugins, read_toml(folder / "run.toml"), alone=True)
    kinds = modalities(plugins, settings)
    _recall(kinds, kept[1])
    objective = build(plugins, settings, kinds)
    step = 0 if initial else load_weights(objective, kept, folder)
    return objective.to(pick_device(device)).eval(), settings, step
