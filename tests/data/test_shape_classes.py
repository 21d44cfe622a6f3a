"""Sizes within a token budget: never enlarged, hardly cropped; even frame rates."""

import fractions
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from sora_jax.data import shape_classes
from sora_jax.data.shape_classes import Budget

budgets = st.builds(Budget, st.integers(30, 20_000), st.sampled_from([8, 16, 32]))
lengths = st.integers(0, 29).map(lambda n: 1 + 4 * n)
many = hypothesis.settings(max_examples=100, deadline=None)
few = hypothesis.settings(max_examples=20, deadline=None)
natives = st.tuples(st.integers(4, 3000), st.integers(4, 3000))


def value(aspect, tokens_of_frame, rows, columns):
    """What the docstring maximises."""
    if rows * columns > tokens_of_frame:
        return 0
    c = 1 - min(columns / rows / aspect, aspect * rows / columns)
    return rows * columns * (1 - c) ** 1.5 * (1 - max(0, c - 0.03)) ** 20


@many
@hypothesis.given(budgets, lengths, natives)
def test_a_size_is_within_the_budget_and_the_video(budget, num_frames, native):
    size = budget.size_of(native, num_frames)
    m = budget.multiple_of
    if min(native) < m:
        assert size is None or size in budget.classes(num_frames)
        assert size is None or min(size) >= m
        return
    if size is None:  # too narrow for the budget
        own = budget._largest(native[1] / native[0], num_frames, native)
        assert shape_classes.cropped(native, own) > 0.5
        return
    assert size[0] % m == size[1] % m == 0 and min(size) >= m
    latent_frames = 1 + (num_frames - 1) / 4
    tokens = latent_frames * size[0] * size[1] / m**2
    assert tokens == budget.tokens(num_frames, size) <= budget.max_tokens
    assert size[0] <= native[0] and size[1] <= native[1]
    again = Budget(budget.max_tokens, m).size_of(native, num_frames)
    assert again == size


def test_a_video_too_narrow_for_the_budget_has_no_size():
    assert Budget(300, 16).size_of((17, 3000), 17) is None
    assert Budget(300, 16).size_of((17, 900), 17) == (16, 848)


@many
@hypothesis.given(
    st.integers(400, 20_000),
    st.integers(200, 3000),
    st.floats(1 / 3, 3),
)
def test_little_is_cropped(max_tokens, height, aspect):
    """Of videos that are more than a dozen tokens high and wide."""
    native = height, round(height * aspect)
    hypothesis.assume(min(native) >= 200)
    size = Budget(max_tokens).size_of(native, 1)
    scale = max(size[0] / native[0], size[1] / native[1])
    kept = size[0] * size[1] / (native[0] * scale * native[1] * scale)
    assert shape_classes.cropped(native, size) == pytest.approx(1 - kept, abs=1e-9)
    assert kept >= 0.94


@few
@hypothesis.given(budgets, lengths)
def test_classes_are_the_best_sizes_of_the_usual_aspects(budget, num_frames):
    m, room = budget.multiple_of, budget.max_tokens // (1 + (num_frames - 1) // 4)
    found = budget.classes(num_frames)
    for (w, h), size in zip(shape_classes.ASPECTS, found, strict=True):
        best = max(
            value(w / h, room, rows, columns)
            for rows in range(1, min(room, 200) + 1)
            for columns in {
                *range(1, min(room // rows, 8) + 1),
                *(min(room // rows, math.floor(rows * w / h) + k) for k in (0, 1)),
            }
            if columns
        )
        mine = value(w / h, room, size[0] // m, size[1] // m)
        assert mine == pytest.approx(best, rel=1e-9)


def test_sizes_that_people_know():
    """32,760 tokens are 81 frames of Wan 2.1's 832x480."""
    budget = Budget(32_760)
    assert dict(zip(shape_classes.ASPECTS, budget.classes(81), strict=True)) == {
        (16, 9): (480, 832), (9, 16): (832, 480), (4, 3): (544, 720),
        (3, 4): (720, 544), (1, 1): (624, 624), (21, 9): (416, 960),
    }  # fmt: skip
    for native, size in {
        (1080, 1920): (480, 832),
        (720, 1280): (480, 832),
        (1920, 1080): (832, 480),
        (1036, 1920): (464, 848),  # 1.85:1 would lose 6.5 % in the class of 16:9
        (1600, 2400): (512, 768),  # 3:2 is none of the six
        (480, 640): (480, 640),  # smaller than its class, so it keeps its size
        (100, 130): (96, 128),
        (15, 400): None,
    }.items():
        assert budget.size_of(native, 81) == size, native
    assert budget.size_of((1080, 1920), 33) == (720, 1280)  # fewer frames, larger ones


@pytest.mark.parametrize(
    "tokens, multiple_of, message",
    [(0, 16, "positive"), (9, 12.5, "even"), (9, 4, "at least 8"), (2, 16, "too few")],
)
def test_impossible_budgets_are_refused(tokens, multiple_of, message):
    with pytest.raises(ValueError, match=message):
        Budget(tokens, multiple_of).classes(9)


def test_rates_are_divided_by_whole_numbers():
    ntsc = fractions.Fraction(30000, 1001)
    for native, limit, rate in [
        (25, 30, 25), (24, 30, 24), (ntsc, 30, ntsc), (30, 30, 30), (60, 30, 30),
        (2 * ntsc, 30, ntsc), (50, 30, 25), (120, 30, 30), (48, 30, 24), (5, 30, 5),
        (25, 24, 25), (30, 24, 15), (30, 8, 7.5), (25, 8, 25 / 3), (240, 16, 16),
    ]:  # fmt: skip
        assert shape_classes.rate(float(native), limit) == pytest.approx(float(rate))


@many
@hypothesis.given(st.floats(0.1, 1000), st.floats(1, 240))
def test_no_larger_rate_would_do(native, limit):
    rate = shape_classes.rate(native, limit)
    k = round(native / rate)
    assert rate == pytest.approx(native / k) and rate <= 1.05 * limit * (1 + 1e-9)
    assert k == 1 or native / (k - 1) > 1.05 * limit * (1 - 1e-9)


@many
@hypothesis.given(st.integers(0, 300), st.sets(lengths, min_size=1, max_size=4))
def test_pieces_leave_less_than_the_shortest_length(count, some):
    descending = tuple(sorted(some, reverse=True))
    found = shape_classes.pieces(count, descending)
    assert found == sorted(found, reverse=True) and {*found} <= some
    assert 0 <= count - sum(found) < descending[-1]
    if count >= descending[0]:
        assert found.count(descending[0]) == count // descending[0]
