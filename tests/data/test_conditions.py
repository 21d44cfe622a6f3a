"""What is given of a clip while the denoiser learns: how it is drawn, and its tokens."""

import collections
import dataclasses
import math

import numpy as np
import pytest

from sora_jax.data import captions, conditions, latent_cache, packing, transforms
from sora_jax.data.conditions import Pattern, Slot

T, H, W, C = 5, 2, 3, 4  # 17 video frames
ENTRY = {"shape": [T, H, W, C], "pictures": [*range(17)], "region": True}


def config(**shares):
    return conditions.Config(shares)


def drawn(name, n=600, entry=ENTRY, **more):
    given = conditions.Config({name: 1.0}, **more)
    return [
        conditions.draw(given, entry, np.random.default_rng(seed)) for seed in range(n)
    ]


def frames_of(name):
    """Which frames of tokens are known, of many draws."""
    return np.array(
        [
            (conditions.slots(one, (T, H, W))[: T * H * W] == Slot.KNOWN)
            .reshape(T, -1)
            .all(1)
            for one in drawn(name)
        ]
    )


def test_none_and_first_frame():
    assert not frames_of("none").any()
    np.testing.assert_array_equal(frames_of("first_frame").sum(0), [600, 0, 0, 0, 0])


@pytest.mark.parametrize("name", ["head", "both"])
def test_heads_have_every_length_and_leave_some(name):
    frames = frames_of(name)
    assert np.all(np.diff(frames.astype(int), axis=1) <= 0)
    lengths = np.bincount(frames.sum(1), minlength=6)
    assert lengths[0] == lengths[5] == 0 and lengths[1:5].min() > 90


def test_tails_are_the_last_frames_as_pictures():
    for name in ("tail", "both"):
        found = collections.Counter(one.pictures for one in drawn(name))
        # One to three neighbours; the last of them is within the last latent frame.
        assert set(found) == {
            tuple(range(last - more, last + 1))
            for last in range(13, 17)
            for more in range(3)
        }
        assert min(found.values()) > 25
    assert not frames_of("tail").any()


def test_keyframes_are_at_any_times_and_every_mth_frame_is_regular():
    found = drawn("keyframes")
    counts = np.bincount([len(one.pictures) for one in found])
    assert len(counts) == 4 and counts[1:].min() > 150
    assert {frame for one in found for frame in one.pictures} == set(range(17))
    assert all(sorted(set(one.pictures)) == [*one.pictures] for one in found)
    found = {one.pictures for one in drawn("every")}
    assert found == {tuple(range(0, 17, m)) for m in (2, 3, 4)}


def test_with_few_pictures_tails_are_still_the_last_frames():
    few = ENTRY | {"pictures": [0, 8, 14, 15, 16]}
    found = {one.pictures for one in drawn("tail", entry=few)}
    assert found == {(16,), (15, 16), (14, 15, 16)}
    assert {one.pattern for one in drawn("every", 50, few)} == {Pattern.NONE}


def test_levels_of_frames_are_apart_or_rise():
    found = [one.levels for one in drawn("levels", 2000)]
    assert {level for levels in found for level in levels} == {0, 1, 2, 3}
    rising = np.mean([list(levels) == sorted(levels) for levels in found])
    assert 0.5 < rising < 0.6  # half of them, and some of the others
    one = conditions.Condition(Pattern.LEVELS, levels=(0, 2, 1, 3, 0))
    slots = conditions.slots(one, (T, H, W)).reshape(T, -1)
    assert slots[:, 0].tolist() == [0, 5, 4, 6, 0] and np.ptp(slots, axis=1).max() == 0


