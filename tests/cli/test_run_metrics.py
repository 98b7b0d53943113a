"""The end of metrics.jsonl, whatever state the file is in."""

import json
import time

import pytest

from selfsup.cli.run_metrics import Log, read_log


def line(step, **more):
    row = {"step": step, "loss": 100.0 - step, "samples_per_second": 10.0 + step % 3, "time": 1000.0 + 2 * step}
    return json.dumps({**row, "metrics": {"accuracy": step / 100}, **more}) + "\n"


def measured(step, when=0.0, **values):
    return json.dumps({"step": step, "measured": values, "time": 1000.0 + 2 * step + when}) + "\n"


@pytest.fixture
def read(tmp_path):
    def write_and_read(text):
        (tmp_path / "metrics.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_log(tmp_path / "metrics.jsonl")

    return write_and_read


def test_the_end_is_the_mean_of_ten_steps(read):
    log = read("".join(line(step) for step in range(50)))
    assert log.steps == 50
    assert log.recent == pytest.approx({"loss": 100 - 44.5, "accuracy": 0.445})
    assert (log.rate, log.pace, log.time) == (11.0, 2.0, 1098.0)


def test_what_was_measured_is_found_wherever_it_stands(read):
    text = measured(-1, loss=9.0) + "".join(line(step) for step in range(3))
    log = read(text + measured(2, 5.0, **{"validation/loss": 3.0, "online/knn": 0.5}) + line(3))
    log.measured.append((8, {"validation/loss": 4.0}))
    assert log.measured[:2] == [(0, {"loss": 9.0}), (3, {"validation/loss": 3.0, "online/knn": 0.5})]
    assert log.last() == {"loss": 9.0, "validation/loss": 4.0, "online/knn": 0.5}
    assert log.best("validation/loss", highest=False) == (3.0, 3)
    assert log.best("validation/loss", highest=True) == (4.0, 8)
    assert log.best("accuracy", highest=True) == (log.recent["accuracy"], 4)
    assert log.best("nothing", highest=True) is None
    assert log.time == 1009.0
    assert log.names() == {"loss", "accuracy", "validation/loss", "online/knn"}


def test_of_equals_the_first_is_best():
    log = Log(measured=[(10, {"a": 1.0}), (20, {"a": 1.0})])
    assert log.best("a", highest=True) == log.best("a", highest=False) == (1.0, 10)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\xff\xfe\n", b"[]\n", b"null\n", b'{"step": "x", "loss": 1}\n'])
def test_lines_that_do_not_parse_are_passed_over(read, torn):
    whole = (line(0) + line(1)).encode()
    for text in (whole + torn, torn.rstrip(b"\n") + b"\n" + whole):
        assert read(text).steps == 2
    assert read(torn).steps == 0


def test_what_is_not_finite_has_no_mean(read):
    log = read(line(0) + line(1, loss=None) + line(2, loss=float("nan"), metrics=None) + measured(2, a=None, b=True))
    assert log.steps == 3
    assert log.recent == {"loss": 100.0, "accuracy": 0.005}
    assert log.measured == []


def test_no_file_and_an_empty_one_are_an_empty_log(read, tmp_path):
    assert read("") == read_log(tmp_path / "nowhere") == read_log(tmp_path) == Log()


def test_long_lines_and_a_file_of_few_lines_are_read_whole(read):
    log = read("".join(line(step, note="x" * 40_000) for step in range(6)))
    assert log.recent["loss"] == pytest.approx(97.5)
    assert read(line(0) + "".join(measured(0, a=1.0) for _ in range(5000))).steps == 1


def test_many_lines_cost_little_more_than_few(read):
    def cost(text):
        read(text)
        began = time.process_time()
        for _ in range(5):
            read(text)
        return time.process_time() - began

    few, many = "".join(map(line, range(2_000))), "".join(map(line, range(100_000))) + measured(99_999, a=1.0)
    # The tail is the same; 50 times the lines are searched for one word. Parsing them all is 50 times the work.
    assert cost(many) < 25 * cost(few)
    assert read(many).measured == [(100_000, {"a": 1.0})]


def test_a_clock_that_was_set_does_not_change_the_pace(tmp_path):
    times = [100.0, 101.0, 102.0, 86_503.0, 86_504.0, 86_505.0]
    rows = [{"step": n, "loss": 1.0, "time": time} for n, time in enumerate(times)]
    (tmp_path / "log").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_log(tmp_path / "log").pace == 1.0


def test_lines_that_nest_without_end_and_numbers_of_hundreds_of_digits_are_passed_over(read):
    log = read(line(0) + "[" * 100_000 + "\n" + line(1, norm=int("9" * 400)) + measured(1, loss=3.0))
    assert (log.steps, log.last()) == (2, {"loss": 3.0})
    assert read(f'{{"step": 1, "loss": {"9" * 400}}}\n').recent == {}
