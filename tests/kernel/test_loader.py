"""The order is a function of the seed and the place, whatever the workers, processes and microbatches."""

import numpy as np
import pytest
import torch

from selfsup.kernel import Part, compose
from selfsup.kernel.errors import ConfigError, DataError
from selfsup.kernel.loader import Order
from selfsup.kernel.random import untag


def start(toys, **settings):
    plugins = toys()
    layers = [{section: {key: value}} for name, value in settings.items() for section, key in [name.split("__")]]
    return compose.start(plugins, compose.resolve(plugins, {"objective": {"name": "hide"}}, *layers))


def samples(order, places):
    return untag(order.ids(np.asarray(places)))


def test_an_epoch_shows_every_sample_once():
    order = Order([Part(7, 7.0), Part(30, 30.0)], seed=1)
    for epoch in range(3):
        epochs, index = samples(order, range(epoch * 37, (epoch + 1) * 37))
        assert sorted(index) == list(range(37))
        assert set(epochs) == {epoch}


def test_epochs_and_seeds_have_their_own_order():
    order = Order([Part(50, 1.0)], seed=1)
    first, second = samples(order, range(50))[1], samples(order, range(50, 100))[1]
    assert list(first) != list(second)
    assert list(first) != list(samples(Order([Part(50, 1.0)], seed=2), range(50))[1])


def test_weights_are_met_exactly_and_a_small_part_is_gone_through_evenly():
    order = Order([Part(10, 1.0), Part(90, 1.0)], seed=3)  # half and half
    epochs, index = samples(order, range(400))
    small = index < 10
    assert small.sum() == 200
    for turn in range(20):  # each pass through the small part shows each of its samples once
        assert sorted(index[small & (epochs == turn)]) == list(range(10))
    assert np.unique(epochs[~small]).tolist() == [0, 1, 2]


def test_ids_do_not_repeat():
    order = Order([Part(10, 3.0), Part(90, 1.0)], seed=3)
    ids = order.ids(np.arange(1000))
    assert len(set(ids)) == 1000


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_makes_the_same_batches(toys, workers):
    alone = list(start(toys, data__workers=0).loader.steps(3, 6))
    shared = list(start(toys, data__workers=workers).loader.steps(3, 6))
    assert len(alone) == len(shared) == 3
    for ours, theirs in zip(alone, shared, strict=True):
        torch.testing.assert_close(ours[0]["ids"], theirs[0]["ids"], rtol=0, atol=0)
        torch.testing.assert_close(ours[0]["encoder"].x, theirs[0]["encoder"].x, rtol=0, atol=0)


def test_microbatches_are_slices_of_the_batch(toys):
    whole = start(toys).loader.read(2)[0]
    parts = start(toys, train__microbatch=3).loader.read(2)
    assert [len(part["ids"]) for part in parts] == [3, 3, 2]
    torch.testing.assert_close(torch.cat([p["encoder"].x for p in parts]), whole["encoder"].x, rtol=0, atol=0)
    assert whole["amount"] == {"numbers": 8.0}


def test_processes_share_a_batch(toys, monkeypatch):
    whole = start(toys).loader.read(2)[0]["ids"]
    monkeypatch.setattr("selfsup.kernel.distributed.world", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr("selfsup.kernel.distributed.rank", lambda rank=rank: rank)
        loader = start_loader(toys)
        halves.append(loader.read(2)[0]["ids"])
    assert torch.cat(halves).tolist() == whole.tolist()


def start_loader(toys):
    from selfsup.kernel.loader import Loader

    reader = start_reader(toys)
    return Loader(reader, batch=8, microbatch=0, workers=0, timeout=1)


def start_reader(toys):
    from selfsup.kernel.loader import Reader

    plugins = toys()
    settings = compose.resolve(plugins, {"objective": {"name": "hide"}})
    kinds = compose.modalities(plugins, settings)
    source = plugins.load("services", "data")().open_data()
    return Reader(source, kinds, compose.build(plugins, settings).collator(**kinds), 0)


def test_a_batch_that_processes_cannot_share_is_refused(toys, monkeypatch):
    monkeypatch.setattr("selfsup.kernel.distributed.world", lambda: 3)
    with pytest.raises(ConfigError, match="a batch of 8 cannot be shared by 3 processes"):
        start_loader(toys)


def test_a_bad_sample_is_replaced_alike_everywhere_and_named(toys):
    run = start(toys, data__bad=1, train__batch=100)
    batch, again = run.loader.read(0)[0], run.loader.read(0)[0]
    assert batch["bad"] == {0: "it is not a number"}
    assert 0 not in untag(batch["ids"])[1]
    assert len(batch["ids"]) == 100
    assert batch["ids"].tolist() == again["ids"].tolist()


def test_data_without_a_usable_sample_stops_with_reasons(toys):
    with pytest.raises(DataError, match=r"samples in a row cannot be used:\n  item .*: it is not a number"):
        start(toys, data__bad=100).loader.read(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_the_one_that_was_raised(toys, monkeypatch, workers):
    run = start(toys, data__workers=workers)

    def missing(stored):
        raise DataError("reading numbers needs a library")

    monkeypatch.setattr(run.loader.reader.modalities["encoder"], "read", missing)
    with pytest.raises(DataError) as raised:
        next(run.loader.steps(0, 1))
    assert str(raised.value) == "reading numbers needs a library"


def test_a_batch_larger_than_the_data_is_refused(toys):
    with pytest.raises(ConfigError, match="larger than the data, which has 100 samples"):
        start(toys, train__batch=128)
