"""MAE against transformers' ViTMAEForPreTraining on shared weights, and what it promises beyond."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from selfsup.kernel.compose import build, resolve
from selfsup.kernel.contracts import Modality, Raw, Signal, Step, Tower
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.plugins.backbones.resnet import ResNet
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.patch_stem import PatchStem
from selfsup.plugins.modalities.audio import Audio
from selfsup.plugins.modalities.image import Image
from selfsup.plugins.objectives.mae import MAE
from selfsup.plugins.services.optimizer import partition

SIZE, PATCH, CHANNELS, PATCHES = 24, 4, 3, 36
WIDTHS = {"encoder": 32, "decoder": 16}
STEP = Step(3, 10, seed=7)


def backbone(width: int, depth: int) -> Transformer:
    return Transformer(width=width, depth=depth, heads=4, positions="sincos", norm_eps=1e-6)


def objective(modality: Modality | None = None, **options: object) -> MAE:
    torch.manual_seed(0)
    modality = modality or Image(size=SIZE, canvas=SIZE, patch=PATCH, channels=CHANNELS)
    towers = [Tower(modality.stem(32), backbone(32, 2), modality), Tower(Raw(), backbone(16, 2))]
    return MAE(*towers, **options)


def photos(count: int = 3, seed: int = 0) -> Signal:
    rng = np.random.default_rng(seed)
    return Signal(torch.from_numpy(rng.integers(0, 256, (count, CHANNELS, SIZE, SIZE), dtype=np.uint8)))


def batch_of(raw: Signal) -> dict[str, object]:
    return {"encoder": raw, "ids": torch.arange(len(raw.x)) + 5}


# --- conformance


def peer(norm_pixels: bool) -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        image_size=SIZE,
        patch_size=PATCH,
        num_channels=CHANNELS,
        hidden_size=WIDTHS["encoder"],
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * WIDTHS["encoder"],
        decoder_hidden_size=WIDTHS["decoder"],
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=4 * WIDTHS["decoder"],
        layer_norm_eps=1e-6,
        mask_ratio=0.75,
        norm_pix_loss=norm_pixels,
    )
    return ViTMAEForPreTraining(config)


RENAMED = {  # ours -> theirs; {} is the number of a layer
    "mask_token": "decoder.mask_token",
    "project": "decoder.decoder_embed",
    "head": "decoder.decoder_pred",
    "encoder.stem.token": "vit.embeddings.cls_token",
    "encoder.stem.patches.embed": "vit.embeddings.patch_embeddings.projection",
    "encoder.backbone.norm": "vit.layernorm",
    "decoder.backbone.norm": "decoder.decoder_norm",
    "encoder.backbone.layers.": "vit.layers.",
    "decoder.backbone.layers.": "decoder.decoder_layers.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".mlp.up.": ".mlp.fc1.",
    ".mlp.down.": ".mlp.fc2.",
    ".attention.out.": ".attention.o_proj.",
}


def partners(theirs: nn.Module, name: str) -> list[Tensor]:
    """Their parameters behind one of ours: one, or three where we hold one matrix."""
    for our_part, their_part in RENAMED.items():
        if name == our_part or name.startswith(our_part + ".") or our_part[-1] == ".":
            name = name.replace(our_part, their_part)
    names = [name.replace(".qkv.", f".{part}_proj.") for part in "qkv"] if ".qkv." in name else [name]
    return [theirs.get_parameter(each) for each in names]


def alike(ours: Tensor, theirs: list[Tensor]) -> Tensor:
    """Theirs in the shape of ours: a convolution over patches is our matrix, values by (row, column, channel)."""
    whole = torch.cat(theirs)
    if whole.ndim == 4:
        whole = whole.permute(0, 2, 3, 1)
    return whole.reshape(ours.shape)


def share_weights(ours: MAE, theirs: ViTMAEForPreTraining) -> None:
    """Random ones, away from special first values; and our table of positions, which theirs leaves at zeros."""
    used = set()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1) * 0.3)
        for name, parameter in ours.named_parameters():
            found = partners(theirs, name)
            used |= {id(p) for p in found}
            parameter.copy_(alike(parameter, found))
        where = ours.encoder.stem(Signal(torch.zeros(1, CHANNELS, SIZE, SIZE).double())).positions
        for tower, table in (
            (ours.encoder, theirs.vit.embeddings.position_embeddings),
            (ours.decoder, theirs.decoder.decoder_pos_embed),
        ):
            table.copy_(tower.backbone.positions(Signal(torch.zeros(1, PATCHES + 1, 1), positions=where)))
            assert (table[:, 0] == 0).all()
            assert len(table[0].unique(dim=0)) == PATCHES + 1
    idle = [name for name, p in theirs.named_parameters() if p.requires_grad and id(p) not in used]
    assert not idle, f"no partner of ours: {idle}"


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_and_gradients_are_those_of_transformers(norm_pixels: bool) -> None:
    ours = objective(norm_pixels=norm_pixels).double()
    theirs = peer(norm_pixels).double()
    share_weights(ours, theirs)
    x, noise = torch.randn(3, CHANNELS, SIZE, SIZE).double(), torch.rand(3, PATCHES)
    want = theirs(x, noise=noise)
    assert want.mask.sum(1).tolist() == [27, 27, 27]

    got = ours.score(ours.encoder.stem.cut(Signal(x)), want.mask.bool())
    assert got.weight == 3 * 27
    torch.testing.assert_close(got.total, want.loss, rtol=1e-12, atol=0)
    got.total.backward()
    want.loss.backward()
    for name, parameter in ours.named_parameters():
        grad = alike(parameter, [p.grad for p in partners(theirs, name)])
        # A bias of keys changes no softmax: its gradient is rounding, so it is measured as part of its vector.
        assert (parameter.grad - grad).norm() <= 1e-10 * grad.norm(), name
        assert grad.norm() > 0, name


def test_the_guesses_are_those_of_transformers_at_hidden_patches() -> None:
    ours, theirs = objective().double(), peer(True).double()
    share_weights(ours, theirs)
    x = torch.randn(2, CHANNELS, SIZE, SIZE).double()
    want = theirs(x, noise=torch.rand(2, PATCHES))
    with torch.no_grad():
        guess, mask = ours.guess(ours.encoder.stem.cut(Signal(x)), want.mask.bool())
    assert mask.hide_real.all()
    torch.testing.assert_close(guess, want.logits[torch.arange(2)[:, None], mask.hide], rtol=0, atol=1e-10)


# --- what is seen and what is not


def test_the_count_is_exact_and_the_choice_is_the_samples_own() -> None:
    model, raw = objective(), photos(6)
    batch = batch_of(raw)
    patches = model.encoder.stem.cut(model.view(batch, STEP))
    hidden = model.hide(patches, batch, STEP).hidden
    assert (hidden.sum(1) == 27).all()
    assert len(hidden.unique(dim=0)) == 6
    some = [4, 1]
    part = {"encoder": Signal(raw.x[some]), "ids": batch["ids"][some]}
    assert torch.equal(model.hide(model.encoder.stem.cut(model.view(part, STEP)), part, STEP).hidden, hidden[some])
    assert not torch.equal(model.hide(patches, {"ids": batch["ids"] + 2**40}, STEP).hidden, hidden), "the next epoch"


def test_the_encoder_gets_visible_patches_alone() -> None:
    """Whatever is behind hidden patches, the guesses are the same; and so few tokens go through the encoder."""
    model = objective()
    patches = model.encoder.stem.cut(Signal(torch.randn(2, CHANNELS, SIZE, SIZE)))
    mask = model.hide(patches, {"ids": torch.arange(2)}, STEP)
    other = replace(patches, x=torch.where(mask.hidden[..., None], torch.nan, patches.x))
    seen = []
    for part in (model.encoder.stem.patches.embed, model.encoder.backbone, model.head):
        part.register_forward_pre_hook(lambda _, given: seen.append(getattr(given[0], "x", given[0]).shape[1]))
    with torch.no_grad():
        assert torch.equal(model.guess(patches, mask)[0], model.guess(other, mask)[0])
    assert seen[:3] == [9, 10, 27], "patches embedded; tokens of the encoder; patches rebuilt"


def test_the_loss_is_the_error_at_hidden_patches_alone() -> None:
    """Visible patches are no targets: the loss is the definition's, worked out patch by patch from the guesses."""
    model = objective()
    patches = model.encoder.stem.cut(Signal(torch.randn(2, CHANNELS, SIZE, SIZE)))
    mask = model.hide(patches, {"ids": torch.arange(2)}, STEP)
    with torch.no_grad():
        loss, (guess, _) = model.score(patches, mask), model.guess(patches, mask)
    errors = []
    for row in range(2):
        assert mask.hide[row].tolist() == mask.hidden[row].nonzero()[:, 0].tolist()
        for values, place in zip(guess[row], mask.hide[row], strict=True):
            x = patches.x[row, place].double()
            target = (x - x.sum() / 48) / (((x - x.sum() / 48) ** 2).sum() / 47 + 1e-6).sqrt()
            errors.append(((values - target) ** 2).mean())
    assert float(loss.total) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert loss.weight == len(errors) == 54
    with torch.no_grad():
        assert model.score(patches, mask.hidden) == loss, "a mask of one's own"


