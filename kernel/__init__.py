"""The microkernel: contracts, discovery and the loop. Everything else is a plugin.

Names are imported on first use, so that listing plugins does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import about as about
    from .contracts import Backbone as Backbone
    from .contracts import Batch as Batch
    from .contracts import Collator as Collator
    from .contracts import Draw as Draw
    from .contracts import Loss as Loss
    from .contracts import Modality as Modality
    from .contracts import Objective as Objective
    from .contracts import Raw as Raw
    from .contracts import Sample as Sample
    from .contracts import Shown as Shown
    from .contracts import Signal as Signal
    from .contracts import Stem as Stem
    from .contracts import Step as Step
    from .contracts import Tower as Tower
    from .contracts import collate_each as collate_each
    from .discovery import Plugins as Plugins
    from .distributed import gather as gather
    from .hookspecs import hookimpl as hookimpl
    from .loader import Part as Part
    from .loader import Source as Source
    from .loop import Report as Report
    from .loop import Run as Run
    from .random import Stream as Stream
    from .random import stream as stream

_EXPORTS = {
    "config": "about",
    "contracts": "Backbone Batch Collator Draw Loss Modality Objective Raw Sample Shown Signal Stem Step Tower "
    "collate_each",
    "discovery": "Plugins",
    "distributed": "gather",
    "hookspecs": "hookimpl",
    "loader": "Part Source",
    "loop": "Report Run",
    "random": "Stream stream",
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
