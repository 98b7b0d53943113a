from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.kernel import Loss, Raw, Signal, Step, Stream, Tower
from selfsup.kernel.config import TrainOptions, check, nest
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.modalities.audio import Audio
from selfsup.plugins.objectives.wav2vec2 import Wav2Vec2, contrast, others, without
from selfsup.plugins.services.optimizer import Optimizers
from selfsup.triton_ops.masks_span import span_mask

SHORT = ((16, 10, 5), (16, 3, 2), (16, 2, 2))  # 20 samples a frame, 35 seen by one
STEP = Step(3, 10, seed=5)
QUIET = {"dropout_input": 0.0, "dropout_features": 0.0}


def make(**options: Any) -> Wav2Vec2:
    torch.manual_seed(0)
    audio = Audio(layers=SHORT)
    backbone = Transformer(
        width=32, depth=2, heads=4, norm_first=False, input_norm=True, positions="conv", conv_kernel=8, conv_groups=4
    )
    options = {"width": 16, "entries": 12, "negatives": 20, **QUIET, **options}
    return Wav2Vec2(Tower(audio.stem(32), backbone, audio), **options).train()


def batch_of(seconds: list[int], ids: list[int] | None = None) -> dict[str, Any]:
    """Utterances of that many hundreds of samples; what one holds depends on its id alone."""
    ids = ids or list(range(len(seconds)))
    waves = [
        torch.randn(100 * n, generator=torch.Generator().manual_seed(i)) for n, i in zip(seconds, ids, strict=True)
    ]
    return {"encoder": Audio(layers=SHORT).collate(waves), "ids": torch.tensor(ids)}


def grads(objective: Wav2Vec2, total: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def seen(objective: Wav2Vec2, batch: dict[str, Any]) -> tuple[Loss, dict[str, Any]]:
    """The loss, and what forward drew for it."""
    drawn: dict[str, Any] = {}
    score = objective.score

    def spy(local: Signal, hidden: Tensor, negatives: Tensor, noise: Stream | None, gumbel: float) -> Loss:
        drawn.update(local=local, hidden=hidden, negatives=negatives, noise=None, gumbel=gumbel)
        if noise is not None:
            size = (negatives.shape[1], *objective.quantize.codebook.shape[:2])
            drawn["noise"] = Stream(noise.key, noise.ids).gumbel(*size)  # [B, M, G, V]
        return score(local, hidden, negatives, noise, gumbel)

    objective.score = spy  # type: ignore[method-assign]
    loss = objective(batch, STEP)
    objective.score = score  # type: ignore[method-assign]
    return loss, drawn


def by_hand(objective: Wav2Vec2, drawn: dict[str, Any]) -> Tensor:
    """The loss as the paper writes it: frame after frame, every negative's vector by itself."""
    local, hidden, tau = drawn["local"], drawn["hidden"], drawn["gumbel"]
    stem, quantize = objective.encoder.stem, objective.quantize
    normed = stem.norm(local.x)
    tokens = replace(local, x=torch.where(hidden[..., None], objective.hidden, stem.project(normed)))
    context = objective.encoder.backbone(tokens).x
    losses, chances, squares = [], [], []
    for b in range(len(hidden)):
        places = hidden[b].nonzero()[:, 0].tolist()
        chosen = []
        for m, t in enumerate(places):
            logits = quantize.logits(normed[b, t]).view(quantize.codebook.shape[:2])
            chances.append(logits.softmax(-1))
            soft = ((logits + drawn["noise"][b, m]) / tau).softmax(-1)
            pick = F.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft
            chosen.append((pick[..., None] * quantize.codebook).sum(1).flatten())
        for m, t in enumerate(places):
            guess, truth = objective.project_context(context[b, t]), objective.project_target(chosen[m])
            wrong = [chosen[j] for j in drawn["negatives"][b, m].tolist()]
            wrong = [objective.project_target(w) for w in wrong if not torch.allclose(w, chosen[m])]
            logits = (
                torch.stack([F.cosine_similarity(guess, v, dim=0) for v in (truth, *wrong)]) / objective.temperature
            )
            losses.append(-logits.log_softmax(0)[0])
        real = int(local.real()[b].sum())
        squares += [local.x[b, :real].square().mean()] * len(places)
    usage = torch.stack(chances).mean(0)
    spread = torch.exp(-torch.xlogy(usage, usage).sum(-1)).sum()
    unused = (usage.numel() - spread) / usage.numel()
    return torch.stack(losses).mean() + objective.diversity * unused + objective.penalty * torch.stack(squares).mean()


def test_loss_and_gradients_are_the_papers() -> None:
    objective = make(negatives=5, feature_scale=1.0).double()
    batch = batch_of([12, 7, 17])
    batch["encoder"] = replace(batch["encoder"], x=batch["encoder"].x.double())
    loss, drawn = seen(objective, batch)
    expected = by_hand(objective, drawn)
    assert loss.weight == drawn["hidden"].sum()
    torch.testing.assert_close(loss.total, expected, rtol=1e-9, atol=0)
    names, parameters = zip(*objective.named_parameters(), strict=True)
    ours = torch.autograd.grad(loss.total, parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(
        dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)), rtol=1e-6, atol=1e-10
    )


