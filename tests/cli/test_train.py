"""`ssl train`: what lands in the folder, how runs end and go on, and what each mistake is answered with."""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from selfsup.kernel.config import read_toml

TRAIN = ("train", "--plugin", "guess", "--set", "data.workers=0")


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    (newest, *_) = sorted(Path(folder, "checkpoints").iterdir(), reverse=True)
    return newest.name, (newest / "model.safetensors").read_bytes()


def test_a_run_needs_a_name_only_and_says_where_it_is(toys):
    out, _ = toys(*TRAIN)
    folder = re.search(r"folder +(runs/guess-\d{8}-\d{6})", out)[1]
    assert sorted(p.name for p in Path(folder).iterdir()) == [
        ".lock",
        "checkpoints",
        "environment.json",
        "metrics.jsonl",
        "outcome.json",
        "run.toml",
        "status",
    ]
    assert f"checkpoints/step-{12:08d}" in out
    assert f"ssl eval knn {folder}\n" in out


def test_flags_become_settings(toys):
    flags = ("--steps", 3, "--batch", 4, "--seed", 7, "--device", "cpu", "--preset", "base", "--backbone", "mixer")
    toys(*TRAIN, *flags, "--modality", "numbers", "--set", "objective.share=0.2", "--out", "r")
    run = read_toml(Path("r/run.toml"))
    assert run["preset"] == "base"
    assert run["objective"]["share"] == 0.2
    assert run["backbone"] == {"name": "mixer", "width": 16}
    wanted = {"steps": 3, "batch": 4, "seed": 7, "device": "cpu"}
    assert {key: run["train"][key] for key in wanted} == wanted


def test_epochs_win_over_the_steps_of_a_recipe(toys):
    toys(*TRAIN, "--epochs", 0.5, "--out", "r")
    assert len(lines("r")) == 7  # half of 100 samples in eights
    assert read_toml(Path("r/run.toml"))["train"]["steps"] == 7


def test_json_is_the_last_line(toys):
    out, _ = toys(*TRAIN, "--out", "r", "--json")
    report = json.loads(out.splitlines()[-1])
    assert report["run"] == "r"
    assert report["ended"] == "done"
    assert report["steps"] == 12
    assert report["loss"] == pytest.approx(lines("r")[-1]["loss"], rel=1e-3)
    assert report["samples_per_second"] > 0


def test_the_environment_is_kept(toys):
    toys(*TRAIN, "--steps", 1, "--out", "r")
    facts = json.loads(Path("r/environment.json").read_text())
    assert facts["plugins"]["objective guess"] == "toys 1.0"
    assert facts["plugins"]["service metrics"].startswith("selfsup ")
    assert {"python", "torch", "selfsup", "platform", "device", "command", "commit"} <= set(facts)


def test_a_run_file_is_a_run(toys):
    toys(*TRAIN, "--steps", 2, "--set", "objective.share=0.3", "--out", "a")
    toys("train", "a/run.toml", "--steps", 3, "--out", "b")
    assert read_toml(Path("b/run.toml"))["objective"]["share"] == 0.3
    assert len(lines("b")) == 3
    assert lines("a")[0]["loss"] == lines("b")[0]["loss"]


def test_a_folder_with_a_run_is_not_overwritten(toys):
    toys(*TRAIN, "--steps", 1, "--out", "r")
    _, err = toys(*TRAIN, "--out", "r", code=1)
    assert "r already holds a run" in err
    assert "--resume" in err
    assert len(lines("r")) == 1


def test_resume_of_nothing_begins_and_says_so(toys):
    out, _ = toys(*TRAIN, "--steps", 2, "--resume", "--out", "new")
    assert "starts from its beginning" in out
    assert len(lines("new")) == 2


def test_a_run_from_weights_that_was_killed_before_it_saved_begins_with_them_again(toys):
    toys(*TRAIN, "--steps", 3, "--out", "a")
    toys(*TRAIN, "--steps", 2, "--from", "a", "--out", "b")
    whole = [line["loss"] for line in lines("b")]
    shutil.rmtree("b/checkpoints")
    toys("train", "--resume", "--out", "b")
    assert [line["loss"] for line in lines("b")] == whole
    shutil.rmtree("a")  # needed no more
    toys("train", "--resume", "--out", "b", "--steps", 3)
    assert [line["loss"] for line in lines("b")[:2]] == whole


def test_a_finished_run_can_go_on_for_more_steps(toys):
    toys(*TRAIN, "--steps", 4, "--out", "r")
    out, _ = toys("train", "--resume", "--out", "r")
    assert "this run was done before: 4 of 4 steps" in out
    out, _ = toys("train", "--resume", "--out", "r", "--steps", 6)
    assert "resumed at step 4 of 6" in out
    assert [line["step"] for line in lines("r")] == list(range(6))


