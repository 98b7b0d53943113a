"""The list of what could not be used: whole, in order, and nothing twice."""

from __future__ import annotations

import json

import pytest

from selfsup.plugins.common.windows import Windows
from selfsup.plugins.services.quarantine import NAME, Quarantine


@pytest.fixture
def run(fake_run):
    made = fake_run()
    made.skipped = {}
    return made


def begun(run):
    service = Quarantine()
    service.run_started(run)
    return service


def lines(run):
    return [json.loads(line) for line in (run.folder / NAME).read_text().splitlines()]


def test_each_sample_is_listed_once_with_its_place(run):
    run.source.place = lambda index: {"path": "a.tar", "member": f"{index}.wav", "offset": 512 * index}
    service = begun(run)
    service.step_finished(run, None)
    assert not (run.folder / "bad").exists()
    run.skipped[7], run.done = "it is empty", 3
    service.step_finished(run, None)
    service.step_finished(run, None)
    run.skipped[9] = "it is cut"
    service.run_finished(run, None)
    assert lines(run) == [
        {"path": "a.tar", "member": "7.wav", "offset": 3584, "reason": "it is empty", "step": 3},
        {"path": "a.tar", "member": "9.wav", "offset": 4608, "reason": "it is cut", "step": 3},
    ]


def test_a_resumed_run_repeats_nothing(run):
    run.source.left_out = [{"path": "b.csv", "row": 3, "reason": "cut"}, {"path": "b.csv", "reason": "cut"}]
    run.skipped = {7: "it is empty"}
    begun(run)
    with (run.folder / NAME).open("a") as file:
        file.write('{"path": "number-9.txt", "reas')  # torn by a kill
    run.skipped = {7: "it is empty", 9: "it is cut"}
    service = begun(run)
    service.run_finished(run, None)
    assert [(row["path"], row.get("row")) for row in lines(run)] == [
        ("b.csv", 3),
        ("b.csv", None),
        ("number-7.txt", None),
        ("number-9.txt", None),
    ]


def test_names_that_are_no_utf8_and_lines_of_others(run):
    (run.folder / "bad").mkdir()
    (run.folder / NAME).write_text("[" * 100_000 + "\n5\nnot JSON\n")
    run.skipped = {3: "cut"}
    run.source.place = lambda index: {"path": "caf\udce9.wav"}
    begun(run)
    assert json.loads((run.folder / NAME).read_text().splitlines()[-1])["path"] == "caf\udce9.wav"


def test_a_full_disk_ends_the_list_and_not_the_run(run, capsys):
    (run.folder / "bad").write_text("in the way")
    run.skipped = {3: "cut"}
    service = begun(run)
    run.skipped[4] = "cut"
    service.step_finished(run, None)
    assert capsys.readouterr().err.startswith(f"warning: {NAME} ends here, it cannot be written: ")


def test_without_a_folder_nothing_is_listed(fake_run):
    run = fake_run(folder=None)
    run.skipped = {1: "cut"}
    begun(run).run_finished(run, None)


def test_a_stream_says_in_its_reasons_where_samples_lie_and_each_place_is_listed_once(run):
    run.source = Windows([None], [20], [])
    run.skipped = {
        1: "a b/0.jsonl row 12: this is no JSON: at 3",
        -2: "0.tar:b/7.wav: the file is empty: no bytes",
        3: "0.tar after 7.wav: it was cut",
        9: "a b/0.jsonl row 12: this is no JSON: at 3",
        10: "no place",
    }
    begun(run).run_finished(run, None)
    found = [{name: value for name, value in row.items() if name != "step"} for row in lines(run)]
    assert found == [
        {"path": "a b/0.jsonl", "row": 12, "reason": "this is no JSON: at 3"},
        {"path": "0.tar", "member": "b/7.wav", "reason": "the file is empty: no bytes"},
        {"path": "0.tar after 7.wav", "reason": "it was cut"},
        {"path": "sample 11 of the stream", "reason": "no place"},
    ]
