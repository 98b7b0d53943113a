"""Every error that is raised on purpose.

* SelfsupError         a person can fix it; the command line prints it without a traceback
  * ConfigError        the run asks for something that does not exist or is out of range
  * PluginError        an installed plugin could not be loaded, or a name is claimed twice
  * ContractError      two plugins that were asked to work together do not fit
  * DataError          there is no usable data, or too much of it is damaged
    * BadSample        one sample cannot be used; the loader skips and counts it
  * StateError         a checkpoint could not be written, or none verifies
  * DivergedError      the loss or a gradient is not finite
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SelfsupError(Exception):
    """Base of every error that a person, rather than a developer, can fix."""


class ConfigError(SelfsupError):
    """The run asks for something that does not exist or is out of range."""


class PluginError(SelfsupError):
    """An installed plugin could not be loaded, or claims a name already taken."""


class ContractError(SelfsupError):
    """Two plugins that were asked to work together do not fit; `by` is the one that broke a promise, where known."""

    def __init__(self, text: str, by: object = None) -> None:
        super().__init__(text)
        self.by = by


class DataError(SelfsupError):
    """There is no usable data, or too much of it is damaged."""


class BadSample(DataError):
    """One sample cannot be used; raise it in `Modality.read` with the reason."""


class StateError(SelfsupError):
    """A checkpoint could not be written, or none of those on disk verifies."""


class DivergedError(SelfsupError):
    """The loss or a gradient is not finite."""


def nearest(asked: str, known: Iterable[str], most: int = 20) -> str:
    """Say what exists: the nearest match if there is one, otherwise all of it, or of a crowd the first `most`."""
    known = sorted(known)
    near = get_close_matches(asked, known, n=1)
    listed = ", ".join(known[:most]) + (f" and {len(known) - most:,} more" if len(known) > most else "")
    return f"did you mean {near[0]!r}?" if near else f"known: {listed or 'none'}"


def allow_bad(bad: int, of: int) -> str:
    """The option that lets so many samples out of all be unusable."""
    return f"--max-bad-fraction {min(1.0, -(-100 * bad // of) / 100):g}"


def most_bad(share: float, of: int) -> float:
    """How many samples out of all may be unusable: that share and at least one, but none where the share is 0."""
    return max(1.0, share * of) if share else 0.0
