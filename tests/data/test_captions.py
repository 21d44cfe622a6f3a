"""Tiers are drawn by their weights, scaled to those that a clip has."""

import collections

import numpy as np
import pytest

from sora_jax.data import captions

ALL = {"alt": "a", "short": "s", "medium": "m", "dense": "d", "structured": "x"}


def drawn(sampler, clip, count=4000):
    rng = np.random.default_rng(0)
    return collections.Counter(sampler.pick(clip, rng) for _ in range(count))


def test_tiers_are_drawn_by_weight():
    sampler = captions.CaptionSampler({"short": 3, "dense": 6, "alt": 1, "medium": 0})
    counts = drawn(sampler, ALL)
    assert set(counts) == {("a", "alt"), ("s", "short"), ("d", "dense")}
    for pair, share in ((("a", "alt"), 0.1), (("s", "short"), 0.3)):
        assert abs(counts[pair] / 4000 - share) < 0.03


def test_captions_of_a_model_are_blended_with_those_of_the_web():
    sampler = captions.CaptionSampler({"model_dense": 0.95, "alt": 0.05})
    counts = drawn(sampler, ALL | {"model_dense": "md", "model_short": "ms"})
    assert set(counts) == {("md", "model_dense"), ("a", "alt")}
    assert abs(counts["md", "model_dense"] / 4000 - 0.95) < 0.015


def test_missing_tiers_scale_up_the_others():
    sampler = captions.CaptionSampler({"short": 0.2, "medium": 0.2, "dense": 0.6})
    counts = drawn(sampler, {"short": "s", "dense": "", "medium": "m", "alt": "a"})
    assert set(counts) == {("s", "short"), ("m", "medium")}
    assert abs(counts["s", "short"] / 4000 - 0.5) < 0.03


def test_a_clip_without_such_a_caption_has_no_text():
    sampler = captions.CaptionSampler({"short": 1})
    assert drawn(sampler, {}, 5) == drawn(sampler, {"alt": "a"}, 5) == {("", "none"): 5}


def test_captions_of_a_tier_are_equally_likely():
    sampler = captions.CaptionSampler({"alt": 1, "short": 3})
    counts = drawn(sampler, {"alt": "a\nb", "short": "s\nt\nu"})
    assert set(counts) == {
        ("a", "alt"), ("b", "alt"), ("s", "short"), ("t", "short"), ("u", "short")
    }  # fmt: skip
    for (_, tier), count in counts.items():
        assert abs(count / 4000 - {"alt": 0.125, "short": 0.25}[tier]) < 0.02


def test_captions_that_are_cut_are_counted(capsys):
    captions.warn_of_cut([10] * 99 + [25], 24, "text.length")
    assert capsys.readouterr().err == ""
    captions.warn_of_cut([10] * 900 + [*range(21, 121)], 24, "text.length")
    said = capsys.readouterr().err
    assert "9.6% of 1000 have more than 24 tokens and are cut" in said
    assert "text.length=110 cuts 1 % of them at most, text.length=120 none" in said
    captions.warn_of_cut([], 24, "text.length")


def test_picking_a_caption_draws_one_number():
    sampler = captions.CaptionSampler({"short": 1, "dense": 1})
    after = set()
    for clip in (ALL, {}, {"dense": "d"}):
        rng = np.random.default_rng(1)
        sampler.pick(clip, rng)
        after.add(rng.random())
    assert len(after) == 1


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"tiny": 1}, "tiny"),
        ({"short": -1, "dense": 2}, "not negative"),
        ({"short": float("nan")}, "not negative"),
        ({"short": 0}, "above zero"),
        ({}, "above zero"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        captions.CaptionSampler(weights)


def test_data_without_the_tiers_asked_for_is_refused():
    sampler = captions.CaptionSampler({"short": 1, "dense": 1})
    sampler.check({"alt": 4, "dense": 1})
    with pytest.raises(ValueError, match="text.tiers asks for; there are: alt .4"):
        sampler.check({"alt": 4})
    with pytest.raises(ValueError, match="there are: none"):
        sampler.check({})
