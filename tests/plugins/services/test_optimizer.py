"""The optimizer service: who is decayed, which learning rate a batch gets, and what a checkpoint brings back."""

import copy
import inspect
import json
import math
import os
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from selfsup.kernel.config import check
from selfsup.kernel.contracts import Loss, Objective, Step
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.kernel.hookspecs import hookimpl
from selfsup.plugins.services.optimizer import Optimizers

NAMES = ("adamw", "sgd", "lars")


class Toy(Objective):
    """One parameter of every sort: two matrices, a named one, a norm, a scale, a bias with two axes, a frozen one."""

    towers = ()
    paper = "none"
    presets: ClassVar = {"base": {}}

    def __init__(self, spared=("token",)):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.position = nn.Module()
        self.position.bias = nn.Parameter(torch.randn(2, 5))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.spared = spared

    def forward(self, batch, step):
        x = self.norm(self.first(batch) + self.token[0]) + self.position.bias.sum(0)
        return Loss((self.scale * self.second(x)).square().mean())

    def no_decay(self):
        return self.spared


def names_of(objective, group):
    known = {id(p): name for name, p in objective.named_parameters()}
    return [known[id(p)] for p in group["params"]]


def train(objective, optimizer, steps, first=0, service=None):
    run = SimpleNamespace(optimizer=optimizer)
    for number in range(first, first + steps):
        step = Step(number, 10)
        if service:
            service.step_started(run=run, step=step)
        data = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        objective(data, step).total.backward()
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def weights(objective):
    return [p.detach().clone() for p in objective.parameters()]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_biases_norms_scales_and_named_parameters_are_spared_and_frozen_ones_left_out(name):
    objective = Toy()
    optimizer = Optimizers(name=name, weight_decay=0.3).build_optimizer(objective, 1)
    decayed, spared = optimizer.param_groups
    assert names_of(objective, decayed) == ["first.weight", "second.weight"]
    assert names_of(objective, spared) == [
        *("scale", "token", "first.bias", "norm.weight", "norm.bias", "position.bias"),
    ]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    if name == "lars":
        assert (decayed["adapt"], spared["adapt"]) == (True, False)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_parameter_does_not_move(name):
    objective = Toy()
    before = objective.frozen.weight.clone()
    service = Optimizers(name=name, lr=0.1, weight_decay=0.3)
    train(objective, service.build_optimizer(objective, 1), 2)
    assert torch.equal(objective.frozen.weight, before)


def test_a_name_in_no_decay_that_does_not_exist_is_an_error_with_the_nearest():
    with pytest.raises(ContractError, match=r"Toy.no_decay names the parameter 'tokn'.*did you mean 'token'"):
        Optimizers().build_optimizer(Toy(spared=("tokn",)), 1)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ContractError, match="Toy has no parameter to train"):
        Optimizers().build_optimizer(Toy().requires_grad_(False), 1)


def test_an_objective_without_matrices_or_without_biases_has_one_group():
    objective = Toy(spared=())
    for p in (objective.first.weight, objective.second.weight, objective.token):
        p.requires_grad_(False)
    (group,) = Optimizers().build_optimizer(objective, 1).param_groups
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("scaling", "batch", "peak"),
    [("linear", 1024, 1.2), ("linear", 64, 0.075), ("sqrt", 1024, 0.6), ("none", 1024, 0.3), ("linear", 256, 0.3)],
)
def test_the_peak_follows_the_batch(scaling, batch, peak):
    service = Optimizers(lr=0.3, reference_batch=256, scaling=scaling)
    assert service.peak(batch) == pytest.approx(peak)
    assert service.build_optimizer(Toy(), batch).param_groups[0]["peak"] == pytest.approx(peak)


def test_without_a_reference_batch_the_peak_is_the_learning_rate():
    assert Optimizers(lr=0.3, scaling="linear").peak(4096) == 0.3


def test_describe_says_how_the_rate_was_scaled():
    service = Optimizers(name="lars", lr=0.3, reference_batch=256, weight_decay=1e-6, warmup=0.1)
    assert service.describe(1024) == (
        "lars, lr 0.3 at batch 256 -> 1.2 at batch 1024 (linear), weight decay 1e-06, cosine after 10 % warm-up"
    )
    for service in (
        Optimizers(schedule="constant", warmup=0),
        Optimizers(schedule="constant", warmup=0, reference_batch=64),
    ):
        assert service.describe(64) == "adamw, lr 0.001, weight decay 0.01, constant"


def test_every_step_sets_the_rate_from_the_step_alone():
    service = Optimizers(lr=0.3, reference_batch=256, schedule="linear", warmup=0.2)
    run = SimpleNamespace(optimizer=service.build_optimizer(Toy(), 512))
    expected = {0: 0.3, 1: 0.6, 2: 0.6, 6: 0.3, 9: 0.075}
    for number in (9, 0, 6, 1, 2):  # in any order
        service.step_started(run=run, step=Step(number, 10))
        assert [g["lr"] for g in run.optimizer.param_groups] == pytest.approx([expected[number]] * 2)


def test_an_outsiders_optimizer_goes_first_and_keeps_its_rate():
    class Own:
        @hookimpl
        def build_optimizer(self, objective):
            return torch.optim.SGD(objective.parameters(), lr=7.0)

    for order in ((Own(), Optimizers()), (Optimizers(), Own())):
        plugins = Plugins()
        for number, service in enumerate(order):
            plugins.register(service, str(number))
        run = SimpleNamespace(optimizer=plugins.hook.build_optimizer(objective=Toy(), batch=1))
        plugins.hook.step_started(run=run, step=Step(0, 10))
        assert run.optimizer.param_groups[0]["lr"] == 7.0


