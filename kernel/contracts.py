"""What a plugin may be, and the one value that plugins pass to each other.

    samples --Objective.collator--> Batch of Signals          (data workers: decode, pad or pack)
    Signal  --Modality.view--> Signal                         (device, the whole batch at once)
    Signal  --Stem--> Signal --Backbone--> Signal             (a Tower)
    Batch   --Objective.forward--> Loss                       (device)

Shapes: B batch, T tokens, D width of a backbone, L width of a stem's latents, P raw values behind
one token, A axes of a position (1 for text and sound, 2 for images, 3 for video).

Options of every plugin are the keyword-only arguments of its `__init__`: that signature is the
schema, the help text and the validation (see `config.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .errors import ContractError
from .random import Stream, stream

if TYPE_CHECKING:
    from .loader import Source

T = TypeVar("T")

CONTRACT = 1
"""The number of what this file and `hookspecs.py` promise. A plugin class states the one that it was made for.
It changes when a plugin that keeps to the old one would no longer work, and not when something is added."""

Sample = Mapping[str, Any]
Batch = dict[str, Any]
Draw = Callable[[str], Stream]
"""draw("crop") is the stream of that purpose for the samples at hand."""

Collator = Callable[[Sequence[Sample], Draw], Batch]
"""Picklable: it goes to data workers."""

Shown = Any
"""What people look at: a text, a list of (text, mark) pairs where mark is "", "hidden" or "guess", a picture
uint8 [H, W, 3], or a curve float [N], NaN where there is nothing; pictures and curves as NumPy arrays."""


@dataclass(frozen=True)
class Signal:
    """A batch of one modality: raw before a stem, tokens after it."""

    x: Tensor  # raw: whatever the modality says; after a stem: [B, T, D]
    segments: Tensor | None = None  # [B, T] int: 0 is padding, equal ids may attend to each other
    positions: Tensor | None = None  # [B, T] or [B, T, A] int; None counts tokens from 0
    edges: Tensor | None = None  # [2, E] into the flattened B * T tokens

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Signal:
        """Copy to a device, without waiting for it when the memory is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Signal:
        """Page-locked copies; the data loader calls this when the device is a GPU."""
        return self._map(Tensor.pin_memory)

    def take(self, index: Tensor) -> Signal:
        """Keep the tokens named by `index` [B, K], and their positions; MAE's way to hide the rest."""
        if self.edges is not None:
            raise ContractError("a graph cannot drop tokens, its edges name them; hide them with fill()")
        kept = self if self.positions is not None else replace(self, positions=self.places())
        rows = torch.arange(len(index), device=index.device)[:, None]
        return kept._map(lambda t: t[rows, index])

    def fill(self, hidden: Tensor, vector: Tensor) -> Signal:
        """Put `vector` [D] where `hidden` [B, T] is true; BERT's way to hide tokens."""
        return replace(self, x=torch.where(hidden[..., None], vector.to(self.x.dtype), self.x))

    def mean(self) -> Tensor:
        """Average over the tokens that are not padding: [B, D]."""
        if self.segments is None:
            return self.x.mean(1)
        real = (self.segments > 0)[..., None].to(self.x.dtype)
        return (self.x * real).sum(1) / real.sum(1).clamp(min=1)

    def real(self) -> Tensor:
        """Which tokens are not padding: [B, T] bool."""
        if self.segments is None:
            return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device)
        return self.segments > 0

    def places(self) -> Tensor:
        """The positions, or the count of tokens where there are none: [B, T] or [B, T, A]."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.x.shape[1], device=self.x.device).expand(self.x.shape[:2])

    def _map(self, f: Callable[[Tensor], Tensor]) -> Signal:
        return Signal(f(self.x), *(t if t is None else f(t) for t in (self.segments, self.positions, self.edges)))


@dataclass(frozen=True)
class Step:
    """Where training is. Schedules read `fraction`, which runs from 0 to 1, and nothing else."""

    number: int
    total: int
    seed: int = 0

    @property
    def fraction(self) -> float:
        """The share of training that lies behind."""
        return self.number / max(1, self.total)

    def draw(self, purpose: str, ids: Tensor) -> Stream:
        """The random stream of each sample in `ids` [B] for this purpose (law 1).

        The ids already carry the epoch, so a sample gets new numbers every time it is seen, and
        the same ones whatever the batch, worker or process it is seen in.
        """
        return stream(self.seed, purpose, ids)

    def draw_once(self, purpose: str, device: torch.device | str = "cpu") -> Stream:
        """One stream for the whole step, the same on every process: [1]-shaped draws."""
        return stream(self.seed, f"step {purpose}", torch.tensor([self.number], device=device))


class Loss(NamedTuple):
    """The scalar to minimise, what else is worth a plot, and how many predictions it averages.

    The loop averages microbatches and processes by `weight`; None counts samples.
    """

    total: Tensor
    metrics: Mapping[str, Tensor] = MappingProxyType({})
    weight: Tensor | None = None


class Stem(nn.Module, ABC):
    """Turn a raw signal into tokens; made by a modality, because it knows the raw form.

    forward = project(norm(latents)): an objective that quantises or predicts what the stem sees
    (wav2vec 2.0, HuBERT) takes the three parts one by one.
    """

    width: int  # L, of the latents
    size: int  # outputs that a head needs to predict one target: V ids, or P raw values
    discrete: bool = False  # whether targets are ids

    def __init__(self) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        self.project: nn.Module = nn.Identity()

    @abstractmethod
    def latents(self, raw: Signal) -> Signal:
        """Local features of every token: raw -> [B, T, L]."""

    def forward(self, raw: Signal) -> Signal:
        """Embed: raw -> [B, T, D]."""
        local = self.latents(raw)
        return replace(local, x=self.project(self.norm(local.x)))

    def targets(self, raw: Signal) -> Tensor:
        """What each token stands for: ids [B, T], or raw values [B, T, P]."""
        raise ContractError(f"{type(self).__name__} has no targets per token; this objective needs them")


class Modality(ABC):
    """Everything about one kind of data that is not learned. Must pickle: it goes to data workers."""

    contract: ClassVar[int] = CONTRACT
    field: ClassVar[str]  # the name of its column and of its built-in sample: "audio", "image"
    suffixes: ClassVar[tuple[str, ...]] = ()  # of files that it reads, lower case, with the dot
    unit: ClassVar[str | None] = None  # what `amount` counts, for the rate: "s of audio", "tokens"

    def learn(self, source: Source) -> None:  # noqa: B027 - most need nothing
        """Find in the data what options left open, such as a tokenizer; nothing where this or `load` did so before."""

    def files(self) -> Mapping[str, str]:
        """What `learn` found, as texts by file name: part of every checkpoint, and of the run's folder for people."""
        return {}

    def load(self, files: Mapping[str, str]) -> None:  # noqa: B027 - as above
        """Take back what `files` gave."""

    def rows(self, source: Source, seed: int, folder: Path | None, max_bad_fraction: float) -> Source:
        """The samples that training goes through, where they are not the stored ones: documents packed into rows.

        `folder` may keep what is costly to make again (None: a temporary one); every process calls this together.
        More than the share `max_bad_fraction` of samples that cannot be used is a DataError that lists them.
        """
        return source

    def read(self, stored: Any) -> Any:
        """Decode one stored field (a Path, bytes, {"bytes", "path"}, an array, a text) into a raw sample.

        Raise BadSample with the reason where that cannot be done.
        """
        return stored

    @abstractmethod
    def collate(self, raws: Sequence[Any], draw: Draw | None = None) -> Signal:
        """Pad, crop or pack raw samples into one signal. Without `draw` nothing is random (evaluation)."""

    @abstractmethod
    def stem(self, width: int) -> Stem:
        """Make the embedding for a backbone of this width."""

    def view(self, raw: Signal, extent: tuple[float, float], draw: Stream, strength: float = 1.0) -> Signal:
        """A random augmentation of every sample, on its device, that shows between these shares of it.

        `strength` scales the distortions beyond cropping and flipping; 0 leaves them out.
        """
        raise ContractError(f"the modality {self.field!r} has no augmentations, which this objective needs")

    def plain(self, raw: Signal) -> Signal:
        """The undistorted view, for evaluation."""
        return raw

    def amount(self, signal: Signal) -> float:
        """How much data a collated signal holds, in `unit`."""
        return float(len(signal.x))

    def show(self, signal: Signal) -> list[Shown]:
        """Each sample of a signal, raw or a view, as people would look at it."""
        return [f"{str(row.dtype).removeprefix('torch.')} {list(row.shape)}" for row in signal.x]

    def sample(self) -> Sequence[Sample]:
        """The small built-in data set: {field: stored, "label": int} each. Says nothing and downloads nothing."""
        raise ContractError(f"the modality {self.field!r} has no built-in sample; name your data with --data")


