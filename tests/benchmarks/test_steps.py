"""Everything of `benchmarks/steps.py` but the GPU: each contest in little, who breaks, whose time is over."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import steps
import steps_measure
import steps_show
import torch
import train_bert
import train_gpt
import train_mae
import train_simclr
import train_wav2vec2
from steps_measure import PHASES, Plan, measure

from selfsup.cli.bench_measure import Ceilings

CPU = torch.device("cpu")
PLAN = Plan(CPU, 2, backend="", rounds=1, turn=0.001, most=1)
MAKERS = {
    "bert": train_bert.SIZES["tiny"],
    "gpt": train_gpt.SIZES["tiny"],
    "mae": train_mae.SIZES["tiny"],
    "simclr": train_simclr.SIZES["tiny-vit"],
    "wav2vec2": train_wav2vec2.SIZES["tiny"],
}


@pytest.fixture(autouse=True)
def known_ceiling(monkeypatch):
    monkeypatch.setattr(steps_measure, "ceilings", lambda *_, **__: Ceilings(1e12, 1e12))


def found_by(make, plan=PLAN):
    found = {"contest": "some"}
    for piece in measure(make, plan):
        json.dumps(piece)
        found = steps.merged(found, piece)
    return found


@pytest.mark.filterwarnings("ignore")  # what transformers and the profiler warn of is theirs
@pytest.mark.parametrize("name", MAKERS)
def test_everyone_in_every_contest_is_measured(name):
    found = found_by(MAKERS[name])
    assert {"ours", "theirs"} <= found["sides"].keys()
    fp32 = found["loss"]["fp32"]
    assert fp32["ours"] == pytest.approx(fp32["theirs"], rel=1e-4)
    for side in found["sides"].values():
        assert side["state"] == "ok", side
        assert side["phases"].keys() == set(PHASES)
        assert side["mfu"] > 0
        assert side["kernels"]
        assert side["largest_batch"] == 2
        assert side["units_per_second"] == pytest.approx(side["samples_per_second"] * found["amount"])
    assert found["flops_of_sample"]["model"] > 0
    said = steps_show.table(found)
    assert "no figure means anything" in said
    assert "as they are: " in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_our_side_stays_on_its_device_and_never_asks_it_for_a_value(monkeypatch, name):
    """On the meta device, where there are no values, and nothing from another device may take part."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which it does not have
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    contest = MAKERS[name](device="meta")
    sides = [side for name, side in contest.sides().items() if name.startswith("ours")]
    assert sides
    for side in sides:
        loss = side.loss_of(1)
        assert loss.device.type == "meta"
        loss.backward()
        assert all(p.grad is not None for p in side.model.parameters())


def test_every_contest_is_of_a_size_that_exists():
    for objective, size, _, little in steps.CONTESTS.values():
        sizes = sys.modules[f"train_{objective}"].SIZES
        assert {size, little} <= sizes.keys()


def test_flops_are_those_of_a_known_model():
    """BERT in little by hand: matrices of the layers, attention, and the head at chosen tokens; six times each."""
    shape = train_bert.SHAPES["tiny"]
    found = found_by(MAKERS["bert"], PLAN)["flops_of_sample"]
    matrices = shape.depth * 12 * shape.width**2
    head = shape.width * (shape.width + shape.words)
    share = 1 - found["needless"] / (6 * head * shape.tokens)  # of the tokens, that are predicted
    assert 0 < share < 0.5
    attention = shape.depth * 2 * shape.tokens * shape.width
    expected = 6 * shape.tokens * (matrices + share * head)
    # torch counts no attention on some machines, and on others its backward with what is computed anew.
    assert expected <= found["model"] <= expected + 7 * shape.tokens * attention


class Broken(train_gpt.Contest):
    """Whose other side breaks in training, with more samples than are enough for it."""

    why: BaseException = RuntimeError("the kernel was lost")
    enough = 0
    counted = False

    def loss_of_theirs(self, number):
        training, self.counted = torch.is_grad_enabled() and self.counted, torch.is_grad_enabled() or self.counted
        if training and self.samples > self.enough:  # not when FLOPs are counted, before everything else
            raise self.why
        return super().loss_of_theirs(number)


def broken(**how):
    kind = type("Contest", (Broken,), how)
    return lambda device: kind(train_gpt.SHAPES["tiny"], device)


@pytest.mark.filterwarnings("ignore")
def test_who_breaks_keeps_nobody_else_from_being_measured():
    found = found_by(broken())
    assert found["sides"]["theirs"] == {"state": "failed", "note": "RuntimeError: the kernel was lost"}
    assert found["sides"]["ours"]["state"] == "ok"
    assert "theirs: RuntimeError: the kernel was lost" in steps_show.table(found)


