"""Several processes compute what one does (law 4), however the model is shared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Forked, together

from selfsup.kernel import distributed
from selfsup.kernel.errors import ConfigError

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

TRAIN = """
import importlib.util, os, sys
import torch
from selfsup.kernel import compose, distributed, hookimpl, loop

spec = importlib.util.spec_from_file_location("toys", {toys!r})
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)


class Listener:
    reports = []

    @hookimpl
    def step_finished(self, run, report):
        self.reports.append(report)


for parallel in {parallel}:
    plugins = toys.Toys()
    Listener.reports = []
    plugins.register(Listener(), "listener")
    train = {{"batch": 12, "steps": 4, "microbatch": {microbatch}, "parallel": parallel, "clip": 0.5, "timeout": 60}}
    settings = compose.resolve(plugins, {{"objective": {{"name": "hide"}}, "train": train}})
    run = compose.start(plugins, settings)
    assert loop.train(run) == "done"
    weights = {{n: loop.whole(p.detach()) for n, p in run.objective.named_parameters()}}
    reports = [(r.loss, r.norm, r.norms, r.finite) for r in Listener.reports]
    ids = distributed.gather(torch.stack([r.ids for r in Listener.reports], 1)).T
    if distributed.rank() == 0:
        torch.save((weights, reports, ids), f"{folder}/{{parallel}}.pt")
distributed.barrier()
os._exit(0)  # as the command line does, and why: cli/main.py
"""


def train(folder: Path, processes: int, microbatch: int, parallel: tuple[str, ...]) -> list:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(
        TRAIN.format(toys=str(HERE / "conftest.py"), microbatch=microbatch, parallel=parallel, folder=folder)
    )
    command = [sys.executable, script]
    for process in together(processes, command) if processes > 1 else [Forked(command)]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{name}.pt") for name in parallel]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone") / "run", 1, 12, ("ddp",))[0]


@pytest.mark.parametrize(("processes", "microbatch"), [(1, 5), (2, 0), (3, 3)])
def test_processes_and_microbatches_give_the_run_of_one(tmp_path, alone, processes, microbatch):
    weights, reports, ids = alone
    parallel = ("ddp", "fsdp") if processes > 1 else ("ddp",)
    for other_weights, other_reports, other_ids in train(tmp_path / "run", processes, microbatch, parallel):
        assert torch.equal(other_ids.sort(1).values, ids.sort(1).values)
        for one, other in zip(reports, other_reports, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-5)


COLLECT = """
import os
import torch
from torch.distributed import get_rank
from selfsup.kernel import distributed, gather

distributed.join(torch.device("cpu"), 60)
distributed.join(torch.device("cpu"), 60)  # joining twice is joining once
rank, world = distributed.rank(), distributed.world()
assert (rank, world) == (get_rank(), 3)

x = torch.arange(2.0).add(10 * rank).requires_grad_()  # [2]
whole = gather(x)  # [6]
assert whole.tolist() == [0, 1, 10, 11, 20, 21]
# Process r's loss is sum_i (r + 1) i whole_i; the gradient of the sum of all losses, for this process's rows.
((rank + 1) * torch.arange(6) * whole).sum().backward()
assert x.grad.tolist() == [6.0 * (2 * rank), 6.0 * (2 * rank + 1)], x.grad
assert gather(torch.ones(2, 3, dtype=torch.int64)).shape == (6, 3)
assert gather(torch.ones(4, 2).T).shape == (6, 4)  # not contiguous

before = torch.ones(2)
assert distributed.total(before).tolist() == [3, 3] and before.tolist() == [1, 1]
assert distributed.anyone(rank == 2) and not distributed.anyone(False)
for text in ("gr\u00fcn", ""):
    assert distributed.alike(text if rank == 0 else f"process {rank}") == text
assert distributed.everyone("gr\u00fcn" * rank) == ["", "gr\u00fcn", "gr\u00fcngr\u00fcn"]
distributed.barrier()
os._exit(0)
"""


def test_what_processes_share(tmp_path):
    script = tmp_path / "collect.py"
    script.write_text(COLLECT)
    done = subprocess.run([*TORCHRUN, "3", str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_alone_nothing_is_shared():
    distributed.join(torch.device("cpu"), 1)
    x = torch.ones(2)
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert distributed.gather(x) is x
    assert distributed.total(x) is x
    assert distributed.alike("alone") == "alone"
    assert distributed.everyone("alone") == ["alone"]
    assert distributed.anyone(True)
    assert not distributed.anyone(False)
    distributed.barrier()


def test_the_others_not_being_there_is_an_error_for_people(monkeypatch):
    where = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for key, value in where.items():
        monkeypatch.setitem(os.environ, key, value)
    with pytest.raises(ConfigError, match="this process could not join the others: "):
        distributed.join(torch.device("cpu"), 1)


def test_processes_that_are_started_again_meet_elsewhere_in_the_store_of_torchrun(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for start in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        assert not distributed.meeting(store).check(["address"])
        distributed.meeting(store).set("address", "here")
    # A store that torchrun makes for each start is the meeting: nodes may count their starts differently.
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert distributed.meeting(store) is store


PARENT = """
import os, signal, sys, time
from selfsup.kernel.distributed import end_with_parent
child = os.fork()
if child == 0:
    end_with_parent(signal.SIGKILL)
    print(os.getpid(), flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends a signal when a parent ends")
def test_a_child_ends_with_its_parent_however_that_ends():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = Path(f"/proc/{int(parent.stdout.readline())}/stat")
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    end = time.monotonic() + 20
    while child.exists() and " Z " not in child.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
