"""`ssl bench ops`: checked, then measured; what is wrong fails the command."""

import json
import subprocess
import sys

import pytest
import torch

import selfsup.triton_ops
from selfsup.cli.bench import _peers
from selfsup.triton_ops import clip_loss

QUICK = ("--rounds", 3, "--seconds", 0.1, "--device", "cpu")


def test_without_a_command_it_says_what_there_is(ssl):
    assert ssl("bench")[0].startswith("Usage: ssl bench")


def test_an_op_is_measured_beside_plain_torch(ssl):
    out, _ = ssl("bench", "ops", "clip_loss", *QUICK, "--out", "results")
    assert "They say nothing about the speed of a GPU" in out
    found = json.loads((ssl.folder / "results" / "ops.json").read_text())
    (case,) = found["cases"]
    states = {row["name"]: row["state"] for row in case["rows"]}
    assert states == {"ours": "ok", "eager": "ok", "bare products": "ok"}
    assert all(row["times"]["median"] > 0 for row in case["rows"])
    assert (found["gpu"], found["dtype"], found["shapes"]) == (False, "float32", "small")
    pytest.importorskip("matplotlib")
    assert (ssl.folder / "results" / "ops.png").exists()


def test_an_op_that_is_wrong_fails_the_command(ssl, monkeypatch):
    def wrong(image, text, scale):
        return clip_loss(image, text, scale) * 1.001

    wrong.__module__ = clip_loss.__module__
    monkeypatch.setattr(sys.modules[clip_loss.__module__], "clip_loss", wrong)
    monkeypatch.setattr(selfsup.triton_ops, "clip_loss", wrong)
    out, err = ssl("bench", "ops", "clip_loss", *QUICK, code=1)
    assert "of 1 cases 1 did not pass" in err
    assert "clip_loss B=130 D=72: wrong: wrong by 1.0e-03" in err
    assert "ours" in out


def test_the_interpreter_is_never_timed(ssl, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # of the ops it is asked on import, so here they take the CPU path
    out, _ = ssl("bench", "ops", "clip_loss", *QUICK, "--out", "results")
    assert "nothing is timed" in out
    found = json.loads((ssl.folder / "results" / "ops.json").read_text())
    assert all(row["times"] is None for case in found["cases"] for row in case["rows"])
    assert found["ceilings"] is None


def test_cases_are_listed(ssl):
    out, _ = ssl("bench", "ops", "--list", "--device", "cpu", "--shapes", "full")
    assert "clip_loss B=65536 D=768" in out.splitlines()
    out, _ = ssl("bench", "ops", "nt_xent", "--list", "--device", "cpu")
    assert out.splitlines() == ["nt_xent 2B=258 D=48"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("clip_los",), "there is no case of an op 'clip_los'; did you mean 'clip_loss'?"),
        (("--device", "toaster"), "there is no device 'toaster'"),
        (("--device", "meta"), "nothing is measured on 'meta'"),
        (("--device", f"cuda:{torch.cuda.device_count()}"), f"torch sees {torch.cuda.device_count()} GPUs here"),
    ],
)
def test_errors_are_for_people(ssl, args, said):
    assert said in ssl("bench", "ops", *args, code=1)[1]


def test_whom_to_measure():
    assert (_peers(None, True), _peers(None, False)) == (None, ("eager",))
    assert (_peers("all", False), _peers("none", True)) == (None, ())
    assert _peers("eager, liger", True) == ("eager", "liger")


def test_help_imports_no_torch():
    source = (
        "import sys; from selfsup.cli.main import main\n"
        "try: main(['bench', 'ops', '--help'])\n"
        "finally: print([m for m in ('torch', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