def test_windows_start_mid_clip_and_take_their_own_pictures():
    found = drawn("keyframes", mid_clip=0.5)
    starts = np.bincount([one.start for one in found], minlength=4)
    assert abs(starts[0] / 600 - 0.5) < 0.06 and starts[1:].min() > 70
    assert len(starts) == 4  # two frames of tokens are left
    for one in found:
        first = 1 + 4 * (one.start - 1) if one.start else 0
        assert min(one.pictures) >= first
        assert one.tokens(ENTRY["shape"], (1, 1, 1)) == H * W * (
            T - one.start + len(one.pictures)
        )
    # A latent that shows one frame is never at the head of such a window.
    for one in drawn("first_frame", mid_clip=1.0):
        assert one.pattern is Pattern.NONE and one.head == 0 and one.start


def test_a_clip_without_room_or_views_is_given_nothing():
    image = {"shape": [1, H, W, C]}
    for name in Pattern:
        wanted = Pattern.NONE
        assert {one.pattern for one in drawn(name, 20, image)} == {wanted}, name


def test_patterns_are_drawn_in_their_proportion():
    given = config(none=0.5, first_frame=0.3, tail=0.2, head=0.0)
    found = collections.Counter(
        conditions.draw(given, ENTRY, np.random.default_rng(seed)).pattern
        for seed in range(2000)
    )
    shares = {pattern.value: count / 2000 for pattern, count in found.items()}
    assert shares == pytest.approx(
        {"none": 0.5, "first_frame": 0.3, "tail": 0.2}, abs=0.04
    )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"probabilities": {"first": 1.0}}, "known-token pattern 'first' is unknown"),
        ({"probabilities": {"none": 0.5, "head": 0.4}}, "sum to 1, not 0.9"),
        ({"probabilities": {"none": 1.5, "head": -0.5}}, "'head' is negative"),
        ({"known_tau": 1.0}, "known_tau must be in"),
        ({"levels": ((0.1, 0.2, 0.3),)}, "pairs"),
        ({"levels": ((0.1, 0.7), (0.5, 0.4))}, "sum to 1.1, above 1"),
    ],
)
def test_wrong_configs_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        conditions.Config(**given)


@pytest.mark.parametrize(
    "given, entry, packed, patch, message",
    [
        ({"head": 1.0}, {"shape": [1, 2, 2, 4]}, True, (1, 1, 1), "at least 2 latent"),
        ({"tail": 1.0}, {"shape": [3, 2, 2, 4]}, True, (1, 1, 1), "--pictures"),
        ({"region": 1.0}, {"shape": [3, 2, 2, 4]}, False, (1, 1, 1), "--regions"),
        ({"every": 1.0}, ENTRY, False, (1, 1, 1), "packing.shapes"),
        (
            {"every": 1.0},
            ENTRY | {"pictures": [0, 8, 14, 15, 16]},
            True,
            (1, 1, 1),
            "picture of every frame",
        ),
        ({"every": 1.0}, ENTRY, True, (2, 1, 1), "of which it needs single"),
    ],
)
def test_patterns_that_the_data_cannot_give_are_refused(
    given, entry, packed, patch, message
):
    with pytest.raises(ValueError, match=message):
        config(**given).check_source([entry], packed, patch)


class Record:
    """Latents of which each number says what it is of."""

    id, fps, captions, scores = "a", 8.0, {"short": "a cat"}, {}
    latents = np.arange(T * H * W * C, dtype=np.float32).reshape(T, H, W, C)
    views = latent_cache.Views(
        frames=tuple(range(17)),
        pictures=1000 + np.arange(17 * H * W * C, dtype="f4").reshape(17, H, W, C),
        kept=5000 + latents,
        region=np.arange(T * H * W).reshape(T, H, W) % 2 == 0,
    )


def example(condition, patch=(1, 1, 1)):
    text = lambda record, random: {}  # noqa: E731
    made = transforms.LatentsAndText(text, given=config(none=1.0), patch=patch)
    return made(Record(), None, condition)


def test_the_example_of_a_clip_holds_what_is_given_of_it():
    one = example(conditions.Condition(Pattern.BOTH, 1, head=2, pictures=(11, 16)))
    np.testing.assert_array_equal(one["latents"], Record.latents[1:])
    np.testing.assert_array_equal(one["beside"], Record.views.pictures[[11, 16]])
    np.testing.assert_allclose(one["times"], [11 / 4, 4.0])
    slots = one["slots"].reshape(-1, H * W)
    assert slots[:, 0].tolist() == [1, 1, 0, 0, 1, 1] and one["start"] == 1
    assert conditions.PATTERNS[one["pattern"]] is Pattern.BOTH


