"""One process at a time works on a run, and its status is there for whoever looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked_child import terminated

from selfsup.cli.main import Asked
from selfsup.cli.run_claim import claim
from selfsup.kernel.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from selfsup.cli.run_claim import claim
with claim(Path(sys.argv[1]), resume=True):
    print("held", flush=True)
    time.sleep(60)
"""


def status(folder):
    return (folder / "status").read_text()


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_works_on_the_run(tmp_path, holder):
    with (
        pytest.raises(ConfigError, match=f"process {holder.pid} on .* works on the run in"),
        claim(tmp_path / "run", True),
    ):
        pass
    assert status(tmp_path / "run") == "RUNNING\n"


def test_what_was_killed_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert status(tmp_path / "run") == "RUNNING\n"
    with claim(tmp_path / "run", True) as claimed:
        assert claimed.ended("done") == 0
    assert status(tmp_path / "run") == "DONE\n"


def test_a_process_made_meanwhile_holds_nothing(tmp_path):
    """A data worker may outlive a run that was killed."""
    with claim(tmp_path / "run", False):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the pipe is closed
            os._exit(0)
    took = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert took.stdout.readline() == "held\n"
    took.kill()
    took.wait()
    took.stdout.close()
    os.close(writing)
    os.close(reading)
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("reason", "code", "line"),
    [("done", 0, "DONE\n"), ("SIGTERM", 75, "PREEMPTED SIGTERM\n"), ("SIGINT", 130, "PREEMPTED SIGINT\n")],
)
def test_the_status_and_the_exit_code_say_how_a_run_ended(tmp_path, reason, code, line):
    with claim(tmp_path, False) as claimed:
        assert status(tmp_path) == "RUNNING\n"
        assert claimed.ended(reason) == code
    assert status(tmp_path) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("no\nmore"), "FAILED no\n"),
        (ZeroDivisionError(), "FAILED ZeroDivisionError\n"),
        (KeyboardInterrupt(), "PREEMPTED interrupted at once\n"),
    ],
)
def test_the_status_says_what_ended_a_run(tmp_path, error, line):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(type(error)), claim(tmp_path, True):
        raise error
    assert status(tmp_path) == line


def fail_after(_):
    raise ConnectionError("closed by peer")


def test_what_another_process_of_the_run_said_first_stays(tmp_path):
    """A process that hangs says so; here only the connection to it breaks."""
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConnectionError), claim(tmp_path, True):
        fail_after((tmp_path / "status").write_text("FAILED process 1 of 2 hung\n"))
    assert status(tmp_path) == "FAILED process 1 of 2 hung\n"


def test_a_run_that_did_not_begin_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError), claim(tmp_path / "run", False):
        raise ConfigError("a typo")
    assert not (tmp_path / "run").exists()


def test_a_run_that_did_not_begin_leaves_no_folder_above_it_that_was_made_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    for out in ("runs/one", "there/runs/one"):
        with pytest.raises(ConfigError), claim(Path(out), False):
            raise ConfigError("a typo")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with pytest.raises(ConnectionError), claim(Path("runs/one"), False):
        fail_after(Path("runs/two").mkdir())  # another run began meanwhile
    assert list(tmp_path.glob("runs/*")) == [tmp_path / "runs" / "two"]


def test_only_the_first_process_makes_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with claim(tmp_path / "runs" / "one", False):
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), claim(tmp_path / "file", False):
        pass


def test_only_the_first_process_holds_a_run(tmp_path, holder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with claim(tmp_path / "run", True):
        pass
    assert status(tmp_path / "run") == "RUNNING\n"


def test_a_signal_before_the_first_step_ends_the_claim_and_what_was_forked_from_it(tmp_path):
    def prepare():
        assert terminated() == 128 + signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Asked, match="SIGUSR1"), claim(tmp_path / "run", False):
        prepare()
    assert status(tmp_path / "run") == "PREEMPTED SIGUSR1\n"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
