"""A forked process does what a new interpreter does, as far as the tests need one."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked, together

PYTHON = sys.executable
LOOK = """
import multiprocessing, os, sys
print(__name__, sys.argv, os.getcwd(), os.environ["GIVEN"], "HOME" in os.environ, multiprocessing.get_start_method())
print("torch" in sys.modules, os.getpgrp() == os.getpid(), file=sys.stderr)
sys.exit(3)
"""
OTHERS = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor(10 ** dist.get_rank()); dist.all_reduce(x); print(x.item()); os._exit(0)
"""


@pytest.mark.parametrize("way", ["text", "file"])
def test_it_sees_what_a_new_interpreter_sees(tmp_path, way):
    (tmp_path / "look.py").write_text(LOOK)
    name, *start = ["-c", "-c", LOOK] if way == "text" else [str(tmp_path / "look.py")] * 2
    found = []
    for start_one in (Forked, subprocess.Popen):
        pipes = {} if start_one is Forked else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = start_one(
            [PYTHON, *start, "a", "b"], env={"GIVEN": "x"}, cwd=tmp_path, start_new_session=True, **pipes
        )
        found.append((*process.communicate(timeout=60), process.returncode))
    (out, err, code), (theirs, _, their_code) = found
    assert (out, code) == (theirs, their_code)
    assert out.startswith(f"__main__ {[name, 'a', 'b']!r} {tmp_path} x False ")
    assert err == "True True\n"  # the imports are there already


def test_modules_are_run_with_plugins_of_their_path(tmp_path):
    (tmp_path / "given.py").write_text("raise SystemExit('said')")
    process = Forked([PYTHON, "-m", "given"], env={"PYTHONPATH": str(tmp_path)})
    assert process.communicate(60) == ("", "said\n")
    assert process.returncode == 1


def test_an_error_is_told():
    process = Forked([PYTHON, "-c", "1 / 0"])
    assert "ZeroDivisionError" in process.communicate(60)[1]
    assert process.poll() == 1


def test_it_can_be_signalled_and_killed(tmp_path):
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = Forked([PYTHON, "-c", "import time; time.sleep(60)"])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(60) == -number
    process.send_signal(number)  # it has ended
    interrupted = Forked(
        [PYTHON, "-c", f"open({str(tmp_path / 'here')!r}, 'w'); import time; time.sleep(60)"], start_new_session=True
    )
    while not (tmp_path / "here").exists():
        assert interrupted.poll() is None
    os.killpg(interrupted.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in interrupted.communicate(60)[1]


def test_several_find_each_other():
    assert [process.communicate(60)[0] for process in together(2, [PYTHON, "-c", OTHERS])] == ["11\n", "11\n"]


def test_it_leaves_no_files_behind():
    process = Forked([PYTHON, "-c", "print('said')"])
    folder = Path(process.files[0]).parent
    assert process.communicate(timeout=60)[0] == "said\n"
    del process
    gc.collect()
    assert not folder.exists()
