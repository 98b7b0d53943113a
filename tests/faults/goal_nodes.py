"""R13: of several nodes one is lost, cut off or comes back, or torchrun itself is killed or stopped; the run goes on.

A node is a torchrun of its own. On one machine they meet on localhost; where root may make network namespaces, each
has its own network, and the link between them goes down.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import runs
from launched import Trial, gone
from result import Result

STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # or a node that comes back waits for an address in vain
TIMEOUT = 5.0
SETS = f"train.timeout={TIMEOUT} hangs.seconds=60"
ROOT = "10.213.77"  # of the namespaces' addresses


def measure(work: Path, full: bool) -> Iterator[Result]:
    yield agent_killed(work / "killed", outlived(work / "outlived") if full else "")
    if not full:
        return
    yield agent_stopped(work / "stopped")
    with Trial(work / "whole") as whole:
        whole.launch(2).finish()
    yield process_killed(work / "process", whole.folder)
    yield host_killed(work / "host", whole.folder)
    for back in (False, True):
        yield node_killed(work / f"node-{back}", whole.folder, back)
    if why := namespaces():
        yield Result("R13", "two nodes: the link goes down", 0, 0, f"skipped: {why}")
    else:
        yield link_down(work / "link")
        yield lossy(work / "lossy", whole.folder)


def rendezvous(port: int, nodes: str = "2", *, host: bool, address: str = "localhost") -> list[str]:
    """The options of a node; `host` is the one at the address, where the nodes meet."""
    at = [f"--rdzv-endpoint={address}:{port}", "--rdzv-id=trial", "--rdzv-backend=c10d"]
    return [f"--nnodes={nodes}", "--max-restarts=3", *at, f"--rdzv-conf=is_host={int(host)}"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def outlived(folder: Path) -> str:
    """What plain torch leaves of a torchrun that is killed."""
    with Trial(folder, steps=100_000) as at:
        job = at.launch(2, fault=("stock", "0", "0"))
        at.wait_for_steps(6, job)
        os.kill(job.pid, signal.SIGKILL)
        return f"plain processes: {len(at.left_after(20))} still train 20 s later"


def agent_killed(folder: Path, stock: str = "") -> Result:
    """kill -9 of torchrun: its processes save and end by themselves."""
    with Trial(folder, steps=100_000, sets="checkpoints.steps=100000") as at:
        job = at.launch(2)
        at.wait_for_steps(6, job)
        os.kill(job.pid, signal.SIGKILL)
        began = time.monotonic()
        left = at.left_after(60)
        seconds = time.monotonic() - began
        good = not left and at.status().startswith("PREEMPTED") and at_end(folder)
    figure = f"saved and ended after {seconds:.1f} s, status {at.status()!r}, left behind: {len(left)}"
    return Result("R13", "kill -9 of torchrun", 1, int(good), figure, stock)


def agent_stopped(folder: Path) -> Result:
    """SIGSTOP of torchrun: its processes do their work and end."""
    with Trial(folder, steps=60) as at:
        job = at.launch(2)
        at.wait_for_steps(6, job)
        os.kill(job.pid, signal.SIGSTOP)
        done = at.wait(lambda: at.status() == "DONE" and not at.ranks(), 120)
        left = [process for process in at.processes() if process.pid != job.pid]
    figure = f"its processes finished the run and ended; left behind: {len(left)}" if done else f"left: {left}"
    return Result("R13", "SIGSTOP of torchrun", 1, int(done is not None and not left), figure)


def at_end(folder: Path) -> bool:
    return int(runs.newest(folder)[1]["step"]) == runs.steps_done(folder)


def process_killed(folder: Path, whole: Path) -> Result:
    """Two nodes of one process each; the process of the second is killed, and both torchruns start theirs again."""
    port = free_port()
    with Trial(folder, sets=SETS) as at:
        jobs = [at.launch(1, *rendezvous(port, host=number == 0), environment=STORES) for number in range(2)]
        at.wait_for_steps(9, jobs[0])
        os.kill(at.ranks()[1], signal.SIGKILL)
        began = time.monotonic()
        codes = [job.wait() for job in jobs]
        why = str(codes) if any(codes) else runs.difference(folder, whole)
    figure = why or f"done {time.monotonic() - began:.1f} s later, same digest"
    return Result("R13", "two nodes: kill -9 of one process", 1, int(not why), figure)


def node_killed(folder: Path, whole: Path, back: bool) -> Result:
    """The second of 1 to 2 nodes is killed, torchrun and all; the first goes on alone, or with it once it is back."""
    port = free_port()
    with Trial(folder, sets=SETS, steps=30 if not back else 200) as at:
        first, second = (at.launch(1, *rendezvous(port, "1:2", host=h), environment=STORES) for h in (True, False))
        at.wait_for_steps(9, first)
        before = at.ranks()
        for pid in (second.pid, before[node_of(at, second)]):
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        if back:
            at.wait(lambda: len(at.ranks()) == 1 and runs.steps_done(folder) > 12, 60)
            third = at.launch(1, *rendezvous(port, "1:2", host=False), environment=STORES)
            joined = at.wait(lambda: len(at.ranks()) == 2, 120)
            codes = [first.wait(), third.wait()]
            why = str(codes) if any(codes) else "" if joined else "it was not let in again"
        else:
            why = str(code) if (code := first.wait()) else ""
        why = why or ("" if at.status() == "DONE" and not at.left_after(10) else f"{at.status()}, {at.processes()}")
    figure = why or f"done {time.monotonic() - began:.1f} s later"
    return Result("R13", f"two nodes: one killed{', and back again' if back else ''}", 1, int(not why), figure)


def host_killed(folder: Path, whole: Path) -> Result:
    """The node where the others meet is killed: the other ends, and the same commands go on with the run."""
    with Trial(folder, sets=SETS) as at:
        port = free_port()
        first, second = (at.launch(1, *rendezvous(port, host=h), environment=STORES) for h in (True, False))
        at.wait_for_steps(9, first)
        for pid in (first.pid, at.ranks()[node_of(at, first)]):
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        left = at.left_after(60)
        seconds, code = time.monotonic() - began, second.wait() if not left else None
        port = free_port()
        again = [at.launch(1, *rendezvous(port, host=h), environment=STORES) for h in (True, False)]
        codes = [job.wait() for job in again]
        why = f"{left} is left; " if left else str(codes) if any(codes) else runs.difference(folder, whole)
    figure = why or f"the other ended after {seconds:.1f} s with {code}; started again, same digest"
    return Result("R13", "two nodes: the one where they meet is killed", 1, int(not why), figure)


def node_of(at: Trial, job: runs.Job) -> int:
    """The rank of the process that this torchrun started."""
    parents = {process.pid: process.parent for process in at.processes()}
    return next(rank for rank, pid in at.ranks().items() if parents[pid] == job.pid)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def namespaces() -> str | None:
    """Why there can be no network namespaces here; None if there can."""
    if not shutil.which("ip"):
        return "there is no program `ip`"
    try:
        with joined():
            return None
    except subprocess.CalledProcessError as cause:
        return str(cause.stderr.decode().strip() or cause)


def link(namespace: str) -> str:
    """The end of the link in a namespace."""
    return f"l{namespace[-14:]}"  # a name has at most 15 letters


@contextlib.contextmanager
def joined() -> Iterator[Sequence[str]]:
    """Two network namespaces and a link between them."""
    names = [f"faults{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", link(names[0]), "type", "veth", "peer", "name", link(names[1]))
        for number, name in enumerate(names, 1):
            ip("link", "set", link(name), "netns", name)
            ip("-n", name, "addr", "add", f"{ROOT}.{number}/24", "dev", link(name))
            ip("-n", name, "link", "set", link(name), "up")
            ip("-n", name, "link", "set", "lo", "up")
            # After how many tries a connection is given up: some 15 s instead of 15 min.
            ip("netns", "exec", name, "sh", "-c", "echo 6 > /proc/sys/net/ipv4/tcp_retries2")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def two_nodes(at: Trial, names: Sequence[str], nodes: str) -> list[runs.Job]:
    """A node in each namespace; they meet in the first one."""
    port, jobs = free_port(), []
    for number, name in enumerate(names, 1):
        options = [*rendezvous(port, nodes, host=number == 1, address=f"{ROOT}.1"), f"--local-addr={ROOT}.{number}"]
        own = {**STORES, "GLOO_SOCKET_IFNAME": link(name)}
        jobs.append(at.launch(1, *options, before=["ip", "netns", "exec", name], environment=own))
    at.wait_for_steps(9, jobs[0])
    return jobs


def link_down(folder: Path) -> Result:
    """The link between two nodes goes down: both notice; the one that holds the rendezvous goes on alone."""
    with joined() as names, Trial(folder, sets=SETS, steps=60) as at:
        jobs = two_nodes(at, names, "1:2")
        before = at.ranks()
        ip("-n", names[1], "link", "set", link(names[1]), "down")
        noticed = at.wait(lambda: all(map(gone, before.values())), TIMEOUT + 60)
        began = time.monotonic()
        cut = at.wait(lambda: not jobs[1].running, 60)
        code = jobs[0].wait()
        seconds = time.monotonic() - began
        left = at.left_after(10)
    good = code == 0 and noticed is not None and cut is not None and not left and at.status() == "DONE"
    figure = (
        f"both processes ended after {noticed or -1:.1f} s, the torchrun that is cut off {cut or -1:.1f} s later (with "
        f"net.ipv4.tcp_retries2 = 6); the first node was done after {seconds:.1f} s; left behind: {len(left)}"
    )
    return Result("R13", "two nodes: the link goes down", 1, int(good), figure)


def lossy(folder: Path, whole: Path) -> Result:
    """Of the packets between two nodes 30 % are lost: the run is slower, and the same."""
    fault = "two nodes: 30 % of the packets are lost"
    with joined() as names, Trial(folder, sets="train.timeout=120") as at:
        jobs = two_nodes(at, names, "2")
        lose = ["tc", "qdisc", "add", "dev", link(names[0]), "root", "netem", "loss", "30%"]
        try:
            ip("netns", "exec", names[0], *lose)
        except subprocess.CalledProcessError as cause:
            return Result("R13", fault, 0, 0, f"skipped: {cause.stderr.decode().strip()}")
        codes = [job.wait() for job in jobs]
        why = str(codes) if any(codes) else runs.difference(folder, whole)
    return Result("R13", fault, 1, int(not why), why or "same digest")
