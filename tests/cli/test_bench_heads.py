"""Labels and logits as they are meant, and rows gathered beforehand that give the same loss."""

import pytest
import torch
from torch.nn import functional as F

from selfsup.cli import bench_heads
from selfsup.cli.bench_case import Draw
from selfsup.cli.bench_parity import error, step


def arrays(case, kind=torch.float64):
    return case.make(Draw(torch.device("cpu"), kind, 0))


def test_as_many_labels_as_the_name_says():
    *_, labels = arrays(bench_heads._linear(67, 10, 48, 129))
    assert (labels != bench_heads.NONE).sum() == 10
    assert labels.max() < 129


def test_a_trained_model_is_sure_of_most_labels_and_an_untrained_one_of_none():
    def sure(trained):
        hidden, weight, labels = arrays(bench_heads._linear(400, 400, 64, 300, trained))
        return (F.softmax(hidden @ weight.T, -1)[torch.arange(400), labels] > 0.5).double().mean()

    assert sure(True) > 0.7
    assert sure(False) < 0.01


@pytest.mark.parametrize("make", [lambda: bench_heads._linear(67, 10, 48, 129), lambda: bench_heads._plain(37, 5, 131)])
def test_gathered_rows_give_the_same_loss(make):
    case = make()
    given = arrays(case)
    gathered = bench_heads._gathered(given)
    assert len(gathered[0]) == len(gathered[-1]) == (10 if len(given) == 3 else 5)
    assert case.reference(*gathered).item() == pytest.approx(case.reference(*given).item(), rel=1e-12)
    assert {name for name in case.peers if name.endswith(", gathered")} == {
        f"{name}, gathered"
        for name in case.peers
        if "," not in name  # ours is never gathered
    }


def test_nothing_is_gathered_where_all_rows_have_labels():
    assert not [name for name in bench_heads._plain(33, 33, 257).peers if "gathered" in name]


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
def test_torchs_own_is_the_reference():
    case = bench_heads._linear(31, 31, 40, 253)
    given = arrays(case, torch.float32)
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in given]
    assert error(step(case.peers["torch"].load(), given)(), step(case.reference, exact)())[0] < 1e-5


def test_a_torch_without_it_says_so(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(ImportError, match=r"2\.13 is the first"):
        bench_heads.LINEAR["torch"].load()


def test_ours_is_told_how_many_rows_have_a_label():
    case = bench_heads._linear(67, 10, 48, 129)
    given = arrays(case)
    told = case.peers["ours, capacity"].load()
    assert told.keywords == {"capacity": 64}
    assert error(step(told, given)(), step(case.reference, given)())[0] < 1e-12