def test_the_gradient_reaches_every_parameter() -> None:
    objective = make()
    found = grads(objective, objective(batch_of([30, 20, 30]), STEP).total)
    for name, _ in objective.named_parameters():
        assert found[name].isfinite().all(), name
        assert found[name].abs().max() > 0, name


def test_the_convolutions_get_a_tenth_of_their_gradient() -> None:
    batch = batch_of([20, 20])
    whole, tenth = (grads(o, o(batch, STEP).total) for o in (make(feature_scale=1.0), make()))
    for name, grad in whole.items():
        scale = 0.1 if name.startswith("encoder.stem.convs") else 1.0
        torch.testing.assert_close(tenth[name], grad * scale, rtol=1e-4, atol=1e-7)


def test_microbatches_add_up_to_the_batch() -> None:
    """Unequal parts, in length and number; all but the diversity term, which is not linear in the batch."""
    seconds, ids = [30, 9, 22, 4, 17, 30, 11], [9, 2, 14, 3, 5, 0, 8]
    objective = make(diversity=0.0)
    whole = objective(batch_of(seconds, ids), STEP)
    expected = grads(objective, whole.total)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 7)]
    losses = [objective(batch_of(seconds[part], ids[part]), STEP) for part in parts]
    weights = torch.stack([loss.weight for loss in losses])
    mean = sum(loss.total * loss.weight for loss in losses) / weights.sum()
    assert weights.sum() == whole.weight
    torch.testing.assert_close(mean, whole.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(grads(objective, mean), expected, rtol=1e-3, atol=1e-6)


def test_draws_are_functions_of_the_sample() -> None:
    """The same mask, negatives and noise in another batch, at another place, beside a longer utterance."""
    objective = make()
    _, alone = seen(objective, batch_of([13], [6]))
    _, beside = seen(objective, batch_of([40, 13, 25], [1, 6, 2]))
    hidden = alone["hidden"][0]
    n = int(hidden.sum())
    assert torch.equal(beside["hidden"][1, : len(hidden)], hidden)
    assert torch.equal(beside["negatives"][1, :n], alone["negatives"][0, :n])
    assert torch.equal(beside["noise"][1, :n], alone["noise"][0, :n])


def test_no_two_samples_share_their_draws() -> None:
    """Among twelve utterances of one length, some hide equally many frames: they still differ in all."""
    _, drawn = seen(make(), batch_of([13] * 12))
    counts = drawn["hidden"].sum(1)
    pairs = [(a, b) for a in range(12) for b in range(a) if counts[a] == counts[b]]
    assert pairs
    for a, b in pairs:
        for name in ("hidden", "negatives", "noise"):
            assert not torch.equal(drawn[name][a, : counts[a]], drawn[name][b, : counts[a]]), name


def test_negatives_are_uniform_over_the_other_hidden_frames() -> None:
    counts = torch.tensor([6, 2, 1, 0])
    drawn = others(STEP.draw("negatives", torch.arange(4)), counts, 8, 30000)
    assert drawn.shape == (4, 8, 30000)
    for own in range(6):
        often = drawn[0, own].bincount(minlength=8) / 30000
        expected = torch.tensor([0.2] * 6 + [0.0] * 2)
        expected[own] = 0
        torch.testing.assert_close(often, expected, atol=0.01, rtol=0)
    assert (drawn[1, 0] == 1).all()
    assert (drawn[1, 1] == 0).all()
    assert (drawn[2, 0] == 0).all()  # itself: it has no other


def test_a_negative_of_the_same_code_is_left_out() -> None:
    guess, vectors = torch.randn(1, 4, 8), torch.randn(2, 8)
    codes = torch.tensor([[[0, 1], [2, 1], [0, 1], [0, 1]]])
    truth = vectors[[0, 1, 0, 0]][None]
    negatives = torch.tensor([[[1, 2, 3], [0, 2, 3], [0, 3, 3], [1, 1, 0]]])
    losses, right = contrast(guess, truth, codes, negatives, 0.1)
    cosine = F.cosine_similarity(guess[0, :, None], vectors[None], dim=-1) / 0.1  # [4, 2]
    hits = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]])  # its own vector, the other
    times = torch.tensor([1.0, 3.0, 0.0, 2.0])  # how often the other is drawn
    own, other = cosine.gather(1, hits).T
    torch.testing.assert_close(losses[0], torch.log(own.exp() + times * other.exp()) - own, rtol=1e-5, atol=1e-6)
    assert losses[0, 2] == 0
    assert right[0].tolist() == [own[0] > other[0], own[1] > other[1], False, own[3] > other[3]]


