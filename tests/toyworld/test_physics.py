"""Mechanics: paths against independent arithmetic, and each part of the rules alone."""

import dataclasses

import numpy as np
import pytest
from scipy import integrate

from experiments import family_controls
from experiments import toyworld_controls as tables
from sora_jax.toyworld import captions, families, oracle, physics, render
from sora_jax.toyworld.scene import DIRECTIONS, OPPOSITE, SPLITS, TIERS, Draws, Event

FAMILIES = ("gravity", "collision")


def scenes(tier: str, family: str, count: int, split: str = "test") -> list:
    return [families.scene(tier, split, i, {family: 1.0}) for i in range(count)]


def first(tier: str, family: str, keep, split: str = "test"):
    """The first scene of which `keep` is true, and its clip."""
    drawn = (families.scene(tier, split, i, {family: 1.0}) for i in range(300))
    scene = next(filter(keep, drawn))
    return scene, render.render(scene)


def with_subject(scene, k: int = 0, **changes):
    """The scene's facts with other ones of a subject."""
    subjects = list(scene.truth.subjects)
    subjects[k] = dataclasses.replace(subjects[k], **changes)
    return dataclasses.replace(scene.truth, subjects=tuple(subjects))


def failed(slots, video) -> set[str]:
    """The parts that fail, without "pass", which must agree with them."""
    verdict = oracle.score_slots(slots, video)
    wrong = {part for part, right in verdict.items() if not right}
    assert ("pass" in wrong) == bool(wrong - {"pass"})
    return wrong - {"pass"}


def other(value: str, values) -> str:
    return next(v for v in values if v != value)


# -- Gravity ---------------------------------------------------------------------------


def integrated(height: float, gravity: float, restitution: float, frames: int):
    """Heights at each frame, by integration of the equation of motion from hit to hit."""

    def hits(t, state):
        return state[0]

    hits.terminal, hits.direction = True, -1
    state, begins, found = [height, 0.0], 0.0, np.zeros(frames)
    while True:
        path = integrate.solve_ivp(
            lambda t, state: [state[1], -gravity],
            (begins, frames),
            state,
            events=hits,
            dense_output=True,
            rtol=1e-10,
            atol=1e-10,
        )
        t = np.arange(frames)
        flying = (t >= begins) & (t <= path.t[-1])
        found[flying] = path.sol(t[flying])[0]
        speed = -restitution * path.y[1, -1]
        if path.t[-1] >= frames - 1 or speed**2 / (2 * gravity) < 0.25:
            return found
        begins, state = path.t[-1], [1e-9, speed]


@pytest.mark.parametrize("restitution", [0.0, 0.6])
@pytest.mark.parametrize(
    ("height", "gravity", "frames"), [(14.0, 1.6, 17), (30.0, 0.9, 33)]
)
def test_heights_solve_the_equation_of_motion(height, gravity, frames, restitution):
    found, lands = physics.heights(height, gravity, restitution, frames)
    wanted = integrated(height, gravity, restitution, frames)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert lands == pytest.approx((2 * height / gravity) ** 0.5)
    assert found.min() >= 0


@pytest.mark.parametrize("tier", families.FAMILIES["gravity"].tiers)
@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_falls_as_its_facts_say(tier, split):
    constants, size = physics.FALLS[tier], TIERS[tier].size
    for scene in scenes(tier, "gravity", 12, split):
        fall, bounce = scene.truth.events
        (thing,), (subject,) = scene.objects, scene.truth.subjects
        down = {"triangle": 0.575, "square": 0.9}.get(thing.shape, 1.0) * thing.radius
        above = size - 1 - down - scene.pos[:, 0, 1]
        wanted = integrated(
            above[0], constants.gravity, 0.6 if bounce.happens else 0.0, len(above)
        )
        np.testing.assert_allclose(above, wanted, atol=2e-3)
        beyond = split == "test_ood"
        low, high = constants.ood_height if beyond else constants.height
        assert low - 1e-3 <= above[0] <= high + 1e-3
        lands = (2 * above[0] / constants.gravity) ** 0.5
        assert lands <= scene.num_frames - 3  # so that its end is seen
        before = np.diff(scene.pos[: int(lands) + 1, 0, 0])
        after = np.diff(scene.pos[int(lands) + 1 :, 0, 0])
        if fall.value == "dropped":
            assert subject.direction is None and not before.any() and not after.any()
            continue
        speed = before * DIRECTIONS[subject.direction][0]
        np.testing.assert_allclose(speed, speed[0], atol=2e-4)
        low, high = constants.ood_speed if beyond else constants.speed
        assert low - 1e-3 <= speed[0] <= high + 1e-3
        np.testing.assert_allclose(
            after, before[0] if bounce.happens else 0.0, atol=2e-4
        )


