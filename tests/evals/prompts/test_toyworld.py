"""Suites of new prompts, verdicts of which nothing is left out, and what chance gives."""

import numpy as np
import pytest

from sora_jax.evals import statistics
from sora_jax.evals.metrics import controls
from sora_jax.evals.prompts import make_clips, toyworld
from sora_jax.toyworld import captions, families, render
from sora_jax.toyworld import scene as scenes

SMALL = {"motion": 24, "relation": 16, "attribute": 12}


@pytest.fixture(scope="module")
def suites():
    return toyworld.make_suites(SMALL, tier="tw32", exclude_texts=[])


@pytest.fixture(scope="module")
def truth(suites):
    return make_clips.render_scenes(
        {s.name: make_clips.matching_scenes(s, tier="tw32") for s in suites}
    )


def test_suites_hold_new_texts_only(suites):
    taken = suites[0].texts[::2]
    again = toyworld.make_suites({"motion": 24}, tier="tw32", exclude_texts=taken)[0]
    assert len(again) == 24 == len(set(again.texts))
    assert not set(taken) & set(again.texts)
    other = toyworld.make_suites({"motion": 24}, tier="tw32", exclude_texts=[], seed=1)
    assert other[0].texts != suites[0].texts
    assert {p.slots.relation for p in suites[1].prompts} == {"left", "right"}


def test_held_out_suites_hold_only_held_out_combinations(suites):
    apart = toyworld.make_suites(
        {"motion_held_out": 8, "attribute": 0}, tier="tw32", exclude_texts=[]
    )
    assert [suite.name for suite in apart] == ["motion_held_out"]
    assert all(prompt.slots.held_out() for prompt in apart[0].prompts)
    assert not any(p.slots.held_out() for suite in suites for p in suite.prompts)
    shown = make_clips.matching_scenes(apart[0], tier="tw32")
    assert all(scene.truth.held_out() for scene in shown)


def test_unknown_suite_is_named():
    with pytest.raises(ValueError, match="suite 'moton' is unknown"):
        toyworld.make_suites({"moton": 3}, tier="tw32", exclude_texts=[])


def test_every_prompt_is_true_of_its_scene(suites):
    for suite in suites:
        drawn = make_clips.matching_scenes(suite, tier="tw32")
        assert len({scene.index for scene in drawn}) == len(drawn)
        for prompt, scene in zip(suite.prompts, drawn, strict=True):
            said, real = prompt.slots, scene.truth
            assert said.relation in (None, real.relation)
            for one, other in zip(said.subjects, real.subjects, strict=True):
                assert (one.colour, one.shape) == (other.colour, other.shape)
                assert one.direction == other.direction
                assert one.speed in (None, other.speed)
    other = make_clips.matching_scenes(suites[0], tier="tw32", seed=1)
    assert other != make_clips.matching_scenes(suites[0], tier="tw32", seed=0)


def table(suites, videos):
    return {
        suite.name: {
            part: share.value
            for part, share in toyworld.summarize(
                toyworld.verdicts(suite, videos[suite.name])
            ).items()
        }
        for suite in suites
    }


def test_control_table(suites, truth):
    """Ground truth passes; each control fails where it must and passes where it can."""
    found = {"ground truth": table(suites, truth)}
    for name in controls.make(truth["motion"]):
        spoilt = {s: controls.make(videos)[name] for s, videos in truth.items()}
        found[name] = table(suites, spoilt)
    mirrored = {s: videos[:, :, :, ::-1] for s, videos in truth.items()}
    found["mirrored"] = table(suites, mirrored)
    shuffled = [toyworld.permuted(suite) for suite in suites]
    found["captions shuffled"] = table(shuffled, truth)
    for name, scores in found.items():
        print(name, {s: f"{parts['pass']:.2f}" for s, parts in scores.items()})
    assert all(p["pass"] == 1 for p in found["ground truth"].values())
    assert all(p["pass"] >= 0.95 for p in found["blurred"].values())
    for name in ("time-reversed", "still"):
        assert found[name]["motion"]["direction"] == 0
        assert found[name]["relation"]["side"] == 1
    assert found["frames shuffled"]["motion"]["direction"] < 0.3
    assert found["mirrored"]["relation"]["side"] == 0
    assert found["mirrored"]["motion"]["direction"] < 0.8  # up and down remain
    assert all(p["pass"] <= 0.2 for p in found["captions shuffled"].values())


