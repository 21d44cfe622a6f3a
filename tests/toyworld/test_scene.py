"""Scenes: pure in their index, inside the frame, true to their split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.toyworld import captions, families, render
from sora_jax.toyworld.scene import (
    DIRECTIONS,
    RELATIONS,
    SPLITS,
    TIERS,
    Draws,
    Scene,
    Slots,
    Subject,
    find_tier,
    tier_of,
)


def anywhere(names):
    kinds = [(tier, name) for name in names for tier in families.FAMILIES[name].tiers]
    return st.tuples(
        st.sampled_from(kinds), st.sampled_from(SPLITS), st.integers(0, 10**9)
    )


def extent(scene: Scene) -> np.ndarray:
    """Left, top, right and bottom of each object in the picture, [T, K, 4]."""
    zoom = np.exp(scene.camera[:, None, 2:3])
    centre = (scene.pos - scene.camera[:, None, :2]) * zoom + scene.size / 2
    radius = np.array([[[thing.radius] for thing in scene.objects]]) * zoom
    # Only a triangle reaches farther than its radius, upwards, and less far downwards.
    triangle = np.array([[[t.shape == "triangle"] for t in scene.objects]])
    up = np.concatenate([radius, radius * np.where(triangle, 1.15, 1.0)], axis=2)
    down = np.concatenate([radius, radius * np.where(triangle, 0.575, 1.0)], axis=2)
    return np.concatenate([centre - up, scene.size - (centre + down)], axis=2)


@settings(max_examples=150, deadline=None)
@given(anywhere(families.FAMILIES))
def test_scene_holds_together(where):
    (tier, family), split, index = where
    scene = families.scene(tier, split, index, {family: 1.0})
    size_class = TIERS[tier]
    assert scene.pos.shape == scene.vel.shape == (*scene.pos.shape[:2], 2)
    assert scene.num_frames == len(scene.pos) == size_class.frames(split)
    assert scene.pos.shape[1] == len(scene.objects)
    # Half a pixel of margin takes the triangle's tip.
    assert extent(scene).min() >= -0.2 * max(t.radius for t in scene.objects)
    within = np.diff(scene.camera[:, 3]) == 0  # Across a cut, things jump.
    steps = np.diff(scene.pos, axis=0)[within]
    np.testing.assert_allclose(steps, scene.vel[1:][within], atol=2e-4)
    assert scene.truth.held_out() == (split == "test_comp")
    assert Scene.from_json(scene.to_json()) == scene
    assert scene.truth.family == family


@settings(max_examples=60, deadline=None)
@given(anywhere(families.BASIC))
def test_geometry_agrees_with_the_slots(where):
    (tier, family), split, index = where
    scene = families.scene(tier, split, index, {family: 1.0})
    truth, size_class = scene.truth, TIERS[tier]
    if truth.relation:
        offset = scene.pos[0, 0] - scene.pos[0, 1]
        along = {name: offset @ unit for name, unit in RELATIONS.items()}
        assert max(along, key=along.get) == truth.relation
        assert along[truth.relation] >= 12 * scene.size / 32 - 1e-3
    for k, subject in enumerate(truth.subjects):
        speed = np.hypot(*scene.vel[0, k])
        if subject.direction is None:
            assert speed == 0
            continue
        ux, uy = DIRECTIONS[subject.direction]
        np.testing.assert_allclose(scene.vel[0, k], (ux * speed, uy * speed), atol=1e-3)
        assert (speed > size_class.speed_limit) == (subject.speed == "fast")
        if split != "test_ood":
            low, high = getattr(size_class, subject.speed)
            assert low - 1e-3 <= speed <= high + 1e-3
    if truth.count:
        assert len(scene.objects) == truth.count
    if len(scene.objects) > 1:
        radii = [thing.radius for thing in scene.objects]
        for t in range(scene.num_frames):
            for i in range(len(radii)):
                for j in range(i):
                    apart = np.hypot(*(scene.pos[t, i] - scene.pos[t, j]))
                    assert apart > radii[i] + radii[j]


def test_scenes_are_pure_in_their_index():
    mix = {"attribute": 0.25, "motion": 0.6, "relation": 0.15}
    forward = [families.scene("tw32", "train", i, mix).to_json() for i in range(20)]
    turned = dict(reversed(mix.items()))
    backward = [
        families.scene("tw32", "train", i, turned).to_json() for i in range(19, -1, -1)
    ]
    assert forward == backward[::-1]
    assert len(set(forward)) == 20
    pictures = {
        render.render(families.scene("tw32", split, 7, mix, seed)).tobytes()
        for split in ("train", "val", "test")
        for seed in (0, 1)
    }
    assert len(pictures) == 6  # Each split and each seed is another world.


def test_draws_are_the_philox_stream():
    words = np.random.Philox(key=Draws(3, "a", 5)._philox.state["state"]["key"])
    expected = [(int(w) >> 11) * 2.0**-53 for w in words.random_raw(32)[::-1]]
    draws = Draws(3, "a", 5)
    assert [draws.unit() for _ in range(32)] == expected
    assert draws._philox.state["state"]["key"][1] == 5


def test_families_are_mixed_as_asked():
    mix = {"attribute": 0.25, "motion": 0.6, "relation": 0.15}
    scenes = [families.scene("tw32", "train", i, mix) for i in range(2000)]
    for name, share in mix.items():
        found = np.mean([scene.family == name for scene in scenes])
        assert abs(found - share) < 0.04, name


def test_nothing_is_nearly_still_on_tw32():
    scenes = [families.scene("tw32", "train", i, {"motion": 1.0}) for i in range(400)]
    speeds = np.array([np.hypot(*scene.vel[0, 0]) for scene in scenes])
    assert speeds.min() >= 1.2
    assert not ((speeds > 1.41) & (speeds < 1.84)).any()  # Slow and fast keep apart.
    assert {scene.objects[0].shape for scene in scenes} == set(TIERS["tw32"].shapes)


def test_training_never_shows_held_out_pairs():
    """Neither in its pictures nor, by the noise of `alt`, in its words."""
    for index in range(1500):
        scene = families.scene("tw32", "train", index)
        assert not scene.truth.held_out()
        for tier in captions.TIERS:
            assert not captions.parse(captions.caption(scene, tier)).held_out()
    pairs = {
        (subject.colour, subject.shape)
        for index in range(1500)
        for subject in families.scene("tw32", "train", index).truth.subjects
    }
    assert len(pairs) == 7 * 4 - 4


def test_range_split_goes_beyond_the_range():
    for tier in TIERS.values():
        for index in range(40):
            scene = families.scene(tier.name, "test_ood", index, {"motion": 1.0})
            assert np.hypot(*scene.vel[0, 0]) >= 1.3 * tier.fast[1] - 1e-3
            scene = families.scene(tier.name, "test_ood", index, {"attribute": 1.0})
            assert scene.objects[0].radius > tier.radius[1]
            scene = families.scene(tier.name, "test_ood", index, {"count": 1.0})
            assert scene.truth.count == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: families.scene("tw8", "train", 0), "tw16, tw32, tw64"),
        (lambda: families.scene("tw32", "dev", 0), "train, val, test"),
        (lambda: families.scene("tw32", "train", -1), ">= 0"),
        (lambda: families.scene("tw32", "train", 0, {"smoke": 1}), "attribute"),
        (lambda: families.scene("tw32", "train", 0, {"motion": 0}), "positive sum"),
        (lambda: families.scene("tw32", "train", 0, {"motion": -1}), "not >= 0"),
        (lambda: find_tier("TW32"), "tw16, tw32, tw64"),
        (lambda: tier_of(31), "16, 32, 64"),
        (lambda: Scene.from_json("[]"), "not a toy-world scene"),
        (lambda: Scene.from_json("{"), "not a toy-world scene"),
    ],
)
def test_errors_name_what_would_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_factors_and_slots_are_inverse():
    slots = Slots(
        (Subject("red", "circle"), Subject("blue", None, "left", "slow")),
        relation="left",
        total=2,
    )
    assert Slots.from_factors(slots.factors()) == slots
    assert Slots.from_factors({}) == Slots()