@pytest.mark.parametrize("seconds", [[1], [1, 1], [1, 30], [2, 3]])
def test_utterances_of_a_frame_or_two_have_a_finite_loss(seconds: list[int]) -> None:
    objective = make()
    batch = batch_of(seconds)
    batch["encoder"] = replace(batch["encoder"], x=batch["encoder"].x[:, : 40 if seconds == [1] else None])
    loss = objective(batch, STEP)
    assert all(g.isfinite().all() for g in grads(objective, loss.total).values())
    assert loss.weight >= len(seconds)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_gumbel_temperature_falls_as_in_the_paper(fraction: float) -> None:
    """max(2 * 0.999995 ** step, 0.5) over BASE's 400,000 steps, and down to 0.1 over LARGE's 600,000."""
    base, large = make(), make(cold=0.1, cooling=1.0)
    for objective, steps, floor in ((base, 400_000, 0.5), (large, 600_000, 0.1)):
        step = Step(int(fraction * steps), steps)
        paper = max(2 * 0.999995**step.number, floor)
        assert math.isclose(objective.gumbel_temperature(step), paper, rel_tol=0.005)


def test_evaluation_draws_no_noise() -> None:
    objective = make().eval()
    _, drawn = seen(objective, batch_of([20, 11]))
    assert drawn["noise"] is None


def test_bf16_is_finite_and_near_fp32() -> None:
    objective, batch = make(), batch_of([30, 20, 25])
    exact = objective(batch, STEP).total
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch, STEP)
    assert loss.total.dtype == torch.float32
    assert all(g.isfinite().all() for g in grads(objective, loss.total).values())
    torch.testing.assert_close(loss.total, exact, rtol=0.03, atol=0)


def test_metrics() -> None:
    loss = make()(batch_of([300, 300, 300]), STEP)
    assert 0.4 < loss.metrics["hidden"] < 0.6
    assert loss.metrics["gumbel_temperature"] == pytest.approx(2 * 0.25 ** (0.3 / 0.693))
    assert 2 <= loss.metrics["code_perplexity"] <= 24
    assert 2 <= loss.metrics["perplexity"] <= 24
    assert 0 <= loss.metrics["accuracy"] < 0.3
    assert not any(value.requires_grad for value in loss.metrics.values())


