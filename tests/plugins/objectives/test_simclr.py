"""SimCLR against its equations worked out pair by pair in float64, and two processes against one."""

import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import Forked
from torch import nn

from selfsup.kernel import distributed
from selfsup.kernel.compose import build, resolve
from selfsup.kernel.contracts import Backbone, Modality, Signal, Stem, Step, Tower
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ConfigError
from selfsup.kernel.random import stream, tag
from selfsup.plugins.objectives.simclr import SimCLR, nt_xent, spread_of, stacked
from selfsup.plugins.services.optimizer import Optimizers

STEP = Step(3, 10, seed=7)


class Curves(Modality):
    """Series [B, T, 1] with padding, whose views are scaled and shifted: nothing of an image."""

    field = "curve"

    def collate(self, raws, draw=None):
        lengths = torch.tensor([len(raw) for raw in raws])
        x = nn.utils.rnn.pad_sequence([torch.as_tensor(raw) for raw in raws], batch_first=True)[..., None]
        return Signal(x, segments=(torch.arange(x.shape[1])[None] < lengths[:, None]).long())

    def stem(self, width):
        return Embed(width)

    def view(self, raw, extent, draw, strength=1.0):
        scale = draw.between(extent[0], extent[1], 1, 1)
        return Signal(raw.x * scale + strength * draw.normal(1, 1), raw.segments)


class Embed(Stem):
    width, size, discrete = 4, 1, False

    def __init__(self, width):
        super().__init__()
        self.linear, self.project = nn.Linear(1, 4), nn.Linear(4, width)

    def latents(self, raw):
        return Signal(torch.tanh(self.linear(raw.x)), raw.segments)


class Mix(Backbone):
    """Two layers with the batch norm of all processes between them."""

    width = 6

    def __init__(self):
        super().__init__()
        from selfsup.plugins.common.norm import BatchNorm

        self.inner, self.norm, self.outer = nn.Linear(6, 6), BatchNorm(6), nn.Linear(6, 6)

    def forward(self, tokens, *, causal=False, context=None):
        x = self.norm(self.inner(tokens.x).transpose(1, 2)).transpose(1, 2)
        return Signal(self.outer(torch.relu(x)), tokens.segments)


def objective(**options):
    torch.manual_seed(0)
    return SimCLR(Tower(Embed(6), Mix(), Curves()), **{"width": 5, "temperature": 0.5, **options})


def batch_of(ids):
    """The curves of these samples, whichever batch they stand in."""
    raws = [torch.sin(torch.arange(9) * (0.2 + 0.1 * (int(i) % 50))) for i in ids]
    return {"encoder": Curves().collate(raws), "ids": tag(2, torch.as_tensor(ids))}


def unit(*shape, seed=0):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def by_hand(first, second, temperature):
    """(loss, gradient of all 2B vectors) of equation 1, one pair at a time."""
    z = np.concatenate([first, second])
    n = len(z)
    total, grad = 0.0, np.zeros_like(z)
    for i in range(n):
        j = (i + n // 2) % n
        scores = {k: float(z[i] @ z[k]) / temperature for k in range(n) if k != i}
        whole = sum(np.exp(s) for s in scores.values())
        total += -np.log(np.exp(scores[j]) / whole)
        for k, score in scores.items():
            pull = (np.exp(score) / whole - (k == j)) / temperature
            grad[i] += pull * z[k]
            grad[k] += pull * z[i]
    return total / n, grad / n


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 7])
def test_the_loss_and_its_gradient_equal_the_hand_computation(count, temperature):
    first, second = (unit(count, 5, seed=seed).requires_grad_() for seed in (0, 1))
    loss, _ = nt_xent(first, second, torch.arange(count), temperature)
    loss.backward()
    expected, grad = by_hand(first.detach().numpy(), second.detach().numpy(), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(torch.cat([first.grad, second.grad]), grad, rtol=1e-9, atol=1e-12)


def test_the_loss_is_half_of_the_authors_sum_over_both_views():
    a, b = unit(6, 5), unit(6, 5, seed=1)
    t, never = 0.3, 1e9 * torch.eye(6, dtype=torch.float64)
    target = torch.arange(6)
    theirs = F.cross_entropy(torch.cat([a @ b.T / t, a @ a.T / t - never], 1), target)
    theirs = theirs + F.cross_entropy(torch.cat([b @ a.T / t, b @ b.T / t - never], 1), target)
    assert nt_xent(a, b, torch.arange(6), t)[0].item() == pytest.approx(theirs.item() / 2, rel=1e-12)


def test_a_sample_alone_has_no_negatives_and_no_loss():
    loss, accuracy = nt_xent(unit(1, 5), unit(1, 5, seed=1), torch.tensor([4]), 0.1)
    assert (loss.item(), accuracy.item()) == (0.0, 1.0)


def test_a_sample_that_is_there_twice_is_no_negative_of_itself():
    first, second = unit(3, 5), unit(3, 5, seed=1)
    twice = torch.tensor([0, 1, 2, 2])
    loss, _ = nt_xent(first[twice], second[twice], twice, 0.2)
    z = torch.cat([first, second])
    expected = []
    for i in (0, 1, 2, 2, 3, 4, 5, 5):
        others = [z[i] @ z[k] / 0.2 for k in (0, 1, 2, 2, 3, 4, 5, 5) if k % 3 != i % 3]
        positive = z[i] @ z[(i + 3) % 6] / 0.2
        expected.append(torch.stack([positive, *others]).logsumexp(0) - positive)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-12)


