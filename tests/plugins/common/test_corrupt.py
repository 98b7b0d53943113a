from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfsup.kernel import stream
from selfsup.plugins.common.corrupt import Choice, Corrupted, capacity, choose, corrupt

PAPER = Choice(0.15)
VOCABULARY, MASK, ORIGINAL = 1000, 2000, 3000  # far from each other, so that it shows what became of a token


def packed(lengths: list[int], total: int | None = None) -> Tensor:
    """The segments of a row that holds sequences of these lengths: [1, T]."""
    row = torch.cat([torch.full((n,), number + 1) for number, n in enumerate(lengths)])
    return torch.nn.functional.pad(row, (0, (total or len(row)) - len(row)))[None].int()


def ends(segments: Tensor) -> Tensor:
    """All but the first and last token of every sequence: the candidates, [B, T]."""
    wide = torch.nn.functional.pad(segments, (1, 1))
    return (segments > 0) & (wide[:, :-2] == segments) & (wide[:, 2:] == segments)


def chosen_of(segments: Tensor, ids: list[int] | None = None, choice: Choice = PAPER) -> Tensor:
    draw = stream(0, "mask", torch.tensor(ids or range(len(segments))))
    return choose(draw, segments, ends(segments), choice)


def hidden_of(chosen: Tensor, size: int, ids: list[int] | None = None) -> Corrupted:
    """Of rows that hold ORIGINAL alone; replacements are of the ids below VOCABULARY."""
    tokens = torch.full(chosen.shape, ORIGINAL)
    return corrupt(
        tokens, chosen, size, MASK, VOCABULARY, stream(0, "replace", torch.tensor(ids or range(len(chosen))))
    )


@pytest.mark.parametrize("choice", [PAPER, PAPER._replace(most=20), Choice(0.5, 3), Choice(0.9)])
def test_each_sequence_gives_the_authors_count(choice: Choice) -> None:
    """Their code: min(max_predictions_per_seq, max(1, int(round(len(tokens) * masked_lm_prob))))."""
    lengths = [*range(3, 60), 128, 512]
    segments = packed(lengths, total=sum(lengths) + 7)
    chosen = chosen_of(segments, choice=choice)[0]
    for number, n in enumerate(lengths, 1):
        count = min(choice.most or n, max(1, int(round(n * choice.share))))  # noqa: RUF046 - as they write it
        assert chosen[segments[0] == number].sum() == min(count, n - 2), n
    assert not (chosen & ~ends(segments)[0]).any()


def test_a_sequence_without_candidates_gives_none() -> None:
    segments = packed([2, 3, 1, 9], total=17)
    chosen = chosen_of(segments)
    assert [int(chosen[segments == number].sum()) for number in range(5)] == [0, 0, 1, 0, 1]
    assert chosen_of(packed([2, 1])).sum() == 0


def test_every_place_is_equally_likely() -> None:
    """6 of 38 candidates in 8000 rows. Counts of places are negatively correlated within a row, which makes
    sum (seen - expected)^2 / (expected (1 - p)) * (N - 1) / N of N places chi-square with N - 1 degrees of freedom."""
    rows, places = 8000, 38
    chosen = chosen_of(packed([40]).expand(rows, -1))[:, 1:-1].double()
    assert (chosen.sum(1) == 6).all()
    p = 6 / places
    statistic = ((chosen.sum(0) - rows * p) ** 2).sum() / (rows * p * (1 - p)) * (places - 1) / places
    spread = (2 * (places - 1)) ** 0.5
    assert abs(statistic - (places - 1)) < 4 * spread
    assert len(chosen.unique(dim=0)) > 0.99 * rows  # of 2.8 million


