"""The transformer gives the outputs and gradients of transformers' models, on shared random weights.

Every model is tiny, made from its configuration class (nothing is downloaded), and in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.vit.modeling_vit import ViTModel
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Encoder, Wav2Vec2EncoderStableLayerNorm

from selfsup.kernel.contracts import Signal
from selfsup.plugins.backbones.transformer import Transformer

B, T, D, HEADS, DEPTH, HIDDEN = 2, 24, 32, 4, 2, 48
LENGTHS = torch.tensor([T, 15])

Check = list[tuple[Tensor, Callable[[], Tensor]]]  # our parameter, and the gradient it should have


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(model: nn.Module) -> None:
    """Every parameter away from its special first value, so that no term hides behind a 0 or a 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1) * 0.5)


def cat(*parts: Tensor) -> Tensor:
    return torch.cat([p.detach() for p in parts])


def compare(
    ours: Transformer,
    theirs: Callable[[Tensor], Tensor],
    x: Tensor,
    segments: Tensor | None = None,
    *,
    check: Check,
    causal: bool = False,
    positions: Tensor | None = None,
) -> None:
    """Outputs at real tokens, gradient of the input, and the gradients named by `check`."""
    real = torch.ones(x.shape[:2]) if segments is None else (segments > 0).float()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = ours(Signal(a, segments, positions), causal=causal).x
    want = theirs(b)
    weight = torch.randn_like(want) * real[..., None]
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(got * real[..., None], want * real[..., None], rtol=1e-5, atol=2e-5)
    near(a.grad * real[..., None], b.grad * real[..., None])
    for parameter, grad in check:
        near(parameter.grad, grad())


def near(got: Tensor, want: Tensor) -> None:
    """Gradients agree to 1e-5 of their norm."""
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert want.norm() > 0


def linear(ours: nn.Linear, *theirs: nn.Module) -> Check:
    """Load one (fused) linear layer from several of theirs; return the comparison of gradients."""
    transpose = any(isinstance(t, transformers.pytorch_utils.Conv1D) for t in theirs)
    turn = (lambda w: w.T) if transpose else (lambda w: w)
    ours.weight.data = cat(*(turn(t.weight) for t in theirs))
    out = [(ours.weight, lambda: torch.cat([turn(t.weight.grad) for t in theirs]))]
    if ours.bias is not None:
        ours.bias.data = cat(*(t.bias for t in theirs))
        out.append((ours.bias, lambda: torch.cat([t.bias.grad for t in theirs])))
    return out


def same(ours: nn.Module, theirs: nn.Module) -> Check:
    """Load a norm or table from one of theirs, with the same parameter names."""
    out = []
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        parameter.data = other.detach().clone()
        out.append((parameter, lambda other=other: other.grad))
    return out