class Backbone(nn.Module, ABC):
    """Mix tokens: [B, T, D] -> [B, T', D]."""

    contract: ClassVar[int] = CONTRACT
    width: int
    wants_raw: ClassVar[bool] = False  # True (a ResNet): the tower has no stem, forward gets the raw signal
    step: Step | None = None  # set by the loop: whole-layer choices, which all ranks must share, draw from it

    @abstractmethod
    def forward(self, tokens: Signal, *, causal: bool = False, context: Signal | None = None) -> Signal:
        """`context` is what a decoder may look at besides its own tokens."""

    def at(self, tokens: Signal, index: Tensor) -> Tensor:
        """What comes out at the places in `index` [B, M] alone: [B, M, D]. A backbone may leave out the rest's work."""
        return self.forward(tokens).take(index).x

    def units(self) -> Iterable[nn.Module]:
        """The repeated parts: what is compiled and sharded one by one."""
        return ()

    @property
    def skips_parameters(self) -> bool:
        """Whether a step may leave some parameters without a gradient (layer drop)."""
        return False


class Raw(nn.Module):
    """The stem of a backbone that wants raw input, and of a decoder that is fed tokens: it changes nothing."""

    def forward(self, raw: Signal) -> Signal:
        """Return the signal as it came."""
        return raw


