"""The one extractor: in order, in eval mode, in float32, bad samples left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from selfsup.kernel.contracts import Backbone, Modality, Signal, Stem, Tower
from selfsup.kernel.errors import BadSample, ConfigError, ContractError, DataError
from selfsup.kernel.loader import Part
from selfsup.plugins.common.features import Raw, Subset, features


class Numbers(Modality):
    """Lists of numbers of any length, padded."""

    field = "number"

    def read(self, stored):
        if stored == "bad":
            raise BadSample("it is bad")
        return torch.tensor(stored, dtype=torch.float32)

    def collate(self, raws, draw=None):
        assert draw is None
        lengths = torch.tensor([len(raw) for raw in raws])
        x = nn.utils.rnn.pad_sequence(raws, batch_first=True)
        return Signal(x, (torch.arange(x.shape[1]) < lengths[:, None]).int())

    def plain(self, raw):
        return replace(raw, x=raw.x + 100)

    def stem(self, width):
        return Wide(width)


class Wide(Stem):
    def __init__(self, width):
        super().__init__()
        self.width, self.size = width, 1
        self.scale = nn.Parameter(torch.linspace(1, 2, width))

    def latents(self, raw):
        return replace(raw, x=raw.x[..., None] * self.scale)


class Layers(Backbone):
    def __init__(self, width=3):
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5)) for _ in range(3)])
        self.batch_norm = nn.BatchNorm1d(width)

    def forward(self, tokens, *, causal=False, context=None):
        x = tokens.x
        for layer in self.layers:
            x = layer(x)
        return replace(tokens, x=self.batch_norm(x.transpose(1, 2)).transpose(1, 2))

    def units(self):
        return self.layers


class List:
    notes = ()

    def __init__(self, rows):
        self.rows, self.parts = rows, [Part(len(rows), 1)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"number": self.rows[index], "label": index} if index else {"number": self.rows[index]}

    def name(self, index):
        return f"row {index}"


ROWS = [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0], "bad", [7.0], "text that is no number", [8.0, 9.0]]


@pytest.fixture
def tower():
    torch.manual_seed(0)
    kind = Numbers()
    return Tower(kind.stem(3), Layers(), kind)


def by_hand(tower, row, layers=3):
    x = (torch.tensor(row)[:, None] + 100) * tower.stem.scale
    for layer in tower.backbone.layers[:layers]:
        x = x @ layer[0].weight.T + layer[0].bias
    norm = tower.backbone.batch_norm
    return ((x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias).mean(0)


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_the_mean_token_of_every_usable_sample_in_order(tower, batch, workers):
    tower.train()
    tower.backbone.batch_norm.running_mean += 0.5
    with torch.autocast("cpu", torch.bfloat16):
        x, labels, skipped = features(tower, Numbers(), List(ROWS), "cpu", batch=batch, workers=workers)
    good = [0, 1, 2, 4, 6]
    assert labels.tolist() == [-1, 1, 2, 4, 6]
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.stack([by_hand(tower, ROWS[i]) for i in good]))
    assert list(skipped) == ["row 3", "row 5"]
    assert skipped["row 3"] == "it is bad"
    assert skipped["row 5"].startswith("TypeError")


def test_it_changes_nothing_and_draws_nothing(tower):
    tower.train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    state = torch.get_rng_state()
    features(tower, Numbers(), List(ROWS), "cpu")
    assert tower.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_layer_before_the_last(tower):
    for layer in (1, 2, 3):
        x = features(tower, Numbers(), List(ROWS[:3]), "cpu", layer=layer).x
        torch.testing.assert_close(x, torch.stack([by_hand(tower, row, layer) for row in ROWS[:3]]))
    whole = features(tower, Numbers(), List(ROWS[:3]), "cpu").x
    assert torch.equal(whole, x)  # no layer is left cut off
    with pytest.raises(ConfigError, match="layer = 4: this backbone has layers 1 to 3"):
        features(tower, Numbers(), List(ROWS), "cpu", layer=4)


def test_layers_that_change_shape_have_no_features_between(tower):
    tower.backbone.layers[2] = nn.Linear(3, 4)
    with pytest.raises(ContractError, match="change shape"):
        features(tower, Numbers(), List(ROWS), "cpu", layer=1)


def test_a_subset_has_its_own_order(tower):
    part = Subset(List(ROWS), [6, 1])
    x, labels, _ = features(tower, Numbers(), part, "cpu")
    assert labels.tolist() == [6, 1]
    torch.testing.assert_close(x[1], by_hand(tower, ROWS[1]))
    assert part.name(0) == "row 6"


def test_no_usable_sample_is_an_error_with_reasons(tower):
    with pytest.raises(DataError, match="none of 2 samples can be used:\n  row 0: it is bad"):
        features(tower, Numbers(), List(["bad", "bad"]), "cpu")


def test_raw_features():
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    assert torch.equal(Raw()(Signal(x)).mean(), x.flatten(1))
    small = Raw(side=4)(Signal(x)).mean().reshape(2, 3, 4, 4)
    torch.testing.assert_close(small[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    with pytest.raises(ContractError, match="different lengths"):
        Raw()(Signal(x[:, 0, 0], torch.ones(2, 8)))
    with pytest.raises(ContractError, match="different lengths"):
        Raw()(Signal(x[:, 0, 0]))
    with pytest.raises(ContractError, match="192 raw values a sample are too many"):
        Raw(most=191)(Signal(x))
