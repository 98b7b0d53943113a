"""Turns, medians, memory and ceilings."""

import torch

from selfsup.cli.bench_measure import Ceilings, Meter, bare, ceilings

CPU = Meter(torch.device("cpu"))


def test_contestants_take_turns_after_one_to_warm_up():
    order = []
    times = CPU.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4, seconds=1)
    assert order == ["a", "b"] * 5
    assert {name: t.turns for name, t in times.items()} == {"a": 4, "b": 4}
    assert all(0 <= t.low <= t.median <= t.high for t in times.values())


def test_what_takes_long_takes_fewer_turns_and_not_fewer_than_three(monkeypatch):
    monkeypatch.setattr(CPU, "once", lambda f: f())
    times = CPU.in_turns({"slow": lambda: 900.0, "slower": lambda: 9000.0, "quick": lambda: 1.0}, 20, seconds=5)
    assert {name: t.turns for name, t in times.items()} == {"slow": 5, "slower": 3, "quick": 20}


def test_what_is_made_anew_is_made_before_each_call():
    order = []
    CPU.in_turns({"a": lambda: order.append("call")}, 3, 1.0, {"a": lambda: order.append("make")})
    assert order == ["make", "call"] * 4


def test_memory_of_a_cpu_is_exact_within_an_op_too():
    x = torch.ones(1000)

    def call():
        middle = torch.empty(5000) * 2  # two arrays of 20,000 bytes, of which one is freed
        return middle[:1000] + x

    assert 40_000 <= CPU.memory(call) <= 40_200


def test_the_floor_is_that_of_products_or_of_bytes():
    limits = Ceilings(flops=1e12, bytes=1e9)
    assert limits.floor(2e12, 0) == 2000
    assert limits.floor(1, 3e9) == 3000


def test_the_ceilings_of_this_machine_are_above_nothing():
    found = ceilings(CPU, torch.float32, small=True)
    assert found.flops > 1e8
    assert found.bytes > 1e7


def test_bare_products_share_arrays_and_run():
    f = bare(((3, 4, 5), (3, 4, 5), (3, 5, 4)), torch.float32, torch.device("cpu"))
    assert f() is None