def test_each_part_of_a_fall_is_judged_on_its_own():
    scene, video = first(
        "tw32",
        "gravity",
        lambda s: s.truth.subjects[0].direction == "left",
    )
    subject, (fall, bounce) = scene.truth.subjects[0], scene.truth.events
    assert failed(scene.truth, video) == set()
    wrong = other(subject.shape, TIERS["tw32"].shapes)
    assert failed(with_subject(scene, shape=wrong), video) == {"shape"}
    wrong = other(subject.colour, TIERS["tw32"].colours)
    assert "colour" in failed(with_subject(scene, colour=wrong), video)
    for way in ("right", "up"):
        assert failed(with_subject(scene, direction=way), video) == {"way"}

    def told(*events):
        return dataclasses.replace(with_subject(scene, direction=None), events=events)

    dropped = dataclasses.replace(fall, value="dropped")
    assert failed(told(dropped, bounce), video) == {"way"}
    turned = dataclasses.replace(bounce, happens=not bounce.happens)
    assert failed(told(fall, turned), video) == {"bounce"}
    assert failed(told(Event("fall")), video) == set()
    # What is stated of neither is not checked, but things must fall.
    for name, change in family_controls.CONTROLS["gravity"].items():
        if name in ("at constant speed", "gravity x 1.6"):
            spoilt = change(scene)
            assert "falls" in failed(told(Event("fall")), spoilt), name
        elif name == "bounces higher":
            spoilt = change(scene)
            bounces = dataclasses.replace(bounce, happens=True)
            assert failed(told(fall, bounces), spoilt) == {"bounce"}


def test_a_fall_ends_on_the_ground():
    """The same fall onto nothing, ten pixels above it, is none onto the ground."""
    scene, _ = first("tw64", "gravity", lambda s: s.pos[0, 0, 1] > 20)
    pos = scene.pos - [0.0, 10.0]
    raised = render.render(dataclasses.replace(scene, pos=pos))
    assert not oracle.score(scene, raised)["pass"]


def test_texts_of_falls():
    scene, video = first(
        "tw32",
        "gravity",
        lambda s: s.truth.events[0].value == "dropped" and s.truth.events[1].happens,
    )
    subject = scene.truth.subjects[0]
    name = f"a {subject.colour} {subject.shape}"
    right = ("falls", "drops", "is dropped and bounces", "drops down")
    wrong = (
        "does not bounce",
        "is thrown to the left",
        "is thrown",
        "drops to the right",
    )
    for said in right:
        assert oracle.score_slots(captions.parse(f"{name} {said}"), video)["pass"], said
    for said in wrong:
        text = f"{name} {said}"
        assert captions.parse(text).family == "gravity"
        assert not oracle.score_slots(captions.parse(text), video)["pass"], said


# -- Collision -------------------------------------------------------------------------


def overlap(shape_a, radius_a, shape_b, radius_b, offset) -> float:
    """Area that two shapes share, by a fine grid of points."""
    grid = np.arange(-12, 12, 0.1)
    x, y = grid[None], grid[:, None]
    a = render.distance(shape_a, x + 0 * y, y + 0 * x, radius_a) < 0
    dx, dy = x - offset[0] + 0 * y, y - offset[1] + 0 * x
    return float((a & (render.distance(shape_b, dx, dy, radius_b) < 0)).mean() * 24**2)


@pytest.mark.parametrize("way", ["left", "right", "up", "down"])
def test_shapes_touch_where_they_just_do_not_overlap(way):
    for one in render.AREA:
        for two in render.AREA:
            apart = physics.touching((one, 5.0), (two, 4.2), way)
            along = np.array(DIRECTIONS[way])
            assert overlap(one, 5.0, two, 4.2, along * (apart + 0.15)) == 0
            assert overlap(one, 5.0, two, 4.2, along * (apart - 0.25)) > 0


@pytest.mark.parametrize("tier", families.FAMILIES["collision"].tiers)
@pytest.mark.parametrize("split", SPLITS)
def test_a_collision_keeps_momentum_and_energy(tier, split):
    for scene in scenes(tier, "collision", 12, split):
        (event,), subjects = scene.truth.events, scene.truth.subjects
        masses = np.array([thing.radius**2 for thing in scene.objects])[:, None]
        before, after = scene.vel[1], scene.vel[-1]
        np.testing.assert_allclose(
            (masses * before).sum(0), (masses * after).sum(0), atol=1e-2
        )
        energies = [float((masses * v * v).sum()) for v in (before, after)]
        assert energies[0] == pytest.approx(energies[1], rel=2e-3)
        assert tables.comes_as_stated(scene, before)
        assert (event.value == "resting") == (subjects[1].direction is None)
        # Straight before and after, at least two frames each; the contact is exact.
        bends = np.flatnonzero(
            (np.abs(np.diff(scene.vel[1:], axis=0)) > 1e-3).any((1, 2))
        )
        assert len(bends) and bends.max() - bends.min() <= 1
        assert 1 < bends.min() and bends.max() < scene.num_frames - 3
        axis = np.array(DIRECTIONS[subjects[0].direction])
        gap = (scene.pos[:, 1] - scene.pos[:, 0]) @ axis
        apart = physics.touching(
            *((t.shape, t.radius) for t in scene.objects), subjects[0].direction
        )
        closing = float((before[0] - before[1]) @ axis)
        meets = (gap[0] - apart) / closing
        t = np.arange(scene.num_frames)
        np.testing.assert_allclose(gap, apart + closing * abs(t - meets), atol=5e-3)


