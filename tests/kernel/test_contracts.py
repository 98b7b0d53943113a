"""The one value on the wire, the clock, and what the base classes promise."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from selfsup.kernel import Backbone, Loss, Modality, Objective, Raw, Signal, Stem, Step, Tower, stream
from selfsup.kernel.errors import ContractError
from selfsup.kernel.random import tag


def signal(batch=2, tokens=5, width=3, **rest):
    x = torch.arange(batch * tokens * width, dtype=torch.float32).view(batch, tokens, width)
    return Signal(x, **rest)


def test_take_keeps_tokens_their_places_and_their_segments():
    segments = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    index = torch.tensor([[3, 0], [4, 4]])
    kept = signal(segments=segments).take(index)
    assert kept.x[:, :, 0].tolist() == [[9.0, 0.0], [27.0, 27.0]]
    assert kept.segments.tolist() == [[2, 1], [1, 1]]
    assert kept.positions.tolist() == [[3, 0], [4, 4]]
    again = kept.take(torch.tensor([[0], [1]]))
    assert again.positions.tolist() == [[3], [4]]


def test_take_keeps_positions_of_several_axes():
    places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), -1).view(1, 6, 2)
    kept = signal(1, 6, positions=places).take(torch.tensor([[5, 2]]))
    assert kept.positions.tolist() == [[[1, 2], [0, 2]]]


def test_a_graph_cannot_drop_tokens():
    with pytest.raises(ContractError, match="hide them with fill"):
        signal(edges=torch.zeros(2, 1, dtype=torch.int64)).take(torch.tensor([[0], [1]]))


def test_fill_hides_what_is_named_and_carries_gradients():
    hidden = torch.tensor([[True, False, False, False, False], [False, False, False, False, True]])
    vector = torch.full((3,), -1.0, requires_grad=True)
    filled = signal().fill(hidden, vector)
    assert (filled.x[hidden] == -1).all()
    assert torch.equal(filled.x[~hidden], signal().x[~hidden])
    filled.x.sum().backward()
    assert vector.grad.tolist() == [2.0, 2.0, 2.0]


def test_fill_takes_the_dtype_of_the_tokens():
    low = Signal(torch.zeros(1, 2, 3, dtype=torch.bfloat16))
    assert low.fill(torch.ones(1, 2, dtype=torch.bool), torch.ones(3)).x.dtype == torch.bfloat16


def test_mean_leaves_padding_out():
    segments = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    mean = signal(segments=segments).mean()
    assert mean[0].tolist() == [1.5, 2.5, 3.5]
    assert mean[1].tolist() == [0.0, 0.0, 0.0]  # nothing but padding: no division by zero
    assert torch.equal(signal().mean(), signal().x.mean(1))


def test_real_and_places_without_segments_and_positions():
    assert signal().real().all()
    assert signal().real().shape == (2, 5)
    assert (
        signal(segments=torch.tensor([[1, 0, 2, 0, 0]] * 2)).real().tolist() == [[True, False, True, False, False]] * 2
    )
    assert signal().places().tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_signal_pickles_and_moves_whole():
    whole = signal(segments=torch.ones(2, 5), positions=torch.zeros(2, 5), edges=torch.zeros(2, 1))
    for copy in (pickle.loads(pickle.dumps(whole)), whole.to("cpu")):
        for name in ("x", "segments", "positions", "edges"):
            assert torch.equal(getattr(copy, name), getattr(whole, name))
    assert signal().to("meta").x.is_meta
    assert signal().to("meta").segments is None


def test_the_clock_runs_from_zero_to_one():
    assert [Step(n, 4).fraction for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert Step(0, 0).fraction == 0


def test_step_draws_are_streams_of_the_seed_and_the_samples():
    ids = tag(1, torch.arange(4))
    assert torch.equal(Step(3, 9, seed=7).draw("mask", ids).bits(5), stream(7, "mask", ids).bits(5))
    assert torch.equal(Step(8, 9, seed=7).draw("mask", ids).bits(5), Step(3, 9, seed=7).draw("mask", ids).bits(5))
    once = Step(3, 9, seed=7).draw_once("layers").uniform(2)
    assert once.shape == (1, 2)
    assert not torch.equal(once, Step(4, 9, seed=7).draw_once("layers").uniform(2))
    assert not torch.equal(once, stream(7, "layers", torch.tensor([3])).uniform(2))  # step 3 is not sample 3


def test_loss_has_no_metrics_and_counts_samples_unless_told():
    loss = Loss(torch.tensor(1.0))
    assert (dict(loss.metrics), loss.weight) == ({}, None)


class Numbers(Modality):
    field = "number"

    def collate(self, raws, draw=None):
        return Signal(torch.stack(list(raws)))

    def stem(self, width):
        return Embed(width)


class Embed(Stem):
    def __init__(self, width):
        super().__init__()
        self.width, self.size = 3, 3
        self.norm, self.project = nn.LayerNorm(3), nn.Linear(3, width)

    def latents(self, raw):
        return raw


class Same(Backbone):
    width = 4

    def forward(self, tokens, *, causal=False, context=None):
        return tokens


class Guess(Objective):
    towers = ("encoder", "decoder")
    paper = "none"
    presets = {"base": {}}  # noqa: RUF012

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, batch, step):
        return Loss(self.encoder(batch["encoder"]).x.sum())


def test_a_backbone_gives_what_comes_out_at_some_places():
    assert Same().at(signal(), torch.tensor([[3, 0], [4, 4]]))[:, :, 0].tolist() == [[9.0, 0.0], [27.0, 27.0]]


def test_a_stem_projects_normed_latents():
    stem, raw = Embed(4), signal(segments=torch.ones(2, 5))
    out = stem(raw)
    torch.testing.assert_close(out.x, stem.project(stem.norm(raw.x)))
    assert out.segments is raw.segments


def test_what_a_plugin_leaves_out_is_refused_with_the_reason():
    with pytest.raises(ContractError, match="Embed has no targets per token"):
        Embed(4).targets(signal())
    with pytest.raises(ContractError, match="the modality 'number' has no augmentations"):
        Tower(Embed(4), Same(), Numbers()).view(signal(), (0.2, 1.0), stream(0, "view", torch.arange(2)))
    with pytest.raises(ContractError, match="the modality 'number' has no built-in sample; name your data with --data"):
        Numbers().sample()


def test_a_tower_is_its_stem_and_backbone_and_the_first_one_is_exported():
    towers = [Tower(Embed(4), Same(), Numbers()), Tower(Raw(), Same())]
    objective = Guess(*towers)
    assert towers[0](signal()).x.shape == (2, 5, 4)
    assert towers[1](signal()).x is not None
    assert objective.exports is towers[0]
    assert objective.backbones() == [towers[0].backbone, towers[1].backbone]
    assert (list(objective.no_decay()), objective.divisible) == ([], True)


def test_the_plain_collator_pickles_and_gives_each_tower_its_own():
    fields = {"encoder": Numbers(), "decoder": Numbers()}
    collate = pickle.loads(pickle.dumps(Guess(Tower(Embed(4), Same()), Tower(Raw(), Same())).collator(**fields)))
    samples = [{"encoder": torch.full((5, 3), float(i)), "decoder": torch.zeros(1, 3)} for i in range(2)]
    batch = collate(samples, lambda purpose: stream(0, purpose, torch.arange(2)))
    assert batch["encoder"].x.shape == (2, 5, 3)
    assert batch["decoder"].x.shape == (2, 1, 3)
    assert Numbers().plain(batch["encoder"]) is batch["encoder"]
    assert Numbers().amount(batch["encoder"]) == 2