def test_a_changed_setting_is_refused_on_resume(toys):
    toys(*TRAIN, "--steps", 2, "--out", "r")
    _, err = toys("train", "--resume", "--out", "r", "--set", "objective.share=0.9", code=1)
    assert "objective.share was 0.4 when this run began and is 0.9 now" in err


def test_from_takes_the_weights_of_another_run(toys):
    toys(*TRAIN, "--steps", 40, "--set", "optimizer.lr=0.05", "--out", "a")
    toys(*TRAIN, "--steps", 1, "--from", "a", "--out", "b")
    assert lines("b")[0]["loss"] < lines("a")[0]["loss"] / 2
    assert "is not the folder of a run; did you mean 'a'?" in toys(*TRAIN, "--from", "aa", "--out", "c", code=1)[1]
    assert not Path("c").exists()  # nothing was begun


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--plugin", "gues"], "there is no objective called 'gues'; did you mean 'guess'?"),
        (["train", "--plugin", "guess", "--backbone", "mixr"], "did you mean 'mixer'?"),
        (["train", "--plugin", "guess", "--preset", "tny"], "guess has no preset 'tny'; did you mean 'tiny'?"),
        (["train", "--plugin", "guess", "--set", "objective.shar=1"], "did you mean 'share'?"),
        (["train", "--plugin", "guess", "--set", "objektive.share=1"], "did you mean 'objective'?"),
        (
            ["train", "--plugin", "guess", "--set", "objective.share=2"],
            "objective.share = 2: input should be less than 1",
        ),
        (["train", "--plugin", "guess", "--set", "share=2"], "--set takes section.option=value"),
        (["train", "--plugin", "guess", "--device", "gpu"], "there is no device 'gpu'"),
        (["train"], "name an objective with --plugin; known: "),
        (["train", "guess"], "for the objective of that name: --plugin guess"),
        (["train", "goodd.toml"], "there is no run file 'goodd.toml'; did you mean 'good.toml'?"),
        (["train", "bad.toml"], "cannot be read as TOML"),
        (["train", "photos"], "name data with --data photos"),
        (["train", "old"], "ssl train --resume --out old"),
        (["train", "--resume", "--out", "odl"], "there is no run in odl to go on with; did you mean 'old'?"),
    ],
)
def test_mistakes_are_answered(toys, args, message):
    Path("good.toml").write_text("[objective]\nname = 'guess'\n")
    Path("bad.toml").write_text("[objective\n")
    Path("photos").mkdir()
    Path("old").mkdir()
    Path("old/run.toml").touch()
    _, err = toys(*args, code=1)
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_data_that_is_not_there_gives_the_nearest_match(toys):
    Path("numbers").mkdir()
    _, err = toys(*TRAIN, "--data", "numbrs", code=1)
    assert "numbrs" in err
    assert "did you mean 'numbers'?" in err


def test_corrupt_samples_are_named_skipped_and_limited(toys):
    Path("d").mkdir()
    for n in range(40):
        Path(f"d/{n:02}.num").write_text("seven" if n == 7 else str(n))
    few = ("--data", "d", "--batch", 8, "--steps", 10, "--preset", "tiny")
    out, _ = toys(*TRAIN, *few, "--max-bad-fraction", 0.1, "--out", "r")
    assert re.search(r"skipped +.*d/07\.num: .*'seven'", out)
    assert "--data LABELLED" in out
    for n in range(20):
        Path(f"d/{n:02}.num").write_text("seven")
    _, err = toys(*TRAIN, *few, "--out", "s", code=1)
    assert "samples cannot be used, more than data.max_bad_fraction = 0.01 allows; remove them, or allow more" in err
    assert re.search(r"d/\d\d\.num: .*'seven'", err)


def test_a_folder_that_cannot_be_written_is_said_before_any_work(toys):
    Path("file").touch()
    for out in ("file", "file/below", "/proc/nowhere"):
        _, err = toys(*TRAIN, "--out", out, code=1)
        assert f"the output folder {out} cannot be written" in err
        assert "choose another with --out" in err


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(toys, monkeypatch):
    monkeypatch.setattr("selfsup.kernel.saving.save_file", _only_twice())
    _, err = toys(*TRAIN, "--set", "checkpoints.steps=5", "--out", "r", code=1)
    assert "the checkpoint of step 10 could not be written" in err
    assert weights("r")[0] == "step-00000005"


