"""The loop: what it computes, how it stops, and that interrupted equals uninterrupted."""

import copy
import multiprocessing
import os
import signal
import threading

import pytest
import torch
from forked_child import terminated

from selfsup.kernel import Loss, compose, hookimpl, loop, state
from selfsup.kernel.errors import DataError, StateError


class Listener:
    """Keeps reports, and does something at a step."""

    def __init__(self, at=None, do=None):
        self.reports, self.calls, self.at, self.do = [], [], at, do

    @hookimpl
    def run_started(self, run):
        self.calls.append("started")

    @hookimpl
    def step_finished(self, run, report):
        self.reports.append(report)
        if run.done == self.at:
            self.do(run)

    @hookimpl
    def measured(self, run, values):
        self.calls.append((run.done, values))

    @hookimpl
    def run_finished(self, run, error):
        self.calls.append(error)


def start(toys, folder=None, resume=False, listener=None, **settings):
    plugins = toys()
    if listener:
        plugins.register(listener, "listener")
    layers = [{section: {key: value}} for name, value in settings.items() for section, key in [name.split("__")]]
    config = compose.resolve(plugins, {"objective": {"name": "hide"}}, *layers)
    return compose.start(plugins, config, folder, resume)


def weights(run):
    return {name: tensor.clone() for name, tensor in run.objective.state_dict().items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_what_a_service_measures_reaches_the_others(toys):
    listener = Listener(at=2, do=lambda run: run.measure({"validation/loss": 1.5}))
    loop.train(start(toys, listener=listener, train__steps=3))
    assert listener.calls == ["started", (2, {"validation/loss": 1.5}), None]


def test_a_run_ends_and_its_loss_falls(toys):
    listener = Listener()
    run = start(toys, listener=listener, train__steps=60)
    assert loop.train(run) == "done"
    losses = [float(report.loss) for report in listener.reports]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert listener.calls == ["started", None]


def test_the_gradient_is_that_of_the_weighted_mean(toys):
    run = start(toys, train__microbatch=3)  # parts of 3, 3 and 2, with unequal numbers of hidden tokens
    step, parts = run.step(0), run.loader.read(0)
    losses = [run.objective(part, step) for part in parts]
    mean = sum(o.total * o.weight for o in losses) / sum(o.weight for o in losses)
    expected = torch.autograd.grad(mean, run.parameters)
    run.optimizer.step = lambda: None
    kept = []
    run.optimizer.zero_grad = lambda set_to_none: kept.extend(p.grad.clone() for p in run.parameters)
    report = loop.take_step(run, step, parts)
    for ours, theirs in zip(kept, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(report.loss, mean.detach())
    torch.testing.assert_close(report.norm, torch.cat([g.flatten() for g in expected]).norm())
    torch.testing.assert_close(report.norms[0], expected[0].norm())


def test_a_metric_of_some_microbatches_changes_no_gradient(toys):
    reports = []
    for late in (False, True):
        run = start(toys, train__microbatch=3)
        forward, calls = run.objective.forward, []

        def some(batch, step, forward=forward, calls=calls, late=late):
            calls.append(batch)
            loss = forward(batch, step)
            more = {"late": torch.ones(())} if late and len(calls) > 1 else {}
            return loss._replace(metrics={**loss.metrics, **more})

        run.objective.forward = some
        reports.append(loop.take_step(run, run.step(0), run.loader.read(0)))
    assert torch.equal(reports[0].loss, reports[1].loss)
    assert torch.equal(reports[0].norm, reports[1].norm)


def test_microbatches_train_as_the_whole_batch_does(toys):
    whole, parts = start(toys), start(toys, train__microbatch=3)
    loop.train(whole)
    loop.train(parts)
    for name, tensor in whole.objective.state_dict().items():
        torch.testing.assert_close(parts.objective.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_clipping_scales_to_the_norm(toys):
    run = start(toys, train__clip=0.01)
    run.optimizer.zero_grad = lambda set_to_none: None
    report = loop.take_step(run, run.step(0), run.loader.read(0))
    assert report.norm > 0.01
    clipped = torch.cat([p.grad.flatten() for p in run.parameters]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_step_copies_no_number_to_the_device(toys, monkeypatch, weighted):
    """`torch.tensor` on a GPU waits for all that was asked of it before (law 5)."""
    run = start(toys)
    parts, forward = run.loader.read(0), run.objective.forward
    if not weighted:
        run.objective.forward = lambda batch, step: forward(batch, step)._replace(weight=None)
    monkeypatch.delattr(torch, "tensor")
    loop.take_step(run, run.step(0), parts)


@pytest.mark.parametrize("at", [1, 6, 11])
def test_interrupted_equals_uninterrupted(toys, tmp_path, at):
    whole = start(toys)
    loop.train(whole)
    listener = Listener(at, lambda run: (run.save(), run.stop("test")))
    first = start(toys, tmp_path, listener=listener)
    assert loop.train(first) == "test"
    torch.manual_seed(99)  # nothing may depend on it
    second = start(toys, tmp_path, resume=True)
    assert second.first == at
    assert "resumed at step" in second.notes[-1]
    assert loop.train(second) == "done"
    same(weights(whole), weights(second))
    for ours, theirs in zip(second.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        same(ours, theirs)


def test_three_resumes_and_one_after_the_end(toys, tmp_path):
    whole = start(toys, train__steps=26)  # 100 samples, batch 8: ends two epochs on
    loop.train(whole)
    for at in (5, 13, 25):  # 13 steps pass the border of an epoch
        stop = Listener(at, lambda run: (run.save(), run.stop("test")))
        loop.train(start(toys, tmp_path, resume=True, listener=stop, train__steps=26))
    last = start(toys, tmp_path, resume=True, listener=Listener(26, lambda run: run.save()), train__steps=26)
    loop.train(last)
    same(weights(whole), weights(last))
    after = start(toys, tmp_path, resume=True, train__steps=26)
    assert (after.first, loop.train(after)) == (26, "done")


def with_sgd(run):
    """The run with an optimizer that keeps nothing."""
    run.optimizer = torch.optim.SGD(run.parameters, lr=0.1, fused=True)
    return run


def without_head(run):
    """The run with a head that gets no gradient in its first steps, as a layer that layer drop leaves out."""

    def drop(*_):
        if run.done < 4:
            run.objective.head.zero_grad(set_to_none=True)

    run.optimizer.register_step_pre_hook(drop)
    return run


@pytest.mark.parametrize("change", [with_sgd, without_head])
def test_a_parameter_may_have_no_optimizer_state_yet(toys, tmp_path, change):
    whole = change(start(toys))
    loop.train(whole)
    stop = Listener(2, lambda run: (run.save(), run.stop("test")))
    loop.train(change(start(toys, tmp_path, listener=stop)))
    second = change(start(toys, tmp_path))
    second.restore(state.newest(tmp_path / "checkpoints")[0])
    assert loop.train(second) == "done"
    assert second.first == 2
    same(weights(whole), weights(second))


def test_a_resume_uses_the_checkpoint_before_a_damaged_one(toys, tmp_path):
    save_each = Listener()
    save_each.step_finished = hookimpl(lambda run, report: run.save())
    loop.train(start(toys, tmp_path, listener=save_each, train__steps=3))
    newest = tmp_path / "checkpoints" / "step-00000003" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x99")
    run = start(toys, tmp_path, resume=True, train__steps=3)
    assert run.first == 2
    assert "step-00000003 is damaged" in run.notes[0]


def test_a_resume_never_begins_anew_over_damaged_checkpoints(toys, tmp_path):
    loop.train(start(toys, tmp_path, listener=Listener(2, lambda run: (run.save(), run.stop("test")))))
    only = tmp_path / "checkpoints" / "step-00000002" / "model.safetensors"
    only.write_bytes(b"")
    with pytest.raises(StateError, match=r"no checkpoint below .* can be used.*step-00000002 is damaged"):
        start(toys, tmp_path, resume=True)


def test_a_checkpoint_of_another_shape_is_refused_by_name(toys, tmp_path, monkeypatch):
    loop.train(start(toys, tmp_path, listener=Listener(2, lambda run: (run.save(), run.stop("test")))))
    build = compose.build

    def changed(*given):  # a plugin that was changed since
        objective = build(*given)
        objective.head = torch.nn.Linear(8, 5)
        return objective

    monkeypatch.setattr(compose, "build", changed)
    with pytest.raises(StateError, match=r"step-00000002 does not fit this model: .*head\.weight"):
        start(toys, tmp_path, resume=True)


def test_a_process_that_does_not_find_the_checkpoint_of_the_first_one_does_not_begin(toys, tmp_path, monkeypatch):
    monkeypatch.setattr("selfsup.kernel.distributed.rank", lambda: 1)
    monkeypatch.setattr("selfsup.kernel.distributed.alike", lambda _: '["step-00000002"]')
    with pytest.raises(StateError, match=r"first process found .*step-00000002, which is not here: .* must share"):
        start(toys, tmp_path, resume=True)


def test_a_step_that_is_not_finite_changes_nothing(toys):
    run = start(toys)
    forward = run.objective.forward

    def explode(batch, step):
        return Loss(forward(batch, step).total * float("nan"))

    run.objective.forward = explode
    before = weights(run)
    report = loop.take_step(run, run.step(0), run.loader.read(0))
    assert not report.finite
    same(before, weights(run))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_at_hand(toys, number, capfd):
    listener = Listener(4, lambda run: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    run = start(toys, listener=listener)
    assert loop.train(run) == number.name
    assert run.done == 4
    assert signal.getsignal(number) == handler
    assert ("stopping after this step" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_a_second_interrupt_ends_it_at_once(toys):
    listener = Listener(4, lambda run: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        loop.train(start(toys, listener=listener))
    assert isinstance(listener.calls[-1], KeyboardInterrupt)


def test_a_run_works_outside_the_main_thread(toys):
    results = []
    run = start(toys, train__steps=2)
    thread = threading.Thread(target=lambda: results.append(loop.train(run)))
    thread.start()
    thread.join()
    assert results == ["done"]


def test_too_many_bad_samples_stop_the_run_with_the_list(toys):
    with pytest.raises(DataError, match=r"(?s)2 of 100 samples cannot be used.*item 0: it is not a number"):
        loop.train(start(toys, data__bad=2))
    run = start(toys, data__bad=2, data__max_bad_fraction=0.02)
    loop.train(run)
    assert sorted(run.skipped) == [0, 1]


def test_skipped_samples_are_remembered(toys, tmp_path):
    listener = Listener(12, lambda run: run.save())
    loop.train(start(toys, tmp_path, listener=listener, data__bad=1, data__max_bad_fraction=0.1, train__steps=12))
    assert start(toys, tmp_path, resume=True, data__bad=1, data__max_bad_fraction=0.1, train__steps=13).skipped


def test_a_loss_that_trains_nothing_is_an_error(toys):
    run = start(toys)
    run.objective.forward = lambda batch, step: Loss(torch.zeros((), requires_grad=True))
    with pytest.raises(StateError, match="no parameter has a gradient"):
        loop.take_step(run, run.step(0), run.loader.read(0))


def test_calibration_runs_once_and_is_kept(toys, tmp_path):
    run = start(toys, tmp_path, listener=Listener(1, lambda run: (run.save(), run.stop("test"))))
    once = run.objective.calibrated.clone()
    assert once != 0
    loop.train(run)
    assert start(toys, tmp_path, resume=True).objective.calibrated == once


def test_services_are_told_of_each_batch_of_a_calibration_and_of_its_end_however_it_ends(toys, monkeypatch):
    told = []

    class Told:
        @hookimpl
        def calibrating(self, number):
            told.append(number)

        @hookimpl
        def calibrated(self):
            told.append("end")

    run = start(toys, listener=Told())
    monkeypatch.setattr(run.objective, "calibrate", lambda batches, step: [next(batches) for _ in range(2)] + [1 / 0])
    with pytest.raises(ZeroDivisionError):
        loop.calibrate(run)
    assert told == [0, "end", 0, 1, "end"]


def test_a_signal_ends_what_a_plugin_forked_and_not_the_run(toys):
    """multiprocessing.Pool ends its processes by SIGTERM, and waits for their end."""
    codes = []
    run = start(toys, listener=Listener(1, lambda run: codes.append(terminated())), train__steps=2)
    assert (loop.train(run), codes) == ("done", [128 + signal.SIGTERM])


def test_dropout_is_seeded_by_the_step_alone(toys):
    draws = []
    for before in (1, 2):
        torch.manual_seed(before)
        loop.reseed(0, 5, 0, 0)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)
    others = []
    for place in ((0, 6, 0, 0), (0, 5, 1, 0), (0, 5, 0, 1), (1, 5, 0, 0)):
        loop.reseed(*place)
        others.append(torch.rand(3))
    assert len({tuple(t.tolist()) for t in [draws[0], *others]}) == 5


def test_a_run_that_fails_leaves_no_worker_behind(toys):
    def fail(run):
        raise ValueError("on purpose")

    before = set(multiprocessing.active_children())  # those of other tests
    run = start(toys, listener=Listener(2, fail), data__workers=1, train__steps=1000)
    with pytest.raises(ValueError, match="on purpose") as kept:
        loop.train(run)
    assert kept.value.__traceback__  # which holds the frames of the loop
    assert set(multiprocessing.active_children()) <= before


def test_bf16_trains(toys):
    listener = Listener()
    loop.train(start(toys, listener=listener, train__precision="bf16"))
    assert all(report.finite for report in listener.reports)


def test_a_copy_of_the_report_does_not_hold_the_graph(toys):
    listener = Listener()
    loop.train(start(toys, listener=listener, train__steps=1))
    report = copy.deepcopy(listener.reports[0])
    assert not report.loss.requires_grad
    assert not report.metrics["hidden"].requires_grad
