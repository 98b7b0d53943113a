from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from selfsup.kernel import Plugins, Raw, Signal, Step, Tower, compose
from selfsup.kernel.errors import ContractError
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.token_stem import Tokens
from selfsup.plugins.objectives.gpt import GPT, next_tokens

WORDS, STEP = 29, Step(3, 10, seed=5)
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64, sums of a few thousand terms


class Letters:
    """Stands for a vocabulary: each id is a sign."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(65 + int(i)) for i in ids)


class Stand:
    """Stands for the modality `text`."""

    vocabulary = Letters()

    def show(self, signal: Signal) -> list[str]:
        return [self.vocabulary.decode(row.tolist()) for row in signal.x]


def make(tie: bool = True, **options: Any) -> GPT:
    torch.manual_seed(0)
    backbone = Transformer(width=16, depth=2, heads=2, length=32, **options)
    return GPT(Tower(Tokens(WORDS, 16), backbone, Stand()), tie=tie).double().train()


def documents(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(WORDS, (n,), generator=generator) for n in lengths]


def packed(rows: list[list[Tensor]], length: int) -> dict[str, Any]:
    """Each row's documents one behind the other, and padding."""
    x = torch.full((len(rows), length), 7)
    segments, positions = torch.zeros(len(rows), length, dtype=torch.int32), torch.zeros(len(rows), length).long()
    for b, row in enumerate(rows):
        start = 0
        for number, ids in enumerate(row, 1):
            place = slice(start, start := start + len(ids))
            x[b, place], segments[b, place], positions[b, place] = ids, number, torch.arange(len(ids))
    return {"decoder": Signal(x, segments, positions), "ids": torch.arange(len(rows))}


def alone(ids: Tensor) -> dict[str, Any]:
    return {"decoder": Signal(ids[None]), "ids": torch.zeros(1).long()}


def grads(objective: nn.Module, total: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters()}


@pytest.mark.parametrize("tie", [True, False])
def test_the_loss_is_the_mean_surprise_at_the_next_token(tie: bool) -> None:
    objective, (ids,) = make(tie), documents(9)
    loss = objective(alone(ids), STEP)
    h = objective.decoder(Signal(ids[None])).x[0]
    table = objective.decoder.stem.embed.weight if tie else objective.head.weight
    expected = torch.stack([-(table @ h[t]).log_softmax(0)[ids[t + 1]] for t in range(8)]).mean()
    torch.testing.assert_close(loss.total, expected, **EXACT)
    assert loss.weight == 8
    torch.testing.assert_close(loss.metrics["perplexity"], expected.exp().detach(), **EXACT)


def test_a_token_is_predicted_from_those_before_it_alone() -> None:
    objective, (ids,) = make(), documents(12)
    x = objective.decoder.stem(Signal(ids[None])).x.detach().requires_grad_()
    objective.decoder.backbone(Signal(x), causal=True).x[0, 5, 0].backward()
    assert x.grad[0, :6].abs().sum(-1).min() > 0
    assert not x.grad[0, 6:].any()
    assert objective.decoder.causal
    other = torch.cat([ids[:6], (ids[6:] + 1) % WORDS])
    before, after = (objective.decoder(Signal(part[None])).x[0, :6] for part in (ids, other))
    torch.testing.assert_close(before, after, **EXACT)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_packed_rows_equal_the_documents_alone(positions: str) -> None:
    objective = make(positions=positions)
    a, b, c, d = documents(9, 5, 12, 2)
    loss = objective(packed([[a, b], [c], [d, a, b]], 20), STEP)
    counts = [8, 4, 11, 1, 8, 4]
    assert loss.weight == sum(counts)
    together = grads(objective, loss.total)
    separate = [objective(alone(ids), STEP).total for ids in (a, b, c, d, a, b)]
    mean = sum(n * part for n, part in zip(counts, separate, strict=True)) / sum(counts)
    torch.testing.assert_close(loss.total, mean, **EXACT)
    for name, gradient in grads(objective, mean).items():
        torch.testing.assert_close(together[name], gradient, **EXACT)


