"""What is wrong, missing or broken is said and not timed, and takes nothing else with it."""

import time

import pytest
import torch

from selfsup.cli import bench_run
from selfsup.cli.bench_case import Case, Peer
from selfsup.cli.bench_measure import Ceilings, Meter
from selfsup.cli.bench_run import BARE, EAGER, OURS, Bench, Plan, run_all

CPU = torch.device("cpu")


def square(x):
    return (x * x).sum()


class Toy(Case):
    """x . x, whose op and reference are given here."""

    op_of_ours = op_of_reference = staticmethod(square)

    def ours(self, *arrays):
        return self.op_of_ours(*arrays)

    def plain(self):
        return self.op_of_reference


def toy(peers=None, ours=square, **more):
    case = Toy("square", "N=64", lambda draw: [draw.normal(64)], square, least=512, peers=peers or {}, **more)
    object.__setattr__(case, "op_of_ours", ours)
    return case


def bench(peers=None, timed=True, kind=torch.float32):
    plan = Plan(CPU, kind, rounds=3, seconds=1.0, timed=timed, peers=peers)
    return Bench(plan, Ceilings(1e12, 1e9) if timed else None, Meter(CPU))


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)


def row(result, name):
    found = result.row(name)
    assert found is not None, [r.name for r in result.rows]
    return found


def test_those_that_are_right_are_timed_and_their_memory_is_measured():
    result = bench().run(toy(products=((4, 4, 4),)))
    assert [r.name for r in result.rows] == [OURS, EAGER, "compiled", BARE]
    for name in (OURS, EAGER, "compiled"):
        assert row(result, name).state == "ok"
        assert row(result, name).times.turns == 3
        assert row(result, name).memory > 0
        assert row(result, name).error < 1e-6
    assert result.floor == pytest.approx(512 / 1e6)
    assert result.failing() == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x: square(x) * 1.01, "wrong by 1.0e-02"),
        (lambda x: square(x) + 0.01 * (x.sum() - x.detach().sum()), "wrong by"),  # in the gradient alone
        (lambda x: square(x) * torch.nan, "wrong by inf"),
    ],
)
def test_what_is_wrong_is_not_timed(wrong, said):
    result = bench().run(toy({"other": Peer(lambda: wrong, only_gpu=False)}, ours=wrong))
    for name in (OURS, "other"):
        assert (row(result, name).state, row(result, name).times) == ("wrong", None)
        assert said in row(result, name).note
    assert row(result, EAGER).times is not None
    (line,) = result.failing()
    assert line.startswith("square N=64: wrong")


def broken(x):
    raise RuntimeError("no room\nfor two")


def missing():
    raise ImportError("No module named 'nothing'")


def test_who_is_not_there_or_breaks_is_listed_with_the_reason():
    peers = {
        "gone": Peer(missing, only_gpu=False),
        "broken": Peer(lambda: broken, only_gpu=False),
        "gpu": Peer(lambda: square),
        "kin": Peer(lambda: lambda x: torch.zeros(3), differs="is something else", only_gpu=False),
    }
    result = bench().run(toy(peers))
    assert (row(result, "gone").state, row(result, "gone").note) == (
        "absent",
        "ImportError: No module named 'nothing'",
    )
    assert (row(result, "broken").state, row(result, "broken").note) == ("failed", "RuntimeError: no room")
    assert (row(result, "gpu").state, row(result, "gpu").note) == ("skipped", "runs on a GPU alone")
    kin = row(result, "kin")
    assert (kin.state, kin.note, kin.error) == ("ok", "is something else", None)
    assert kin.times is not None
    assert result.failing() == []


def test_an_op_that_breaks_or_is_not_there_is_a_failure():
    assert "no room" in bench().run(toy(ours=broken)).failing()[0]
    (line,) = bench().run(Case("nothing", "N=1", lambda draw: [draw.normal(1)], lambda op, x: op(x))).failing()
    assert "there is no op 'nothing'" in line


def test_a_case_that_cannot_be_made_is_a_failure():
    def make(draw):
        raise TypeError("it takes no size")

    (line,) = bench().run(Case("square", "N=1", make, square)).failing()
    assert line == "square N=1: failed: TypeError: it takes no size"


def test_a_gpu_that_does_nothing_any_more_is_said_once_and_by_whom(monkeypatch):
    measuring = bench()

    def broken_for_good(x):
        monkeypatch.setattr(measuring.meter, "wait", lambda: broken(x))
        raise RuntimeError("an illegal memory access")

    first = measuring.run(toy({"wild": Peer(lambda: broken_for_good, only_gpu=False)}))
    assert row(first, "wild").state == "failed"
    (line,) = measuring.run(toy()).failing()
    assert "nothing runs on the GPU since wild in square N=64: RuntimeError: no room" in line