def wav2vec2(norm_first: bool, kernel: int) -> tuple[Transformer, nn.Module, Check]:
    config = transformers.Wav2Vec2Config(
        hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=HIDDEN,
        num_conv_pos_embeddings=kernel, num_conv_pos_embedding_groups=4, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = (Wav2Vec2EncoderStableLayerNorm if norm_first else Wav2Vec2Encoder)(config).eval()
    randomise(theirs)
    ours = Transformer(
        width=D, depth=DEPTH, heads=HEADS, hidden=HIDDEN, norm_first=norm_first, input_norm=not norm_first,
        positions="conv", conv_kernel=kernel, conv_groups=4, dropout=0.1, layer_drop=0.05,
    ).eval()  # fmt: skip
    check = []
    conv = theirs.pos_conv_embed.conv
    for parameter, other in (
        (ours.positions.weight_g, conv.parametrizations.weight.original0),
        (ours.positions.weight_v, conv.parametrizations.weight.original1),
        (ours.positions.bias, conv.bias),
    ):
        parameter.data = other.detach().clone()
        check.append((parameter, lambda other=other: other.grad))
    check += same(ours.norm if norm_first else ours.input_norm, theirs.layer_norm)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        check += linear(a.attention.qkv, b.attention.q_proj, b.attention.k_proj, b.attention.v_proj)
        check += linear(a.attention.out, b.attention.out_proj)
        check += linear(a.mlp.up, b.feed_forward.intermediate_dense)
        check += linear(a.mlp.down, b.feed_forward.output_dense)
        check += same(a.norm1, b.layer_norm) + same(a.norm2, b.final_layer_norm)
    return ours, theirs, check


@pytest.mark.parametrize(("kernel", "samples"), [(8, 2), (9, 2), (128, 2), (128, 16)])  # the last by Fourier transform
@pytest.mark.parametrize("norm_first", [False, True])
def test_wav2vec2_with_padding(norm_first: bool, kernel: int, samples: int) -> None:
    ours, theirs, check = wav2vec2(norm_first, kernel)
    mask = torch.arange(T) < LENGTHS.repeat(samples // 2)[:, None]
    x = torch.randn(samples, T, D)

    def encode(x: Tensor) -> Tensor:  # their encoder writes zeros into its input
        return theirs(x.clone(), attention_mask=mask).last_hidden_state

    compare(ours, encode, x, mask.long(), check=check)


def test_bert() -> None:
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=HIDDEN,
        type_vocab_size=1,
    )  # fmt: skip
    theirs = BertModel(config, add_pooling_layer=False).eval()
    randomise(theirs)
    theirs.embeddings.token_type_embeddings.weight.data.zero_()
    ours = Transformer(
        width=D, depth=DEPTH, heads=HEADS, hidden=HIDDEN, norm_first=False, input_norm=True, norm_eps=1e-12, dropout=0.1
    ).eval()
    check = same(ours.positions.table, theirs.embeddings.position_embeddings)
    check += same(ours.input_norm, theirs.embeddings.LayerNorm)
    for a, b in zip(ours.layers, theirs.encoder.layer, strict=True):
        inner = b.attention.self
        check += linear(a.attention.qkv, inner.query, inner.key, inner.value) + linear(
            a.attention.out, b.attention.output.dense
        )
        check += linear(a.mlp.up, b.intermediate.dense) + linear(a.mlp.down, b.output.dense)
        check += same(a.norm1, b.attention.output.LayerNorm) + same(a.norm2, b.output.LayerNorm)
    mask = (torch.arange(T) < LENGTHS[:, None]).long()
    compare(
        ours,
        lambda x: theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state,
        torch.randn(B, T, D),
        mask,
        check=check,
    )


@pytest.mark.parametrize("padded", [False, True])
def test_llama_with_grouped_keys(padded: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=HEADS, num_key_value_heads=2,
        intermediate_size=HIDDEN, rms_norm_eps=1e-6,
    )  # fmt: skip
    theirs = LlamaModel(config).eval()
    randomise(theirs)
    ours = Transformer(
        width=D, depth=DEPTH, heads=HEADS, kv_heads=2, hidden=HIDDEN, norm="rms", norm_eps=1e-6, positions="rotary",
        activation="swiglu", bias=False,
    ).eval()  # fmt: skip
    check = same(ours.norm, theirs.norm)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        inner = b.self_attn
        check += linear(a.attention.qkv, inner.q_proj, inner.k_proj, inner.v_proj) + linear(
            a.attention.out, inner.o_proj
        )
        check += linear(a.mlp.up, b.mlp.gate_proj, b.mlp.up_proj) + linear(a.mlp.down, b.mlp.down_proj)
        check += same(a.norm1, b.input_layernorm) + same(a.norm2, b.post_attention_layernorm)
    mask = (torch.arange(T) < LENGTHS[:, None]).long() if padded else None
    compare(
        ours,
        lambda x: theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state,
        torch.randn(B, T, D),
        mask,
        check=check,
        causal=True,
    )


def test_gpt2() -> None:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=32, n_embd=D, n_layer=DEPTH, n_head=HEADS, n_inner=HIDDEN
    )
    theirs = GPT2Model(config).eval()
    randomise(theirs)
    ours = Transformer(
        width=D,
        depth=DEPTH,
        heads=HEADS,
        hidden=HIDDEN,
        length=32,
        activation="gelu_tanh",
        init_residual=True,
        dropout=0.1,
    ).eval()
    check = same(ours.positions.table, theirs.wpe) + same(ours.norm, theirs.ln_f)
    for a, b in zip(ours.layers, theirs.h, strict=True):
        check += linear(a.attention.qkv, b.attn.c_attn) + linear(a.attention.out, b.attn.c_proj)
        check += linear(a.mlp.up, b.mlp.c_fc) + linear(a.mlp.down, b.mlp.c_proj)
        check += same(a.norm1, b.ln_1) + same(a.norm2, b.ln_2)
    compare(ours, lambda x: theirs(inputs_embeds=x).last_hidden_state, torch.randn(B, T, D), check=check, causal=True)


