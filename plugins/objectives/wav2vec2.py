"""wav2vec 2.0: tell the true quantised latent of a hidden frame from others of the same utterance.

Baevski, Zhou, Mohamed, Auli 2020, "wav2vec 2.0: A framework for self-supervised learning of speech
representations", https://arxiv.org/abs/2006.11477. Spans of frames are hidden from the transformer. For
a hidden frame with context c, quantised latent q and K negatives from the other hidden frames of its
utterance (eq. 3, sim the cosine, k the temperature),

    L_m = -log exp(sim(c, q) / k) / sum_{q' in {q} + negatives} exp(sim(c, q') / k)

    L = mean L_m + diversity * (G V - sum_g PPL_g) / (G V) + penalty * mean z^2

PPL_g is the perplexity of the softmax over the entries of codebook g, averaged over all hidden frames and
without noise: the form of eq. 4 that the authors trained with. z are the latents before their normalisation.

What differs from the paper, and why:

* The Gumbel temperature falls with the share of the run that is done, not with the step number: a
  factor of 0.999995 a step meets its floor after 277,258 steps, which a shorter run never sees.
  `cooling` = 0.693 and 400,000 steps are the paper's BASE, 1.0 and 600,000 its LARGE.
* Every utterance is hidden as its own length says; the authors' code trims all rows of a batch to the row
  with the fewest hidden frames (see `triton_ops/masks_span.py`).
* z^2 is averaged over the real frames of an utterance, and utterances by their hidden frames, where the
  authors average over the batch with its padding. So the mean is the same however a batch is split.

A batch split over processes gives the loss and gradient of the whole. Split into microbatches, so do L_m and
the penalty; PPL, which is not linear in the batch, is then that of each microbatch.

Shapes: B utterances, T frames, L width of a latent, D of the backbone, W of the projections, M the most
frames that can be hidden, K negatives, G groups of V codebook entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from selfsup.kernel import Batch, Loss, Objective, Shown, Signal, Stem, Step, Stream, Tower, about
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.plugins.common.masking import pack, pick
from selfsup.plugins.common.quantize import GumbelQuantizer, Quantized, perplexity, usage
from selfsup.triton_ops.masks_span import Spans, capacity, span_mask


class Wav2Vec2(Objective):
    """Pick a hidden frame's quantised latent out of 101; learns speech from sound alone."""

    towers = ("encoder",)
    paper = "Baevski et al. 2020, wav2vec 2.0, https://arxiv.org/abs/2006.11477"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {  # BASE on LibriSpeech, section 4.2
            "modality.name": "audio",
            "modality.longest": 15.625,
            "backbone.name": "transformer",
            "backbone.width": 768,
            "backbone.depth": 12,
            "backbone.heads": 12,
            "backbone.norm_first": False,
            "backbone.input_norm": True,
            "backbone.positions": "conv",
            "backbone.dropout": 0.1,
            "backbone.attention_dropout": 0.1,
            "backbone.layer_drop": 0.05,
            "optimizer.name": "adamw",
            "optimizer.lr": 5e-4,
            "optimizer.betas": (0.9, 0.98),
            "optimizer.eps": 1e-6,
            "optimizer.weight_decay": 0.01,
            "optimizer.schedule": "linear",
            "optimizer.warmup": 0.08,
            "optimizer.reference_batch": 360,
            "train.steps": 400_000,
            "train.batch": 360,  # 64 GPUs of 1.4 million samples are 358.4 crops, 1.56 hours
        },
        "large": {  # LARGE on LibriVox, section 4.2; 128 GPUs of 1.2 million samples
            "objective.width": 768,
            "objective.cold": 0.1,
            "objective.cooling": 1.0,
            "objective.penalty": 0.0,
            "objective.feature_scale": 1.0,
            "modality.longest": 20.0,
            "modality.conv_norm": "layer",
            "modality.conv_bias": True,
            "backbone.width": 1024,
            "backbone.depth": 24,
            "backbone.heads": 16,
            "backbone.norm_first": True,
            "backbone.input_norm": False,
            "backbone.layer_drop": 0.0,
            "optimizer.lr": 3e-4,
            "optimizer.reference_batch": 480,
            "train.steps": 600_000,
            "train.batch": 480,
        },
        "tiny": {  # minutes on two CPU cores; frames of 20 ms as in base, from sound at half the rate
            "objective.width": 64,
            "objective.entries": 64,
            "objective.negatives": 50,
            "objective.hot": 1.0,
            "objective.mask_length": 5,
            "objective.diversity": 0.3,
            "objective.penalty": 1.0,
            "objective.feature_scale": 1.0,
            "objective.dropout_input": 0.0,
            "objective.dropout_features": 0.0,
            "modality.rate": 8000,
            "modality.longest": 3.0,
            "modality.layers": ((64, 10, 5), (64, 8, 4), (64, 8, 8)),
            "backbone.width": 128,
            "backbone.depth": 2,
            "backbone.heads": 4,
            "backbone.conv_kernel": 32,
            "backbone.conv_groups": 8,
            "backbone.dropout": 0.0,
            "backbone.attention_dropout": 0.0,
            "backbone.layer_drop": 0.0,
            "optimizer.lr": 2e-3,
            "optimizer.reference_batch": 16,
            "train.steps": 600,
            "train.batch": 16,
        },
    }

    def __init__(
        self,
        encoder: Tower,
        *,
        width: Annotated[int, about("of the quantised latents and of both projections", ge=1)] = 256,
        groups: Annotated[int, about("codebooks; they share `width`", ge=1)] = 2,
        entries: Annotated[int, about("of each codebook", ge=2)] = 320,
        temperature: Annotated[float, about("of the contrast, k in eq. 3", ge=0.02)] = 0.1,
        negatives: Annotated[int, about("drawn for each hidden frame", ge=1)] = 100,
        hot: Annotated[float, about("Gumbel temperature at the start", gt=0)] = 2.0,
        cold: Annotated[float, about("Gumbel temperature at the end", gt=0)] = 0.5,
        cooling: Annotated[float, about("share of the run in which hot becomes cold", gt=0, le=1)] = 0.693,
        mask_share: Annotated[float, about("frames in spans, were there no overlaps", gt=0, lt=1)] = 0.65,
        mask_length: Annotated[int, about("frames of a span", ge=1)] = 10,
        least_spans: Annotated[int, about("of an utterance, shortened to fit", ge=1)] = 2,
        diversity: Annotated[float, about("weight of unused codebook entries", ge=0)] = 0.1,
        penalty: Annotated[float, about("weight of the squared latents", ge=0)] = 10.0,
        feature_scale: Annotated[float, about("of the gradient into the convolutions", ge=0)] = 0.1,
        dropout_input: Annotated[float, about("of what the backbone sees", ge=0, lt=1)] = 0.1,
        dropout_features: Annotated[float, about("of what is quantised", ge=0, lt=1)] = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(encoder.stem, Stem):
            raise ContractError("wav2vec 2.0 quantises what a stem sees, and this backbone has none; try a transformer")
        if width % groups:
            raise ConfigError(f"objective.width = {width} cannot be shared by {groups} groups; choose a multiple")
        self.encoder, self.negatives, self.temperature = encoder, negatives, temperature
        self.hot, self.cold, self.cooling = hot, cold, cooling
        self.spans = Spans(mask_share, mask_length, least_spans)
        self.diversity, self.penalty, self.feature_scale = diversity, penalty, feature_scale
        self.dropout_input, self.dropout_features = nn.Dropout(dropout_input), nn.Dropout(dropout_features)
        self.hidden = nn.Parameter(torch.rand(encoder.width))
        self.quantize = GumbelQuantizer(encoder.stem.width, width, groups=groups, entries=entries)
        self.project_target = nn.Linear(width, width)
        self.project_context = nn.Linear(encoder.width, width)

    def forward(self, batch: Batch, step: Step) -> Loss:
        """Hide, draw the negatives and the noise, and score; every draw is a function of the utterance's id."""
        ids = batch["ids"]
        local = self.latents(batch["encoder"])  # [B, T, L]
        hidden = span_mask(step.draw("mask", ids), local.real(), self.spans)  # [B, T]
        size = capacity(hidden.shape[1], self.spans)
        negatives = others(step.draw("negatives", ids), hidden.sum(1), size, self.negatives)  # [B, M, K]
        noise = step.draw("gumbel", ids) if self.training else None
        return self.score(local, hidden, negatives, noise, self.gumbel_temperature(step))

    def gumbel_temperature(self, step: Step) -> float:
        """From `hot` to `cold`, by equal factors over the first `cooling` of the run."""
        cooled = min(1.0, step.fraction / self.cooling)
        return self.hot * math.exp(cooled * math.log(self.cold / self.hot))

    def latents(self, raw: Signal) -> Signal:
        """What the convolutions see, before its normalisation: [B, T, L]. Scales the gradient on its way back."""
        local: Signal = self.encoder.stem.latents(raw)
        return replace(local, x=_ScaleGradient.apply(local.x, self.feature_scale))  # type: ignore[no-untyped-call]

    def score(
        self, local: Signal, hidden: Tensor, negatives: Tensor, noise: Stream | Tensor | None, gumbel: float
    ) -> Loss:
        """The loss of given choices.

        local: latents [B, T, L]. hidden: [B, T] bool. negatives: [B, M, K], for each hidden frame the numbers of K
        others among the hidden frames of its utterance. noise: of a stream, or ready made [B, M, G, V], or None, at the
        temperature `gumbel`.
        """
        losses, right, valid, target = self.guesses(local, hidden, negatives, noise, gumbel)
        exact = self.hidden.dtype
        with torch.autocast(losses.device.type, enabled=False):
            spread = perplexity(usage(target.logits.softmax(-1), valid))
            with torch.no_grad():
                chosen = torch.zeros_like(target.logits).scatter_(-1, target.logits.argmax(-1, keepdim=True), 1.0)
                codes = perplexity(usage(chosen, valid))
            counts = hidden.sum(1)  # [B]
            number = counts.sum().clamp(min=1)
            mean = torch.where(valid, losses, 0.0).sum() / number
            total = mean + self.diversity * (1 - spread / self.quantize.size)
            if self.penalty:
                total = total + self.penalty * (squares(local.x.to(exact), local.real()) * counts).sum() / number
        metrics = {
            "contrast": mean.detach(),
            "accuracy": (right & valid).sum() / number,
            "perplexity": spread.detach(),
            "code_perplexity": codes,
            "gumbel_temperature": torch.full_like(codes, gumbel),
            "hidden": number / local.real().sum().clamp(min=1),
        }
        return Loss(total, metrics, weight=counts.sum())

    def guesses(
        self, local: Signal, hidden: Tensor, negatives: Tensor, noise: Stream | Tensor | None, gumbel: float
    ) -> tuple[Tensor, Tensor, Tensor, Quantized]:
        """Loss, whether the truth wins, and whether there is any hidden frame there, [B, M] each; and the targets."""
        index, valid = pack(hidden, negatives.shape[1])  # [B, M]
        normed = self.encoder.stem.norm(local.x)  # [B, T, L]
        tokens = replace(local, x=self.dropout_input(self.encoder.stem.project(normed)))  # [B, T, D]
        context = pick(self.encoder.backbone(tokens.fill(hidden, self.hidden)).x, index)  # [B, M, D]
        with torch.autocast(
            context.device.type, enabled=False
        ):  # what follows is small, and logarithms are not for bf16
            exact = self.hidden.dtype
            features = self.dropout_features(pick(normed, index)).to(exact)  # [B, M, L]
            target = self.quantize(features, noise, gumbel)
            guess, truth = self.project_context(context.to(exact)), self.project_target(target.vectors)  # [B, M, W]
            losses, right = contrast(guess, truth, target.codes, negatives, self.temperature)  # [B, M]
        return losses, right, valid, target

    @torch.no_grad()
    def show(self, batch: Batch, step: Step, guess: bool = True) -> Mapping[str, Sequence[Shown]]:
        """Each sample without its hidden frames; the guess is the chance given to the truth at each of these.

        Frames are shown side by side over the whole sample: within the receptive field of where they are.
        """
        local, ids = self.latents(batch["encoder"]), batch["ids"]
        hidden = span_mask(step.draw("mask", ids), local.real(), self.spans)  # [B, T]
        frames = local.real().sum(1).tolist()
        masks = [row[:count].numpy() for row, count in zip(hidden.cpu(), frames, strict=True)]
        samples = self.encoder.modality.show(batch["encoder"])
        shown: dict[str, Sequence[Shown]] = {
            "sample": samples,
            "what the model sees": list(map(without, samples, masks)),
        }
        if not guess:
            return shown
        size = capacity(hidden.shape[1], self.spans)
        negatives = others(step.draw("negatives", ids), hidden.sum(1), size, self.negatives)  # [B, M, K]
        losses = self.guesses(local, hidden, negatives, None, self.gumbel_temperature(step))[0]
        chances = [np.full(count, np.nan, np.float32) for count in frames]
        for row, mask, chance in zip((-losses).exp().cpu().numpy(), masks, chances, strict=True):
            chance[mask] = row[: int(mask.sum())]
        return {**shown, f"chance given to the truth among {self.negatives + 1}, 0 to 1": chances}


def without(sample: Shown, hidden: np.ndarray[Any, Any]) -> Shown:
    """A curve [N] with gaps where frames [T] are hidden; of what is no curve, the frames as marked text."""
    if isinstance(sample, np.ndarray) and sample.ndim == 1:
        return np.where(hidden[np.arange(len(sample)) * len(hidden) // len(sample)], np.float32(np.nan), sample)
    return [("■" if is_hidden else "·", "hidden" if is_hidden else "") for is_hidden in hidden]


def others(draw: Stream, counts: Tensor, size: int, k: int) -> Tensor:
    """For each of the `size` places of a row with counts [B] hidden frames, k others of them, alike likely: [B, M, k].

    Alone, a frame gets itself, which `contrast` leaves out as it does every negative of the same code.
    """
    last = (counts - 1).clamp(min=0)[:, None, None]  # [B, 1, 1]
    own = torch.arange(size, device=counts.device)[:, None]  # [M, 1]
    drawn = draw.integers(last, size, k)  # [B, M, K], in [0, counts - 1)
    return (drawn + (drawn >= own)).minimum(last)


def contrast(
    guess: Tensor, truth: Tensor, codes: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Eq. 3 for every guess [B, M, W], and whether its truth beats all negatives: [B, M] both.

    A negative with the codes [B, M, G] of the truth is the truth, and is left out. The cosines of all pairs of an
    utterance are one product [B, M, M], of which the negatives are read: their vectors, [B, M, K, W], are never made.
    """
    cosines = F.normalize(guess, dim=-1) @ F.normalize(truth, dim=-1).transpose(1, 2)  # [B, M, M]
    rows = torch.arange(len(codes), device=codes.device)[:, None, None]  # [B, 1, 1]
    same = (codes[rows, negatives] == codes[:, :, None]).all(-1)  # [B, M, K]
    wrong = (cosines.gather(2, negatives) / temperature).masked_fill(same, -torch.inf)  # [B, M, K]
    true = cosines.diagonal(dim1=1, dim2=2) / temperature  # [B, M]
    losses = torch.cat([true[..., None], wrong], -1).logsumexp(-1) - true  # [B, M]
    # Where all negatives are the truth the codebook has collapsed, and nothing was beaten.
    return losses, (true[..., None] > wrong).all(-1) & ~same.all(-1)


def squares(x: Tensor, real: Tensor) -> Tensor:
    """The mean square of each row of x [B, T, L], over the frames that are real [B, T]: [B]."""
    each = x.square().mean(-1)  # [B, T]
    return torch.where(real, each, 0.0).sum(1) / real.sum(1).clamp(min=1)


class _ScaleGradient(Function):
    """x forward, the gradient times `scale` backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None
