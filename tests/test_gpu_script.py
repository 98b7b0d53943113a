"""`benchmarks/gpu.sh` in little, so that its first run on a GPU is not its first run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STAGES = ("tests", "sanitize", "ops", "steps", "learn")


def run(out: Path, *args: str, code: int = 0, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    given = clean | {"PYTHON": sys.executable, "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run([SCRIPT, *args], env=given, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_one_stage_for_one_op(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    said = run(tmp_path / "out", "--dry-run", "--wheels", str(tmp_path / "wheels"), "ops:random_bits", COMMIT="abc")
    assert "all is well" in said
    assert "broken" in said
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert (about["dry_run"], about["commit"], about["device"]) == (True, "abc", None)
    assert about["command"].startswith("benchmarks/gpu.sh --dry-run")
    assert about["versions"]["torch"]
    found = json.loads((tmp_path / "out" / "ops.json").read_text())
    assert [case["op"] for case in found["cases"]] == ["random_bits"]


@pytest.mark.parametrize(
    ("args", "said"),
    [(("nonsense",), "there is no stage or option 'nonsense'"), (("ops",), "torch sees no GPU here; --dry-run")],
)
def test_errors_are_for_people(tmp_path, args, said):
    assert said in run(tmp_path, *args, code=2)


def test_help_is_its_first_lines(tmp_path):
    said = run(tmp_path, "--help")
    assert "benchmarks/gpu.sh --dry-run" in said
    assert "#" not in said


@pytest.mark.slow
def test_every_stage_in_little(tmp_path):
    said = run(tmp_path, "--dry-run")
    assert "all is well" in said
    names = {path.name for path in tmp_path.iterdir()}
    expected = {"about.json", "tests.xml", "ops.json", "ops.png", "steps.json", "learn.json", "gpu.log"}
    assert expected - {"ops.png"} <= names <= expected  # at most eight
    assert int(ElementTree.parse(tmp_path / "tests.xml").getroot()[0].get("tests", "0")) > 50
    log = (tmp_path / "gpu.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("=== ")] == [f"=== {name}" for name in STAGES]
    assert log.split("=== sanitize")[1].split("=== ops")[0].count("random_bits B=5 N=37") == 2
    steps, learned = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("steps", "learn"))
    assert [(found["contest"], found["sides"]["theirs"]["state"]) for found in steps] == [("gpt", "ok")]
    assert [(found["task"], found["train"]["ended"], found["met"]) for found in learned] == [("gpt", "done", False)]
    assert learned[0]["perplexity"]["rows"]["trained"]["nats"] > 0


@pytest.mark.slow
def test_a_stage_that_fails_is_named_and_the_others_run(tmp_path):
    wrong = ("tests:of_nothing", "ops:nothing", "steps:nothing", "learn:nothing")
    said = run(tmp_path, "--dry-run", *wrong, "ops:random_bits", code=1)
    assert f"FAILED: {' '.join(wrong)}" in said
    assert "there is no contest 'nothing'; known: gpt, bert-512" in said
    assert "there is no task 'nothing'; known: gpt, simclr-mnist" in said
    assert (tmp_path / "ops.json").exists()
