"""Bad answers are found, each for its reason, and true captions are kept."""

import functools

import pytest

from sora_jax.captioning import captioner, checks, motion
from sora_jax.toyworld import captions, families, render
from tests.captioning import moving

GOOD = (
    "A small brown dog runs along a wet beach towards the left while grey waves roll in "
    "behind it. The camera follows the dog at a steady pace under a pale morning sky."
)


def unmeasured():
    raise AssertionError("the text states no direction")


def problem(text, tier="model_dense", way=None, stopped="stop", **options):
    measured = functools.partial(motion.measure, moving.frames(way))
    return checks.problem(captioner.Answer(text, stopped), tier, measured, **options)


def test_a_caption_is_kept():
    assert problem(GOOD, way="left") is None
    assert problem("a dog running along the beach", "model_short") is None
    # Words that only look like set phrases.
    for text in (
        "A man in a video shop points at a wall of films in the final hour of the day.",
        "Frames of old pictures hang on the wall, and a cat sits on the sofa below them.",
        "Two children cannot reach the shelf, so they climb on a chair that wobbles a bit.",
    ):
        assert problem(text) is None, text


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "it is empty"),
        (" \n\t\u200b", "it is empty"),
        ("I'm sorry, but I can't help with that request about this clip today.", "refuses"),
        ("I cannot identify people in images, and so I will not describe it.", "refuses"),
        ("As an AI, I have no way to watch clips, so here is a guess instead.", "refuses"),
        (f"This video shows a dog. {GOOD}", "set phrase: 'This video shows'"),
        (f"The video clip depicts a dog. {GOOD}", "set phrase"),
        (f"In this clip, a dog runs. {GOOD}", "set phrase"),
        (f"Here is a caption: {GOOD}", "set phrase"),
        (f"{GOOD} In conclusion, it is a calm scene.", "set phrase: 'In conclusion'"),
        (f"{GOOD} In the final frame the dog is gone.", "set phrase"),
        (f"**Subject**: {GOOD}", "markup"),
        (f"<think>Let me see.</think> {GOOD}", "markup"),
        (f"- a dog\n- a beach\n{GOOD}", "markup"),
        ("一只棕色的小狗沿着潮湿的海滩向左跑，灰色的海浪在它身后翻滚。", "not in Latin letters"),
        ("Маленькая собака бежит по мокрому пляжу под бледным небом.", "not in Latin letters"),
        (
            "Ein kleiner brauner Hund rennt am nassen Strand entlang, hinter ihm rollen "
            "graue Wellen heran, der Himmel ist blass.",
            "not in English",
        ),
        ("A dog runs.", "3 words, not 12 to 250"),
        (" ".join([f"word{n} of the day" for n in range(80)]), "words, not 12 to 250"),
        (f"{GOOD} The dog runs very very very fast.", "repeats 'very'"),
        (
            "The dog runs on the wet sand. " * 4,
            "repeats 'the dog runs on the'",
        ),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_caption_is_found(text, reason):
    assert reason in problem(text, way="left")


def test_what_ends_early_is_found():
    assert "cut off" in problem(GOOD, way="left", stopped="length")
    assert "broke it off" in problem(GOOD, way="left", stopped="abort")
    assert "withheld" in problem(GOOD, way="left", stopped="content_filter")
    assert "words" in problem(GOOD, "model_short")


def test_a_caption_becomes_one_line_without_quotes():
    assert checks.cleaned('"a dog\n runs"\x07 ') == "a dog runs"
    assert checks.cleaned("a “dog”") == "a “dog”"
    assert checks.cleaned("a dog\ud800 runs").encode() == b"a dog runs"


@pytest.mark.parametrize(
    "text, said",
    [
        ("a car drives to the left", {"left"}),
        ("A ball rolls quickly across the frame from left to right.", {"right"}),
        ("the bird flies up and right", {"up", "right"}),
        ("it is heading towards the bottom left corner", {"down", "left"}),
        ("a boat drifting leftwards", {"left"}),
        ("it moves to the left of the frame, then downward", {"left", "down"}),
        ("a man on the left walks past a house on the right", set()),
        ("she left the room and it was all right", set()),
        ("a red square to the left of a blue circle", set()),
        ("a dog moves past the left wall", set()),
        ("it moves to the left of the tree", set()),
        ("the camera pans to the right", set()),
        ("the view moves left", set()),
        ("it does not move to the left", set()),
        ("a woman turns to the right and looks up", set()),
        ("a ball rolls from the left, then stops", set()),
        ("a ball rolls in the lower left corner", set()),
        ("he picks up a cup and sits down", set()),
    ],
)
def test_directions_are_those_of_things(text, said):
    assert checks.directions(text) == said


@pytest.mark.parametrize("way", moving.WAYS)
def test_a_side_that_the_pixels_contradict(way):
    other = checks._OPPOSITE[way]
    text = "a white square that moves {}wards"
    assert problem(text.format(way), "model_short", way) is None
    found = problem(text.format(other), "model_short", way)
    assert found == f"it says {other}, and what moves in the clip moves {way}"
    # It may be right of another thing, or of a motion that is not seen.
    both = f"a square that moves {way}wards and a dot that moves {other}wards"
    assert problem(both, "model_short", way) is None
    assert problem(text.format(other), "model_short", None) is None


def test_motion_is_measured_for_a_direction_only():
    answer = captioner.Answer("a red ball rests on the left")
    assert checks.problem(answer, "model_short", unmeasured) is None


def test_a_network_may_write_as_its_training_captions_do():
    """All dense captions of the toy world, a third of which have a set phrase."""
    refused = 0
    for index in range(120):
        text = captions.caption(families.scene("tw32", "train", index), "dense")
        refused += problem(text) is not None
        assert problem(text, is_assistant=False) is None, text
    assert refused > 20
    for text in ("", "a dot a dot a dot a dot a dot a dot a dot a dot"):
        assert problem(text, is_assistant=False) is not None
    other = (
        "The white square with sharp edges moves to the right across the grey scene."
    )
    assert "what moves in the clip moves left" in problem(
        other, way="left", is_assistant=False
    )


def test_what_moves_with_the_whole_picture_is_unknown():
    frames_thwc = moving.frames("left")
    frames_thwc[3] = 255 - frames_thwc[3]  # a cut
    assert motion.measure(frames_thwc) == motion.UNKNOWN
    assert motion.measure(moving.frames(None)) == motion.UNKNOWN


def test_the_toy_world_agrees():
    """No true caption is refused; of those with the opposite way most are."""
    found = opposite = 0
    for index in range(8):
        drawn = families.scene("tw32", "val", index, {"motion": 1.0}, 5)
        way = drawn.truth.subjects[0].direction
        measured = motion.measure(render.render(drawn))
        assert measured.shares[way] > 0.8, index
        for tier in ("medium", "dense"):
            text = captions.caption(drawn, tier)
            assert checks._contradiction(text, lambda: measured) is None  # noqa: B023
            changed = captions.exchanged(drawn, tier, "direction")
            stated = changed and captions.parse(changed).subjects[0].direction
            if stated == checks._OPPOSITE[way]:
                opposite += 1
                wrong = checks._contradiction(changed, lambda: measured)  # noqa: B023
                found += wrong is not None
    assert opposite >= 3 and found == opposite
