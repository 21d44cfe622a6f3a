"""Kernel distances, neighbours and classes against brute force and known truth."""

import itertools

import numpy as np
import pytest

from sora_jax.evals.metrics import set_metrics


def draw(count: int, d: int = 6, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (count, d))


def brute_force(first, second, degree, offset) -> tuple[float, float]:
    """Both forms of the kernel distance, pair by pair."""

    def mean(xs, ys, skip_same=False):
        values = [
            (x @ y / x.size + offset) ** degree
            for (i, x), (j, y) in itertools.product(enumerate(xs), enumerate(ys))
            if not (skip_same and i == j)
        ]
        return np.mean(values)

    between = 2 * mean(first, second)
    biased = mean(first, first) + mean(second, second) - between
    unbiased = mean(first, first, True) + mean(second, second, True) - between
    return biased, unbiased


@pytest.mark.parametrize("kernel", [set_metrics.KID, set_metrics.JEDI])
def test_kernel_distance_is_the_sum_over_pairs(kernel, monkeypatch):
    monkeypatch.setattr(set_metrics, "_ROWS", 4)  # several blocks, the last one short
    first, second = draw(11), draw(7, seed=1, mean=0.5)
    found = set_metrics.kernel_distance(first, second, kernel)
    expected = brute_force(first, second, kernel.degree, kernel.offset)
    np.testing.assert_allclose(
        (found.biased.value, found.unbiased.value), expected, rtol=1e-10
    )


def test_jedi_and_kid_have_their_kernels():
    assert (set_metrics.KID.degree, set_metrics.KID.offset) == (3, 1.0)
    assert (set_metrics.JEDI.degree, set_metrics.JEDI.offset) == (2, 0.0)


def test_only_the_unbiased_form_is_zero_for_equal_distributions():
    pairs = [(draw(60, seed=i), draw(60, seed=100 + i)) for i in range(20)]
    found = [set_metrics.kernel_distance(*pair) for pair in pairs]
    unbiased = np.array([distance.unbiased.value for distance in found])
    assert abs(unbiased.mean()) < 3 * unbiased.std() / np.sqrt(len(found))
    biased = np.array([distance.biased.value for distance in found])
    assert biased.mean() > 10 * abs(unbiased.mean()) and biased.min() > 0


def test_intervals_hold_the_true_distance(monkeypatch):
    """Of equal distributions 0; of others the distance of very many samples."""
    monkeypatch.setattr(set_metrics, "SUBSETS", 60)
    truth = set_metrics.kernel_distance(
        draw(4000, seed=50), draw(4000, seed=51, mean=0.4)
    ).unbiased.value
    held = {0.0: 0, truth: 0}
    for i in range(20):
        for mean, value in ((0.0, 0.0), (0.4, truth)):
            found = set_metrics.kernel_distance_with_intervals(
                draw(50, seed=i), draw(70, seed=100 + i, mean=mean)
            )
            low, high = found.unbiased.low, found.unbiased.high
            assert low < found.unbiased.value < high
            held[value] += low <= value <= high
            assert found.biased.low < found.biased.value < found.biased.high
    assert min(held.values()) >= 17


def test_large_sets_have_smaller_subsets_and_equal_intervals(monkeypatch):
    first, second = draw(200), draw(200, seed=1, mean=0.5)
    halves = set_metrics.kernel_distance_with_intervals(first, second)
    monkeypatch.setattr(set_metrics, "LARGEST_SUBSET", 40)
    fifths = set_metrics.kernel_distance_with_intervals(first, second)
    assert halves.unbiased.value == fifths.unbiased.value
    widths = [one.unbiased.high - one.unbiased.low for one in (halves, fifths)]
    assert widths[1] == pytest.approx(widths[0], rel=0.3)


def counted(samples, reference, k) -> list[float]:
    """Precision, recall, density, coverage by their definitions, pair by pair."""

    def radius(point, own):
        return sorted(np.linalg.norm(point - other) for other in own)[k]

    def inside(point, centre, own):
        return np.linalg.norm(point - centre) <= radius(centre, own)

    def within(points, own):
        return [sum(inside(point, centre, own) for centre in own) for point in points]

    balls = np.array(within(samples, reference))
    recall = np.mean(np.array(within(reference, samples)) > 0)
    covered = [any(inside(s, r, reference) for s in samples) for r in reference]
    return [np.mean(balls > 0), recall, balls.mean() / k, np.mean(covered)]


@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_are_counted_as_defined(k, monkeypatch):
    monkeypatch.setattr(set_metrics, "_ROWS", 5)
    samples, reference = draw(17, d=3, mean=101.0), draw(13, d=3, seed=1, mean=100.0)
    found = set_metrics.neighbours(samples, reference, k)
    values = [found.precision, found.recall, found.density, found.coverage]
    expected = counted(samples, reference, k)
    np.testing.assert_allclose([one.value for one in values], expected, rtol=1e-12)
    assert all(one.low <= one.value <= one.high for one in values)
    assert 0 < found.precision.value < 1 and 0 < found.coverage.value < 1


def test_disjoint_sets_and_a_set_and_itself():
    first, far = draw(20), draw(20, seed=1, mean=50.0)
    found = set_metrics.neighbours(first, far)
    for one in (found.precision, found.recall, found.density, found.coverage):
        assert one.value == 0
    itself = set_metrics.neighbours(first, first)
    assert itself.precision.value == itself.recall.value == itself.coverage.value == 1
    distance = set_metrics.kernel_distance(first, first)
    assert distance.biased.value == pytest.approx(0, abs=1e-12)


def test_one_mode_of_two_is_precise_and_covers_half():
    modes = np.concatenate([draw(30, seed=1), draw(30, seed=2, mean=30.0)])
    found = set_metrics.neighbours(draw(60, seed=3), modes)
    assert found.precision.value > 0.8 and found.recall.value <= 0.5
    assert 0.35 < found.coverage.value <= 0.5
    copies = np.repeat(draw(1, seed=1), 60, axis=0)  # the same sample again and again
    collapsed = set_metrics.neighbours(copies, modes)
    assert collapsed.precision.value == 1 and collapsed.coverage.value < 0.4
    assert collapsed.recall.value == pytest.approx(1 / 60)


def test_inception_score():
    sure = 50 * np.eye(4)[np.arange(80) % 4]
    assert set_metrics.inception_score(sure, 2) == pytest.approx((4, 0), abs=1e-9)
    assert set_metrics.inception_score(sure[::4], 2)[0] == pytest.approx(1)
    assert set_metrics.inception_score(np.zeros((40, 4)))[0] == pytest.approx(1)
    logits = draw(30, d=5, seed=4)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [
        np.exp(np.mean([(q * np.log(q / part.mean(0))).sum() for q in part]))
        for part in (p[:10], p[10:20], p[20:])
    ]
    expected = np.mean(scores), np.std(scores)
    assert set_metrics.inception_score(logits, 3) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(ValueError, match="20 samples or more are needed, got 8"):
        set_metrics.inception_score(logits[:8])


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="6 and 5 features"):
        set_metrics.kernel_distance(draw(9), draw(9, d=5))
    with pytest.raises(ValueError, match="6 samples or more are needed, got 5"):
        set_metrics.neighbours(draw(9), draw(5))
    broken = draw(9)
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 9 feature vectors hold NaN"):
        set_metrics.kernel_distance(broken, draw(9))
