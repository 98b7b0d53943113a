"""A worker that dies or stops is replaced and nothing is lost; what would happen again ends in a sentence."""

from __future__ import annotations

import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
from functools import partial

import pytest
import torch
from torch.utils.data import Dataset

from selfsup.kernel import Signal, workers
from selfsup.kernel.errors import DataError
from selfsup.kernel.workers import made_ahead, worker_started

PLACES = [[n, n + 1] for n in range(40)]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Squares(Dataset):
    """Batches of squares; what is done before the batch that begins with `at` happens as often as `times` says."""

    def __init__(self, act=None, at=None, times=None):
        self.act, self.at = act, at
        self.left = multiprocessing.Value("i", times or 0)

    def __getitem__(self, places):
        if places[0] == self.at:
            with self.left.get_lock():
                left, self.left.value = self.left.value, self.left.value - 1
            if left > 0:
                self.act()
        return torch.tensor(places) ** 2

    def called(self, places):
        return f"sample {places[0]}"


def kill_me(number):
    os.kill(os.getpid(), number)
    time.sleep(0.1)


def values(batches):
    return [batch.tolist() for batch in batches]


WHOLE = [[n * n for n in places] for places in PLACES]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(workers, "LOOK", 0.3)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    assert signal.getsignal(signal.SIGCHLD) == before, "the death of a worker is not raised anywhere"
    for child in multiprocessing.active_children():
        child.join(5)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_come_in_order(count):
    assert values(made_ahead(Squares(), PLACES, count)) == WHOLE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_dies_or_stops_is_replaced(capfd, number, count):
    began = time.monotonic()
    assert values(made_ahead(Squares(partial(kill_me, number), 17, 1), iter(PLACES), count)) == WHOLE
    assert time.monotonic() - began < 20
    said = "was stopped" if number == signal.SIGSTOP else f"was killed by {number.name}"
    assert f"warning: a data worker {said}" in capfd.readouterr().err


def test_a_worker_that_exits_is_replaced(capfd):
    assert values(made_ahead(Squares(partial(os._exit, 3), 17, 2), PLACES, 2)) == WHOLE
    assert capfd.readouterr().err.count("ended with exit code 3; all were started anew") == 2


def test_a_batch_that_kills_every_worker_is_named():
    batches = made_ahead(Squares(partial(kill_me, signal.SIGBUS), 5, 99), PLACES, 2)
    with pytest.raises(DataError, match=r"3 times in a row a data worker was killed by SIGBUS.*while it made sample 5"):
        values(batches)


def test_one_kill_now_and_then_is_no_row(capfd):
    """Each of several batches costs a worker: between them others came."""

    class Often(Squares):
        def __getitem__(self, places):
            if places[0] in (3, 13, 23, 33):
                self.at = places[0]
                if self.left.value != places[0]:
                    self.left.value = places[0]
                    kill_me(signal.SIGKILL)
            self.at = None
            return super().__getitem__(places)

    assert values(made_ahead(Often(), PLACES, 1)) == WHOLE
    assert 4 <= capfd.readouterr().err.count("warning: ") <= 8


def test_a_batch_that_takes_too_long_is_an_error():
    batches = made_ahead(Squares(partial(time.sleep, 60), 5, 99), PLACES, 1, timeout=0.6)
    with pytest.raises(DataError, match=r"brought nothing for train.timeout = 0.6 s, while it made sample 5"):
        values(batches)


def test_a_slow_batch_is_waited_for():
    assert values(made_ahead(Squares(partial(time.sleep, 1.5), 5, 1), PLACES, 1, timeout=60)) == WHOLE


def fail(kind, text, *_):
    raise kind(text)


@pytest.mark.parametrize("count", [0, 1])
def test_what_the_data_raise_arrives_as_it_is(count):
    with pytest.raises(ValueError, match="no such thing"):
        values(made_ahead(Squares(partial(fail, ValueError, "no such thing"), 5, 9), PLACES, count))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        values(made_ahead(Squares(partial(fail, RuntimeError, "shape mismatch"), 5, 9), PLACES, count))


@pytest.mark.parametrize(
    ("kind", "text"), [(MemoryError, ""), (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_is_an_error_for_people(kind, text):
    with pytest.raises(DataError, match="a data worker ran out of memory"):
        values(made_ahead(Squares(partial(fail, kind, text), 5, 9), PLACES, 1))


def test_full_shared_memory_is_an_error_for_people_and_leaves_nothing(tmp_path, monkeypatch):
    gone = []
    monkeypatch.setattr(os, "unlink", gone.append)
    text = "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
    found = workers.Handed(Squares(partial(fail, RuntimeError, text), 5, 9))[[5, 6]]
    assert re.match("/dev/shm is full, .* --shm-size", str(found))
    assert gone == ["/dev/shm/torch_1_2_0"]


def test_all_tensors_of_a_batch_are_shared_in_the_worker():
    batch = {"a": Signal(torch.ones(3), torch.ones(2)), "b": [torch.ones(1), (torch.zeros(0), "text")], "c": 4}
    workers._share(batch)
    tensors = [batch["a"].x, batch["a"].segments, batch["b"][0]]
    assert all(tensor.is_shared() for tensor in tensors)


def test_workers_that_cannot_be_started_are_an_error_for_people(monkeypatch):
    monkeypatch.setattr(workers.DataLoader, "__iter__", partial(fail, OSError, "no room"))
    with pytest.raises(DataError, match="data workers cannot be started: no room; try fewer"):
        next(made_ahead(Squares(), PLACES, 2))


def test_closing_early_ends_the_workers():
    batches = made_ahead(Squares(), PLACES, 2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_a_sigterm_while_a_worker_starts_does_not_end_it(monkeypatch):
    def slow(number):
        time.sleep(1)
        worker_started(number)

    monkeypatch.setattr("selfsup.kernel.workers.worker_started", slow)
    steps = made_ahead(Squares(), [[1]], 1)
    signalled = []
    timer = threading.Timer(0.5, lambda: [signalled.append(c.terminate()) for c in multiprocessing.active_children()])
    timer.start()
    assert next(steps).tolist() == [1]
    steps.close()
    assert signalled


def test_a_worker_outlives_a_sigterm_by_some_seconds_only(monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.5)
    ready = FORK.Event()
    worker = FORK.Process(target=_work, args=(ready,))
    worker.start()
    ready.wait(10)
    os.kill(worker.pid, signal.SIGINT)
    worker.terminate()
    worker.join(0.2)
    assert worker.is_alive()
    worker.join(10)
    assert worker.exitcode == -signal.SIGALRM


FORK = multiprocessing.get_context("fork")


def _work(ready):
    workers.worker_started(0)
    ready.set()
    while True:
        time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends a signal when a parent ends")
def test_a_worker_that_is_stuck_ends_with_its_parent():
    reading, writing = os.pipe()
    parent = FORK.Process(target=_parent, args=(writing,))
    parent.start()
    os.close(writing)
    assert os.read(reading, 1) == b"."
    parent.kill()
    parent.join()
    assert select.select([reading], [], [], 10)[0]  # nobody holds the other end any more
    assert os.read(reading, 1) == b""
    os.close(reading)


def _parent(writing):
    FORK.Process(target=_stuck, args=(writing,)).start()
    os.close(writing)
    time.sleep(60)


def _stuck(writing):
    workers.worker_started(0)
    os.write(writing, b".")
    time.sleep(60)
