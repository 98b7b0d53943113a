"""Conformance tests for plugin authors, for pytest: subclass one, name your plugin, done.

    from selfsup.testing import ObjectiveContract

    class TestJigsaw(ObjectiveContract):
        name = "jigsaw"

The tests find the plugin by its entry point, as a run does, so it has to be installed. They run on a CPU with
the preset "tiny" and the built-in sample of the objective's modality.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in ("objective", "modality", "backbone")))

from .backbone import BackboneContract  # noqa: E402  (after the line above, or failures would not show values)
from .modality import ModalityContract  # noqa: E402
from .objective import ObjectiveContract  # noqa: E402

__all__ = ["BackboneContract", "ModalityContract", "ObjectiveContract"]