def test_vit() -> None:
    config = transformers.ViTConfig(
        hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=HIDDEN,
        image_size=8, patch_size=2,
    )  # fmt: skip
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    randomise(theirs)
    ours = Transformer(width=D, depth=DEPTH, heads=HEADS, hidden=HIDDEN, norm_eps=1e-12, positions="none").eval()
    check = same(ours.norm, theirs.layernorm)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        inner = b.attention
        check += linear(a.attention.qkv, inner.q_proj, inner.k_proj, inner.v_proj) + linear(
            a.attention.out, inner.o_proj
        )
        check += linear(a.mlp.up, b.mlp.fc1) + linear(a.mlp.down, b.mlp.fc2)
        check += same(a.norm1, b.layernorm_before) + same(a.norm2, b.layernorm_after)

    def encode(x: Tensor) -> Tensor:
        for layer in theirs.layers:
            x = layer(x, None)
        return theirs.layernorm(x)

    compare(ours, encode, torch.randn(B, T, D), check=check)


@pytest.mark.parametrize("decoder", [False, True])
def test_t5_relative_bias(decoder: bool) -> None:
    """Longer than 128 tokens, so that every bucket is used; their logits are not divided by sqrt(d)."""
    length = 150
    config = transformers.T5Config(
        vocab_size=11, d_model=D, d_kv=D // HEADS, d_ff=HIDDEN, num_layers=DEPTH, num_heads=HEADS, is_decoder=decoder,
        is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    theirs = T5Stack(config).eval()
    randomise(theirs)
    ours = Transformer(
        width=D,
        depth=DEPTH,
        heads=HEADS,
        hidden=HIDDEN,
        norm="rms",
        norm_eps=1e-6,
        positions="relative",
        activation="relu",
        bias=False,
    ).eval()
    check = same(ours.norm, theirs.final_layer_norm)
    check += same(ours.positions.table, theirs.block[0].layer[0].SelfAttention.relative_attention_bias)
    scale = (D // HEADS) ** 0.5
    for a, b in zip(ours.layers, theirs.block, strict=True):
        inner, mlp = b.layer[0].SelfAttention, b.layer[-1].DenseReluDense
        linear(a.attention.qkv, inner.q, inner.k, inner.v)
        a.attention.qkv.weight.data[:D] *= scale
        check.append(
            (
                a.attention.qkv.weight,
                lambda m=inner: torch.cat([m.q.weight.grad / scale, m.k.weight.grad, m.v.weight.grad]),
            )
        )
        check += linear(a.attention.out, inner.o) + linear(a.mlp.up, mlp.wi) + linear(a.mlp.down, mlp.wo)
        check += same(a.norm1, b.layer[0].layer_norm) + same(a.norm2, b.layer[-1].layer_norm)
    mask = (torch.arange(length) < torch.tensor([[length], [140]])).long()
    compare(
        ours,
        lambda x: theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state,
        torch.randn(B, length, D),
        mask,
        check=check,
        causal=decoder,
    )