def _only_twice():
    """safetensors' save_file on a disk that holds one checkpoint."""
    from safetensors.torch import save_file

    calls = []

    def save(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    return save


def test_a_loss_that_is_not_a_number_stops_the_run_or_is_skipped(toys):
    _, err = toys(*TRAIN, "--set", "objective.poison=5", "--out", "r", code=1)
    assert "step 5: the loss is nan" in err
    assert "built-in number sample" in err
    assert Path("r/bad/step-5/batch-0.safetensors").exists()
    assert lines("r")[-1]["loss"] is None
    assert not Path("r/checkpoints").exists()
    _, err = toys(*TRAIN, "--set", "objective.poison=5", "--set", "watchdog.policy=skip", "--out", "s")
    assert "warning: step 5: the loss is nan" in err
    assert len(lines("s")) == 12


def test_an_unforeseen_error_is_short_and_the_terminal_is_left_in_order(toys):
    _, err = toys(*TRAIN, "--set", "objective.crash=3", "--set", "console.style=bar", "--out", "r", code=1)
    said = "the objective 'guess' of toys 1.0 failed after 3 of 12 steps: RuntimeError: a toy broke"
    assert f"error: {said}\n" in err
    assert Path("r/status").read_text() == f"FAILED {said}\n"
    assert len(lines("r")) == 3


HOOK = """
from selfsup.kernel import hookimpl
class Watch:
    def __init__(self, *, {options}):
        pass
    @hookimpl
    def {hook}(self):
        {body}
"""


def watch(toys, body, hook="step_finished", options="many: int = 3"):
    text = HOOK.format(body=body, hook=hook, options=options)
    toys.distribution("watchers", "[selfsup.services]\nwatch = watchers:Watch\n", watchers=text)


@pytest.mark.parametrize("body", ["raise OSError('boo')", "import sys; sys.exit(0)"])
def test_a_hook_that_raises_is_named_and_what_was_saved_stays(toys, body):
    watch(toys, f"self.n = getattr(self, 'n', 0) + 1\n        if self.n == 5:\n            {body}")
    _, err = toys(*TRAIN, "--set", "checkpoints.steps=2", "--out", "r", code=1)
    what = "OSError: boo" if "boo" in body else "SystemExit: 0"
    kept = Path("r/checkpoints/step-00000004")
    assert (
        f"the service 'watch' of watchers 1.0 failed after 5 of 12 steps: {what}; the newest checkpoint is {kept}"
        in err
    )
    assert Path("r/status").read_text().startswith("FAILED the service 'watch'")
    assert kept.exists()


def test_a_service_that_breaks_at_the_end_does_not_cost_the_last_checkpoint(toys):
    watch(toys, "1 / 0", hook="run_finished")
    _, err = toys(*TRAIN, "--out", "r", code=1)
    assert "the service 'watch' of watchers 1.0 failed after 12 of 12 steps: ZeroDivisionError" in err
    assert Path("r/checkpoints/step-00000012").exists()


def test_a_strangers_service_that_cannot_be_used_is_left_out_unless_it_is_asked_for(toys, monkeypatch):
    watch(toys, "pass", options="many: int = nowhere")
    _, err = toys(*TRAIN, "--out", "r")
    said = "the service 'watch' of watchers 1.0 could not be imported: NameError: name 'nowhere' is not defined"
    assert f"warning: a service is left out of this run: {said}" in err
    assert "watch]" not in Path("r/run.toml").read_text()
    toys("eval", "knn", "r")
    _, err = toys(*TRAIN, "--set", "watch.many=1", "--out", "s", code=1)
    assert f"error: {said}" in err
    assert not Path("s").exists()


def test_a_run_that_had_a_service_does_not_go_on_without_it(toys, monkeypatch):
    watch(toys, "pass")
    toys(*TRAIN, "--set", "checkpoints.steps=4", "--out", "r")
    (toys.path / "watchers.py").write_text("import gone")
    del sys.modules["watchers"]
    _, err = toys("train", "--resume", "--out", "r", "--steps", 20, code=1)
    assert "the service 'watch' of watchers 1.0 could not be imported: ModuleNotFoundError" in err
    _, err = toys(*TRAIN, "--resume", "--out", "r", code=1)  # the same command, which does not name it
    assert "this run had a service that cannot be used now: the service 'watch' of watchers 1.0" in err
    _, err = toys("eval", "knn", "r")
    assert "warning: a service is left out" in err
    shutil.rmtree(toys.path / "watchers-1.0.dist-info")
    toys("eval", "knn", "r")


def test_a_run_goes_on_with_the_plugin_that_it_began_with(toys, monkeypatch):
    toys(*TRAIN, "--out", "r")
    toys.distribution("others", "[selfsup.objectives]\nguess = toy_plugins:Guess\n")
    _, err = toys("train", "--resume", "--out", "r", code=1)
    assert "'guess' is claimed by others 1.0 and by toys 1.0; say which, as in others:guess" in err
    monkeypatch.setenv("SELFSUP_DISABLE", "toys:guess")
    _, err = toys("train", "--resume", "--out", "r", code=1)
    assert "the objective 'guess' was of toys 1.0 when this run began and is of others 1.0 now" in err
    assert "SELFSUP_DISABLE=others:guess" in err
    monkeypatch.setenv("SELFSUP_DISABLE", "others:guess")
    toys("train", "--resume", "--out", "r")
    monkeypatch.delenv("SELFSUP_DISABLE")
    toys("train", "--plugin", "others:guess", "--steps", 2)
    (folder,) = Path("runs").glob("guess-*")
    assert 'name = "others:guess"' in (folder / "run.toml").read_text()
    toys("train", "--resume", "--out", folder)
    toys("eval", "knn", folder)


def test_two_runs_of_one_second_have_two_folders(toys, monkeypatch):
    from selfsup.cli import train

    monkeypatch.setattr(train.time, "strftime", lambda _: "20260101-000000")
    for _ in range(3):
        toys("train", "--plugin", "guess", "--steps", 1)
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "guess-20260101-000000",
        "guess-20260101-000000-2",
        "guess-20260101-000000-3",
    ]


