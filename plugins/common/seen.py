"""What training makes of some samples, for people: read as a run reads them, then shown by the objective itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from selfsup.kernel import compose, state
from selfsup.kernel.config import Settings
from selfsup.kernel.contracts import Modality, Objective, Shown, Step
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ContractError
from selfsup.kernel.loader import Endless, Reader, Source, to_device


@dataclass(frozen=True)
class Seen:
    """Samples by caption, and what a person calls each of them."""

    names: Sequence[str]
    shown: Mapping[str, Sequence[Shown]]
    notes: Sequence[str] = ()  # on the data they were taken from

    def of(self, place: int) -> dict[str, Shown]:
        """One sample, by caption."""
        return {caption: values[place] for caption, values in self.shown.items()}


def open_data(plugins: Plugins, settings: Settings, kinds: Mapping[str, Modality]) -> Source:
    """The data of a run as it is stored, through the services of its settings."""
    plugins.serve(settings)
    return compose.open_source(plugins, settings, kinds, settings.get("data", {}).get("paths", []))


def see(
    settings: Settings,
    objective: Objective,
    source: Source,
    step: Step,
    count: int,
    *,
    guess: bool,
    folder: Path | None = None,
) -> Seen:
    """The first `count` samples of a step, as the objective shows them; `source` holds them as they are stored.

    `folder` is that of the run, where it has one.
    """
    kinds = modalities_of(objective)
    rows = compose.rows(settings, kinds, source, folder)
    if folder and isinstance(rows, Endless):  # a stream would be read up to this step from its beginning
        rows.recall(state.facts(compose.newest_checkpoint(folder))["marks"])
    reader = Reader(rows, kinds, objective.collator(**kinds), step.seed)
    count, first = min(count, len(rows)), step.number * settings["train"]["batch"]
    batch = reader[range(first, first + count)]
    device = next((p.device for p in objective.parameters()), torch.device("cpu"))
    training = objective.training
    try:
        objective.eval()
        with torch.no_grad():
            shown = objective.show(to_device(batch, device), step, guess=guess)
    finally:
        objective.train(training)
    names = [rows.name(reader.key(ident)) for ident in batch["ids"].tolist()]
    for caption, values in shown.items():
        if len(values) != len(names):
            raise ContractError(f"the objective shows {len(values)} times {caption!r} for {len(names)} samples")
    return Seen(names, shown, rows.notes)


def modalities_of(objective: Objective) -> dict[str, Modality]:
    """The modality of each tower that has one."""
    towers = {name: getattr(objective, name).modality for name in objective.towers}
    return {name: modality for name, modality in towers.items() if modality is not None}
