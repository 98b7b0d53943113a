"""`ssl plugins --check`: every plugin in a process of its own, whatever it does there."""

import json
import time
from pathlib import Path

import pytest

from selfsup.cli.plugins_check import examined
from selfsup.kernel.discovery import Plugins

BACKBONE = """
from selfsup.kernel import Backbone
class X(Backbone):
    def forward(self, tokens, *, causal=False, context=None):
        return tokens
"""


def broken(toys, **modules):
    entries = "".join(f"{name} = {name}:X\n" for name in modules)
    toys.distribution("strangers", f"[selfsup.backbones]\n{entries}", **modules)


def test_the_good_and_the_broken(toys, monkeypatch):
    broken(
        toys,
        fine=BACKBONE,
        raises="def f():\n    raise OSError('boo')\nf()",
        lacks="import nowhere",
        leaves="import sys; sys.exit(0)",
        kills="import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        exits="import os; os._exit(0)",
        older=BACKBONE + "    contract = 0",
        other="X = 3",
    )
    verdicts = json.loads(toys("plugins", "--check", "--kind", "backbones", "--json", code=1)[0])
    said = {v["name"]: (v["good"], v["reason"]) for v in verdicts if "strangers 1.0" in v["distribution"]}
    assert {name for name, (good, _) in said.items() if good} == {"fine"}
    for name, part in {
        "raises": "could not be imported: OSError: boo",
        "lacks": "ModuleNotFoundError: No module named 'nowhere'",
        "leaves": "SystemExit: 0",
        "kills": "its import ended the process: it died of SIGKILL",
        "exits": "SystemExit: os._exit(0)",
        "older": "was made for contract 0",
        "other": "is no class but a int",
    }.items():
        assert part in said[name][1], name
    (trace,) = [v["trace"] for v in verdicts if v["name"] == "raises"]
    assert "in f\n" in trace
    (mixer,) = [v for v in verdicts if v["name"] == "mixer"]
    assert (mixer["good"], mixer["contract"], mixer["options"]) == (True, 1, 1)


def test_one_plugin_and_its_traceback_with_debug(toys):
    broken(toys, raises="def f():\n    raise OSError('boo')\nf()", fine=BACKBONE)
    out, _ = toys("plugins", "raises", "--check", code=1)
    assert "broken: could not be imported: OSError: boo" in " ".join(out.split())
    assert "Traceback" not in out
    assert "0 good, 1 broken; --debug shows the tracebacks" in out
    assert "in f\n" in toys("plugins", "raises", "--check", "--debug", code=1)[0]
    assert "1 good, 0 broken" in toys("plugins", "--check", "fine")[0]
    assert "there is no plugin called 'fin'; did you mean 'fine'?" in toys("plugins", "--check", "fin", code=1)[1]


def test_a_name_claimed_twice_is_broken_but_by_its_full_name(toys):
    toys.distribution("more", "[selfsup.backbones]\nmixer = toy_plugins:Mixer\n")
    verdicts = json.loads(toys("plugins", "mixer", "--check", "--json", code=1)[0])
    assert sorted(v["distribution"] for v in verdicts) == ["more 1.0", "toys 1.0"]
    assert all("claimed by more 1.0 and by toys 1.0" in v["reason"] for v in verdicts)
    toys("plugins", "toys:mixer", "--check")


def test_a_hang_is_ended_with_all_that_it_started(toys):
    hang = "import os, time, pathlib\nos.fork() and time.sleep(60)\npathlib.Path('child').write_text(str(os.getpid()))"
    broken(toys, hangs=f"{hang}\ntime.sleep(60)", fine=BACKBONE)
    plugins = Plugins()
    found = [plugins.find("backbones", name) for name in ("hangs", "fine")]
    began = time.monotonic()
    hangs, fine = examined(found, limit=2.0)
    assert time.monotonic() - began < 20
    assert hangs.reason == "its import did not end in 2 s"
    assert fine.good
    child = int((toys.folder / "child").read_text())
    for _ in range(100):  # it is gone, or nobody has asked for its end yet
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what a plugin started lives on")


def test_a_command_that_is_none_is_broken(toys):
    toys.distribution("odd", "[selfsup.commands]\nodd = odd:odd\n", odd="odd = 3")
    (verdict,) = json.loads(toys("plugins", "odd", "--check", "--json", code=1)[0])
    assert "is no click.Command but a int" in verdict["reason"]


def test_damaged_entry_points_are_told(toys):
    toys.distribution("strange", "[selfsup.backbones]\nno equals sign")
    out, _ = toys("plugins")
    assert "strange: its entry points cannot be read" in out
    verdicts = json.loads(toys("plugins", "--check", "--kind", "backbones", "--json", code=1)[0])
    assert verdicts[-1]["name"] == "strange"


def test_what_a_plugin_prints_is_not_shown(toys):
    broken(toys, loud=f"print('LOUD')\n{BACKBONE}")
    out, err = toys("plugins", "loud", "--check")
    assert "LOUD" not in out + err