def test_known_tokens_of_a_region_do_not_see_the_rest():
    one = example(conditions.Condition(Pattern.REGION))
    known = Record.views.region
    np.testing.assert_array_equal(one["latents"][known], Record.views.kept[known])
    np.testing.assert_array_equal(one["latents"][~known], Record.latents[~known])
    np.testing.assert_array_equal(one["slots"] == Slot.KNOWN, known.ravel())
    # A token of several latents is known only if all of them are.
    wide = example(conditions.Condition(Pattern.REGION), patch=(1, 2, 1))
    want = known.reshape(T, 1, 2, W).all(2).ravel()
    np.testing.assert_array_equal(wide["slots"] == Slot.KNOWN, want)


def test_pictures_are_laid_behind_their_clip_at_their_times():
    given = conditions.Condition(Pattern.TAIL, 2, pictures=(15, 16))
    tokens = given.tokens((T, H, W), (1, 1, 1))
    assert tokens == (3 + 2) * H * W
    shape = packing.Shape(1, 80, 2)
    clips = (packing.Clip(0, tokens, given), packing.Clip(0, T * H * W))
    planner = type(
        "Plan", (), {"seed": 0, "step": lambda s, n: packing.Step(shape, (clips,))}
    )
    source = type("Source", (), {"read": lambda s, i: [Record()] * len(i)})
    text = lambda record, random: {"text_ids": np.zeros(2, np.int32)}  # noqa: E731
    made = transforms.LatentsAndText(text)
    batch, _ = packing.Batches(source(), made, planner(), (1, 1, 1), 0, 1)[0]
    a_frame, tokens_mc = H * W, batch["tokens"][0]
    np.testing.assert_array_equal(
        tokens_mc[: 3 * a_frame], Record.latents[2:].reshape(-1, C)
    )
    np.testing.assert_array_equal(
        tokens_mc[3 * a_frame : tokens], Record.views.pictures[15:].reshape(-1, C)
    )
    times = batch["places"][0, ::a_frame, 0][:10]
    np.testing.assert_allclose(times, [2, 3, 4, 3.75, 4, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(
        batch["places"][0, :a_frame, 1:],
        batch["places"][0, tokens - a_frame : tokens, 1:],
    )
    assert batch["slots"][0, ::a_frame][:10].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    segments = batch["segments"][0]
    assert (segments == 1).sum() == tokens and (segments == 2).sum() == T * a_frame
    assert batch["frames"][0].tolist() == [3, 5]
    assert batch["pattern"][0].tolist() == [
        conditions.PATTERNS.index(Pattern.TAIL), 0,
    ]  # fmt: skip


def test_a_planner_counts_the_tokens_of_pictures_and_keeps_what_it_has_drawn():
    given = conditions.Config({"none": 0.5, "keyframes": 0.5}, mid_clip=0.2)
    made = transforms.LatentsAndText(None, given=given)

    def plan():
        return packing.Planner(
            np.full(200, T * H * W),
            packing.halved(given.most_tokens(ENTRY, (1, 1, 1)), 2, unit=4, clips=4),
            groups=4, window=100, seed=3, cost=packing.Cost(),
            draw=lambda index, random: made.draw(ENTRY, random),
        )  # fmt: skip

    steps, carried = plan().plan(0, [])
    more, _ = plan().plan(1, carried)
    placed = [clip for step in steps + more for row in step.rows for clip in row]
    assert plan().plan(0, []) == (steps, carried)
    for step in steps + more:
        for row in step.rows:
            assert sum(clip.tokens for clip in row) <= step.shape.tokens
    assert {len(clip.condition.pictures) for clip in placed} == {0, 1, 2, 3}
    for clip in placed:
        assert clip.tokens == clip.condition.tokens(ENTRY["shape"], (1, 1, 1))
    # What was carried over is used as it was drawn.
    assert carried and set(carried) <= {clip for clip in placed} | set(
        plan().plan(1, carried)[1]
    )


# -- other clips, and loops -----------------------------------------------------------

SHORT = [3, H, W, C]
INDEX = [
    {"id": "a", "shape": SHORT, "subject": "x"},
    {"id": "b", "shape": SHORT, "subject": "x", "edit_of": "a"},
    {"id": "c", "shape": [5, H, W, C], "subject": "x"},
    {"id": "d", "shape": [3, H, 2 * W, C], "subject": "x"},  # of another size
    {"id": "e", "shape": [5, H, W, C], "edit_of": "a"},  # of another length
    {"id": "f", "shape": SHORT, "edit_of": "gone"},
    {"id": "g", "shape": SHORT, "subject": "alone"},
]


def test_other_clips_are_those_of_the_subject_and_the_source_of_the_same_size():
    more = conditions.related(INDEX, first=10)
    assert {10 + place for place in range(3)} == more.keys()
    found = [more.get(10 + place, {}) for place in range(len(INDEX))]
    assert [entry.get("siblings") for entry in found] == [
        *[[10, 11, 12]] * 3, None, None, None, None,
    ]  # fmt: skip
    assert found[0]["siblings"] is found[2]["siblings"]  # however many there are
    assert [entry.get("rank") for entry in found[:3]] == [0, 1, 2]
    assert [entry.get("source") for entry in found] == [None, 10, *[None] * 5]
    slower = [*INDEX[:1], INDEX[1] | {"fps": 4.0}]
    assert "source" in conditions.related(INDEX[:2])[1]
    assert "source" not in conditions.related(slower)[1]


def test_references_and_sources_are_given_where_there_are_any():
    more = conditions.related(INDEX)
    entries = [entry | more.get(place, {}) for place, entry in enumerate(INDEX)]
    found = drawn("reference", entry=entries[0])
    counts = collections.Counter(one.references for one in found)
    assert set(counts) == {(1,), (2,), (1, 2), (2, 1)}
    assert min(counts.values()) > 100
    of_last = {r for one in drawn("reference", 90, entries[2]) for r in one.references}
    assert of_last == {0, 1}
    assert {one.pattern for one in drawn("reference", 5, entries[4])} == {Pattern.NONE}
    edit = drawn("edit", 1, entries[1], mid_clip=1.0)[0]
    assert (edit.pattern, edit.source, edit.start) == (Pattern.EDIT, 0, 0)
    assert edit.tokens(SHORT, (1, 1, 1)) == 6 * H * W
    assert {one.pattern for one in drawn("edit", 5, entries[4])} == {Pattern.NONE}
    given = conditions.Config({"none": 0.5, "reference": 0.25, "edit": 0.25})
    for entry, most in ((entries[0], 5), (entries[1], 6), (entries[3], 3)):
        assert given.most_tokens(entry, (1, 1, 1)) == most * math.prod(
            entry["shape"][1:3]
        )


def test_a_clip_that_repeats_itself_is_a_window_of_one_period():
    """Of 17 frames and period 8: latents 1 to 2, 2 to 3 or 3 to 4."""
    entry = {"shape": [T, H, W, C], "period": 8}
    given = conditions.Config({"none": 0.9, "loop": 0.1})
    found = [
        conditions.draw(given, entry, np.random.default_rng(seed))
        for seed in range(300)
    ]
    windows = collections.Counter((one.start, one.stop) for one in found)
    assert set(windows) == {(1, 3), (2, 4), (3, 5)} and min(windows.values()) > 60
    assert {one.pattern for one in found} == {Pattern.LOOP}
    assert {one.tokens(entry["shape"], (1, 1, 1)) for one in found} == {2 * H * W}
    assert given.most_tokens(entry, (1, 1, 1)) == 2 * H * W
    once = ENTRY | {"pictures": []}
    assert {one.pattern for one in drawn("loop", 20, once)} == {Pattern.NONE}
    # Where loops are not trained, it is a clip like any other.
    assert drawn("none", 1, entry)[0] == conditions.Condition()


def test_images_are_clips_cut_to_their_first_latent():
    found = drawn("first_frame", images=0.25)
    share = np.mean([one == conditions.Condition(stop=1) for one in found])
    assert 0.2 < share < 0.3
    assert conditions.Config({"none": 1.0}, images=0.1).patterns == ("none", "images")


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("reference", "clips of one subject"),
        ("edit", "clips that are edits of others"),
        ("loop", "clips that repeat themselves"),
    ],
)
def test_what_the_clips_lack_is_said(name, lacks):
    given = conditions.Config({name: 1.0})
    with pytest.raises(ValueError, match=lacks):
        given.check_source([ENTRY], True, (1, 1, 1))
    entries = [ENTRY | {"siblings": [0, 1], "rank": 0, "source": 1, "period": 8}]
    given.check_source(entries, True, (1, 1, 1))
    with pytest.raises(ValueError, match="packed rows"):
        given.check_source(entries, False, (1, 1, 1))
    with pytest.raises(ValueError, match="a token spans 2 latent frames"):
        given.check_source(entries, True, (2, 1, 1))


