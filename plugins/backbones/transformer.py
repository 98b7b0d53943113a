"""The transformer (Vaswani et al. 2017, "Attention is all you need", https://arxiv.org/abs/1706.03762).

    pre-norm     x <- x + attention(norm1(x));  x <- x + mlp(norm2(x));  norm(x) after the last layer
    post-norm    x <- norm1(x + attention(x));  x <- norm2(x + mlp(x))

One class serves the families, by their options (what is not named is the default):

    ViT, MAE      positions = sincos, norm_eps = 1e-6
    GPT-2         activation = gelu_tanh, init_residual, dropouts 0.1
    BERT          norm_first = false, input_norm, norm_eps = 1e-12, dropouts 0.1
    wav2vec 2.0   norm_first = false, input_norm, positions = conv, dropouts 0.1, layer_drop = 0.05
    LLaMA         norm = rms, positions = rotary, activation = swiglu, bias = false, kv_heads
    T5            norm = rms, positions = relative, activation = relu, bias = false; as a decoder, cross

T5 leaves out the 1 / sqrt(d) of attention and folds it into its initial weights; here it stays, so T5's
query weights times sqrt(d) are ours. BERT's and GPT-2's token tables belong to the stem.

Shapes: B batch, T tokens, D width, H heads, F hidden width of the feed-forward part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Backbone, Signal
from selfsup.kernel.errors import ConfigError, ContractError

from ..common.attention import CrossAttention, Scope, SelfAttention, cross_mask, self_mask
from ..common.block_attention import block_mask, gathered, serves, within
from ..common.masking import pick
from ..common.norm import Norm, token_norm
from ..common.positions import Conv, Learned, Relative, Rotary, SinCos
from ..common.transformer_layer import Activation, FeedForward, Layer

Positions = Literal["learned", "sincos", "rotary", "relative", "conv", "none"]


class Transformer(Backbone):
    """Layers of attention and feed-forward: [B, T, D] -> [B, T, D]; an encoder, or with `causal` a decoder.

    Output at padding is finite and means nothing. Sequences packed into one row do not see each other.
    The draws of dropout and drop path come from torch's generator; `layer_drop` draws from the step, so
    that all processes, microbatches and passes of one step leave out the same layers.

    Linear weights and tables start from normal(0, 0.02), biases from 0 (BERT, GPT-2). `init_residual`
    divides the start of the n projections that write to the residual stream (two a layer, three with
    cross-attention) by sqrt(n), as GPT-2 does.
    """

    def __init__(
        self,
        *,
        width: Annotated[int, about("channels of a token", ge=1)] = 768,
        depth: Annotated[int, about("layers", ge=1)] = 12,
        heads: Annotated[int, about("heads of attention; they divide the width", ge=1)] = 12,
        kv_heads: Annotated[int | None, about("heads of keys and values; None: as many as heads", ge=1)] = None,
        hidden: Annotated[
            int | None,
            about("width of the feed-forward part; None: 4 x width, for swiglu 8/3 x to a multiple of 64", ge=1),
        ] = None,
        norm: Annotated[Norm, about("LayerNorm, or RMSNorm")] = "layer",
        norm_first: Annotated[bool, about("norm before each part and after all (pre-norm), or after each")] = True,
        norm_eps: Annotated[float, about("added to the variance", gt=0)] = 1e-5,
        input_norm: Annotated[bool, about("norm of tokens plus positions before the first layer")] = False,
        activation: Annotated[Activation, about("of the feed-forward part")] = "gelu",
        positions: Annotated[Positions, about("how tokens know where they are")] = "learned",
        length: Annotated[int, about("learned positions", ge=1)] = 512,
        conv_kernel: Annotated[int, about("tokens that a convolutional position spans", ge=1)] = 128,
        conv_groups: Annotated[int, about("groups of convolutional positions; they divide the width", ge=1)] = 16,
        bias: Annotated[bool, about("biases in linear layers")] = True,
        dropout: Annotated[float, about("of tokens plus positions, and of what layers add", ge=0, lt=1)] = 0.0,
        attention_dropout: Annotated[float, about("of attention weights", ge=0, lt=1)] = 0.0,
        activation_dropout: Annotated[float, about("within the feed-forward part", ge=0, lt=1)] = 0.0,
        drop_path: Annotated[float, about("share of samples that skip the last layer; grows from 0", ge=0, lt=1)] = 0.0,
        layer_drop: Annotated[float, about("chance that a step leaves out a layer", ge=0, lt=1)] = 0.0,
        cross: Annotated[bool, about("attention to a context, for decoders")] = False,
        packed: Annotated[int, about("most sequences in one row", ge=1)] = 64,
        init_residual: Annotated[bool, about("smaller first weights at the ends of residual branches")] = False,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        hidden = hidden or (math.ceil(8 * width / 3 / 64) * 64 if activation == "swiglu" else 4 * width)
        self.width, self.layer_drop, self.cross = width, layer_drop, cross
        self.packed = 1 if positions == "conv" else packed
        self.positions = make_positions(positions, width, heads, length, conv_kernel, conv_groups)
        self.input_norm = token_norm(norm, width, norm_eps) if input_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(
                attention=SelfAttention(width, heads, kv_heads, bias, attention_dropout),
                cross=CrossAttention(width, heads, kv_heads, bias, attention_dropout) if cross else None,
                mlp=FeedForward(width, hidden, activation, bias, activation_dropout),
                norms=[token_norm(norm, width, norm_eps) for _ in range(3 if cross else 2)],
                norm_first=norm_first,
                dropout=dropout,
                drop_path=drop_path * i / max(1, depth - 1) if drop_path else None,
            )
            for i in range(depth)
        )
        self.norm = token_norm(norm, width, norm_eps) if norm_first else nn.Identity()
        self.apply(start)
        if init_residual:
            self._shrink_residual()

    def forward(self, tokens: Signal, *, causal: bool = False, context: Signal | None = None) -> Signal:
        """Mix tokens [B, T, D]; `causal`: each sees itself and those before it in its row and segment.

        `context` [B, S, D] is what a backbone with `cross` looks at; its segments pair with the tokens'.
        """
        if self.cross != (context is not None):
            need = "needs a context to look at" if self.cross else "looks at no context; set backbone.cross = true"
            raise ContractError(f"a transformer with cross = {str(self.cross).lower()} {need}")
        if context is not None and context.x.shape[-1] != self.width:
            raise ContractError(
                f"this decoder is {self.width} wide and its context {context.x.shape[-1]}; make them equal"
            )
        signal = self.embed(within(tokens, self.packed, self._remedy()))
        restore: Tensor | None = None
        if self._in_blocks(signal):
            signal, restore = gathered(signal)
        scope = self.scope(signal, causal, context, blocks=restore is not None)
        x = signal.x
        for layer, dropped in zip(self.layers, self.dropped_layers(), strict=True):
            if not dropped:
                x = layer(x, scope)
        x = self.norm(x)
        if restore is not None:
            x = x.gather(1, restore[..., None].expand_as(x))
        return replace(tokens, x=x)

    def at(self, tokens: Signal, index: Tensor) -> Tensor:
        """The tokens at the places in `index` [B, M] of what `forward` gives: [B, M, D].

        In the last layer, what makes other tokens and no key or value is left out: five sixths of its work.
        """
        if self.cross or self._in_blocks(tokens):
            return super().at(tokens, index)
        signal = self.embed(within(tokens, self.packed, self._remedy()))
        scope, x = self.scope(signal, False, None, blocks=False), signal.x
        *first, last = zip(self.layers, self.dropped_layers(), strict=True)
        for layer, dropped in first:
            x = x if dropped else layer(x, scope)
        x = pick(x, index) if last[1] else last[0](x, scope.asking(index))
        out: Tensor = self.norm(x)
        return out

    def _in_blocks(self, tokens: Signal) -> bool:
        """Whether attention goes over sequences laid end to end."""
        return tokens.segments is not None and not isinstance(self.positions, Relative) and serves(tokens.x)

    def embed(self, tokens: Signal) -> Signal:
        """Tokens plus positions, normed and dropped out: what the first layer gets.

        Under autocast the residual stream that starts here is float32.
        """
        x = tokens.x.float() if torch.is_autocast_enabled(tokens.x.device.type) else tokens.x
        if isinstance(self.positions, Conv) and tokens.segments is not None:
            x = x.masked_fill(~tokens.real()[..., None], 0)  # the convolution would spread what padding holds
        if isinstance(self.positions, Learned | SinCos | Conv):
            x = x + self.positions(replace(tokens, x=x)).to(x.dtype)
        return replace(tokens, x=self.dropout(self.input_norm(x)))

    def scope(self, tokens: Signal, causal: bool, context: Signal | None, *, blocks: bool) -> Scope:
        """What all layers share; with `blocks`, tokens are sorted by segment."""
        bias = self.positions(tokens, causal) if isinstance(self.positions, Relative) else None
        sorted_segments = tokens.segments if blocks else None
        return Scope(
            causal=causal,
            mask=None if blocks else self_mask(tokens, causal, bias),
            turn=self.positions(tokens) if isinstance(self.positions, Rotary) else None,
            blocks=None if sorted_segments is None else block_mask(sorted_segments, self.packed, causal),
            context=None if context is None else context.x,
            context_mask=None if context is None else cross_mask(tokens, context),
        )

    def dropped_layers(self) -> list[bool]:
        """Which layers this pass leaves out (LayerDrop, Fan et al. 2019); decided on the host."""
        depth = len(self.layers)
        if not self.training or self.layer_drop == 0:
            return [False] * depth
        chance = torch.rand(depth) if self.step is None else self.step.draw_once("layer drop").uniform(depth)[0]
        dropped: list[bool] = (chance < self.layer_drop).tolist()
        return dropped

    def units(self) -> Iterable[nn.Module]:
        """The layers."""
        return self.layers

    @property
    def skips_parameters(self) -> bool:
        """True with layer drop: a layer left out gets no gradient."""
        return self.layer_drop > 0

    def _remedy(self) -> str:
        if isinstance(self.positions, Conv):
            return "convolutional positions reach across them: use backbone.positions = rotary or relative"
        return "raise backbone.packed"

    @torch.no_grad()
    def _shrink_residual(self) -> None:
        ends = [p for name, p in self.layers.named_parameters() if name.endswith((".out.weight", ".down.weight"))]
        for weight in ends:
            weight.div_(math.sqrt(len(ends)))


def make_positions(
    kind: Positions, width: int, heads: int, length: int, conv_kernel: int, conv_groups: int
) -> nn.Module | None:
    """The module behind `backbone.positions`; None for "none"."""
    if kind == "conv" and width % conv_groups:
        raise ConfigError(f"backbone.conv_groups = {conv_groups} does not divide backbone.width = {width}")
    if kind == "rotary" and (width // heads) % 2:
        raise ConfigError(
            f"rotary positions turn pairs of channels, and heads are {width // heads} wide: an odd number"
        )
    if kind == "learned":
        return Learned(length, width)
    if kind == "sincos":
        return SinCos(width)
    if kind == "rotary":
        return Rotary(width // heads)
    if kind == "relative":
        return Relative(heads)
    return Conv(width, conv_kernel, conv_groups) if kind == "conv" else None


def start(module: nn.Module) -> None:
    """First values of one module: normal(0, 0.02) for weights and tables, 0 for biases; others keep theirs."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
