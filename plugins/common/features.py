"""The one extractor of features (law 9): every evaluation gets them here, for bank and query alike.

    f(x) = mean over tokens of tower(plain(x))

from the exported tower in eval mode, in float32, without augmentation, in the order of the data.

Shapes: N samples that can be used, B batch, T tokens, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from selfsup.kernel.contracts import Backbone, Modality, Sample, Signal
from selfsup.kernel.errors import BadSample, ConfigError, ContractError, DataError
from selfsup.kernel.loader import Source
from selfsup.kernel.workers import made_ahead


class Features(NamedTuple):
    """What `features` gives; rows of x and labels belong together."""

    x: Tensor  # [N, D] float32, on the host
    labels: Tensor  # [N] int64, -1 where unknown
    skipped: dict[str, str]  # name of a sample that cannot be used -> why


@dataclass(frozen=True)
class Subset:
    """Some samples of a source, by number."""

    source: Source
    index: Sequence[int]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> Sample:
        return self.source[int(self.index[place])]

    def name(self, place: int) -> str:
        """As the source calls it."""
        return self.source.name(int(self.index[place]))


def features(
    tower: nn.Module,
    modality: Modality,
    source: Source | Subset,
    device: torch.device | str,
    *,
    batch: int = 64,
    layer: int | None = None,
    workers: int = 0,
) -> Features:
    """The features of every sample that can be used, in order.

    `layer` = n skips the units of the backbone after the n-th (its last norm still applies); None uses all.
    """
    mode, kind = tower.training, torch.device(device).type
    batches = [range(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    decoded = made_ahead(_Decoded(source, modality), batches, workers)
    rows, labels, skipped = [], [], {}
    try:
        tower.to(device).eval()
        with torch.no_grad(), torch.autocast(kind, enabled=False), _cut(tower, layer):
            for signal, known, bad in decoded:
                skipped.update(bad)
                if signal is not None:
                    plain = modality.plain(signal.to(device))
                    rows.append(tower(plain).mean().float().cpu())  # [B, D]
                    labels += known
    finally:
        tower.train(mode)
    if not rows:
        raise DataError(f"none of {len(source)} samples can be used:\n{list_skipped(skipped)}")
    return Features(torch.cat(rows).clone(), torch.tensor(labels), skipped)


class Raw(nn.Module):
    """A tower that learned nothing: the plain input itself, one value a feature.

    Images are averaged down to at most `side` pixels a side, so that judging them takes seconds, not hours.
    """

    def __init__(self, side: int = 32, most: int = 16384) -> None:
        super().__init__()
        self.side, self.most = side, most

    def forward(self, plain: Signal) -> Signal:
        """[B, ...] -> [B, 1, D]; ContractError for signals of no fixed size."""
        x = plain.x.float()
        if plain.segments is not None or plain.edges is not None or plain.x.ndim < 3:
            raise ContractError("samples of different lengths have no raw features")
        if x.ndim == 4 and max(x.shape[2:]) > self.side:
            x = nn.functional.adaptive_avg_pool2d(x, self.side)  # [B, C, side, side]
        if x[0].numel() > self.most:
            raise ContractError(f"{x[0].numel():,} raw values a sample are too many")
        return Signal(x.flatten(1)[:, None])  # [B, 1, D]


def list_skipped(skipped: dict[str, str], most: int = 10) -> str:
    """The first few samples that could not be used, a line each."""
    lines = [f"  {name}: {why}" for name, why in list(skipped.items())[:most]]
    return "\n".join(lines + ["  …"] * (len(skipped) > most))


class _Decoded(Dataset[Any]):
    """Numbers of samples -> (signal or None, labels, {name: why it cannot be used})."""

    def __init__(self, source: Source | Subset, modality: Modality) -> None:
        self.source, self.modality = source, modality

    def __getitem__(self, places: Sequence[int]) -> tuple[Signal | None, list[int], dict[str, str]]:
        raws, labels, bad = [], [], {}
        for place in places:
            try:
                sample = self.source[place]
                raws.append(self.modality.read(sample[self.modality.field]))
                labels.append(int(sample.get("label", -1)))
            except BadSample as why:
                bad[self.source.name(place)] = str(why)
            except Exception as cause:  # a decoder may raise anything; one sample is no reason to stop
                bad[self.source.name(place)] = f"{type(cause).__name__}: {cause}"
        return self.modality.collate(raws) if raws else None, labels, bad


def units_of(tower: nn.Module, layer: int) -> list[nn.Module]:
    """The units of a tower's backbone; ConfigError if there is none of the number `layer`, which counts from 1."""
    backbone = getattr(tower, "backbone", None)
    units = list(backbone.units()) if isinstance(backbone, Backbone) else []
    if not 1 <= layer <= len(units):
        raise ConfigError(f"layer = {layer}: this backbone has {f'layers 1 to {len(units)}' if units else 'no layers'}")
    return units


@contextmanager
def _cut(tower: nn.Module, layer: int | None) -> Iterator[None]:
    """Let the units after the `layer`-th pass on what they are given."""
    if layer is None:
        yield
        return
    hooks = [unit.register_forward_hook(_skip) for unit in units_of(tower, layer)[layer:]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _skip(unit: nn.Module, given: tuple[Any, ...], out: Any) -> Any:
    if not isinstance(out, Tensor) or out.shape != given[0].shape:
        raise ContractError(
            f"the layers of this backbone change shape ({type(unit).__name__}); only its end has features"
        )
    return given[0]