def test_a_row_is_masked_alike_in_any_batch() -> None:
    lengths = [[30, 9], [12], [40, 3], [25, 25]]
    rows = torch.cat([packed(row, total=60) for row in lengths])
    together = chosen_of(rows, ids=[7, 3, 9, 5])
    alone = chosen_of(packed([12]), ids=[3])
    assert torch.equal(alone[0], together[1, :12])
    assert torch.equal(chosen_of(rows[[3, 0]], ids=[5, 7]), together[[3, 0]])
    assert not torch.equal(chosen_of(rows, ids=[8, 4, 10, 6]), together)
    shown = hidden_of(together, 14, ids=[7, 3, 9, 5]).ids
    assert torch.equal(hidden_of(alone, 4, ids=[3]).ids[0], shown[1, :12])
    assert torch.equal(hidden_of(together[[3, 0]], 9, ids=[5, 7]).ids, shown[[3, 0]])
    assert not torch.equal(hidden_of(together, 14, ids=[8, 4, 10, 6]).ids, shown)


@pytest.mark.parametrize("choice", [PAPER, PAPER._replace(most=5), Choice(0.4), Choice(0.01)])
@pytest.mark.parametrize("sequences", [1, 2, 5, 16])
def test_the_capacity_holds_every_row(choice: Choice, sequences: int) -> None:
    generator = torch.Generator().manual_seed(sequences)
    for total in (16, 50, 127, 128, 400):
        rows = []
        for _ in range(60):
            cuts = (torch.randperm(total - 1, generator=generator)[: sequences - 1] + 1).sort().values.tolist()
            rows.append(packed([b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]))
        segments = torch.cat(rows)
        draw = stream(0, "mask", torch.arange(len(rows)))
        most = int(choose(draw, segments, segments > 0, choice).sum(1).max())
        assert most <= capacity(total, sequences, choice) <= total


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 10, 19, 20, 77])
def test_a_row_is_shown_in_exact_proportions(count: int) -> None:
    rows, length = 2000, 90
    chosen = (torch.arange(length) < count).expand(rows, -1)
    ids = hidden_of(chosen, count + 3).ids
    masked, kept = (((ids == what) & chosen).sum(1).double() for what in (MASK, ORIGINAL))
    replaced = ((ids < VOCABULARY) & chosen).sum(1).double()
    assert (masked + kept + replaced == count).all()
    for seen, tenths in ((masked, 8), (replaced, 1), (kept, 1)):
        assert (seen - count * tenths / 10).abs().max() < 1
        # Rounded by v in 0 .. 9, a count is one of two neighbours: variance at most 1 / 4.
        assert abs(seen.mean() - count * tenths / 10) < 4 * (0.25 / rows) ** 0.5
        if count % 10 == 0:
            assert (seen == count * tenths // 10).all()
    assert (ids[:, count:] == ORIGINAL).all()


def test_the_masked_among_the_chosen_are_drawn() -> None:
    """Every chosen place is masked in 80 % of the rows."""
    rows, some = 4000, torch.arange(30) % 3 == 1
    share = (hidden_of(some.expand(rows, -1), 12).ids[:, some] == MASK).double().mean(0)
    assert (share - 0.8).abs().max() < 4.5 * (0.8 * 0.2 / rows) ** 0.5


def test_replacements_come_from_the_whole_vocabulary() -> None:
    """1000 of 10000 chosen tokens become one of 7 ids, all alike likely: chi-square with 6 degrees of freedom."""
    tokens, chosen = torch.full((200, 50), ORIGINAL), torch.ones(200, 50, dtype=torch.bool)
    ids = corrupt(tokens, chosen, 50, MASK, 7, stream(0, "replace", torch.arange(200))).ids
    counts = torch.bincount(ids[(ids != MASK) & (ids != ORIGINAL)], minlength=7).double()
    assert len(counts) == 7
    assert counts.sum() == 1000
    assert ((counts - 1000 / 7) ** 2 / (1000 / 7)).sum() < 6 + 4 * 12**0.5


def test_what_is_to_be_predicted_stands_side_by_side() -> None:
    chosen = chosen_of(packed([30, 20, 8], total=64))
    tokens = torch.arange(64)[None]
    hidden = corrupt(tokens, chosen, 20, MASK, VOCABULARY, stream(0, "replace", torch.tensor([0])))
    assert hidden.valid.sum() == chosen.sum() == 4 + 3 + 1
    assert torch.equal(hidden.truth[hidden.valid], tokens[chosen])
    assert torch.equal(hidden.places[hidden.valid], chosen[0].nonzero()[:, 0])
    assert torch.equal(hidden.ids[~chosen], tokens[~chosen])
