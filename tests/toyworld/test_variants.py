"""Scenes with one thing changed: the rest is the same, and the oracle reads the change."""

import numpy as np
import pytest

from sora_jax.toyworld import captions, oracle, render, variants
from sora_jax.toyworld import scene as scenes

COUNT = 12


def things(count=COUNT):
    return [variants.one_thing("tw32", "train", index, 3) for index in range(count)]


@pytest.mark.parametrize("what", variants.EDITS)
def test_an_edit_changes_one_thing(what):
    for scene in things():
        after = variants.edited(scene, what)
        assert oracle.score(after, render.render(after))["pass"]
        assert not after.truth.held_out()
        np.testing.assert_array_equal(after.pos, scene.pos)
        (old,), (new,) = scene.objects, after.objects
        assert (after.background != scene.background) == (what == "background")
        assert (new.colour != old.colour) == (what == "colour")
        assert (new.shape != old.shape) == (what == "shape")
        assert new.radius == old.radius
        # Its captions say so in the same words.
        texts = [captions.caption(one, "structured") for one in (scene, after)]
        assert texts[0] != texts[1]
        changed = {
            key for key in {**scene.factors, **after.factors}
            if scene.factors.get(key) != after.factors.get(key)
        }  # fmt: skip
        assert changed == {{"background": "tone"}.get(what, what + "s")}


def test_only_scenes_of_one_thing_are_edited():
    from sora_jax.toyworld import families

    two = families.scene("tw32", "train", 0, {"relation": 1.0})
    with pytest.raises(ValueError, match="one thing"):
        variants.edited(two, "colour")
    with pytest.raises(ValueError, match="an edit is of"):
        variants.edited(things(1)[0], "size")


def test_a_sibling_shows_the_thing_elsewhere():
    apart = []
    for scene in things():
        other = variants.sibling(scene)
        assert oracle.score(other, render.render(other))["pass"]
        for name in ("colour", "shape"):
            assert getattr(other.objects[0], name) == getattr(scene.objects[0], name)
        assert other.background != scene.background
        apart.append(np.linalg.norm(other.pos[0] - scene.pos[0]))
    assert np.median(apart) > 4


@pytest.mark.parametrize("period", [8, 12, 16])
def test_a_loop_repeats_itself_and_keeps_its_pace(period):
    for index in range(4):
        scene = variants.looping("tw32", "train", index, period)
        frames = render.render(scene)
        assert len(frames) == 1 + 2 * period
        np.testing.assert_array_equal(frames[: period + 1], frames[period:])
        steps = np.linalg.norm(np.diff(scene.pos[:, 0], axis=0), axis=1)
        tier = scenes.find_tier("tw32")
        subject = scene.truth.subjects[0]
        low, high = tier.fast if subject.speed == "fast" else tier.slow
        # All steps but those at the two turning points have the speed.
        assert low - 0.01 <= np.median(steps) <= high + 0.01
        assert steps.max() <= high + 0.01
        assert (frames[0] != frames[period // 2]).any()


@pytest.mark.parametrize(("split", "fps", "count"), [("train", 4, 5), ("train", 16, 17), ("test_len", 16, 33)])  # fmt: skip
def test_another_rate_shows_the_same_at_other_times(split, fps, count):
    from sora_jax.toyworld import families

    for index in range(6):
        scene = families.scene("tw32", split, index, {"motion": 0.5, "camera": 0.5})
        other = variants.at_rate(scene, fps)
        assert other.num_frames == count
        here = slice(None, None, max(1, fps // 8))
        there = slice(None, None, max(1, 8 // fps))
        np.testing.assert_allclose(other.pos[here], scene.pos[there], atol=1e-4)
        np.testing.assert_allclose(other.camera[here], scene.camera[there], atol=1e-4)
        seconds = np.diff(other.pos[:, 0], axis=0) * fps
        np.testing.assert_allclose(seconds, other.vel[1:, 0] * fps, atol=4e-3)
    with pytest.raises(ValueError, match="whole"):
        variants.at_rate(scene, 7.3)


def test_a_thing_may_be_unnamed():
    for scene in things():
        text, stated = variants.unnamed(scene, "medium")
        subject = scene.truth.subjects[0]
        assert subject.colour not in text and subject.shape not in text
        assert captions.parse(text) == stated
        for one in stated.subjects:
            assert one.colour is None and one.shape is None
            assert one.direction in (None, subject.direction)


def test_siblings_of_held_out_things_are_held_out():
    for index in range(30):
        scene = variants.one_thing("tw32", "test_comp", index)
        assert variants.sibling(scene).truth.held_out() == scene.truth.held_out()


@pytest.mark.parametrize("tier", scenes.TIERS)
def test_loops_fit_their_tier(tier):
    fitting = [period for period in (8, 12, 16, 96) if variants.fits(tier, period)]
    assert 8 in fitting and 96 not in fitting
    for period in fitting:
        for index in range(12):
            variants.looping(tier, "train", index, period)
    with pytest.raises(ValueError, match="period 96 is too long"):
        variants.looping(tier, "train", 0, 96)
