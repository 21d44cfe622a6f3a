"""Clips of any length in rows of a few lengths, of like cost, none lost."""

import collections

import numpy as np
import pytest

from sora_jax.data import packing

# Width 5120 with an MLP of 13824: attention's pairs beside the products of a token.
WIDE = 2 * 5120 / (2 * (6 * 5120**2 + 2 * 5120 * 13824) / 5120)


def mixed(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of images and clips of 1 + 4n <= 129 frames in five sizes, 8 x 8 x 4, 2 x 2."""
    random = np.random.default_rng(seed)
    sizes = np.array([(256, 256), (480, 480), (480, 832), (720, 720), (720, 1280)])
    height, width = sizes[random.integers(len(sizes), size=count)].T
    latents = np.where(random.random(count) < 0.3, 1, 1 + random.integers(1, 33, count))
    return latents * (height // 16) * (width // 16)


def planner(lengths, groups=8, window=20_000, skips=True, shapes=5, clips=256, seed=0):
    return packing.Planner(
        lengths,
        packing.halved(int(lengths.max()), shapes, unit=256, clips=clips),
        groups=groups,
        window=window,
        seed=seed,
        cost=packing.Cost(1.0, WIDE, skips),
    )


def windows(planner_, count):
    """The steps of some windows, and what is left over at the end."""
    steps, carried = [], []
    for window in range(count):
        found, carried = planner_.plan(window, carried)
        steps += found
    return steps, carried


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("groups, window", [(8, 20_000), (64, 20_000), (256, 40_000)])
def test_twenty_thousand_mixed_clips_fill_balanced_rows(groups, window, skips, capsys):
    plans = planner(mixed(20_000), groups, window, skips)
    steps, _ = windows(plans, 2)
    found = plans.summarize(steps)
    with capsys.disabled():
        print(f"\n{groups} groups, skips {skips}: {found}")
    assert found.padding <= 0.01
    assert found.imbalance <= 0.03
    assert found.shapes <= 8


def test_every_clip_comes_once_an_epoch_or_is_carried_over():
    lengths = mixed(500)
    plans = planner(lengths, groups=4, window=125)
    steps, carried = windows(plans, 8)  # two epochs
    seen = collections.Counter(
        clip.index for s in steps for row in s.rows for clip in row
    )
    seen.update(clip.index for clip in carried)
    assert seen == dict.fromkeys(range(500), 2)
    assert len(steps) > 10


def test_rows_have_room_and_one_shape_a_step():
    lengths = mixed(2000)
    plans = planner(lengths, clips=7)
    for step in windows(plans, 1)[0]:
        assert len(step.rows) == 8 * step.shape.rows
        for row in step.rows:
            assert 1 <= len(row) <= 7
            assert all(clip.tokens == lengths[clip.index] for clip in row)
            assert sum(clip.tokens for clip in row) <= step.shape.tokens


def test_a_plan_follows_from_seed_and_window_alone():
    lengths = mixed(1000)
    first, again, other = (
        [plans.step(number) for number in range(40)]
        for plans in (planner(lengths, window=300, seed=s) for s in (3, 3, 4))
    )
    assert first == again
    assert first != other
    # Steps by number, in any order, are those of the sequence.
    plans = planner(lengths, window=300, seed=3)
    assert [plans.step(number) for number in (39, 2, 17)] == [
        first[number] for number in (39, 2, 17)
    ]


def test_groups_of_a_step_share_expensive_and_cheap_rows():
    lengths = np.array([1000, 900, 500, 400])
    plans = packing.Planner(
        lengths, [packing.Shape(2, 1000, 1)],  # a clip a row, two rows a group
        groups=2, window=4, seed=0, cost=packing.Cost(0.0, 1.0, skips=True),
    )  # fmt: skip
    (step,), carried = plans.plan(0, [])
    assert not carried
    indices = [clip.index for (clip,) in step.rows]
    assert {frozenset(indices[:2]), frozenset(indices[2:])} == {
        frozenset({0, 3}), frozenset({1, 2})
    }  # fmt: skip
    costs = 1000**2 + 400**2, 900**2 + 500**2
    expected = max(costs) / np.mean(costs) - 1
    assert plans.summarize([step]).imbalance == pytest.approx(expected)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([], "no clips to pack"),
        ([10, 700, 20], "clip 1 has 700 tokens, more than the 512 of the longest row"),
        ([10, 0], "clip 1 has no tokens"),
    ],
)
def test_clips_that_cannot_be_packed_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        packing.Planner(
            np.array(lengths, int), [packing.Shape(1, 512, 4)],
            groups=2, window=10, seed=0, cost=packing.Cost(),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["shapes", "unit", "clips"])
def test_sizes_that_are_not_positive_are_refused(name):
    given = {"shapes": 2, "unit": 8, "clips": 4, name: 0}
    with pytest.raises(ValueError, match=f"positive sizes, not .*{name} 0"):
        packing.halved(100, **given)


def test_too_few_clips_for_a_step_are_an_error_not_a_wait():
    plans = packing.Planner(
        np.array([500, 500, 3]), [packing.Shape(4, 512, 1)],
        groups=999, window=3, seed=0, cost=packing.Cost(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="windows of 3 clips have not filled one step"):
        plans.step(0)