def test_what_cannot_be_timed_was_checked_all_the_same(monkeypatch):
    measuring = bench()
    monkeypatch.setattr(measuring.meter, "in_turns", lambda *args: broken(None))
    result = measuring.run(toy())
    assert row(result, OURS).state == "ok"
    assert result.failing() == ["square N=64: failed: RuntimeError: no room"]


def test_arrays_prepared_for_a_peer_are_judged_by_the_reference_on_them():
    half = Peer(lambda: square, prepare=lambda arrays: [arrays[0].detach()[::2].requires_grad_()], only_gpu=False)
    assert row(bench().run(toy({"half": half})), "half").state == "ok"


class Spoiling(torch.autograd.Function):
    """The gradient takes the place of the input, as it does in some fused losses."""

    @staticmethod
    def forward(context, x):
        total = (x * x).sum()
        context.save_for_backward(x.data.mul_(2))
        return total

    @staticmethod
    def backward(context, arriving):
        return context.saved_tensors[0] * arriving


def test_what_spoils_its_inputs_gets_new_ones_and_the_others_keep_theirs():
    result = bench().run(toy({"spoiler": Peer(lambda: Spoiling.apply, spoils=True, only_gpu=False)}))
    assert [row(result, name).state for name in (OURS, EAGER, "spoiler")] == ["ok"] * 3
    assert row(result, "spoiler").times.turns == 3


def test_what_works_in_place_has_arrays_of_its_own_for_everyone():
    halve = staticmethod(lambda x: x.detach().mul_(0.5))
    case = Toy("halve", "N=8", lambda draw: [draw.normal(8, learned=False)], square, in_place=True)
    object.__setattr__(case, "op_of_ours", halve)
    object.__setattr__(case, "op_of_reference", halve)
    assert [r.state for r in bench().run(case).rows] == ["ok"] * 3


def test_a_gradient_fewer_is_said():
    peer = Peer(lambda: lambda x, y: (x * x).sum() + (y.detach() ** 2).sum(), only_gpu=False)
    case = Toy("square", "N=8", lambda draw: [draw.normal(8), draw.normal(8)], square, peers={"half": peer})
    both = staticmethod(lambda x, y: (x * x).sum() + (y * y).sum())
    object.__setattr__(case, "op_of_ours", both)
    object.__setattr__(case, "op_of_reference", both)
    assert row(bench().run(case), "half").note == "1 gradient fewer"


def test_the_op_with_an_option_is_ours_too():
    wrong = Peer(lambda: lambda x: square(x) * 1.01, only_gpu=False)
    result = bench(peers=()).run(toy({"ours, quick": wrong}))
    assert [r.name for r in result.rows] == [OURS, "ours, quick"]
    assert "wrong by 1.0e-02" in result.failing()[0]


def test_only_those_wanted_take_part():
    peers = {name: Peer(lambda: square, only_gpu=False) for name in ("liger", "liger, gathered", "cce")}
    names = [r.name for r in bench(peers=("liger",)).run(toy(peers)).rows]
    assert names == [OURS, "liger", "liger, gathered"]
    assert [r.name for r in bench(peers=()).run(toy(peers)).rows] == [OURS]


def test_without_time_there_is_the_check_alone():
    result = bench(timed=False).run(toy())
    assert row(result, OURS).error is not None
    assert all(r.times is None and r.memory is None for r in result.rows)


def test_an_output_left_unwritten_shows():
    result = bench().run(toy(ours=lambda x: square(x) + torch.empty(())))
    assert row(result, OURS).state == "wrong"


def test_eager_torch_without_memory_takes_nothing_with_it(monkeypatch):
    case = toy(truth=square)

    def full(x):
        raise torch.OutOfMemoryError("out of memory")

    object.__setattr__(case, "op_of_reference", full)
    result = bench(peers=(EAGER,)).run(case)
    assert (row(result, EAGER).state, row(result, OURS).state) == ("failed", "ok")


def test_past_the_limit_of_time_nothing_begins():
    results = list(run_all(bench(), [toy(), toy()], time.monotonic() - 1))
    assert [row(result, OURS).state for result in results] == ["skipped"] * 2
    assert [result.failing() for result in results] == [[], []]
    assert bench_run.Row("x").state == "ok"