@pytest.mark.parametrize("name", NAMES)
def test_training_twice_gives_the_same_bits(name):
    found = []
    for _ in range(2):
        objective, service = Toy(), Optimizers(name=name, lr=0.05)
        train(objective, service.build_optimizer(objective, 1), 4, service=service)
        found.append(weights(objective))
    assert same(*found)
    assert not same(found[0], weights(Toy()))


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("name", [*NAMES, "nesterov", "no momentum"])
def test_an_update_that_is_left_out_leaves_no_trace(name, first):
    options = {"nesterov": {"name": "sgd", "nesterov": True}, "no momentum": {"name": "sgd", "momentum": 0.0}}
    options = {"lr": 0.05, **options.get(name, {"name": name})}
    found = []
    for with_bad in (True, False):
        objective = Toy()
        optimizer = Optimizers(**options).build_optimizer(objective, 1)
        if not first:
            train(objective, optimizer, 1, first=3)
        if with_bad:
            for p in objective.parameters():
                p.grad = torch.full_like(p, torch.nan)
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        train(objective, optimizer, 2)
        found.append(weights(objective))
    assert same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_brings_the_state_back_bit_for_bit(name):
    """As the loop does it: tensors apart, the groups through JSON, into an optimizer that has not stepped."""
    objective, service = Toy(), Optimizers(name=name, lr=0.05, warmup=0.3)
    optimizer = service.build_optimizer(objective, 1)
    train(objective, optimizer, 3, service=service)
    saved = copy.deepcopy(get_optimizer_state_dict(objective, optimizer))
    tensors, groups = saved["state"], json.loads(json.dumps(saved["param_groups"]))
    assert set(tensors) == {n for n, p in objective.named_parameters() if p.requires_grad}

    other = Toy()
    other.load_state_dict(objective.state_dict())
    resumed = service.build_optimizer(other, 1)
    set_optimizer_state_dict(other, resumed, {"state": copy.deepcopy(tensors), "param_groups": groups})
    again = get_optimizer_state_dict(other, resumed)["state"]
    for parameter, moments in tensors.items():
        assert again[parameter].keys() == moments.keys()
        for moment, value in moments.items():
            assert torch.equal(again[parameter][moment], value), (parameter, moment)
    for target, opt in ((objective, optimizer), (other, resumed)):
        train(target, opt, 3, first=3, service=service)
    assert same(weights(objective), weights(other))


def test_a_resumed_run_may_change_no_option():
    assert set(Optimizers.fixed) == set(inspect.signature(Optimizers.__init__).parameters) - {"self"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"optimizer.betas = \[0.9, 1.0\]"),
        ({"milestones": (0.6, 0.3)}, "milestones .* must rise"),
        ({"milestones": (0.5, 1.5)}, "milestones .* between 0 and 1"),
        ({"name": "sgd", "nesterov": True, "momentum": 0.0}, "needs optimizer.momentum"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Optimizers(**options)


@pytest.mark.parametrize("option", [{"warmup": 1.5}, {"lr": 0.0}, {"momentum": 1.0}, {"name": "adam"}])
def test_options_out_of_range_are_refused_by_the_schema(option):
    with pytest.raises(ConfigError, match=rf"optimizer.{next(iter(option))}"):
        check("optimizer", Optimizers, option)


def test_adamw_takes_its_betas_and_eps():
    objective = Toy()
    (group, _) = Optimizers(betas=(0.8, 0.95), eps=1e-6).build_optimizer(objective, 1).param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_lars_takes_its_trust_and_momentum():
    objective = Toy()
    before = objective.second.weight.detach().clone()
    optimizer = Optimizers(name="lars", lr=0.5, trust=0.02, weight_decay=0.0).build_optimizer(objective, 1)
    objective(torch.ones(2, 6), Step(0, 1)).total.backward()
    optimizer.step()
    moved = (objective.second.weight.detach() - before).norm() / before.norm()
    assert moved == pytest.approx(0.5 * 0.02, rel=1e-4)
    assert math.isclose(optimizer.param_groups[0]["momentum"], 0.9)


class Shardable(Toy):
    """The same without a parameter of no dimension, which FSDP2 refuses."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))


def shard(rank, folder):
    """One of two processes that share every parameter by FSDP2; each sees half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name in NAMES:
        model = fully_shard(Shardable())
        optimizer = Optimizers(name=name, lr=0.05).build_optimizer(model, 1)
        train_with_a_gap(model, optimizer, lambda data: data.chunk(2)[rank])
        found[name] = [p.full_tensor().detach() for p in model.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # as the command line does, and why: cli/main.py


def train_with_a_gap(model, optimizer, part):
    """Three steps, of which the second is left out."""
    for number in range(3):
        data = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        model(part(data), Step(number, 3)).total.backward()
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(number == 1)), None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_sharded_parameters_are_updated_as_whole_ones_are(tmp_path):
    started = [Forked([sys.executable, __file__, tmp_path, rank]) for rank in range(2)]
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    for name in NAMES:
        model = Shardable()
        train_with_a_gap(model, Optimizers(name=name, lr=0.05).build_optimizer(model, 1), lambda data: data)
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt")[name], weights(model), rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    shard(int(sys.argv[2]), sys.argv[1])