def test_accuracy_is_the_share_of_views_that_are_nearest_to_their_partner():
    first = torch.eye(4, dtype=torch.float64)
    second = first.clone()
    second[0] = F.normalize(0.6 * first[0] + 0.8 * first[1], dim=0)  # nearer to sample 1 than to its own
    _, accuracy = nt_xent(first, second, torch.arange(4), 0.1)
    # View a of sample 0 still finds its partner; only view b of it finds both views of sample 1 nearer.
    assert accuracy.item() == pytest.approx(7 / 8)


def test_it_trains_on_any_modality_and_everything_in_it_gets_a_gradient():
    model = objective()
    loss = model(batch_of([1, 2, 3, 4]), STEP)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(loss.metrics) == {"accuracy", "alignment", "spread"}
    assert loss.weight is None
    assert not any(m.requires_grad for m in loss.metrics.values())


def test_the_loss_is_that_of_the_encoded_views():
    model, batch = objective(strength=0.3, extent=(0.5, 0.9)), batch_of([1, 2, 3, 4])
    found = model(batch, STEP)
    views = [Curves().view(batch["encoder"], (0.5, 0.9), stream(7, f"view {name}", batch["ids"]), 0.3) for name in "ab"]
    x = Signal(torch.cat([v.x for v in views]), torch.cat([v.segments for v in views]))
    z = F.normalize(model.head(model.encoder(x).mean()), dim=-1).double().detach().numpy()
    assert found.total.item() == pytest.approx(by_hand(z[:4], z[4:], 0.5)[0], rel=1e-5)
    distances = ((z[:4] - z[4:]) ** 2).sum(-1)
    assert found.metrics["alignment"].item() == pytest.approx(distances.mean(), rel=1e-4)


def test_a_sample_has_the_same_views_whatever_its_batch():
    class Spy(Curves):
        seen = ()

        def view(self, raw, extent, draw, strength=1.0):
            out = super().view(raw, extent, draw, strength)
            self.seen = (*self.seen, out.x)
            return out

    views = {}
    for ids in ([5, 6, 7, 8], [8, 5]):
        model = objective()
        model.encoder.modality = Spy()
        model(batch_of(ids), STEP)
        views[len(ids)] = model.encoder.modality.seen
    for of_four, of_two in zip(views[4], views[2], strict=True):
        assert torch.equal(of_four[[3, 0]], of_two)
    assert not torch.equal(*views[4])


def test_spread_is_one_for_directions_without_preference_and_zero_after_a_collapse():
    torch.manual_seed(0)
    assert spread_of(torch.randn(4000, 32)).item() == pytest.approx(1.0, abs=0.02)
    assert spread_of(torch.randn(1, 32).expand(100, 32) * torch.rand(100, 1)).item() == pytest.approx(0.0, abs=1e-4)


def test_stacked_signals_keep_segments_positions_and_edges():
    def one(value):
        x = torch.full((2, 3, 4), float(value))
        place = torch.full((2, 3), value)
        return Signal(x, place, place + 1, edges=torch.tensor([[0, 5], [1, 4]]))

    both = stacked(one(1), one(2))
    assert both.x[:, 0, 0].tolist() == [1, 1, 2, 2]
    assert both.segments[:, 0].tolist() == [1, 1, 2, 2]
    assert both.positions[:, 0].tolist() == [2, 2, 3, 3]
    assert both.edges.tolist() == [[0, 5, 6, 11], [1, 4, 7, 10]]