class Tower(nn.Module):
    """A stem and the backbone behind it, with the modality they are for; what an objective is given."""

    stem: Any  # a Stem, or Raw
    causal = False  # an objective that trains it to look back alone says so, for whoever uses it later

    def __init__(self, stem: nn.Module, backbone: Backbone, modality: Modality | None = None) -> None:
        super().__init__()
        self.stem, self.backbone, self.width = stem, backbone, backbone.width
        self.modality: Any = modality

    def forward(self, raw: Signal, *, context: Signal | None = None) -> Signal:
        """Raw (or, for a decoder, tokens) -> [B, T', D]."""
        tokens = returned(self.stem, "forward", self.stem(raw), Signal)
        return returned(self.backbone, "forward", self.backbone(tokens, causal=self.causal, context=context), Signal)

    def view(self, raw: Signal, extent: tuple[float, float], draw: Stream, strength: float = 1.0) -> Signal:
        """A random augmentation; see `Modality.view`."""
        return returned(self.modality, "view", self.modality.view(raw, extent, draw, strength), Signal)


class Objective(nn.Module, ABC):
    """A pretext task: what to hide, what to predict, how wrong the guess was.

    `__init__` takes its towers by position, in the order of `towers`, and options by keyword.
    Buffers may change in `forward`, as in BatchNorm; parameters only in `after_step`.
    """

    contract: ClassVar[int] = CONTRACT
    towers: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]  # authors, year, title, address
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Settings by dotted name. "base" is the paper's recipe, whole; the others say what differs from it."""

    divisible: ClassVar[bool] = True
    """Whether the loss of a batch is the weighted mean of the losses of its parts (microbatches)."""

    @abstractmethod
    def forward(self, batch: Batch, step: Step) -> Loss:
        """Score one batch on the device. batch["ids"] [B] names its samples, for `step.draw`."""

    def collator(self, **modalities: Modality) -> Collator:
        """Return the picklable function with which data workers make a batch."""
        return partial(collate_each, modalities)

    def show(self, batch: Batch, step: Step, guess: bool = True) -> Mapping[str, Sequence[Shown]]:
        """What training makes of each sample of a batch, by caption: views, what is hidden, and with `guess` the guess.

        For reports: in eval mode, without gradient, on few samples; the draws are those of training.
        """
        towers = ((name, getattr(self, name)) for name in self.towers if name in batch)
        return {name: tower.modality.show(batch[name]) for name, tower in towers}

    def calibrate(self, batches: Iterable[Batch], step: Step) -> None:
        """Fit buffers to some data before the first step: k-means, counts. Runs once; kept in checkpoints.

        `batches` are whole, as all processes together see them, so that each process fits the same.
        """

    def after_step(self, step: Step) -> None:
        """Change parameters that the optimizer does not own: EMA teachers."""

    def backbones(self) -> list[Backbone]:
        """Every backbone inside, teachers' included."""
        return [module for module in self.modules() if isinstance(module, Backbone)]

    def no_decay(self) -> Iterable[str]:
        """Names of parameters without weight decay, besides all one-dimensional ones."""
        return ()

    @property
    def exports(self) -> Tower:
        """The product of training: what evaluation and export use."""
        tower: Tower = getattr(self, self.towers[0])
        return tower


def collate_each(modalities: Mapping[str, Modality], samples: Sequence[Sample], draw: Draw) -> Batch:
    """The plain batch: every modality collates its own tower's field of the samples."""
    return {
        name: returned(m, "collate", m.collate([s[name] for s in samples], draw), Signal)
        for name, m in modalities.items()
    }


def returned(by: Any, method: str, value: Any, kind: type[T]) -> T:
    """The value that a plugin's method returned, if it is of the kind promised; ContractError says whose is not."""
    if isinstance(value, kind):
        return value
    said = f"{type(by).__module__}.{type(by).__qualname__}.{method}"
    raise ContractError(f"{said} returned a {type(value).__name__}, not a {kind.__name__}", by)