def test_predicting_the_mean_explains_nothing() -> None:
    """Normalised patches have mean 0 and, with the unbiased variance, a mean square of 47 / 48."""
    model = objective()
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        loss = model(batch_of(photos()), STEP)
    assert float(loss.total) == pytest.approx(47 / 48, rel=1e-4)
    assert float(loss.metrics["explained"]) == pytest.approx(0, abs=1e-5)


# --- padded rows


class Series(Modality):
    """[B, N] in blocks of four, padded."""

    field = "series"

    def collate(self, raws, draw=None):
        lengths = torch.tensor([len(raw) for raw in raws])[:, None]
        x = nn.utils.rnn.pad_sequence(list(raws), batch_first=True, padding_value=9.0)
        return Signal(x, segments=(torch.arange(x.shape[1]) < lengths).int())

    def stem(self, width):
        return Blocks(4, width)

    def view(self, raw, extent, draw, strength=1.0):
        return raw


class Blocks(PatchStem):
    def cut(self, raw):
        return Signal(raw.x.unflatten(1, (-1, 4)), raw.segments[:, ::4])


@pytest.mark.parametrize("class_token", [True, False])
def test_padding_is_no_part_of_the_loss(class_token: bool) -> None:
    """Two rows of unequal length together are as good as each alone, averaged by what they hide."""
    model = objective(Series(), class_token=class_token)
    raws = [torch.randn(48), torch.randn(20)]
    ids = torch.arange(2)

    def loss(rows: list[int]):
        raw = model.encoder.modality.collate([raws[row] for row in rows])
        return model({"encoder": raw, "ids": ids[rows]}, STEP)

    both, first, second = loss([0, 1]), loss([0]), loss([1])
    assert [int(part.weight) for part in (both, first, second)] == [13, 9, 4]
    mean = (9 * first.total + 4 * second.total) / 13
    torch.testing.assert_close(both.total, mean, rtol=1e-5, atol=0)


