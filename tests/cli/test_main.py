"""The command itself: speed, help, completion, and what every kind of failure looks like."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfsup.cli import main as cli

COMMAND = "[selfsup.commands]\n{name} = {module}:{name}\n"


def run(*code):
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "args", [["--help"], ["plugins"], ["train", "--help"], ["look", "--help"], ["report", "--help"], ["--version"]]
)
def test_help_and_lists_do_not_import_torch(args):
    code = f"""
import sys
from selfsup.cli.main import main
try:
    main({args!r})
except SystemExit as ended:
    assert not ended.code
assert "torch" not in sys.modules and "pydantic" not in sys.modules, "too much was imported"
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [["--help"], ["plugins"]])
def test_help_and_list_are_quick(args):
    # In seconds of the processor, which other processes on a busy machine do not lengthen as they do the clock's.
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("-m", "selfsup.cli", *args).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


def test_help_lists_commands_with_their_summaries(ssl):
    out, _ = ssl("--help")
    assert "Train a model, or go on with a run" in out
    assert out == ssl()[0]


def test_a_group_without_a_command_shows_its_help(ssl):
    out, err = ssl("eval")
    assert "knn" in out
    assert "probe" in out
    assert err == ""


def test_version(ssl):
    assert ssl("--version")[0].startswith("selfsup ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["train", "--plugn", "x"], "--plugin"),
        (["train", "--steps", "0"], "0 is not in the range x>=1"),
        (["plugins", "--kind", "objektives"], "objektives"),
        (["train", "--resume"], "--resume needs the folder of the run"),
        (["train", "--resume", "--out", "x", "--from", "y"], "give one of them"),
        (["train", "--from", "runs/x"], "ssl train runs/x/run.toml --from runs/x"),
    ],
)
def test_wrong_usage_exits_with_2(ssl, args, message):
    out, err = ssl(*args, code=2)
    assert err.startswith("error: ")
    assert message in err
    assert "--help says what it takes" in err
    assert out == ""


def test_a_command_that_raises_on_import_harms_no_other(ssl):
    ssl.distribution("broken", COMMAND.format(name="boom", module="boom"), boom="'''Go boom.'''\nraise OSError('bad')")
    assert "Go boom." in ssl("--help")[0]
    ssl("plugins")
    _, err = ssl("boom", code=1)
    for part in ("command 'boom' of broken 1.0", "OSError: bad", "SELFSUP_DISABLE=commands.boom"):
        assert part in err


def test_a_command_that_does_not_parse_harms_no_other(ssl):
    ssl.distribution("broken", COMMAND.format(name="boom", module="boom"), boom="def (")
    assert "cannot be read: SyntaxError" in ssl("--help")[0]
    assert "SyntaxError" in ssl("boom", code=1)[1]


def test_a_command_must_be_one(ssl):
    ssl.distribution("odd", COMMAND.format(name="odd", module="odd"), odd="odd = 3")
    assert "of odd 1.0 is no click.Command but a int" in ssl("odd", code=1)[1]


def test_two_distributions_with_one_command(ssl):
    for name in ("one", "two"):
        ssl.distribution(name, COMMAND.format(name="same", module=name))
    assert "claimed by one 1.0 and by two 1.0" in ssl("same", code=1)[1]
    assert "claimed by one 1.0 and by two 1.0" in " ".join(ssl("--help")[0].split())


