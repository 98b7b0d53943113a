from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.kernel import Plugins, Raw, Signal, Step, Tower, compose
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.kernel.random import tag
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.corrupt import Corrupted
from selfsup.plugins.common.token_stem import Tokens
from selfsup.plugins.objectives.bert import IGNORED, Bert

PAD, BEGIN, END, MASK, WORDS = 0, 1, 2, 3, 61
STEP = Step(3, 10, seed=5)
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64, sums of a few thousand terms


class Letters:
    """Stands for a vocabulary: each id is a sign."""

    mask: int | None = MASK
    special = frozenset({PAD, BEGIN, END, MASK})

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(48 + i) for i in ids)


class Stand:
    """Stands for the modality `text`."""

    vocabulary, pack, pieces, tokenizer = Letters(), True, 4, "letters"


def make(share: float = 0.15, most: int | None = None) -> Bert:
    torch.manual_seed(0)
    backbone = Transformer(
        width=16, depth=2, heads=2, length=64, norm_first=False, input_norm=True, norm_eps=1e-12, packed=4
    )
    return Bert(Tower(Tokens(WORDS, 16), backbone, Stand()), share=share, most=most).double().train()


def texts(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Sequences of these lengths, each between its ends."""
    generator = torch.Generator().manual_seed(seed)
    inner = (torch.randint(4, WORDS, (n - 2,), generator=generator) for n in lengths)
    return [torch.cat([torch.tensor([BEGIN]), ids, torch.tensor([END])]) for ids in inner]


def packed(rows: list[list[Tensor]], length: int, ids: list[int] | None = None) -> dict[str, Any]:
    """Each row's sequences one behind the other, and padding."""
    x = torch.full((len(rows), length), PAD)
    segments, positions = torch.zeros(len(rows), length, dtype=torch.int32), torch.zeros(len(rows), length).long()
    for b, row in enumerate(rows):
        start = 0
        for number, tokens in enumerate(row, 1):
            place = slice(start, start := start + len(tokens))
            x[b, place], segments[b, place], positions[b, place] = tokens, number, torch.arange(len(tokens))
    return {"encoder": Signal(x, segments, positions), "ids": torch.tensor(ids or range(len(rows)))}


def batch_of(ids: list[int] | None = None) -> dict[str, Any]:
    a, b, c, d, e = texts(20, 12, 31, 3, 26)
    return packed([[a, b], [c], [d, a, e]], 52, ids)


def grads(objective: nn.Module, total: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters()}


def by_hand(objective: Bert, raw: Signal, hidden: Corrupted) -> Tensor:
    """The loss as the paper writes it: sequence by sequence, one prediction after the other."""
    stem, losses = objective.encoder.stem, []
    for b in range(len(raw.x)):
        for number in range(1, int(raw.segments[b].max()) + 1):
            own = (raw.segments[b] == number).nonzero()[:, 0]
            context = objective.encoder(Signal(hidden.ids[b, own][None])).x[0]
            for place in hidden.places[b][hidden.valid[b]].tolist():
                if place in own:
                    h = F.gelu(objective.dense(context[place - own[0]]))
                    g = F.layer_norm(h, h.shape, objective.norm.weight, objective.norm.bias, 1e-12)
                    losses.append(-(stem.embed.weight @ g + objective.bias).log_softmax(0)[raw.x[b, place]])
    return torch.stack(losses).mean()


def test_loss_and_gradients_are_the_papers_and_packed_sequences_are_apart() -> None:
    objective, batch = make(), batch_of()
    hidden = objective.hide(batch["encoder"], batch["ids"], STEP)
    expected = by_hand(objective, batch["encoder"], hidden)
    theirs = grads(objective, expected)
    loss = objective(batch, STEP)
    torch.testing.assert_close(loss.total, expected, **EXACT)
    assert loss.weight == hidden.valid.sum() == sum(max(1, round(0.15 * n)) for n in (20, 12, 31, 3, 20, 26))
    for name, gradient in grads(objective, loss.total).items():
        torch.testing.assert_close(gradient, theirs[name], **EXACT)
        assert gradient.abs().max() > 0, name


def test_special_tokens_are_never_hidden_and_what_is_not_chosen_is_shown() -> None:
    objective = make(share=0.9)
    for number in range(20):
        batch = batch_of([3 * number, 3 * number + 1, 3 * number + 2])
        raw, hidden = batch["encoder"], objective.hide(batch["encoder"], batch["ids"], STEP)
        assert (hidden.truth[hidden.valid] > MASK).all()
        chosen = torch.zeros_like(raw.real()).scatter(1, hidden.places, hidden.valid)
        assert torch.equal(hidden.ids[~chosen], raw.x[~chosen])
        assert torch.equal(chosen.sum(1), torch.tensor([18 + 10, 28, 1 + 18 + 23]))


def test_masks_change_by_epoch_and_are_the_same_in_any_batch() -> None:
    objective = make()
    first, second = (batch_of([tag(epoch, n) for n in (4, 7, 9)]) for epoch in (0, 1))
    shown = [objective.hide(batch["encoder"], batch["ids"], STEP).ids for batch in (first, second)]
    assert not torch.equal(*shown)
    turned = Signal(*(part[[2, 0]] for part in (first["encoder"].x, first["encoder"].segments)))
    again = objective.hide(turned, first["ids"][[2, 0]], Step(9, 10, seed=5)).ids
    assert torch.equal(again, shown[0][[2, 0]])
    assert not torch.equal(objective.hide(turned, first["ids"][[2, 0]], Step(9, 10, seed=6)).ids, again)


def test_predictions_of_a_sequence_can_be_limited() -> None:
    objective, batch = make(share=0.5, most=3), batch_of()
    assert objective(batch, STEP).weight == 3 * 5 + 1


def test_microbatches_add_up_to_the_batch() -> None:
    objective = make()
    whole = objective(batch_of(), STEP)
    expected = grads(objective, whole.total)
    batch = batch_of()
    raw = batch["encoder"]
    parts = [slice(0, 1), slice(1, 3)]
    losses = [
        objective({"encoder": Signal(raw.x[p], raw.segments[p], raw.positions[p]), "ids": batch["ids"][p]}, STEP)
        for p in parts
    ]
    weights = torch.stack([loss.weight for loss in losses])
    mean = sum(loss.total * loss.weight for loss in losses) / weights.sum()
    torch.testing.assert_close(mean, whole.total, **EXACT)
    torch.testing.assert_close(grads(objective, mean), expected, **EXACT)


def test_rows_of_padding_weigh_and_teach_nothing() -> None:
    objective = make()
    loss = objective(packed([[], []], 8), STEP)
    assert loss.weight == 0
    assert loss.total == 0
    assert not any(gradient.any() for gradient in grads(objective, loss.total).values())


@pytest.mark.parametrize("seed", [0, 1])
def test_conformance_with_transformers(seed: int) -> None:
    """Loss and every gradient of BertForMaskedLM, in float64, for the same weights and masks."""
    train = benchmark()
    contest = train.Contest(train.Shape(batch=3, tokens=40, width=32, depth=3, heads=4, words=1101))
    randomise(contest.theirs.double(), seed)
    train.copy_weights(contest.theirs, contest.ours.double())
    ours, theirs = contest.losses(seed)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (ours + theirs).backward()
    values = dict(contest.theirs.named_parameters())
    for name, parameter in contest.ours.named_parameters():
        wanted = torch.cat([values[other].grad for other in train.their_names(name)])
        assert (parameter.grad - wanted).norm() <= 1e-11 * wanted.norm(), name
        assert wanted.norm() > 0, name


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Every trained parameter away from its special first value, so that no term hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(noise * 0.2 + (parameter.dim() == 1) * 0.5)


def test_the_peers_masks_count_as_many_tokens() -> None:
    """What the benchmark gives the other side: 15 % of 126 candidates by draw, for our 19 of 128 tokens."""
    train = benchmark()
    contest = train.Contest(train.Shape(batch=64, tokens=128, width=8, depth=1, heads=1, words=1101))
    shown, labels = contest.collator.torch_mask_tokens(contest.x.clone(), special_tokens_mask=contest.special)
    assert abs((labels != IGNORED).sum() / 64 - 18.9) < 4 * math.sqrt(18.9 * 0.85 / 64)
    assert torch.equal(shown[:, 0], contest.x[:, 0])
    hidden = contest.ours.hide(Signal(contest.x), torch.arange(64), STEP)
    assert (hidden.valid.sum(1) == 19).all()
    assert hidden.valid.shape == (64, 19)


def benchmark() -> Any:
    """benchmarks/train_bert.py, which pairs the two models."""
    path = Path(__file__).parents[3] / "benchmarks" / "train_bert.py"
    spec = importlib.util.spec_from_file_location("train_bert", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("preset", "million"), [("base", 109.5), ("large", 335.1), ("roberta", 124.6)])
def test_presets_have_the_published_sizes(preset: str, million: float) -> None:
    """BERT-base has 109.5 million with its pooled [CLS] (0.6) and token types, but without the masked head (0.6)."""
    settings = compose.resolve(Plugins(), {"objective": {"name": "bert"}, "preset": preset})
    options = {key: value for key, value in settings["backbone"].items() if key != "name"}
    assert options["length"] >= settings["modality"]["length"]
    assert options["packed"] >= settings["modality"]["pieces"]
    with torch.device("meta"):
        stem = Tokens(settings["modality"]["vocabulary"], options["width"])
        objective = Bert(Tower(stem, Transformer(**options), Stand()))
    assert abs(sum(p.numel() for p in objective.parameters()) / 1e6 - million) < 0.1


def test_people_see_what_is_hidden_and_guessed() -> None:
    objective, batch = make().eval(), batch_of()
    with torch.no_grad():
        shown = objective.show(batch, STEP)
    hidden = objective.hide(batch["encoder"], batch["ids"], STEP)
    raw = batch["encoder"]
    assert list(shown) == ["hidden", "guess"]
    for caption, rows in shown.items():
        for b, row in enumerate(rows):
            places = sorted(hidden.places[b][hidden.valid[b]].tolist())
            at = [place for part, mark in row for place in [mark] * len(part)]
            assert [place for place, mark in enumerate(at) if mark] == places
            assert set(at) == {"", caption}
            text = "".join(part for part, _ in row)
            seen = Letters().decode(hidden.ids[b][raw.real()[b]].tolist())
            assert [a for a, mark in zip(text, at, strict=True) if not mark] == [
                a for a, mark in zip(seen, at, strict=True) if not mark
            ]
            assert (text == seen) == (caption == "hidden")
    with torch.no_grad():
        objective.bias[50] = 1e6  # the only guess from here on
        guess = objective.show(batch, STEP)["guess"]
    assert {letter for row in guess for part, mark in row if mark for letter in part} == {chr(48 + 50)}
    assert list(objective.show(batch, STEP, guess=False)) == ["hidden"]


def test_what_cannot_be_hidden_is_refused() -> None:
    backbone = Transformer(width=16, depth=1, heads=2)
    with pytest.raises(ContractError, match="this modality has none; try --modality text"):
        Bert(Tower(Raw(), backbone, Stand()))
    narrow = Tokens(WORDS, 8)
    narrow.project = nn.Linear(8, 16)
    with pytest.raises(ContractError, match="as wide as the backbone"):
        Bert(Tower(narrow, backbone, Stand()))
    stand = Stand()
    stand.vocabulary = Letters()
    stand.vocabulary.mask = None
    with pytest.raises(ConfigError, match=r"modality.tokenizer = 'letters' has no token that masks others"):
        Bert(Tower(Tokens(WORDS, 16), backbone, stand))


def test_a_backbone_that_returns_no_tensor_is_named() -> None:
    objective = make()
    objective.encoder.backbone.at = lambda tokens, index: 3
    with pytest.raises(ContractError, match=r"Transformer\.at returned a int, not a Tensor"):
        objective(batch_of(), STEP)


def test_bf16_is_finite_and_near() -> None:
    objective, batch = make().float(), batch_of()
    exact = objective(batch, STEP).total
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch, STEP)
    assert loss.total.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in grads(objective, loss.total).values())
    torch.testing.assert_close(loss.total, exact, rtol=0.01, atol=0)
    assert math.isclose(exact.item(), math.log(WORDS), rel_tol=0.1)
