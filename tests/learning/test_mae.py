"""MAE learns to go on with gratings of which it sees two fifths, and so which way they run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from selfsup.kernel.contracts import Raw, Signal, Step, Tower
from selfsup.kernel.random import tag
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.judges import probe
from selfsup.plugins.modalities.image import Image
from selfsup.plugins.objectives.mae import MAE
from selfsup.plugins.services.optimizer import Optimizers

KINDS, SIDE, LABELLED = 8, 16, 80
STEPS, BATCH = 400, 64


def gratings(count: int, seed: int) -> tuple[np.ndarray, Tensor]:
    """(uint8 images [count, SIDE, SIDE], orientations [count]), of which the phase and the noise say nothing."""
    rng = np.random.default_rng(seed)
    label = rng.integers(KINDS, size=count)
    angle, phase = (x[:, None, None] for x in (np.pi * label / KINDS, rng.uniform(0, 2 * np.pi, count)))
    row, column = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    wave = np.sin(0.8 * (row * np.sin(angle) + column * np.cos(angle)) + phase)
    image = 0.5 + 0.3 * wave + rng.normal(0, 0.06, (count, SIDE, SIDE))
    return (image.clip(0, 1) * 255).astype(np.uint8), torch.from_numpy(label)


def accuracy(model: MAE, bank: tuple[Signal, Tensor], query: tuple[Signal, Tensor]) -> float:
    """Of a linear probe on the features of the exported tower."""
    model.eval()
    tower = model.exports
    with torch.no_grad():
        known, asked = (tower(tower.modality.plain(raw)).mean() for raw, _ in (bank, query))
    model.train()
    return (probe(known, bank[1], asked).guess == query[1]).float().mean().item()


def test_it_rebuilds_what_it_does_not_see_and_tells_orientations_apart() -> None:
    torch.manual_seed(0)
    modality = Image(size=SIDE, canvas=SIDE, channels=1, patch=4, mean=(0.5,), std=(0.25,), flip_chance=0.0)
    encoder = Tower(modality.stem(64), Transformer(width=64, depth=2, heads=4, positions="sincos"), modality)
    decoder = Tower(Raw(), Transformer(width=32, depth=2, heads=2, positions="sincos"))
    model = MAE(encoder, decoder, mask_share=0.6, extent=(1.0, 1.0))
    (images, labels), (queries, answers) = gratings(1300, 0), gratings(400, 1)
    data, asked = (modality.collate([modality.read(image) for image in x]) for x in (images, queries))
    bank = Signal(data.x[:LABELLED], positions=data.positions[:LABELLED]), labels[:LABELLED]
    before = accuracy(model, bank, (asked, answers))

    service = Optimizers(lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=0.1)
    run = SimpleNamespace(optimizer=service.build_optimizer(model, BATCH))
    history = []
    for number in range(STEPS):
        step = Step(number, STEPS)
        epoch, place = divmod(number * BATCH, len(images) // BATCH * BATCH)
        chosen = torch.from_numpy(np.random.default_rng(epoch).permutation(len(images))[place : place + BATCH])
        raw = Signal(data.x[chosen], positions=data.positions[chosen])
        service.step_started(run=run, step=step)
        loss = model({"encoder": raw, "ids": tag(epoch, chosen)}, step)
        loss.total.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        history.append(float(loss.total.detach()))

    after = accuracy(model, bank, (asked, answers))
    last = sum(history[-20:]) / 20
    assert last < 0.75, last  # predicting the mean of each patch: 15 / 16
    assert after > before + 0.15, (before, after)
