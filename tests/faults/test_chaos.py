"""The long command measures every goal, goes on when one fails, and leaves what it measured in a file."""

from __future__ import annotations

import re
import sys

import chaos
import pytest

GOAL = '''
"""R{number}: made up."""
from result import Result

def measure(work, full):
    assert work.is_dir()
    yield Result("R{number}", "one | bit", 3, {survived}, "full" if full else "short", "loses all")
    {then}
'''


@pytest.fixture
def goals(tmp_path, monkeypatch):
    """Writes goals of its own, in place of the real ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(chaos, "chosen", lambda asked, own=chaos.chosen: own(asked, tmp_path))

    def write(name, number, survived=3, then="pass"):
        (tmp_path / f"goal_{name}.py").write_text(GOAL.format(number=number, survived=survived, then=then).lstrip())
        monkeypatch.delitem(sys.modules, f"goal_{name}", raising=False)

    return write


def ran(tmp_path, *words):
    code = chaos.main([*words, "--out", str(tmp_path / "out.md")])
    return code, (tmp_path / "out.md").read_text()


def test_all_goals_in_their_order(goals, tmp_path, capsys):
    goals("fake_late", 12)
    goals("fake_early", 2)
    code, text = ran(tmp_path)
    assert code == 0
    assert text.index("| R2 | one \\| bit | 3 | 3 | full | loses all |") < text.index("| R12 |")
    assert "6 of 6 faults survived" in text
    assert "Not measured: nothing." in text
    assert "`python tests/faults/chaos.py`" in text
    assert "R2   one | bit: 3 of 3 survived; full; stock: loses all" in capsys.readouterr().out


def test_some_goals_in_short(goals, tmp_path):
    goals("fake_late", 12)
    goals("fake_early", 2)
    for name in ("R12", "fake_late"):
        code, text = ran(tmp_path, name, "--short")
        assert code == 0
        assert "| R12 | one \\| bit | 3 | 3 | short |" in text
        assert "| R2 |" not in text
        assert f"`python tests/faults/chaos.py {name} --short`" in text
    with pytest.raises(SystemExit, match=r"no goal R3; known: fake_early \(R2\), fake_late \(R12\)"):
        ran(tmp_path, "R3")


def test_what_was_not_survived_is_an_exit_code(goals, tmp_path):
    goals("fake_weak", 1, survived=2)
    assert ran(tmp_path)[0] == 1


def test_a_goal_that_fails_is_named_and_the_others_are_measured(goals, tmp_path):
    goals("fake_broken", 1, then="raise RuntimeError('no disk')")
    goals("fake_late", 12)
    code, text = ran(tmp_path)
    assert code == 1
    assert "- goal_fake_broken: RuntimeError: no disk" in text
    assert "| R12 |" in text
    assert "| R1 |" in text  # what it measured before it failed


def test_after_ctrl_c_the_file_holds_what_was_measured(goals, tmp_path):
    goals("fake_stopped", 1, then="raise KeyboardInterrupt")
    goals("fake_late", 12)
    code, text = ran(tmp_path)
    assert code == 1
    assert "| R1 |" in text
    assert "| R12 |" not in text
    assert "interrupted by Ctrl-C" in text


def test_what_a_machine_does_not_allow_is_skipped_and_named(goals, tmp_path):
    goals("fake_root", 5, then="yield Result('R5', 'a full disk', 0, 0, 'skipped: only root may')")
    code, text = ran(tmp_path)
    assert code == 0
    assert "- R5 a full disk: skipped: only root may" in text


PAGE = chaos.HERE.parents[1] / "docs" / "faults.md"
CONTRACT = """
A run that is killed at any instant and restarted with the same command continues from the newest checkpoint whose
digests verify, and, at the same world size and device type, ends with bitwise identical weights, optimizer state,
learning rate and sample order. No input file and no checkpoint can execute code. Whatever is skipped is counted
and named.
"""


def test_the_contract_is_on_the_page_word_for_word():
    text = " ".join(PAGE.read_text("utf-8").replace("\n> ", " ").split())
    assert text.startswith(f"# Runs that survive {' '.join(CONTRACT.split())} ## ")


def test_the_page_names_every_goal_beside_the_files_that_measure_it():
    rows = re.findall(r"^\| R(\d+) \|(.*)$", PAGE.read_text("utf-8"), re.M)
    told = {int(goal): set(re.findall(r"\[(goal_\w+\.py)\]", row)) for goal, row in rows}
    measured = {}
    for path in chaos.HERE.glob("goal_*.py"):
        for goal in chaos.numbers(path):
            measured.setdefault(goal, set()).add(path.name)
    assert told == measured
