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


class Gpu:
    """Stands in for torch.cuda: it counts the time in calls, and notes what is asked of it."""

    def __init__(self, monkeypatch):
        self.said, self.clock, self.mode, self.used = [], 0, 0, [10, 10, 50]
        for name in ("Event", "Stream", "CUDAGraph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *args, of=name, **options: Thing(self, of))
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda thing: thing)
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *device, of=name: self.said.append(of))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))
        self.meter = Meter(CPU.device)
        self.meter.gpu = True

    def call(self):
        self.said.append("call")
        self.clock += 7


class Thing:
    """An event, a stream or a graph."""

    def __init__(self, gpu, kind):
        self.gpu, self.kind, self.at = gpu, kind, 0

    def record(self):
        self.at = self.gpu.clock

    def elapsed_time(self, end):
        return end.at - self.at

    def wait_stream(self, other):
        self.gpu.said.append(f"{self.kind} waits for {other.kind}")

    def replay(self):
        self.gpu.said.append("replay")
        self.gpu.clock += 5

    def __enter__(self):
        self.gpu.said.append(self.kind)

    def __exit__(self, *error):
        self.gpu.said.append(f"end of {self.kind}")


def test_the_time_of_a_gpu_is_that_between_its_events(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert gpu.meter.in_turns({"a": gpu.call}, rounds=4, seconds=1)["a"].median == 7
    assert gpu.said == ["call", "synchronize"] * 5


def test_a_graph_is_captured_after_three_calls_aside_and_replayed(monkeypatch):
    gpu = Gpu(monkeypatch)
    times = gpu.meter.replayed(gpu.call, rounds=4)
    assert (times.median, times.turns) == (5, 4)
    aside = ["Stream waits for current_stream", "Stream", *["call"] * 3, "end of Stream"]
    assert gpu.said[: len(aside) + 4] == [
        *aside,
        "current_stream waits for Stream",
        "CUDAGraph",
        "call",
        "end of CUDAGraph",
    ]
    assert gpu.said.count("replay") == 5


def test_waiting_for_the_host_is_seen_and_forgotten(monkeypatch):
    gpu = Gpu(monkeypatch)

    def waits():
        assert gpu.mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    assert gpu.meter.waits(waits)
    assert not gpu.meter.waits(gpu.call)
    assert gpu.mode == 0


def test_memory_of_a_gpu_is_above_what_was_there(monkeypatch):
    assert Gpu(monkeypatch).meter.memory(lambda: None) == 40