@pytest.mark.filterwarnings("ignore")
def test_the_batch_is_halved_until_everyone_fits_and_the_largest_is_found_by_doubling():
    plan = Plan(CPU, 8, backend="", rounds=1, turn=0.001, most=4)
    found = found_by(broken(why=torch.OutOfMemoryError("no memory"), enough=2), plan)
    assert found["batch"] == 2
    assert found["sides"]["theirs"]["largest_batch"] == 2
    assert found["sides"]["ours"]["largest_batch"] == 32
    assert found["notes"][0] == "a batch of 8 does not fit theirs: OutOfMemoryError: no memory"
    assert ">= 32" in steps_show.table(found)


class Refusing(train_gpt.Contest):
    def loss_of_theirs(self, number):
        raise TypeError("forward() got an unexpected keyword argument")


@pytest.mark.filterwarnings("ignore")
def test_ours_is_measured_where_the_other_side_cannot_be_called():
    found = found_by(lambda device: Refusing(train_gpt.SHAPES["tiny"], device))
    assert {name.partition(",")[0] for name in found["sides"]} == {"ours"}
    assert found["sides"]["ours"]["state"] == "ok"
    assert "unexpected keyword argument" in steps_show.table(found)


class Wrong(train_gpt.Contest):
    def loss_of_theirs(self, number):
        return super().loss_of_theirs(number) * 1.1


@pytest.mark.filterwarnings("ignore")
def test_who_is_wrong_is_not_timed():
    found = found_by(lambda device: Wrong(train_gpt.SHAPES["tiny"], device))
    assert found["sides"]["theirs"]["state"] == "wrong"
    assert "seconds" not in found["sides"]["theirs"]
    assert "not timed" in steps_show.table(found)


def test_compiled_models_are_ours_by_their_layers_and_others_whole():
    contest = MAKERS["gpt"](device=CPU)
    measured = steps_measure.Measured(contest, Plan(CPU, 2, backend="eager"))
    compiled = []
    for module in [*contest.ours.modules(), *contest.theirs.modules()]:
        module.compile = lambda module=module, **how: compiled.append((module, how))
    measured.timed = lambda suffix: iter([{"suffix": suffix}])
    assert list(measured.compiled()) == [{"suffix": ", compiled"}]
    layers = contest.ours.backbones()[0].layers
    assert [module for module, _ in compiled] == [*layers, contest.theirs]
    assert compiled[-1][1] == {"backend": "eager", "dynamic": False}


def test_a_contest_whose_time_is_over_keeps_what_it_found():
    script = "import time\nprint('{\"a\": 1}', flush=True)\ntime.sleep(60)"
    assert list(steps.pieces([sys.executable, "-c", script], 2.0)) == [
        {"a": 1},
        {"notes": ["stopped after 2 s: the time given was over"]},
    ]


def test_a_contest_that_dies_says_why(capsys):
    script = "import sys\nprint('{\"a\": 1}')\nsys.exit('no kernel image')"
    assert list(steps.pieces([sys.executable, "-c", script], 60.0)) == [
        {"a": 1},
        {"notes": ["ended with 1: no kernel image"], "broke": True},
    ]
    assert "no kernel image" in capsys.readouterr().err


def test_names_are_what_contests_begin_with():
    assert steps.chosen(["bert", "gpt"]) == ["gpt", "bert-512", "bert-128"]
    assert steps.chosen([]) == list(steps.CONTESTS)
    with pytest.raises(SystemExit, match="no contest 'nothing'; known: gpt"):
        steps.chosen(["nothing"])


def test_kernels_of_a_gpu_are_told_from_stretches_that_somebody_named(monkeypatch):
    import steps_profile

    cuda, cpu = steps_profile.DeviceType.CUDA, steps_profile.DeviceType.CPU
    rows = [("gemm", cuda, 3000), ("Optimizer.step#AdamW.step", cuda, 9000), ("aten::mm", cpu, 5000)]
    rows.append(("copy", cuda, 1000))
    events = [SimpleNamespace(key=k, device_type=d, self_device_time_total=t, count=4) for k, d, t in rows]

    class Profile:
        def __init__(self, activities):
            assert steps_profile.ProfilerActivity.CUDA in activities

        def __enter__(self):
            return SimpleNamespace(key_averages=lambda: events)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(steps_profile, "profile", Profile)
    found = steps_profile.profiled(lambda: None, gpu=True)
    assert [(k["name"], k["ms"], k["calls"], k["share"]) for k in found["kernels"]] == [
        ("gemm", 1.5, 2.0, 0.75),
        ("copy", 0.5, 2.0, 0.25),
    ]
    assert steps_profile.busy(found, 0.004) == 0.5


def test_parameters_of_a_model_and_its_optimizer_are_counted_once():
    contest = MAKERS["gpt"](device=CPU)
    entrant = steps_measure.Entrant(contest.sides()["ours"], contest, PLAN)
    parameters, buffers = list(contest.ours.parameters()), list(contest.ours.buffers())
    size, others = 4 * sum(p.numel() for p in parameters), sum(b.nbytes for b in buffers)
    assert entrant.bytes() == size + others
    entrant.step()  # two moments and a count of steps for each
    assert entrant.bytes() == 3 * size + others + 4 * len(parameters)
