"""The watchdog: names what is not finite, keeps the batch, stops or skips."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfsup.kernel.errors import DataError, DivergedError
from selfsup.plugins.services.watchdog import Watchdog, tensors

NAN, INF = float("nan"), float("inf")


def watch(run, **options):
    service = Watchdog(**options)
    service.run_started(run)
    return service


def test_finite_steps_pass(fake_run, fake_report):
    run = fake_run()
    service = watch(run)
    service.step_finished(run, fake_report(run, 0))
    service.run_finished(run, None)
    assert list(run.folder.iterdir()) == []


def test_the_message_names_step_samples_and_parameters(fake_run, fake_report):
    run = fake_run()
    with pytest.raises(DivergedError) as caught:
        watch(run).step_finished(run, fake_report(run, 7, loss=2.0, norms=(1.0, INF, 1.0, NAN)))
    message = str(caught.value)
    assert "step 7: the loss is 2" in message
    assert "not finite in 0.bias, 1.bias of 4 parameters" in message
    assert "number-4.txt, number-5.txt" in message
    assert "watchdog.policy=skip" in message
    assert str(run.folder / "bad" / "step-7") in message


def test_the_batch_is_kept_as_tensors_and_names(fake_run, fake_report):
    run = fake_run()
    with pytest.raises(DivergedError):
        watch(run).step_finished(run, fake_report(run, 7, loss=NAN))
    folder = run.folder / "bad" / "step-7"
    kept = load_file(folder / "batch-0.safetensors")
    assert torch.equal(kept["0.encoder.x"], run.loader.read(7)[0]["encoder"].x)
    assert kept["0.ids"].tolist() == [4, 5]
    facts = json.loads((folder / "batch-0.json").read_text())
    assert (facts["step"], facts["loss"], facts["norm"]) == (7, "nan", 2.0)
    second = {"id": (1 << 40) + 5, "epoch": 1, "index": 5, "name": "number-5.txt"}
    assert facts["samples"][1] == second


def test_skipping_goes_on_until_patience_ends(fake_run, fake_report, capsys):
    run = fake_run()
    service = watch(run, policy="skip", patience=3)
    losses = [NAN, NAN, 1.0, NAN, NAN]  # never three in a row
    for number, loss in enumerate(losses):
        service.step_finished(run, fake_report(run, number, loss=loss))
    assert capsys.readouterr().err.count("It was skipped") == 4
    with pytest.raises(DivergedError, match="3 steps in a row"):
        service.step_finished(run, fake_report(run, 5, loss=NAN))


def test_no_more_batches_are_kept_than_asked_for(fake_run, fake_report):
    run = fake_run()
    service = watch(run, policy="skip", patience=100, keep=2)
    for number in range(4):
        service.step_finished(run, fake_report(run, number, loss=NAN))
    assert sorted(path.name for path in (run.folder / "bad").iterdir()) == ["step-0", "step-1"]


def test_on_a_gpu_steps_are_read_every_few(fake_run, fake_report):
    run = fake_run()
    run.device = torch.device("cuda")  # only asked for its type
    service = watch(run, every=3)
    service.step_finished(run, fake_report(run, 0, loss=NAN))
    service.step_finished(run, fake_report(run, 1))
    with pytest.raises(DivergedError, match="step 0"):
        service.step_finished(run, fake_report(run, 2))


def test_steps_left_unread_are_read_at_the_end_unless_the_run_failed(fake_run, fake_report):
    run = fake_run()
    run.device = torch.device("cuda")
    for error in (None, OSError()):
        service = watch(run, every=9)
        service.step_finished(run, fake_report(run, 0, loss=NAN))
        if error:
            service.run_finished(run, error)
        else:
            with pytest.raises(DivergedError):
                service.run_finished(run, error)


def test_a_batch_that_cannot_be_kept_is_said_and_the_run_stops_all_the_same(fake_run, fake_report):
    run = fake_run()

    def unreadable(step):
        raise DataError("the disk is gone")

    run.loader.read = unreadable
    with pytest.raises(DivergedError, match=r"could not be written to .* the disk is gone"):
        watch(run).step_finished(run, fake_report(run, 0, loss=NAN))
    (run.folder / "bad2").write_text("")
    run.folder = run.folder / "bad2"  # a file where a folder should be
    with pytest.raises(DivergedError, match="could not be written to"):
        watch(run).step_finished(run, fake_report(run, 0, loss=NAN))


def test_without_a_folder_only_the_message_is_left(fake_run, fake_report, tmp_path):
    run = fake_run(folder=None)
    with pytest.raises(DivergedError, match="step 0"):
        watch(run).step_finished(run, fake_report(run, 0, loss=NAN))
    assert list(Path(tmp_path).iterdir()) == []


def test_tensors_are_found_in_any_nesting():
    batch = [{"views": [torch.zeros(1), (torch.ones(2),)], "amount": {"s": 2.0}, "name": "x"}]
    assert {name: len(t) for name, t in tensors(batch)} == {"0.views.0": 1, "0.views.1.0": 2}
