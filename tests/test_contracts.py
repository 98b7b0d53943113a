"""Every plugin that is installed, ours or a stranger's, keeps its contract."""

from __future__ import annotations

from typing import Any

import pytest

from selfsup.kernel import Plugins
from selfsup.testing import BackboneContract, ModalityContract, ObjectiveContract

# What a plugin's test class says beyond its name. A stranger's plugin is run as it comes.
SAID: dict[tuple[str, str], dict[str, Any]] = {
    ("objectives", "bert"): {"options": {"modality.vocabulary": 512, "modality.length": 64, "backbone.depth": 2}},
    ("objectives", "gpt"): {"options": {"modality.vocabulary": 512, "modality.length": 64, "backbone.depth": 2}},
    ("objectives", "wav2vec2"): {
        # The perplexity of the codebook is of the whole batch, not a mean over samples.
        "linear": {"objective.diversity": 0.0},
    },
    ("backbones", "transformer"): {"options": {"width": 32, "depth": 2, "heads": 4}},
    ("modalities", "code"): {"options": {"vocabulary": 512, "length": 512}},
    ("modalities", "text"): {"options": {"vocabulary": 512, "length": 512}},
    ("modalities", "image"): {"options": {"size": 32, "patch": 8}},
}
CONTRACTS = {"objectives": ObjectiveContract, "modalities": ModalityContract, "backbones": BackboneContract}

for kind, contract in CONTRACTS.items():
    for name in Plugins().names(kind):
        title = f"Test_{kind}_{name}"
        globals()[title] = type(title, (contract,), {"name": name, **SAID.get((kind, name), {})})


def test_a_contract_names_a_plugin_that_is_installed():
    for kind, name in SAID:
        assert name in Plugins().names(kind)


@pytest.mark.parametrize("contract", CONTRACTS.values())
def test_a_contract_is_not_collected_by_itself(contract):
    assert not contract.__name__.startswith("Test")