def test_what_a_patch_or_a_stride_rules_out_is_refused():
    images = conditions.Config({"none": 1.0}, images=0.1)
    with pytest.raises(ValueError, match="an image has one"):
        images.check_source([ENTRY], True, (2, 1, 1))
    loops = conditions.Config({"none": 0.5, "loop": 0.5})
    with pytest.raises(ValueError, match="no multiple of the 8 frames"):
        loops.most_tokens({"shape": [5, H, W, C], "period": 12}, (1, 1, 1), 8)


class Other(Record):
    latents = -1.0 - Record.latents
    captions = {"short": "before", "dense": "the same"}


def test_other_clips_are_laid_beside_a_clip():
    two = conditions.Condition(Pattern.REFERENCE, references=(4, 7))
    made = transforms.LatentsAndText(lambda record, random: {})
    one = made(Record(), None, two, [Other(), Record()])
    np.testing.assert_array_equal(one["beside"], [Other.latents[0], Record.latents[0]])
    assert one["times"].tolist() == [-1, -2] and one["period"] == 0
    slots = one["slots"].reshape(-1, H * W)[:, 0].tolist()
    assert slots == [0] * T + [Slot.REFERENCE] * 2


def test_an_edit_is_told_by_a_caption_that_its_source_does_not_have():
    @dataclasses.dataclass(frozen=True)
    class After:
        captions: dict
        latents = Record.latents
        views = Record.views

    told = []

    class Text:
        sampler = captions.CaptionSampler({"short": 0.5, "dense": 0.5})

        def __call__(self, record, random):
            told.append(record.captions)
            return {}

    made = transforms.LatentsAndText(Text())
    edit = conditions.Condition(Pattern.EDIT, source=2)
    both = {"short": "before\nafter", "dense": "the same", "alt": "another"}
    one = made(After(both), None, edit, [Other()])
    np.testing.assert_array_equal(one["beside"], Other.latents)
    assert one["times"].tolist() == [0, 1, 2, 3, 4]
    slots = one["slots"].reshape(-1, H * W)[:, 0].tolist()
    assert slots == [0] * T + [Slot.SOURCE] * T
    # Where only captions differ that are not used, all are kept.
    alike = {"dense": "the same", "alt": "another"}
    made(After(alike), None, edit, [Other()])
    assert told == [{"short": "after", "alt": "another"}, alike]


def test_a_loop_is_its_window_and_says_its_period():
    one = example(conditions.Condition(Pattern.LOOP, 2, 4))
    np.testing.assert_array_equal(one["latents"], Record.latents[2:4])
    assert one["period"] == 2 and one["start"] == 2 and len(one["slots"]) == 2 * H * W