def test_in_bfloat16_the_similarities_are_still_float32():
    model, batch = objective(temperature=0.05), batch_of(range(8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch, STEP)
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_product_is_the_encoder():
    model = objective()
    assert model.exports is model.encoder
    assert not model.divisible


@pytest.mark.parametrize("extent", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_an_extent_that_is_no_range_of_shares_is_refused(extent):
    with pytest.raises(ConfigError, match=r"objective.extent"):
        objective(extent=extent)


@pytest.mark.parametrize("preset", sorted(SimCLR.presets))
def test_a_preset_makes_a_model_that_takes_images_of_its_size(preset):
    plugins = Plugins()
    settings = resolve(plugins, {"preset": preset, "objective": {"name": "simclr"}})
    model = build(plugins, settings)
    side, channels = settings["modality"]["size"], settings["modality"]["channels"]
    raw = Signal(torch.zeros(2, channels, side, side, dtype=torch.uint8))
    with torch.no_grad():
        assert model({"encoder": raw, "ids": torch.arange(2)}, STEP).total.isfinite()


def test_base_is_the_papers_recipe():
    settings = resolve(Plugins(), {"preset": "base", "objective": {"name": "simclr"}})
    service = Optimizers(**settings["optimizer"])
    assert service.peak(settings["train"]["batch"]) == pytest.approx(4.8)  # section 2.2
    assert (service.name, service.weight_decay, service.warmup * settings["train"]["epochs"]) == ("lars", 1e-6, 10)
    assert (settings["train"]["batch"], settings["backbone"]["depth"], settings["objective"]["layers"]) == (4096, 50, 2)


def worker(rank, folder):
    """One of two processes: the gradient of its half of the batch, averaged as DDP and the loop do."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = IDS[rank * 4 : rank * 4 + 4]
    torch.save(gradient(mine), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # as the command line does, and why: cli/main.py


IDS = [11, 3, 40, 7, 29, 18, 5, 23]


def gradient(ids):
    model = objective()
    loss = model(batch_of(ids), STEP)
    weight = torch.tensor(float(len(ids)))
    (loss.total * weight).backward()
    weights = distributed.total(weight)
    grads = {name: distributed.total(p.grad) / weights for name, p in model.named_parameters()}
    means = {"loss": loss.total.detach(), "accuracy": loss.metrics["accuracy"], "alignment": loss.metrics["alignment"]}
    means = {name: distributed.total(value * weight) / weights for name, value in means.items()}
    return means, grads, dict(model.named_buffers())


def test_two_processes_give_the_loss_and_the_gradient_of_one(tmp_path):
    started = [Forked([sys.executable, __file__, tmp_path, rank]) for rank in range(2)]
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    expected = gradient(IDS)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        compare = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                compare(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    worker(int(sys.argv[2]), sys.argv[1])


def test_people_see_both_views_and_the_nearest_of_all():
    settings = resolve(Plugins(), {"objective": {"name": "simclr"}, "preset": "tiny"})
    objective = build(Plugins(), settings).eval()
    modality = objective.encoder.modality
    raw = modality.collate([modality.read(sample["image"]) for sample in modality.sample()[:6]])
    batch = {"encoder": raw, "ids": torch.arange(6)}
    shown = objective.show(batch, STEP)
    first, second = objective.views(batch, STEP)
    for name, signal in {"sample": raw, "one view": first, "its partner": second}.items():
        np.testing.assert_array_equal(shown[name], modality.show(signal))
    with torch.no_grad():
        a, b = (F.normalize(objective.head(objective.encoder(view).mean()), dim=-1) for view in (first, second))
    views = [*modality.show(first), *modality.show(second)]
    for row in range(6):
        cosines = torch.cat([a, b]) @ a[row]
        cosines[row] = -2
        np.testing.assert_array_equal(shown["nearest view"][row], views[int(cosines.argmax())])
        assert (shown["which is"][row] == "its partner") == (int(cosines.argmax()) == row + 6)
    assert list(objective.show(batch, STEP, guess=False)) == list(shown)[:3]
