"""wav2vec 2.0 learns: tones that glide up and start again, each utterance at a tempo of its own.

What a hidden stretch sounded like follows from the slope of what is heard around it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selfsup.kernel import Signal, Step, Tower
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.modalities.audio import Audio
from selfsup.plugins.objectives.wav2vec2 import Wav2Vec2

BATCH, FRAMES, STEPS = 16, 80, 110


def glides(generator: torch.Generator) -> Tensor:
    """[B, N] at 20 samples a frame; a glide takes 12 to 24 frames."""
    time = torch.arange(20 * FRAMES + 15) / 20
    frames = torch.empty(BATCH, 1).uniform_(12, 24, generator=generator)
    place = (torch.rand(BATCH, 1, generator=generator) + time / frames) % 1
    cycles = (0.02 + 0.2 * place).cumsum(1)
    return torch.sin(2 * math.pi * cycles) + 0.05 * torch.randn(place.shape, generator=generator)


def test_wav2vec2_learns_to_tell_the_hidden_sound_from_others() -> None:
    torch.manual_seed(0)
    audio = Audio(rate=2000, layers=((32, 10, 5), (32, 4, 4)), shortest=0)
    backbone = Transformer(
        width=64, depth=2, heads=4, norm_first=False, input_norm=True, positions="conv", conv_kernel=16, conv_groups=4
    )
    objective = Wav2Vec2(
        Tower(audio.stem(64), backbone, audio),
        width=32,
        entries=32,
        negatives=30,
        mask_length=4,
        hot=1.0,
        penalty=1.0,
        feature_scale=1.0,
        dropout_input=0.0,
        dropout_features=0.0,
    ).train()
    optimizer = torch.optim.AdamW(objective.parameters(), betas=(0.9, 0.98), fused=True)
    generator, history = torch.Generator().manual_seed(0), []
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (number + 1) / 20)
        batch = {"encoder": Signal(glides(generator)), "ids": torch.arange(BATCH) + number * BATCH}
        loss = objective(batch, Step(number, STEPS))
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.metrics)
    first, last = ({k: sum(float(m[k]) for m in part) / 10 for k in part[0]} for part in (history[:10], history[-10:]))
    assert first["accuracy"] < 0.1
    assert last["accuracy"] > 0.25  # of 31, by chance 0.03
    assert last["contrast"] < first["contrast"] - 1
    assert last["code_perplexity"] > 20  # of 64: not collapsed
