"""The training loop, read top to bottom."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import Optimizer

from . import distributed, state
from .config import Settings
from .contracts import Batch, Loss, Objective, Step, returned
from .discovery import Plugins
from .errors import DataError, SelfsupError, StateError, allow_bad, most_bad
from .loader import Endless, Loader, to_device
from .precision import autocast
from .random import key_of
from .saving import Saver
from .workers import SIGNALS


@dataclass(frozen=True)
class Report:
    """What a step did. Tensors are on the device; on a GPU reading one waits for the step."""

    step: Step
    ids: Tensor  # [B] int64, host: this process's samples
    loss: Tensor  # (), averaged over microbatches and processes, like the metrics
    metrics: Mapping[str, Tensor]
    norm: Tensor  # (), of the gradient before clipping
    norms: Tensor  # [P], of each parameter's gradient, in the order of Run.parameter_names
    finite: Tensor  # () bool: loss and gradients; where not, the update was left out
    amount: Mapping[str, float]  # unit -> how much data, this process
    bad: Mapping[int, str]  # index -> why a sample could not be used, this process


class Run:
    """Everything a run is made of; what hooks are given."""

    optimizer: Optimizer

    def __init__(
        self,
        plugins: Plugins,
        config: Settings,
        objective: Objective,
        model: distributed.Wrapped,
        loader: Loader,
        device: torch.device,
        folder: Path | None,
        total: int,
    ) -> None:
        self.plugins, self.config, self.objective, self.model = plugins, config, objective, model
        self.loader, self.device, self.folder, self.total = loader, device, folder, total
        self.first = self.done = 0  # the first step of this process; steps done so far
        self.skipped: dict[int, str] = {}  # index -> reason, of all processes
        self.notes: list[str] = []  # what people should be told when the run starts
        self.reason: str | None = None  # why to stop early
        self.saver: Saver | None = None
        trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
        self.parameter_names, self.parameters = [n for n, _ in trained], [p for _, p in trained]

    @property
    def hook(self) -> pluggy.HookRelay:
        """Call the services."""
        return self.plugins.hook

    @property
    def source(self) -> Any:
        """The data."""
        return self.loader.reader.source

    @property
    def seed(self) -> int:
        """Of all randomness."""
        return int(self.config["train"]["seed"])

    @property
    def batch(self) -> int:
        """Samples behind one step, over all processes."""
        return self.loader.batch

    def step(self, number: int) -> Step:
        """A step of this run."""
        return Step(number, self.total, self.seed)

    def stop(self, reason: str) -> None:
        """Ask the loop to end after the step at hand."""
        self.reason = self.reason or reason

    def measure(self, values: Mapping[str, float]) -> None:
        """Tell the services what one of them measured; on the first process."""
        self.hook.measured(run=self, values=values)

    def save(self, wait: bool = True) -> Path | None:
        """Write a checkpoint of the state after the steps done so far; all processes call this together.

        Unless told to wait it goes on beside training, and `saved` commits it.
        """
        if self.folder is None or self.done == 0:
            return None
        self.saved(wait=True)
        optimizer: Any = dcp.get_optimizer_state_dict(self.objective, self.optimizer)
        moments = {f"{name}:{key}": t for name, own in optimizer["state"].items() for key, t in own.items()}
        tensors = {"model": dcp.get_model_state_dict(self.objective), "optimizer": moments}
        facts = {"settings": self.config, "optimizer": optimizer["param_groups"], "skipped": self.skipped}
        facts["modality"] = {tower: dict(kind.files()) for tower, kind in self.loader.reader.modalities.items()}
        if isinstance(self.source, Endless):
            facts["marks"] = self.source.news()[0]
        self.saver = self.saver or Saver(self.folder / "checkpoints")
        self.saver.begin(self.done, tensors, facts, self.parameter_names)
        return self.saved(wait=True) if wait else None

    def saved(self, wait: bool = False) -> Path | None:
        """Commit the checkpoint that is being written, if all have written it; all processes call this together."""
        written = self.saver.commit(wait) if self.saver else None
        if written and distributed.rank() == 0:
            self.hook.checkpoint_saved(run=self, folder=written)
        return written

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint that verifies; each process reads what it holds, however it was split before.

        Raises StateError if it is of a model of other shapes.
        """
        model: Any = dcp.get_model_state_dict(self.objective)
        held = state.contents(folder)
        if why := state.misfit({name: size for name, (size, _) in held["model"].items()}, state.sizes(model)):
            raise StateError(f"the checkpoint {folder} does not fit this model: {why}")
        # Not set_optimizer_state_dict: it refuses parameters that had no gradient yet, and optimizers without state.
        parameters = dict(self.objective.named_parameters(remove_duplicate=False))
        numbers = {p: n for n, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        kept: dict[int, dict[str, Any]] = {}
        moments = {}
        for key, (size, dtype) in held.get("optimizer", {}).items():
            name, _, moment = key.rpartition(":")
            own = parameters[name]
            moments[key] = torch.empty_like(own, dtype=dtype) if own.shape == size else torch.empty(size, dtype=dtype)
            kept.setdefault(numbers[own], {})[moment] = moments[key].detach()
        state.read(folder, {**model, **moments})
        facts = state.facts(folder)
        packed = zip(facts["optimizer"], self.optimizer.state_dict()["param_groups"], strict=True)
        groups = [{**saved, "params": own["params"]} for saved, own in packed]
        self.optimizer.load_state_dict({"state": dict(sorted(kept.items())), "param_groups": groups})
        self.first = self.done = int(facts["step"])
        self.skipped = {int(index): reason for index, reason in facts["skipped"].items()}
        if "marks" in facts:
            self.source.recall(facts["marks"])


@torch.no_grad()
def calibrate(run: Run) -> None:
    """Let the objective fit what it fits before the first step, and tell the services."""

    def batches() -> Iterator[Batch]:
        whole = run.loader.whole(run.total)
        for number in range(run.total):
            run.hook.calibrating(run=run, number=number)
            yield to_device(next(whole), run.device)

    try:
        run.objective.calibrate(batches(), run.step(0))
    finally:
        run.hook.calibrated(run=run)


def train(run: Run) -> str:
    """Take the steps that are left and tell the services; "done", or why the run stopped early."""
    with listening(run):
        error = None
        try:
            run.hook.run_started(run=run)
            if run.first < run.total:
                fit_microbatch(run)
            with closing(run.loader.steps(run.first, run.total, pin=run.device.type == "cuda")) as steps:
                for number, parts in enumerate(steps, run.first):
                    step = run.step(number)
                    run.hook.step_started(run=run, step=step)
                    note_bad(run, parts)
                    report = take_step(run, step, parts)
                    run.done = number + 1
                    run.hook.step_finished(run=run, report=report)
                    if distributed.anyone(run.reason is not None):
                        run.stop("another process stopped")
                        break
        except BaseException as caught:
            error = caught
            raise
        finally:
            finish(run, error)
    return run.reason or "done"


def finish(run: Run, error: BaseException | None) -> None:
    """Tell every service, though one breaks: another may have the last checkpoint to write."""
    failure: Exception | None = None
    for tell in run.plugins.apart("run_finished"):
        try:
            tell(run=run, error=error or (failure if isinstance(failure, SelfsupError) else None))
        except Exception as caught:
            failure = failure or caught
    if failure and error is None:
        raise failure


def take_step(run: Run, step: Step, parts: list[Batch]) -> Report:
    """One optimizer step over this process's microbatches."""
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        with run.model.syncing(last=number == len(parts) - 1):
            loss, weight = forward_backward(run, step, number, part)
        values = {"loss": loss.total, **loss.metrics}
        for key, value in {"": weight, **{k: v.detach() * weight for k, v in values.items()}}.items():
            sums[key] = sums[key] + value if key in sums else value.detach().float()
    shared = distributed.total(torch.stack([v.reshape(()).float() for v in sums.values()]))
    means = dict(zip(sums, shared / shared[0].clamp(min=1e-12), strict=True))
    # backward gave the mean over processes of sum_i w_i L_i; the mean loss divides by the sum of all w_i.
    norms, norm = scale_gradients(run, distributed.world() / shared[0].clamp(min=1e-12))
    finite = norm.isfinite() & means["loss"].isfinite()
    run.optimizer.found_inf, run.optimizer.grad_scale = (~finite).float(), None  # type: ignore[attr-defined]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.objective.after_step(step)
    amount = {unit: sum(p["amount"].get(unit, 0.0) for p in parts) for unit in parts[0]["amount"]}
    bad = {index: reason for part in parts for index, reason in part["bad"].items()}
    metrics = {key: value for key, value in means.items() if key not in ("", "loss")}
    ids = torch.cat([part["ids"] for part in parts])
    return Report(step, ids, means["loss"], metrics, norm, norms, finite, amount, bad)


def forward_backward(run: Run, step: Step, number: int, part: Batch) -> tuple[Loss, Tensor]:
    """One microbatch: add the gradient of weight * loss."""
    reseed(run.seed, step.number, distributed.rank(), number)
    for backbone in run.objective.backbones():
        backbone.step = step
    with autocast(run.device, run.config["train"]["precision"]):
        loss = returned(run.objective, "forward", run.model.forward(to_device(part, run.device), step), Loss)
    # Filled on the device: `torch.tensor` would copy the number there, and the host wait for the copy.
    count = torch.full((), float(len(part["ids"])), device=run.device)
    weight = count if loss.weight is None else loss.weight.float()
    (loss.total.float() * weight).backward()  # type: ignore[no-untyped-call]
    return loss, weight


def reseed(seed: int, step: int, rank: int, number: int) -> None:
    """Seed torch for what draws from it: dropout and drop path (law 1's exception)."""
    low, high = key_of(seed, f"torch {step} {rank} {number}")
    torch.manual_seed((high << 31) ^ low)


@torch.no_grad()
def scale_gradients(run: Run, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply all gradients by a factor and clip them: (norm of each [P], norm of all ()), before clipping."""
    grads = [p.grad for p in run.parameters if p.grad is not None]
    if not grads:
        raise StateError("no parameter has a gradient: this objective's loss does not depend on what it trains")
    each = iter([whole(n).float() for n in torch._foreach_norm(grads)])
    norms = torch.stack([torch.zeros_like(factor) if p.grad is None else next(each) for p in run.parameters]) * factor
    norm = torch.linalg.vector_norm(norms)
    clip = run.config["train"]["clip"]
    if clip:
        factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factor)
    return norms, norm


def whole(x: Tensor) -> Tensor:
    """A plain tensor from one that may be sharded over processes."""
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full


def note_bad(run: Run, parts: list[Batch]) -> None:
    """Count the samples that could not be used, on all processes alike; past the limit, stop with the list."""
    new = {i: why for part in parts for i, why in part["bad"].items() if i not in run.skipped}
    if not distributed.anyone(bool(new)):
        return
    of = run.source.seen if isinstance(run.source, Endless) else len(run.source)
    told = [json.loads(said) for said in distributed.everyone(json.dumps([new, of]))]
    run.skipped.update({int(i): why for bad, _ in told for i, why in bad.items()})
    share, bad = run.config.get("data", {}).get("max_bad_fraction", 0.01), len(run.skipped)
    if bad > most_bad(share, of := max(seen for _, seen in told)):
        listed = "\n".join(f"  {run.source.name(i)}: {why}" for i, why in list(run.skipped.items())[:20])
        raise DataError(
            f"{bad} of {of} samples cannot be used, more than data.max_bad_fraction = {share:g} allows; remove them, "
            f"or allow more, as in {allow_bad(2 * bad, of)}:\n{listed}"
        )


def fit_microbatch(run: Run) -> None:
    """On a GPU with `train.microbatch` = 0, halve the microbatch until a step fits its memory."""
    if run.device.type != "cuda" or run.config["train"]["microbatch"] or not run.objective.divisible:
        return
    while True:
        part = run.loader.read(run.first)[0]
        buffers = [b.clone() for b in run.objective.buffers()]
        try:
            with run.model.syncing(last=False):
                forward_backward(run, run.step(run.first), 0, part)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        run.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(run.objective.buffers(), buffers, strict=True):
            buffer.copy_(before)
        if not distributed.anyone(not fits):
            return
        if run.loader.microbatch == 1:
            raise DataError("one sample does not fit the memory of this GPU; choose smaller samples or a smaller model")
        torch.cuda.empty_cache()
        run.loader.microbatch = -(-run.loader.microbatch // 2)


@contextmanager
def listening(run: Run) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C end the run after the step at hand; a second Ctrl-C at once."""

    own = os.getpid()

    def heard(number: int, _: Any) -> None:
        if os.getpid() != own:  # forked from it, as by a plugin's pool, which ends its processes by SIGTERM
            os._exit(128 + number)
        if run.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop(signal.Signals(number).name)
        if number == signal.SIGINT and distributed.rank() == 0:  # a print may be under way, which no other may enter
            os.write(2, b"\nstopping after this step; Ctrl-C again ends it at once, and saves nothing\n")

    numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