def test_a_document_does_not_touch_its_neighbours() -> None:
    objective = make()
    a, b, c = documents(6, 7, 5)
    x = objective.decoder.stem(packed([[a, b, c]], 20)["decoder"])
    embedded = x.x.detach().requires_grad_()
    raw = packed([[a, b, c]], 20)["decoder"]
    hidden = objective.decoder.backbone(Signal(embedded, raw.segments, raw.positions), causal=True).x[..., 0]
    labels = next_tokens(raw, raw.x)
    hidden[0, 6:13][labels[0, 6:13] >= 0].sum().backward()
    assert embedded.grad[0, 6:12].any()
    assert not embedded.grad[0, :6].any()
    assert not embedded.grad[0, 13:].any()


def test_nothing_is_predicted_across_bounds_or_in_padding() -> None:
    a, b = documents(3, 4)
    raw = packed([[a, b]], 10)["decoder"]
    labels = next_tokens(raw, raw.x)[0].tolist()
    assert labels == [a[1], a[2], -100, b[1], b[2], b[3], -100, -100, -100, -100]


def test_rows_without_predictions_weigh_and_teach_nothing() -> None:
    objective = make()
    loss = objective(packed([documents(1)], 8), STEP)
    assert loss.weight == 0
    assert loss.total == 0
    assert not any(g.any() for g in grads(objective, loss.total).values())


@pytest.mark.parametrize("seed", [0, 1])
def test_conformance_with_gpt2(seed: int) -> None:
    """Loss and every gradient of GPT2LMHeadModel, in float64, for the same weights."""
    train = benchmark()
    contest = train.Contest(train.Shape(batch=3, tokens=20, width=32, depth=3, heads=4, words=101))
    randomise(contest.theirs.double(), seed)
    train.copy_weights(contest.theirs, contest.ours.double())
    ours, theirs = contest.losses()
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)  # theirs is rounded to float32
    (ours + theirs).backward()
    values = dict(contest.theirs.named_parameters())
    for name, parameter in contest.ours.named_parameters():
        other = train.their_name(name)
        near(parameter.grad, train.turned(other, values.pop(other).grad), name)
    assert not values


LLAMA = {
    "decoder.stem.embed.weight": ["model.embed_tokens.weight"],
    "head.weight": ["lm_head.weight"],
    "decoder.backbone.norm.weight": ["model.norm.weight"],
    "norm1.weight": ["input_layernorm.weight"],
    "norm2.weight": ["post_attention_layernorm.weight"],
    "attention.qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "mlp.up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
}


def llama_names(ours: str) -> list[str]:
    if ours in LLAMA:
        return LLAMA[ours]
    _, _, _, number, *rest = ours.split(".")
    return [f"model.layers.{number}.{name}" for name in LLAMA[".".join(rest)]]


@pytest.mark.parametrize("seed", [0, 1])
def test_conformance_with_llama(seed: int) -> None:
    """Loss and every gradient of LlamaForCausalLM, in float64; the options are those of the preset, but for sizes."""
    settings = compose.resolve(Plugins(), {"objective": {"name": "gpt"}, "preset": "llama"})
    sizes = {"width": 32, "depth": 2, "heads": 4, "hidden": 48}
    options = {key: value for key, value in settings["backbone"].items() if key != "name"} | sizes
    ours = GPT(Tower(Tokens(101, 32), Transformer(**options)), tie=settings["objective"]["tie"]).double()
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, rms_norm_eps=1e-6, attn_implementation="sdpa",
        )
    ).double()  # fmt: skip
    randomise(theirs, seed)
    values = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(torch.cat([values[other] for other in llama_names(name)]))
    x = torch.randint(101, (3, 20), generator=torch.Generator().manual_seed(seed))
    mine = ours({"decoder": Signal(x), "ids": torch.arange(3)}, STEP).total
    his = theirs(x, labels=x, use_cache=False).loss
    # Angles of positions are float32 on both sides, and so is the sum of their loss.
    torch.testing.assert_close(mine, his.double(), rtol=1e-6, atol=0)
    (mine + his).backward()
    for name, parameter in ours.named_parameters():
        near(parameter.grad, torch.cat([values.pop(other).grad for other in llama_names(name)]), name)
    assert not values


