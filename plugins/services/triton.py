"""Put the Triton ops in place of plain torch where a run is on a GPU; the results are equal, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

from selfsup.kernel.config import about
from selfsup.kernel.hookspecs import hookimpl
from selfsup.kernel.random import FASTER

if TYPE_CHECKING:
    from selfsup.kernel.loop import Run


class Triton:
    """Random words in one launch instead of about a hundred."""

    def __init__(self, *, enabled: Annotated[bool, about("use Triton where it is installed")] = True) -> None:
        self.enabled = enabled

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Import the op only where it will run."""
        if self.enabled and run.device.type == "cuda" and find_spec("triton"):
            from selfsup.triton_ops.philox import random_bits

            FASTER["cuda"] = random_bits
