import math

import pytest

from selfsup.kernel.contracts import Step
from selfsup.plugins.common.schedules import share


def curve(shape, total, **options):
    return [share(Step(k, total), shape, **options) for k in range(total)]


def test_warmup_rises_in_equal_parts_and_reaches_the_peak_with_its_last_step():
    assert curve("constant", 10, warmup=0.4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_the_first_step_trains_even_where_the_warmup_is_shorter_than_a_step():
    assert curve("constant", 10, warmup=0.05)[0] == 1.0


def test_a_warmup_that_is_no_whole_number_of_steps_never_passes_the_peak():
    values = curve("constant", 10, warmup=0.25)  # W = 2.5
    assert values[:4] == pytest.approx([0.4, 0.8, 1, 1])


def test_a_run_that_is_all_warmup_ends_at_the_peak():
    assert curve("cosine", 4, warmup=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_starts_at_the_peak_is_half_way_in_the_middle_and_tends_to_its_end():
    values = curve("cosine", 8, final=0.2)
    assert values[0] == 1.0
    assert values[4] == pytest.approx(0.6)
    assert values[7] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 7 / 8)) / 2)


def test_cosine_after_warmup_begins_at_the_peak():
    values = curve("cosine", 12, warmup=0.25)  # W = 3
    assert values[2:4] == [1.0, 1.0]
    assert values[3 + 3] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)


def test_linear_falls_in_equal_parts():
    assert curve("linear", 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert curve("linear", 4, final=0.5) == pytest.approx([1, 0.875, 0.75, 0.625])


def test_multistep_multiplies_at_each_milestone_of_the_whole_run():
    values = curve("multistep", 10, milestones=(0.3, 0.6), decay=0.1, warmup=0.1)
    assert values == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 4)


def test_without_options_nothing_is_warmed_up():
    assert share(Step(0, 100)) == 1.0
    assert 0 < share(Step(99, 100)) < 1e-3


def test_it_depends_on_the_step_alone():
    forwards = curve("cosine", 20, warmup=0.2)
    backwards = [share(Step(k, 20), "cosine", warmup=0.2) for k in reversed(range(20))]
    assert forwards == backwards[::-1]
