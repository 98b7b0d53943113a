"""What contests share: one objective at one size, our model beside another's, with the same weights and batch.

A batch waits in host memory, as a data worker leaves it (pinned, for a GPU), and is fetched in every step. What workers
make ahead for the other side, such as its masks, is made before the clock on a GPU, and in the step on a CPU, where
it takes the time of the same cores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

AHEAD = 4  # batches' worth of choices that workers have made before the clock starts


class Side(NamedTuple):
    """One that takes part: what is trained, and the loss of step number so-and-so."""

    model: nn.Module
    loss_of: Callable[[int], Tensor]


class Contest(ABC):
    """A pair of models; subclasses make them, then `fill` the first batch."""

    peer: str  # what theirs is
    unit: str  # what a sample is made of, for people
    ours: Any
    theirs: Any

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.samples = 0
        self._ahead: list[tuple[Tensor, ...]] = []

    @abstractmethod
    def batch(self, samples: int) -> Tensor:
        """A batch in host memory."""

    @property
    @abstractmethod
    def amount(self) -> float:
        """How much of `unit` a sample holds."""

    @property
    def needless(self) -> float:
        """FLOPs that theirs spends on a sample and that no method needs."""
        return 0.0

    def fill(self, samples: int) -> None:
        """A new batch, of so many samples."""
        self.samples, self._ahead = samples, []
        self.host = self._pinned(self.batch(samples))
        self.fetch()

    def fetch(self) -> None:
        """Put the batch on the device; the host does not wait for it."""
        self.x = self.there(self.host)

    def there(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def ids(self, number: int) -> Tensor:
        """Of the samples of step number so-and-so."""
        return torch.arange(self.samples, device=self.device) + number * self.samples

    def ahead(self, number: int, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` gives in host memory, on the device; for a GPU made beforehand, and used in turns."""
        if self.device.type == "cpu":
            return make()
        if not self._ahead:
            self._ahead = [tuple(map(self._pinned, make())) for _ in range(AHEAD)]
        return tuple(map(self.there, self._ahead[number % AHEAD]))

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self.device.type == "cuda" else x

    @abstractmethod
    def losses(self) -> tuple[Tensor, Tensor]:
        """Our loss and theirs, for the same random choices."""

    def checked(self) -> dict[str, Tensor]:
        """The loss of everyone who has the weights of ours, for the same random choices."""
        return dict(zip(("ours", "theirs"), self.losses(), strict=True))

    @abstractmethod
    def loss_of_ours(self, number: int) -> Tensor:
        """A step's loss, with the choices drawn as in training."""

    @abstractmethod
    def loss_of_theirs(self, number: int) -> Tensor:
        """The same of the other side."""

    def sides(self) -> dict[str, Side]:
        """Everyone, ours first and then what `peer` names."""
        return {"ours": Side(self.ours, self.loss_of_ours), "theirs": Side(self.theirs, self.loss_of_theirs)}

    def absent(self) -> dict[str, str]:
        """Who would take part, and why they do not."""
        return {}


def repeated(some: Tensor, samples: int) -> Tensor:
    """So many samples of few: drawing thousands of pictures takes longer than a step."""
    return some if len(some) == samples else some.repeat(-(-samples // len(some)), *[1] * (some.ndim - 1))[:samples]


def normal(samples: int, *shape: int) -> Tensor:
    """Normal values [samples, *shape]; beyond 64 samples they come again."""
    return repeated(torch.randn(min(samples, 64), *shape), samples)


def photos(samples: int, side: int) -> Tensor:
    """Squares as data workers hand them over [samples, 3, side, side]; beyond 64 they come again."""
    return repeated(torch.randint(256, (min(samples, 64), 3, side, side), dtype=torch.uint8), samples)