# --- the rest


def test_linear_layers_start_xavier_uniform_and_tokens_normal() -> None:
    model = build(Plugins(), resolve(Plugins(), {"objective": {"name": "mae"}, "preset": "tiny"}))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.98 * bound < module.weight.abs().max() <= bound, name
            assert (module.bias == 0).all(), name
    for token in (model.mask_token, model.encoder.stem.token):
        assert 0.7 * 0.02 < token.std() < 1.3 * 0.02


def test_tokens_are_decayed_and_biases_are_not() -> None:
    model = objective()
    decayed, spared = ({id(p) for p in group} for group in partition(model))
    assert {id(model.mask_token), id(model.encoder.stem.token)} <= decayed
    assert all(id(p) in (spared if p.ndim == 1 else decayed) for p in model.parameters())


def test_show_rebuilds_hidden_patches_and_leaves_the_others() -> None:
    model, raw = objective().eval(), photos(2)
    model.encoder.modality.show = lambda signal: list(signal.x)
    batch = batch_of(raw)
    shown = model.show(batch, STEP)
    assert list(shown) == ["view", "what the model sees", "rebuilt, each patch with its true mean and deviation"]
    assert list(model.show(batch, STEP, guess=False)) == ["view", "what the model sees"]
    view, visible, rebuilt = (Signal(torch.stack(x)) for x in shown.values())
    assert torch.equal(view.x, model.view(batch, STEP).x)
    cut = model.encoder.stem.cut
    mask = model.hide(cut(view), batch, STEP)
    hidden = mask.hidden
    for x in (visible, rebuilt):
        assert torch.equal(cut(x).x[~hidden], cut(view).x[~hidden])
    assert (cut(visible).x[0][hidden[0]] == (view.x[0].min() + view.x[0].max()) / 2).all()
    true, guess = cut(view).x[hidden].double(), cut(rebuilt).x[hidden].double()
    assert not torch.isclose(true, guess).all(-1).any()
    with torch.no_grad():
        plain = model.guess(cut(view), mask)[0].flatten(0, 1).double()
    want = plain * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    torch.testing.assert_close(guess, want, rtol=0, atol=1e-5)


def test_errors_say_what_to_do() -> None:
    image = Image(size=SIZE, patch=PATCH)
    with pytest.raises(ConfigError, match="--backbone transformer"):
        MAE(Tower(Raw(), ResNet(depth=18), image), Tower(Raw(), backbone(16, 1)))
    audio = Audio()
    with pytest.raises(ConfigError, match="'audio' has a stem that cuts no patches"):
        MAE(Tower(audio.stem(32), backbone(32, 1), audio), Tower(Raw(), backbone(16, 1)))
    with pytest.raises(ConfigError, match="norm_pixels = false"):
        objective(Image(size=4, patch=1, channels=1))
    with pytest.raises(ConfigError, match="the smaller first"):
        objective(extent=(0.5, 0.2))
    one = objective(Image(size=8, canvas=8, patch=8, channels=CHANNELS))
    with pytest.raises(ContractError, match="smaller patches"):
        one({"encoder": Signal(photos().x[..., :8, :8]), "ids": torch.arange(3)}, STEP)
