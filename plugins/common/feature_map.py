"""How the features of some samples spread, for reports: on a plane, trained beside untrained, and in numbers.

The plane is that of the first two principal components, each model's own. Labels, where there are any, colour the
points and serve nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from selfsup.kernel.contracts import Modality, Objective
from selfsup.kernel.errors import DataError
from selfsup.kernel.loader import Source
from selfsup.kernel.random import shuffled

from .charts import scatter
from .features import Features, Subset, features
from .page import HUES, Raw, cards, legend, say, table
from .spectrum import Spectrum, spectrum

MOST = 500  # samples
SECONDS = 60.0  # in which as many samples are taken as can be
BATCH = 16
MAIN = 0.75  # share of the variance on one component that is worth a word


def feature_map(
    objective: Objective, untrained: Callable[[], Objective], source: Source, seed: int, step: int
) -> list[Raw]:
    """Charts, numbers and what they mean, of the exported tower; `untrained` makes the same one as it began."""
    modality: Modality = objective.exports.modality
    index = shuffled(np.arange(min(MOST, len(source))), len(source), seed, "report").tolist()
    trained = _features(objective, modality, source, index, SECONDS)
    taken = len(trained.labels) + len(trained.skipped)
    initial = _features(untrained(), modality, source, index[:taken], None)
    if len(trained.x) < 3:
        raise DataError(f"only {len(trained.x)} samples can be used")
    names = [str(name) for name in getattr(source, "classes", None) or []]
    colours, meaning = hues(trained.labels.tolist(), names)
    titles = (f"trained, step {step:,}", "random initialisation")
    spectra = [spectrum(found.x) for found in (trained, initial)]
    places = [found.places.numpy() for found in spectra]
    charts = [scatter(title, points, colours) for title, points in zip(titles, places, strict=True)]
    told = f"Features of {len(trained.x):,} samples on their first two principal components, each model its own."
    return [
        say(told),
        cards(charts),
        *([legend(meaning)] if meaning else []),
        _numbers(titles, spectra),
        _hint(*spectra),
    ]


def _features(
    objective: Objective, modality: Modality, source: Source, index: Sequence[int], limit: float | None
) -> Features:
    """Of the samples of these numbers, or of as many first ones as a limit in seconds allows."""
    import torch

    device = next(objective.parameters()).device
    end = None if limit is None else time.perf_counter() + limit
    parts: list[Features] = []
    for first in range(0, len(index), BATCH):
        if end is not None and parts and time.perf_counter() > end:
            break
        parts.append(
            features(objective.exports, modality, Subset(source, index[first : first + BATCH]), device, batch=BATCH)
        )
    skipped = {name: why for part in parts for name, why in part.skipped.items()}
    return Features(torch.cat([part.x for part in parts]), torch.cat([part.labels for part in parts]), skipped)


def hues(labels: Sequence[int], names: Sequence[str]) -> tuple[list[int], dict[str, str]]:
    """A colour for each label, and what each colour means; of many classes the most frequent ones have one."""
    known = [label for label in labels if label >= 0]
    counted = sorted(set(known), key=lambda label: (-known.count(label), label))
    classes = sorted(counted[: len(HUES)])
    number = {label: hue for hue, label in enumerate(classes)}
    meaning = {f"hue-{hue}": names[label] if label < len(names) else str(label) for label, hue in number.items()}
    if meaning and len(counted) > len(classes):
        meaning["hue"] = f"{len(counted) - len(classes)} more classes"
    return [number.get(label, -1) for label in labels], meaning


def _numbers(titles: Sequence[str], spectra: Sequence[Spectrum]) -> Raw:
    rows: list[list[str]] = [["effective rank"], ["variance on one component"], ["on two"], ["components with 90 %"]]
    for found in spectra:
        shares = found.explained
        rows[0].append(f"{found.rank:.1f} of at most {found.most}")
        rows[1].append(f"{100 * float(shares[:1].sum()):.0f} %")
        rows[2].append(f"{100 * float(shares[:2].sum()):.0f} %")
        rows[3].append(str(int((shares.cumsum(0) < 0.9).sum()) + 1))
    return table(("", *titles), rows)


def _hint(trained: Spectrum, initial: Spectrum) -> Raw:
    """What the numbers say about collapse."""
    if trained.rank == 0:
        return say("All features are alike: the model has collapsed.", "warn")
    if trained.collapsed:
        return say(
            f"An effective rank of {trained.rank:.1f}: samples differ along a line at most, as in a collapse.", "warn"
        )
    if trained.rank < 0.25 * initial.rank:
        return say(
            f"The features use far fewer dimensions than before training ({trained.rank:.1f} against "
            f"{initial.rank:.1f}): this may be a partial collapse.",
            "warn",
        )
    share, before = (float(found.explained[0]) for found in (trained, initial))
    if share > MAIN and share > before + 0.1:
        return say(
            f"One direction holds {100 * share:.0f} % of the variance ({100 * before:.0f} % before training): samples "
            "differ along little else.",
            "warn",
        )
    return say("No sign of a collapse.", "soft")
