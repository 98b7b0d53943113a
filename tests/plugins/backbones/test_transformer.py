from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor

from selfsup.kernel.config import check
from selfsup.kernel.contracts import Signal, Step
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.plugins.backbones.transformer import Transformer

SMALL = {"width": 32, "depth": 2, "heads": 4, "conv_kernel": 4, "conv_groups": 4}
PROBE = torch.linspace(-1, 1, 32).square()  # a sum over a layer norm's output would have no gradient
KINDS = ["learned", "sincos", "rotary", "relative", "none"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def model(**options: object) -> Transformer:
    """A small transformer with weights large enough that attention matters."""
    backbone = Transformer(**{**SMALL, **options})
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return backbone.eval()


def packed_row(*lengths: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Segments and positions [1, T] of documents of these lengths in one row."""
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)] + [torch.zeros(padding).long()])
    positions = torch.cat([torch.arange(n) for n in (*lengths, padding)])
    return segments[None], positions[None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone(kind: str, causal: bool) -> None:
    backbone = model(positions=kind, kv_heads=2)
    x = torch.randn(1, 14, 32)
    segments, positions = packed_row(5, 7, padding=2)
    out = backbone(Signal(x, segments, positions), causal=causal).x
    for part in (slice(0, 5), slice(5, 12)):
        alone = backbone(Signal(x[:, part]), causal=causal).x
        torch.testing.assert_close(out[:, part], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_some_places_alone_are_as_with_the_others(kind: str, packed: bool, norm_first: bool) -> None:
    """Outputs, and gradients of the input and of every parameter, in float64."""
    backbone = model(positions=kind, kv_heads=2, norm_first=norm_first, bias=norm_first).double()
    segments = packed_row(14)[0] if kind == "conv" else packed_row(5, 7, padding=2)[0]
    x = torch.randn(2, 14, 32, dtype=torch.float64, requires_grad=True)
    tokens = Signal(x, segments.expand(2, -1) if packed else None)
    index = torch.tensor([[3, 0, 11], [9, 9, 4]])
    found = []
    for out in (backbone.at(tokens, index), backbone(tokens).x[torch.arange(2)[:, None], index]):
        parameters = [x, *backbone.parameters()]
        loss = (out * torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)).sum()
        found.append((out, torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_some_places_alone_survive_the_loss_of_the_last_layer() -> None:
    backbone = model(layer_drop=0.5).train()
    x, index = torch.randn(2, 6, 32), torch.tensor([[5, 1], [0, 2]])
    for number in range(8):
        backbone.step = Step(number, 8)
        torch.testing.assert_close(
            backbone.at(Signal(x), index), backbone(Signal(x)).x[torch.arange(2)[:, None], index], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_padding_changes_nothing_and_stays_finite(kind: str) -> None:
    backbone = model(positions=kind)
    x = torch.randn(3, 9, 32, requires_grad=True)
    segments = (torch.arange(9) < torch.tensor([[9], [4], [0]])).long()  # the last sample is all padding
    out = backbone(Signal(x, segments)).x
    assert out.isfinite().all()
    torch.testing.assert_close(out[1:2, :4], backbone(Signal(x[1:2, :4])).x, rtol=1e-5, atol=1e-5)
    (out @ PROBE)[segments > 0].sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[segments == 0] == 0).all()
    assert (x.grad[segments > 0].abs().amax(-1) > 1e-3).all()


def test_causal_tokens_do_not_see_later_ones() -> None:
    for kind in KINDS:
        backbone = model(positions=kind)
        for segments in (None, torch.ones(1, 8).long()):
            x = torch.randn(1, 8, 32, requires_grad=True)
            out = backbone(Signal(x, segments), causal=True).x
            (grad,) = torch.autograd.grad(out[0, 4] @ PROBE, x)
            assert (grad[0, 5:] == 0).all(), kind
            assert (grad[0, :5].abs().amax(-1) > 1e-3).all(), kind


@pytest.mark.parametrize("kind", ["learned", "sincos", "rotary", "relative"])
def test_dropped_tokens_keep_their_positions(kind: str) -> None:
    """MAE's `take`: the order of tokens in the row does not matter, their positions do."""
    backbone = model(positions=kind)
    signal = Signal(torch.randn(2, 6, 32))
    order = torch.tensor([[5, 0, 3], [1, 4, 2]])
    shuffled = backbone(signal.take(order)).x
    in_order = backbone(signal.take(order.sort(1).values)).x
    torch.testing.assert_close(shuffled.gather(1, order.argsort(1)[..., None].expand(-1, -1, 32)), in_order)
    moved = backbone(Signal(signal.take(order).x)).x
    assert (moved - shuffled).abs().max() > 1e-3


def test_conv_positions_refuse_what_they_cannot_see() -> None:
    backbone = model(positions="conv")
    x = torch.randn(1, 6, 32)
    with pytest.raises(ContractError, match="2 packed sequences"):
        backbone(Signal(x, torch.tensor([[1, 1, 1, 2, 2, 0]])))
    with pytest.raises(ContractError, match="order of tokens"):
        backbone(Signal(x).take(torch.tensor([[4, 1]])))


def test_more_sequences_than_packed_are_refused() -> None:
    backbone = model(packed=2)
    x = torch.randn(2, 4, 32)
    backbone(Signal(x, torch.tensor([[1, 1, 2, 0], [5, 5, 5, 5]])))
    with pytest.raises(ContractError, match=r"3 packed sequences.*takes 2; raise backbone.packed"):
        backbone(Signal(x, torch.tensor([[1, 2, 3, 0], [1, 1, 1, 1]])))


@pytest.mark.parametrize("norm_first", [True, False])
def test_cross_attention_sees_the_context_of_its_segment(norm_first: bool) -> None:
    decoder = model(cross=True, norm_first=norm_first, kv_heads=2)
    x, memory = torch.randn(1, 6, 32), torch.randn(1, 5, 32, requires_grad=True)
    tokens = Signal(x, torch.tensor([[1, 1, 1, 2, 2, 0]]), torch.tensor([[0, 1, 2, 0, 1, 0]]))
    out = decoder(tokens, causal=True, context=Signal(memory, torch.tensor([[1, 1, 2, 2, 0]]))).x
    assert out.isfinite().all()
    alone = decoder(Signal(x[:, 3:5]), causal=True, context=Signal(memory[:, 2:4])).x
    torch.testing.assert_close(out[:, 3:5], alone, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad((out[0, :5] @ PROBE).sum(), memory)
    assert (grad[0, 4] == 0).all()
    assert (grad[0, :4].abs().amax(-1) > 1e-3).all()


def test_cross_attention_to_an_empty_context_is_finite() -> None:
    decoder = model(cross=True)
    memory = torch.randn(2, 3, 32, requires_grad=True)
    context = Signal(memory, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    out = decoder(Signal(torch.randn(2, 4, 32)), context=context).x
    (out @ PROBE).sum().backward()
    assert out.isfinite().all()
    assert memory.grad.isfinite().all()


def test_misfits_are_contract_errors() -> None:
    x = Signal(torch.randn(1, 4, 32))
    with pytest.raises(ContractError, match=r"set backbone\.cross = true"):
        model()(x, context=x)
    with pytest.raises(ContractError, match="needs a context"):
        model(cross=True)(x)
    with pytest.raises(ContractError, match="32 wide and its context 16"):
        model(cross=True)(x, context=Signal(torch.randn(1, 4, 16)))
    with pytest.raises(ContractError, match=r"raise backbone\.length"):
        model(length=3)(x)
    with pytest.raises(ContractError, match="position 3 is beyond the 3"):
        model(length=3)(x.take(torch.tensor([[3]])))
    for kind in ("learned", "relative"):
        with pytest.raises(ContractError, match="these tokens have 2"):
            model(positions=kind)(Signal(x.x, positions=torch.zeros(1, 4, 2).long()))


def test_options_that_do_not_fit_are_config_errors() -> None:
    for options, message in (
        ({"heads": 5}, "heads = 5 does not divide"),
        ({"kv_heads": 3}, "kv_heads = 3 does not divide"),
        ({"positions": "conv", "conv_groups": 5}, "conv_groups = 5"),
        ({"positions": "rotary", "width": 12}, "odd number"),
    ):
        with pytest.raises(ConfigError, match=message):
            Transformer(**{**SMALL, **options})
    settings = check("backbone", Transformer, {"positions": "conv", "kv_heads": 4})
    assert settings["width"] == 768
    assert set(settings) == set(inspect.signature(Transformer).parameters)
    with pytest.raises(ConfigError, match="positions"):
        check("backbone", Transformer, {"positions": "sinus"})


def test_hidden_widths() -> None:
    assert Transformer(**SMALL).layers[0].mlp.up.weight.shape == (128, 32)
    swiglu = Transformer(**{**SMALL, "width": 256}, activation="swiglu").layers[0].mlp
    assert swiglu.up.weight.shape == (2 * 704, 256)  # 8/3 of 256 is 682.7
    assert swiglu.down.weight.shape == (256, 704)


def test_layer_drop_follows_the_step_and_computes_nothing() -> None:
    backbone = model(depth=8, layer_drop=0.5).train()
    calls: list[int] = []
    for i, layer in enumerate(backbone.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    x = Signal(torch.randn(1, 4, 32))
    seen = []
    for number in (3, 3, 4):
        calls.clear()
        backbone.step = Step(number, 10, seed=1)
        torch.manual_seed(len(seen))  # the step decides, not torch's generator
        backbone(x)
        seen.append(tuple(calls))
    assert seen[0] == seen[1] != seen[2]
    assert 0 < len(seen[0]) < 8
    assert backbone.skips_parameters
    assert not model().skips_parameters
    backbone.step = None
    assert backbone(x).x.isfinite().all()
    calls.clear()
    backbone.eval()(x)
    assert calls == list(range(8))


def test_layer_drop_leaves_out_the_share_it_says() -> None:
    backbone = model(depth=10, layer_drop=0.2).train()
    dropped = 0
    for number in range(300):
        backbone.step = Step(number, 300)
        dropped += sum(backbone.dropped_layers())
    assert abs(dropped / 3000 - 0.2) < 4 * (0.2 * 0.8 / 3000) ** 0.5


def test_drop_path_grows_with_depth() -> None:
    backbone = Transformer(**{**SMALL, "depth": 3}, drop_path=0.6)
    torch.testing.assert_close(torch.stack([layer.keep for layer in backbone.layers]), torch.tensor([1, 0.7, 0.4]))
    assert not any(layer.drops_path for layer in Transformer(**SMALL).layers)


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropouts_act_in_training_only(option: str) -> None:
    backbone = model(**{option: 0.5})
    x = Signal(torch.randn(2, 6, 32))
    assert torch.equal(backbone(x).x, backbone(x).x)
    backbone.train()
    assert not torch.equal(backbone(x).x, backbone(x).x)
    at_input = (backbone.embed(x).x == 0).float().mean()
    assert at_input == 0 if option != "dropout" else abs(at_input - 0.5) < 0.15


def test_first_values() -> None:
    plain = Transformer(width=128, depth=8, heads=4, cross=True)
    weights = dict(plain.named_parameters())
    assert abs(weights["layers.3.attention.qkv.weight"].std() - 0.02) < 0.001
    assert abs(weights["layers.3.mlp.down.weight"].std() - 0.02) < 0.001
    assert abs(weights["positions.table.weight"].std() - 0.02) < 0.001
    assert all((p == 0).all() for name, p in weights.items() if name.endswith("bias"))
    shrunk = dict(Transformer(width=128, depth=8, heads=4, cross=True, init_residual=True).named_parameters())
    for end in ("attention.out", "cross.out", "mlp.down"):
        assert abs(shrunk[f"layers.3.{end}.weight"].std() - 0.02 / 24**0.5) < 0.0003
    assert abs(shrunk["layers.3.mlp.up.weight"].std() - 0.02) < 0.001


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_copies_pickles_and_trains_every_parameter(kind: str) -> None:
    backbone = Transformer(**SMALL, positions=kind, input_norm=True)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(backbone)))
    x = Signal(torch.randn(2, 5, 32))
    assert torch.equal(backbone(x).x, twin(x).x)
    assert list(backbone.units()) == list(backbone.layers)
    (backbone(x).x @ PROBE).sum().backward()
    silent = [name for name, p in backbone.named_parameters() if p.grad is None or not 0 < p.grad.norm() < 1e9]
    assert silent == []


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_bfloat16_is_near_float32(kind: str) -> None:
    """The residual stream of autocast is float32, also when the stem hands over bfloat16."""
    backbone = Transformer(**SMALL, positions=kind)
    segments = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    signal = Signal(torch.randn(2, 9, 32).bfloat16(), segments)
    want = backbone(Signal(signal.x.float(), segments)).x
    with torch.autocast("cpu", torch.bfloat16):
        got = backbone(signal).x
    assert got.dtype == torch.float32
    real = (segments > 0)[..., None]
    assert ((got - want) * real).norm() < 0.01 * (want * real).norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's compiler itself
def test_layers_share_one_compiled_graph() -> None:
    """Per layer nothing is a constant of the graph: 3 layers compile once in training, and 24 would."""
    backbone = Transformer(**{**SMALL, "depth": 3}, drop_path=0.3, dropout=0.1, positions="rotary").train()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for layer in backbone.units():
        layer.compile(backend=count, fullgraph=True)
    x = torch.randn(2, 5, 32, requires_grad=True)
    assert backbone(Signal(x, torch.ones(2, 5).long())).x.isfinite().all()
    assert len(graphs) == 1