def near(got: Tensor, want: Tensor, name: str) -> None:
    assert (got - want).norm() <= 1e-6 * want.norm(), name
    assert want.norm() > 0, name


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Every parameter away from its special first value, so that no term hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.copy_(noise * 0.2 + (parameter.dim() == 1) * 0.5)


def benchmark() -> Any:
    """benchmarks/train_gpt.py, which pairs the two models."""
    path = Path(__file__).parents[3] / "benchmarks" / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("preset", "million"), [("base", 124), ("medium", 355), ("large", 774), ("xl", 1558), ("llama", 6738)]
)
def test_presets_have_the_published_sizes(preset: str, million: int) -> None:
    settings = compose.resolve(Plugins(), {"objective": {"name": "gpt"}, "preset": preset})
    options = {key: value for key, value in settings["backbone"].items() if key != "name"}
    assert settings["backbone"]["length"] >= 1024 or options["positions"] == "rotary"
    assert options["packed"] >= settings["modality"]["pieces"]
    with torch.device("meta"):
        stem = Tokens(settings["modality"]["vocabulary"], options["width"])
        objective = GPT(Tower(stem, Transformer(**options)), tie=settings["objective"]["tie"])
    assert round(sum(p.numel() for p in objective.parameters()) / 1e6) == million


def test_people_see_how_the_model_goes_on() -> None:
    objective = make().eval()
    a, b = documents(12, 7)
    batch = packed([[a, b], [b]], 20)
    with torch.no_grad():
        shown = objective.show(batch, STEP)
        again = objective.show(batch, STEP)
    assert shown == again
    (prompt, mark), (added, guess) = shown["continued"][0]
    assert (prompt, mark, guess) == (Letters().decode(a[:6].tolist()), "", "guess")
    assert len(added) == 6
    assert [len(part) for part, _ in shown["continued"][1]] == [3, 3]
    assert list(objective.show(batch, STEP, guess=False)) == ["text"]


def test_a_continuation_is_drawn_from_the_softmax() -> None:
    objective = make().eval()
    prompt = documents(4)[0]
    with torch.no_grad():
        objective.weight.mul_(5)
        chances = (objective.decoder(Signal(prompt[None])).x[0, -1] @ objective.weight.T).softmax(0)
        n = 400
        drawn = torch.cat([objective.continued(prompt, u[None]) for u in (torch.arange(n) + 0.5) / n])
    # Evenly spaced draws meet every token within one of its share.
    assert (torch.bincount(drawn, minlength=WORDS) - n * chances).abs().max() <= 1


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(ContractError, match="this modality has none; try --modality text"):
        GPT(Tower(Raw(), Transformer(width=16, depth=1, heads=2)))
    narrow = Tokens(WORDS, 8)
    narrow.project = nn.Linear(8, 16)
    with pytest.raises(ContractError, match=r"objective\.tie=false"):
        GPT(Tower(narrow, Transformer(width=16, depth=1, heads=2)))
    assert GPT(Tower(narrow, Transformer(width=16, depth=1, heads=2)), tie=False).weight.shape == (WORDS, 16)


def test_bf16_is_finite_and_near() -> None:
    objective, batch = make().float(), packed([documents(9, 5), documents(12)], 20)
    exact = objective(batch, STEP).total
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch, STEP)
    assert loss.total.dtype == torch.float32
    assert all(g.isfinite().all() for g in grads(objective, loss.total).values())
    torch.testing.assert_close(loss.total, exact, rtol=0.01, atol=0)
    assert math.isclose(float(exact.detach()), math.log(WORDS), rel_tol=0.1)