FAILS = """
import click
@click.command()
def fails():
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("ZeroDivisionError('oops')", 1, "error: ZeroDivisionError: oops"),
        ("KeyboardInterrupt", 130, "interrupted"),
        ("click.Abort", 130, "interrupted"),
        ("click.ClickException('so it is')", 1, "error: so it is"),
    ],
)
def test_errors_become_messages(ssl, error, code, message):
    ssl.distribution("fails", COMMAND.format(name="fails", module="fails"), fails=FAILS.format(error=error))
    _, err = ssl("fails", code=code)
    assert err.lstrip().startswith(message)  # after a ^C there is a new line
    assert "Traceback" not in err
    assert ("--debug" in err) == ("ZeroDivision" in error)


@pytest.mark.parametrize("args", [("--debug", "fails"), ("fails", "--debug")])
def test_debug_shows_the_traceback(ssl, args):
    ssl.distribution("fails", COMMAND.format(name="fails", module="fails"), fails=FAILS.format(error="OSError('x')"))
    with pytest.raises(OSError, match="x"):
        cli.main(args)


def test_one_of_several_processes_ends_at_once_and_says_which_it_is(ssl):
    # A thread that is not a daemon, like those of a collective, would hold the process.
    code = FAILS.format(error="OSError('x')").replace("raise", "import threading, time\n    " + (
        "threading.Thread(target=time.sleep, args=(60,)).start()\n    raise"
    ))  # fmt: skip
    ssl.distribution("fails", COMMAND.format(name="fails", module="fails"), fails=code)
    process = ssl.start("fails", WORLD_SIZE="2", RANK="1")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith("[1] error: OSError: x")


def complete(words, monkeypatch, capsys):
    """What the shell would offer for the last of these words."""
    monkeypatch.setenv("_SSL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main([])
    return capsys.readouterr().out.split()


WAITS = """
import atexit, os, time
from pathlib import Path
import click

def wait():
    Path("here").touch()
    time.sleep(60)

class Last:
    def __del__(self, make=os.mkdir, sleep=time.sleep):
        make("here")
        sleep(1.5)

@click.command()
@click.argument("where")
def waits(where):
    if where == "at once":
        atexit.register(os.mkdir, "late")  # as threads would go on meanwhile
        wait()
    elif where == "in order":
        atexit.register(wait)
    else:
        os.last = Last()  # freed with the modules, when no handler is called any more
"""


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [("at once", 130, "interrupted"), ("in order", 130, ""), ("with its last objects", 0, "")],
)
def test_ctrl_c_ends_without_a_traceback(ssl, ends, code, said):
    ssl.distribution("waiting", COMMAND.format(name="waits", module="waiting"), waiting=WAITS)
    process, until = ssl.start("waits", ends), time.monotonic() + 60
    while not Path("here").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (code, said)
    assert not Path("late").exists()


def test_completion(toys, monkeypatch, capsys):
    for name in ("runs/a-1", "runs/a-2", "runs/other"):
        (toys.folder / name).mkdir(parents=True)
    (toys.folder / "runs/a-1/run.toml").touch()
    (toys.folder / "runs/a-2/run.toml").touch()
    for words, offered in [
        (["ssl", "tr"], ["plain,train"]),
        (["ssl", "train", "--plugin", "gu"], ["plain,guess"]),
        (["ssl", "check", "--backbone", "mix"], ["plain,mixer"]),
        (["ssl", "plugins", "numb"], ["plain,numbers"]),
        (["ssl", "train", "--from", "ru"], ["plain,runs/a-1", "plain,runs/a-2"]),
        (["ssl", "report", "runs/a"], ["plain,runs/a-1", "plain,runs/a-2"]),
        (["ssl", "train", "--from", "runs/"], ["plain,runs/a-1", "plain,runs/a-2"]),
        (["ssl", "train", "--data", "ph"], ["file,ph"]),
    ]:
        assert complete(words, monkeypatch, capsys) == offered, words


def test_completion_can_be_installed(ssl):
    process = ssl.start(_SSL_COMPLETE="bash_source")
    out, _ = process.communicate(timeout=30)
    assert "_ssl_completion" in out
    assert process.returncode == 0


def test_module_and_script_are_one(ssl):
    process = ssl.start("--version")
    assert process.communicate(timeout=30)[0] == ssl("--version")[0]


@pytest.mark.parametrize("args", [["plugins"], ["plugins", "--json"], ["--version"]])
def test_a_reader_that_leaves_is_no_error(args):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "selfsup.cli", *args]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
