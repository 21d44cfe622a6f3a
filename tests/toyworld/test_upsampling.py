"""Rules for short prompts: what is stated stays, what is open is filled in."""

import pytest

from sora_jax.evals.prompts import make_clips
from sora_jax.toyworld import captions, families, upsampling


def facts(text: str) -> frozenset:
    return make_clips.facts(captions.parse(text).by_place())


@pytest.mark.parametrize("family", families.BASIC)
@pytest.mark.parametrize("tier", ["dense", "structured"])
def test_what_a_prompt_states_is_kept_and_the_rest_is_filled_in(family, tier):
    said_more = 0
    for seed, (text, _) in enumerate(families.prompts(family, 24, seed=5)):
        longer = upsampling.upsample(text, tier, seed)
        assert facts(text) <= facts(longer), (text, longer)
        parsed = captions.parse(longer)
        assert parsed.tone and all(s.colour and s.shape for s in parsed.subjects)
        assert not parsed.held_out()
        said_more += len(facts(longer)) > len(facts(text))
    assert said_more == 24


def test_a_seed_decides_what_is_filled_in():
    texts = {upsampling.upsample("a thing moves left", "dense", n) for n in range(8)}
    assert len(texts) == 8
    assert {captions.parse(t).subjects[0].direction for t in texts} == {"left"}
    assert len({captions.parse(t).subjects[0].colour for t in texts}) > 2
    again = upsampling.upsample("a thing moves left", "dense", 0)
    assert again in texts


def test_held_out_combinations_come_from_prompts_alone():
    for seed in range(40):
        text = upsampling.upsample("a red thing", "structured", seed)
        assert captions.parse(text).subjects[0].shape != "cross"
    text = upsampling.upsample("a red cross", "structured")
    subject = captions.parse(text).subjects[0]
    assert (subject.colour, subject.shape) == ("red", "cross")


@pytest.mark.parametrize(
    "text",
    [
        "a cat asleep on the sofa",
        "a woman in a red dress walks slowly",  # words that captions do not have
        "zoom in on a red circle",
        "a red circle, a blue square and a green cross",  # too many things
        "a red circle and a blue square",
        "three red circles move left",  # no family has both
        "a red circle in the centre moves left",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert upsampling.upsample(text, "dense") == text


def test_a_tier_that_cannot_say_all_is_not_used():
    """Structured captions of two things that move have no speed."""
    text = "a red circle moves slowly left and a blue square moves quickly right"
    assert upsampling.upsample(text, "structured") == text
    assert facts(text) <= facts(upsampling.upsample(text, "dense"))


def test_an_unknown_tier():
    with pytest.raises(ValueError, match="no caption tier"):
        upsampling.upsample("a red circle", "long")