def test_groups_that_do_not_share_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be shared by 3 groups"):
        make(width=16, groups=3)


@pytest.mark.parametrize("preset", Wav2Vec2.presets)
def test_presets_name_options_that_exist(preset: str) -> None:
    plugins = {
        "objective": Wav2Vec2,
        "modality": Audio,
        "backbone": Transformer,
        "optimizer": Optimizers,
        "train": TrainOptions,
    }
    settings = nest({**Wav2Vec2.presets["base"], **Wav2Vec2.presets[preset]})
    assert settings.keys() == plugins.keys() - ({"objective"} if preset == "base" else set())
    for section, options in settings.items():
        if section in ("modality", "backbone"):
            options.pop("name")
        check(section, plugins[section], options)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_conformance_with_transformers(norm_first: bool, seed: int) -> None:
    """Loss and every gradient of Wav2Vec2ForPreTraining, for the same weights, masks, negatives and noise.

    Where it departs from the paper, it is followed or left out: its loss is the sum over hidden frames (ours is their
    mean, so it is multiplied by their number); it has no penalty on the latents and does not scale the gradient of
    the convolutions (both are tested above); it averages the perplexity over one process; and over rows of unequal
    length, its group norm lets padding into the features, so the rows here are equally long.
    """
    train = benchmark()
    shape = train.Shape(3, 0.9, 16, 32, 2, 4, 16, 12, 20, norm_first=norm_first, kernel=8)
    contest = train.Contest(shape)
    ours, theirs = contest.losses(seed)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    (ours + theirs).backward()
    values = dict(contest.theirs.named_parameters())
    for name, parameter in contest.ours.named_parameters():
        expected = torch.cat([values[n].grad for n in train.their_names(name)]).view_as(parameter)
        assert parameter.grad is not None, name
        close = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=close, msg=lambda m, n=name: f"{n}: {m}")


def benchmark() -> Any:
    """benchmarks/train_wav2vec2.py, which pairs the two models."""
    path = Path(__file__).parents[3] / "benchmarks" / "train_wav2vec2.py"
    spec = importlib.util.spec_from_file_location("train_wav2vec2", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_backbone_without_a_stem_is_refused() -> None:
    with pytest.raises(ContractError, match="this backbone has none; try a transformer"):
        Wav2Vec2(Tower(Raw(), Transformer(width=16, depth=1, heads=2)))


def test_people_see_what_is_hidden_and_the_chance_of_the_truth() -> None:
    objective = make().eval()
    batch = batch_of([40, 60])
    hidden = span_mask(STEP.draw("mask", batch["ids"]), objective.latents(batch["encoder"]).real(), objective.spans)
    shown = objective.show(batch, STEP)
    loss, drawn = seen(objective, batch)
    total = 0.0
    for row, (sample, heard, chance) in enumerate(zip(*shown.values(), strict=True)):
        frames = int(drawn["local"].real()[row].sum())
        there = np.isfinite(heard)
        np.testing.assert_array_equal(heard[there], sample[there])
        frame = np.arange(len(sample)) * frames // len(sample)
        np.testing.assert_array_equal(~there, hidden[row].numpy()[frame])
        np.testing.assert_array_equal(np.isfinite(chance), hidden[row, :frames].numpy())
        total -= float(np.log(chance[np.isfinite(chance)]).sum())
    torch.testing.assert_close(total / int(hidden.sum()), float(loss.metrics["contrast"]), rtol=1e-5, atol=0)
    assert list(objective.show(batch, STEP, guess=False)) == list(shown)[:2]


def test_what_is_no_curve_shows_its_hidden_frames_as_marks() -> None:
    assert without("a text", np.array([False, True])) == [("·", ""), ("■", "hidden")]
