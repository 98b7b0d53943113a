"""What every modality owes the rest."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from selfsup.cli.installed import summary
from selfsup.kernel import Modality, Part, Plugins, Sample, Signal, Stem, stream
from selfsup.kernel.config import check, schema
from selfsup.kernel.errors import BadSample, ContractError
from selfsup.kernel.random import tag

WIDTH = 16
IDS = tag(1, torch.arange(4))


LEARNED: dict[type, Mapping[str, str]] = {}  # by contract: learning anew for every test would take minutes


class BuiltIn:
    """The built-in sample of a modality as a source."""

    notes: Sequence[str] = ()

    def __init__(self, modality: Modality) -> None:
        self.modality = modality
        self.parts: Sequence[Part] = [Part(len(self), len(self))]

    def __len__(self) -> int:
        return len(self.modality.sample())

    def __getitem__(self, index: int) -> Sample:
        return self.modality.sample()[index]

    def name(self, index: int) -> str:
        return f"sample {index}"


class ModalityContract:
    """Subclass it, and set `name`."""

    name: ClassVar[str]
    """The plugin, by its entry point."""

    options: ClassVar[Mapping[str, Any]] = {}
    """Its options where they are not the defaults, for instance to make it smaller."""

    tolerance: ClassVar[float] = 1e-4
    """Absolute, of values of order one that two orders of summation give in float32."""

    def make(self) -> Modality:
        """The modality under test, after it learned what it has to from its sample."""
        modality = self._new()
        if type(self) not in LEARNED:
            modality.learn(BuiltIn(modality))
            LEARNED[type(self)] = modality.files()
        elif LEARNED[type(self)]:
            modality.load(LEARNED[type(self)])
        return modality

    def _new(self) -> Modality:
        cls = Plugins().load("modalities", self.name)
        modality: Modality = cls(**check("modality", cls, self.options))
        return modality

    def raws(self, modality: Modality) -> list[Any]:
        """Four decoded samples, of unequal size where the built-in sample has such."""
        sample = modality.sample()
        places = [i * (len(sample) - 1) // 3 for i in range(4)]
        return [modality.read(sample[place][modality.field]) for place in places]

    def test_it_says_what_it_is(self) -> None:
        cls = Plugins().load("modalities", self.name)
        assert issubclass(cls, Modality)
        assert summary(Plugins().find("modalities", self.name)), "the first line of the module's docstring"
        assert all(s.startswith(".") and s == s.lower() for s in cls.suffixes)
        for option, field in schema(cls).model_fields.items():
            assert field.description, f"describe {option} with about()"

    def test_its_sample_can_be_read(self) -> None:
        modality = self.make()
        sample = modality.sample()
        assert len(sample) >= 4
        stored = sample[0]
        assert modality.field in stored
        assert isinstance(stored.get("label", 0), int)
        _same(modality.read(stored[modality.field]), modality.read(stored[modality.field]))

    def test_what_it_learned_comes_back(self) -> None:
        modality, other = self.make(), self._new()
        modality.learn(BuiltIn(modality))  # changes nothing the second time
        files = modality.files()
        assert files == LEARNED[type(self)]
        if files:
            other.load(files)
            assert other.files() == files
            other.learn(BuiltIn(other))
            assert other.files() == files
            _same(other.collate(self.raws(other)), modality.collate(self.raws(modality)))

    def test_what_training_goes_through_can_be_read(self) -> None:
        modality = self.make()
        rows = modality.rows(BuiltIn(modality), 0, None, 0.0)
        assert sum(part.size for part in rows.parts) == len(rows) > 0
        copy = pickle.loads(pickle.dumps(rows))
        for index in (0, len(rows) - 1):
            assert rows.name(index)
            raws = [modality.read(source[index][modality.field]) for source in (rows, copy)]
            one, other = (modality.collate([raw], _draw(IDS[:1])) for raw in raws)
            assert len(one.x) == 1
            _same(one, other)

    def test_an_empty_file_is_a_bad_sample(self) -> None:
        modality = self.make()
        if modality.suffixes:
            with pytest.raises(BadSample):
                modality.read(b"")

    def test_it_goes_to_workers(self) -> None:
        modality = self.make()
        raws = self.raws(modality)
        copy = pickle.loads(pickle.dumps(modality))
        _same(copy.collate(raws), modality.collate(raws))

    def test_a_batch_is_one_signal_and_repeats(self) -> None:
        modality = self.make()
        raws = self.raws(modality)
        signal = modality.collate(raws)
        assert isinstance(signal, Signal)
        assert len(signal.x) == 4
        assert modality.amount(signal) > 0
        _same(signal, modality.collate(raws))
        _same(modality.collate(raws, _draw(IDS)), modality.collate(raws, _draw(IDS)))

    def test_a_sample_is_collated_alike_in_any_batch(self) -> None:
        modality = self.make()
        raws = self.raws(modality)
        whole = modality.collate(raws, _draw(IDS))
        order = [2, 0, 3, 1]
        _same(modality.collate([raws[i] for i in order], _draw(IDS[order])), _rows(whole, order))

    def test_its_stem_makes_tokens(self) -> None:
        modality = self.make()
        stem = modality.stem(WIDTH)
        assert isinstance(stem, Stem)
        raw = modality.plain(modality.collate(self.raws(modality)))
        tokens, local = stem(raw), stem.latents(raw)
        assert tokens.x.shape[0] == 4
        assert tokens.x.shape[2] == WIDTH
        assert local.x.shape[2] == stem.width
        for signal in (tokens, local):
            assert signal.x.isfinite().all()
            assert signal.segments is None or signal.segments.shape == signal.x.shape[:2]
            assert signal.positions is None or signal.positions.shape[:2] == signal.x.shape[:2]
        tokens.x.square().mean().backward()
        for key, parameter in stem.named_parameters():
            assert parameter.grad is not None, f"{key} has no gradient"
            assert parameter.grad.isfinite().all(), key

    def test_targets_stand_for_tokens(self) -> None:
        modality = self.make()
        stem = modality.stem(WIDTH)
        raw = modality.plain(modality.collate(self.raws(modality)))
        try:
            targets = stem.targets(raw)
        except ContractError:
            return  # it says that it has none
        assert targets.shape[:2] == stem(raw).x.shape[:2]
        if stem.discrete:
            assert not targets.is_floating_point()
            assert ((targets >= 0) & (targets < stem.size)).all()
        else:
            assert targets.shape[2] == stem.size

    def test_padding_changes_nothing(self) -> None:
        modality = self.make()
        stem = modality.stem(WIDTH).eval()
        raws = self.raws(modality)
        with torch.no_grad():
            together = stem(modality.plain(modality.collate(raws)))
            for row, raw in enumerate(raws):
                alone = stem(modality.plain(modality.collate([raw])))
                real = int(alone.real().sum())
                assert int(together.real()[row].sum()) == real
                difference = (together.x[row][together.real()[row]] - alone.x[0][alone.real()[0]]).abs().max()
                assert difference <= self.tolerance, f"sample {row} changes by {difference:.1e} when it is padded"

    def test_views_belong_to_samples(self) -> None:
        modality = self.make()
        raw = modality.collate(self.raws(modality))
        try:
            views = modality.view(raw, (0.3, 1.0), stream(0, "view", IDS))
        except ContractError:
            return  # it says that it has none
        order = [2, 0, 3, 1]
        shuffled = modality.view(_rows(raw, order), (0.3, 1.0), stream(0, "view", IDS[order]))
        _same(shuffled, _rows(views, order), self.tolerance)
        part = modality.view(_rows(raw, [1]), (0.3, 1.0), stream(0, "view", IDS[[1]]))
        _same(part, _rows(views, [1]), self.tolerance)
        others = modality.view(raw, (0.3, 1.0), stream(1, "view", IDS))
        assert others.x.shape != views.x.shape or not torch.equal(others.x, views.x)


def _draw(ids: Tensor) -> Any:
    return lambda purpose: stream(0, purpose, ids)


def _rows(signal: Signal, order: list[int]) -> Signal:
    if signal.edges is not None:
        pytest.skip("a graph's samples cannot be picked by row")
    rest = (part if part is None else part[order] for part in (signal.segments, signal.positions))
    return Signal(signal.x[order], *rest)


def _same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    if isinstance(one, Signal):
        for part in ("x", "segments", "positions", "edges"):
            _same(getattr(one, part), getattr(other, part), tolerance)
    elif isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, equal_nan=True)
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            _same(a, b, tolerance)
    else:
        assert bool((one == other) if not hasattr(one, "shape") else (one == other).all())