def test_what_is_missing_or_not_found_is_wrong(suites, truth):
    motion = suites[0]
    videos = list(truth["motion"])
    videos[3] = None
    videos[5] = np.full_like(videos[5], 128)
    found = toyworld.verdicts(motion, videos)
    shares = toyworld.summarize(found)
    assert shares["colour"].count == shares["pass"].count == len(motion)
    right = (len(motion) - 2) / len(motion)
    assert shares["colour"].value == shares["direction"].value == right
    assert not any(found[3].values()) and found[3].keys() == found[5].keys()
    with pytest.raises(ValueError, match="24 prompts, but there are 23 clips"):
        toyworld.verdicts(motion, videos[1:])


def test_only_what_a_prompt_states_counts(suites, truth):
    """The rules pass what is not stated; that may not raise a share."""
    shares = toyworld.summarize(toyworld.verdicts(suites[0], truth["motion"]))
    stating = sum(p.slots.subjects[0].speed is not None for p in suites[0].prompts)
    assert 0 < stating < len(suites[0])
    assert shares["speed"].count == stating


def test_a_side_needs_both_colours(suites, truth):
    """Recolouring the first object makes the side wrong, not only the colours."""
    relation = suites[1]
    videos = truth["relation"].copy()
    colour = relation.prompts[0].slots.subjects[0].colour
    far = np.abs(videos[0].astype(int) - scenes.PALETTE[colour]).sum(-1)
    videos[0][far < 60] = 128
    found = toyworld.verdicts(relation, videos)[0]
    assert not found["colours"] and not found["side"]


def test_permutation_moves_every_prompt_and_keeps_all(suites):
    for suite in suites:
        moved = toyworld.permuted(suite)
        assert sorted(moved.texts) == sorted(suite.texts)
        pairs = zip(moved.texts, suite.texts, strict=True)
        assert all(here != there for here, there in pairs)


def test_worst_takes_each_part_from_its_own_seed():
    first = {
        "colour": statistics.proportion(9, 10),
        "side": statistics.proportion(5, 10),
    }
    second = {
        "colour": statistics.proportion(7, 10),
        "side": statistics.proportion(8, 10),
    }
    found = toyworld.worst([first, second])
    assert found["colour"] == second["colour"] and found["side"] == first["side"]
    assert found["side"].low < 0.5 < found["side"].high


def test_texts_of_samples_become_suites():
    texts = [
        "a red circle moves left",
        "the weather in spring",
        "a blue square left of a green circle",
        "a red square moves down",  # held out
        "a cyan cross moves right",
    ]
    found, order, unmeasured = toyworld.suites_of_texts(texts)
    assert unmeasured == [1]
    assert [suite.name for suite in found] == ["motion", "motion_held_out", "relation"]
    assert [t for suite in found for t in suite.texts] == [texts[i] for i in order]


def test_clip_seeds_depend_on_seed_and_text_alone(suites):
    seeds = [make_clips.clip_seed(0, prompt) for prompt in suites[0].prompts]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [make_clips.clip_seed(0, p) for p in suites[0].head(24).prompts]
    assert not set(seeds) & {make_clips.clip_seed(1, p) for p in suites[0].prompts}


def test_nearest_caption_depends_on_word_order():
    known = [
        "a red circle left of a blue square",
        "a blue square left of a red circle",
        "a green cross moves down",
        "the red circle moves up",
    ]
    texts = ["one blue square left of a red circle", "green cross moving down"]
    assert make_clips.nearest_captions(texts, known) == [1, 2]
    with pytest.raises(ValueError, match="no captions"):
        make_clips.nearest_captions(texts, [])


def test_nearest_caption_of_a_scene_is_its_own():
    drawn = [families.scene("tw32", "train", i, {"motion": 1}) for i in range(60)]
    known = [captions.caption(scene, "medium") for scene in drawn]
    found = make_clips.nearest_captions(known, known)
    assert [known[i] for i in found] == known


def test_exact_motion_is_that_of_the_renderer():
    scene = families.scene("tw32", "test", 0, {"motion": 1})
    motion = make_clips.exact_motion([scene, scene])
    flow, occluded = render.flow(scene)
    np.testing.assert_array_equal(motion.flow_bphwx[1], flow)
    np.testing.assert_array_equal(motion.followed_bphw[0], ~occluded)
