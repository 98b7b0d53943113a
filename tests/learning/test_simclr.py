"""SimCLR learns the orientation of gratings whose phase, frequency, contrast and noise say nothing about it."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from selfsup.kernel.contracts import Signal, Step, Tower
from selfsup.kernel.random import tag
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.modalities.image import Image
from selfsup.plugins.objectives.simclr import SimCLR
from selfsup.plugins.services.optimizer import Optimizers

KINDS, SIDE, LABELLED = 8, 16, 160
STEPS, BATCH = 110, 96


def gratings(count, seed):
    """(uint8 images [count, SIDE, SIDE], orientations [count])."""
    rng = np.random.default_rng(seed)
    label = rng.integers(KINDS, size=count)
    angle, frequency, phase, contrast = (
        x[:, None, None]
        for x in (
            np.pi * label / KINDS,
            rng.uniform(0.8, 1.6, count),
            rng.uniform(0, 2 * np.pi, count),
            rng.uniform(0.3, 1, count),
        )
    )
    row, column = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    wave = np.sin(frequency * (row * np.sin(angle) + column * np.cos(angle)) + phase)
    image = 0.5 + 0.3 * contrast * wave + rng.normal(0, 0.12, (count, SIDE, SIDE))
    return (image.clip(0, 1) * 255).astype(np.uint8), torch.from_numpy(label)


def accuracy(model, bank, labels, query, answers):
    """Of the 5 nearest neighbours by cosine, among few labelled images, on the features of the exported tower."""
    model.eval()
    tower = model.exports
    with torch.no_grad():
        known, asked = (F.normalize(tower(tower.modality.plain(x)).mean(), dim=1) for x in (bank, query))
    model.train()
    votes = labels[(asked @ known.T).topk(5, 1).indices].mode(1).values
    return (votes == answers).float().mean().item()


def test_neighbours_agree_on_the_orientation():
    torch.manual_seed(0)
    modality = Image(size=SIDE, canvas=SIDE, channels=1, patch=4, flip_chance=0.0, grey_chance=0.0, blur_chance=0.0)
    tower = Tower(modality.stem(64), Transformer(width=64, depth=1, heads=4, positions="sincos"), modality)
    model = SimCLR(tower, extent=(0.4, 1.0), width=32, layers=2)
    (images, labels), (queries, answers) = gratings(2000, 0), gratings(500, 1)
    data, query = (modality.collate([modality.read(image) for image in x]) for x in (images, queries))
    bank = Signal(data.x[:LABELLED], positions=data.positions[:LABELLED])
    before = accuracy(model, bank, labels[:LABELLED], query, answers)

    service = Optimizers(lr=6e-3, weight_decay=0.05, warmup=0.1)
    run = SimpleNamespace(optimizer=service.build_optimizer(model, BATCH))
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

    after = accuracy(model, bank, labels[:LABELLED], query, answers)
    assert after > before + 0.3, (before, after)
    assert after > 0.55
    assert loss.metrics["spread"] > 0.05