def test_each_part_of_a_collision_is_judged_on_its_own():
    scene, video = first(
        "tw64", "collision", lambda s: s.truth.events[0].value == "resting"
    )
    one, _ = scene.truth.subjects
    assert failed(scene.truth, video) == set()
    wrong = other(one.shape, TIERS["tw64"].shapes)
    assert failed(with_subject(scene, 0, shape=wrong), video) == {"shapes"}
    unused = next(
        c
        for c in TIERS["tw64"].colours
        if c not in [thing.colour for thing in scene.objects]
    )
    assert "colours" in failed(with_subject(scene, 1, colour=unused), video)
    for way in DIRECTIONS:
        if way != one.direction:
            assert failed(with_subject(scene, 0, direction=way), video) == {"approach"}
    opposite = OPPOSITE[one.direction]
    assert failed(with_subject(scene, 1, direction=opposite), video) == {"approach"}
    # It is the first that moves.
    turned = dataclasses.replace(scene.truth, subjects=scene.truth.subjects[::-1])
    assert "approach" in failed(turned, video)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ghosts", {"separate"}),
        ("both stop", {"separate", "momentum", "speeds"}),
        ("no push", {"momentum", "speeds"}),
    ],
)
def test_laws_that_are_broken_are_named(name, parts):
    for scene in scenes("tw64", "collision", 6):
        spoilt = family_controls.CONTROLS["collision"][name](scene)
        assert parts & failed(scene.truth, spoilt), scene.index


def test_things_must_touch():
    """The same velocities with a gap of six pixels between them are no contact."""
    scene, _ = first("tw64", "collision", lambda s: s.pos.max() < 56)
    pos = scene.pos.copy()
    axis = np.array(DIRECTIONS[scene.truth.subjects[0].direction])
    pos[:, 1] += 6 * axis
    apart = render.render(dataclasses.replace(scene, pos=pos))
    assert failed(scene.truth, apart) == {"meet"}


def test_texts_of_collisions():
    scene, video = first(
        "tw32", "collision", lambda s: s.truth.events[0].value == "resting"
    )
    one, two = scene.truth.subjects
    a, b = (f"{s.colour} {s.shape}" for s in (one, two))
    way = one.direction
    right = (
        f"a {a} moves {way} and hits a {b}",
        f"a {a} bumps into the resting {b}",
        f"a {a} moving {way} collides with the resting {b}",
    )
    wrong = (
        f"a {b} moves {way} and hits a {a}",
        f"a {b} hits the resting {a}",
        f"a {a} moves {OPPOSITE[way]} and hits a {b}",
    )
    for text in right:
        assert oracle.score_slots(captions.parse(text), video)["pass"], text
    for text in wrong:
        assert captions.parse(text).family == "collision"
        assert not oracle.score_slots(captions.parse(text), video)["pass"], text


# -- Both ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_controls(family):
    table = tables.controls("tw32", family, 16)
    assert table.pop("truth")[0] == 1
    for name in ("noise 8", "blur .7, noise 8", "blur 1, noise 12"):
        assert table.pop(name)[0] >= 0.9, name
    for name, (share, level) in table.items():
        assert share == pytest.approx(level, abs=0.05), name
    for name, (share, level) in family_controls.controls("tw32", family, 8).items():
        assert share == level == 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_tiers_without_the_family_are_refused(family):
    with pytest.raises(ValueError, match="tier tw16 has no family"):
        families.scene("tw16", "train", 0, {family: 1.0})


def test_a_scene_without_room_is_an_error(monkeypatch):
    tight = physics.Approach(*[(90.0, 91.0)] * 4)
    monkeypatch.setitem(physics.APPROACHES, "tw32", tight)
    draws, tier = Draws(0, "test", 0), TIERS["tw32"]
    slots = physics.choose_collision(draws, tier, "train")
    with pytest.raises(RuntimeError, match="no room"):
        physics.lay_out_collision(draws, tier, "train", slots)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("caption_tier", captions.TIERS[1:])
def test_another_direction_is_the_opposite_one(family, caption_tier):
    found = 0
    for scene in scenes("tw32", family, 20):
        text = captions.exchanged(scene, caption_tier, "direction")
        if text is None:
            continue
        found += 1
        assert captions.parse(text).family == family
        assert not oracle.score_slots(captions.parse(text), render.render(scene))[
            "pass"
        ]
    assert found