@pytest.mark.parametrize("number", ["3", "seven"])
def test_a_run_that_fails_ends_though_it_has_workers(toys, number):
    """The error is one of the step where a number is given, else one of the worker, which finds no sample."""
    Path("d").mkdir()
    for n in range(8):
        Path(f"d/{n}.num").write_text(number)
    failing = ("--data", "d", "--set", "data.workers=1", "--set", "objective.crash=3", "--out", "r")
    process = toys.fork("train", "--plugin", "guess", *failing)
    try:
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 1
    assert ("a toy broke" if number == "3" else "samples in a row cannot be used") in err


def test_several_processes_need_a_name_for_the_folder(toys, monkeypatch):
    from selfsup.cli.train import default_folder
    from selfsup.kernel.errors import ConfigError

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="name it with --out"):
        default_folder({"objective": {"name": "guess"}})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(toys, number, code):
    process = toys.fork(*TRAIN, "--steps", 60, "--set", "objective.pause=0.03", "--out", "r")
    _until(process, lambda: Path("r/metrics.jsonl").exists() and len(lines("r")) >= 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert Path("r/status").read_text() == f"PREEMPTED {number.name}\n"
    done = len(lines("r"))
    assert 3 <= done < 60
    assert f"stopped by {number.name} after {done} of 60 steps; the state is saved" in out
    assert "ssl train --resume --out r" in out
    assert weights("r")[0] == f"step-{done:08d}"
    toys("train", "--resume", "--out", "r")
    toys(*TRAIN, "--steps", 60, "--out", "whole")
    assert weights("r") == weights("whole")
    assert [(row["step"], row["loss"]) for row in lines("r")] == [(row["step"], row["loss"]) for row in lines("whole")]


SLOW = """'''Slow.'''
import time
from toy_plugins import Guess

class Slow(Guess):
    def __init__(self, encoder):
        open("here", "w").close()
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_is_no_failure(toys, number):
    toys.distribution("slow", "[selfsup.objectives]\nslow = slow:Slow\n", slow=SLOW)
    process = toys.fork("train", "--plugin", "slow", "--resume", "--out", "r")
    _until(process, Path("here").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip().splitlines()[-1]) == (75, f"ended by {number.name}")
    assert Path("r/status").read_text() == f"PREEMPTED {number.name}\n"


def test_a_recipe_is_that_of_anothers_modality_of_the_same_name_too(toys):
    toys.distribution("others", "[selfsup.modalities]\nnumbers = toy_plugins:Numbers\n")
    _, err = toys(*TRAIN, code=1)
    assert "the modality 'numbers' is claimed by " in err
    toys(*TRAIN, "--modality", "others:numbers", "--out", "r")
    assert 'name = "others:numbers"' in Path("r/run.toml").read_text()


def test_a_second_ctrl_c_says_what_is_kept(toys):
    slow = ("--set", "objective.pause=2", "--set", "checkpoints.steps=1")
    process = toys.fork(*TRAIN, "--steps", 60, *slow, "--out", "r")
    _until(process, lambda: Path("r/checkpoints/step-00000001").exists() and Path("pausing").read_text() == "1")
    process.send_signal(signal.SIGINT)
    _until(process, lambda: "Ctrl-C again" in Path(process.files[1]).read_text())  # two at once would be one
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "ended at once after 1 of 60 steps; the newest checkpoint is r/checkpoints/step-00000001" in err
    assert "ssl train --resume --out r\n" in err


def test_ctrl_c_outside_of_a_run_exits_with_130(toys):
    slow = "'''Slow.'''\nimport time\nopen('here', 'w').close()\ntime.sleep(60)\n"
    toys.distribution("slow", "[selfsup.objectives]\nslow = slow:Slow\n", slow=slow)
    process = toys.fork("train", "--plugin", "slow")
    _until(process, Path("here").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "interrupted"


def _until(process, ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.05)
