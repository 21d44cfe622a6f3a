"""Tags of scores and captions in another order: shares, meaning, and nothing when off."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from configs import base
from sora_jax.core import config as configs
from sora_jax.data import captions, latent_cache, records, shards, texts, transforms
from sora_jax.toyworld import captions as toy_captions
from sora_jax.toyworld import families
from sora_jax.training import encode_text, initial, jobs, recipe
from tests.data import clips
from tests.data.test_latent_cache import STATED, encode

MOTION = ("motion", (0.1, 0.3), ("low", "medium", "high"))
SHARP = ("text_area", (0.01,), ("none", "some"))
TAGS = captions.variation((MOTION, SHARP), 0.5, 0.0)
SCORES = {"motion": 0.5, "text_area": 0.0}


def picked(variation, text, scores, tier="short", count=4000):
    sampler = captions.CaptionSampler({tier: 1.0}, variation)
    random = np.random.default_rng(0)
    return [sampler.pick({tier: text}, random, scores)[0] for _ in range(count)]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ({"motion": 0.05}, ["motion: low"]),
        ({"motion": 0.1}, ["motion: medium"]),  # a limit belongs above
        ({"motion": 0.3, "text_area": 0.2}, ["motion: high", "text area: some"]),
        ({"motion": float("nan"), "text_area": 0.0}, ["text area: none"]),
        ({"sharpness": 1.0}, []),
    ],
)
def test_scores_become_words(scores, wanted):
    assert TAGS.tags_of(scores) == wanted


def test_tags_follow_a_text():
    assert captions.tagged("a cat", ["b: c", "d: e"]) == "a cat; b: c; d: e"
    assert captions.tagged("A cat.", ["b: c"]) == "A cat. b: c"
    assert captions.tagged("a cat", []) == "a cat"


def test_each_tag_is_kept_with_its_probability_and_by_itself():
    count = 4000
    found = collections.Counter(picked(TAGS, "a cat", SCORES, count=count))
    ends = "", "; motion: high", "; text area: none", "; motion: high; text area: none"
    assert set(found) == {f"a cat{end}" for end in ends}
    low, high = stats.binom.interval(1 - 1e-6, count, 0.25)
    assert all(low <= number <= high for number in found.values())
    rare = captions.variation((MOTION,), 0.1, 0.0)
    kept = sum(text != "a cat" for text in picked(rare, "a cat", SCORES, count=count))
    low, high = stats.binom.interval(1 - 1e-6, count, 0.1)
    assert low <= kept <= high
    for keep, wanted in ((0.0, {"a cat"}), (1.0, {"a cat; motion: high"})):
        all_or_none = captions.variation((MOTION,), keep, 0.0)
        assert set(picked(all_or_none, "a cat", SCORES, count=50)) == wanted


def test_a_clip_without_text_or_scores_has_no_tags():
    assert set(picked(TAGS, "", SCORES, count=50)) == {""}
    assert set(picked(TAGS, "a cat", {}, count=50)) == {"a cat"}


@pytest.mark.parametrize("tier", ["dense", "structured"])
def test_toy_captions_in_another_order_state_the_same(tier):
    """Of all families; the first part stays first, and no word is lost."""
    varied = captions.variation((), 0.5, 1.0)
    sampler = captions.CaptionSampler({tier: 1.0}, varied)
    random, changed, mix = np.random.default_rng(0), 0, {}
    for family, index in itertools.product(families.FAMILIES, range(40)):
        scene = families.scene("tw64", "train", index, {family: 1.0}, 5)
        text, slots = toy_captions.stated(scene, tier)
        found, _ = sampler.pick({tier: text}, random)
        mix.setdefault(family, set()).add(found != text)
        changed += found != text
        assert toy_captions.parse(found) == toy_captions.parse(text) == slots
        mark = "." if tier == "dense" else ";"
        assert found.split(mark)[0] == text.split(mark)[0]
        words = (sorted(one.replace(";", "").split()) for one in (found, text))
        assert len({*map(tuple, words)}) == 1
    assert changed > 80 and all(True in seen for seen in mix.values())


def test_the_share_that_is_shuffled_and_its_orders():
    """1 of 6 orders is the old one; all orders are equally likely."""
    count, text = 6000, "A cat sits. Dogs bark. Birds sing. Rain falls."
    half = captions.variation((), 0.5, 0.5)
    found = collections.Counter(picked(half, text, {}, "dense", count))
    rest = ["Dogs bark.", "Birds sing.", "Rain falls."]
    orders = {f"A cat sits. {' '.join(o)}" for o in itertools.permutations(rest)}
    assert set(found) == orders
    for order in orders:
        share = 0.5 + 0.5 / 6 if order == text else 0.5 / 6
        low, high = stats.binom.interval(1 - 1e-6, count, share)
        assert low <= found[order] <= high
    for tier in ("alt", "short", "medium"):
        assert set(picked(half, text, {}, tier, 50)) == {text}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A cat. It sits. A dog. Then it barks.", ["A cat. It sits.", "A dog. Then it barks."]),
        ("Mr. A. Smith walks. Rain falls.", ["Mr. A. Smith walks.", "Rain falls."]),
        ("It is 3 p.m. in the U.S. capital. Rain falls.", ["It is 3 p.m. in the U.S. capital.", "Rain falls."]),
        ("a dot. a box. the end.", ["a dot.", "a box.", "the end."]),
        ('A sign says "Stop. Go." Rain falls.', None),
        ("A cat. A dog", None),
        ("a cat", None),
    ],
)  # fmt: skip
def test_sentences_that_belong_together_stay_so(text, parts):
    assert texts.sentences(text) == (None if parts is None else (parts, " "))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("subject: a cat; motion: left; tone: dark", ["subject: a cat", "motion: left", "tone: dark"]),
        ("first: a; motion: left; second: b; motion: up; tone: dark",
         ["first: a; motion: left; second: b; motion: up", "tone: dark"]),
        ("first: a; relation: left of; second: b; tone: dark",
         ["first: a; relation: left of; second: b", "tone: dark"]),
        ("a cat; tone: dark", None),
    ],
)  # fmt: skip
def test_entries_that_belong_together_stay_so(text, parts):
    assert texts.entries(text) == (None if parts is None else (parts, "; "))


def test_varying_draws_no_further_number_and_off_changes_nothing():
    text = "A cat sits. Dogs bark. Rain falls."
    both = captions.variation((MOTION, SHARP), 0.5, 1.0)
    after = set()
    for variation in (captions.Variation(), TAGS, both):
        sampler = captions.CaptionSampler({"dense": 1, "short": 1}, variation)
        random = np.random.default_rng(3)
        drawn = [
            sampler.pick({"dense": text, "short": "a cat"}, random, SCORES)[1]
            for _ in range(20)
        ]
        after.add((tuple(drawn), random.random()))
    assert len(after) == 1  # also the tiers are the same
    off = captions.variation((), 0.5, 0.0)
    assert not off.is_on
    assert set(picked(off, text, SCORES, "dense", 50)) == {text}
    # The same number gives the same text.
    assert picked(both, text, SCORES, "dense", 50) == picked(
        both, text, SCORES, "dense", 50
    )


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ((("motion", (0.1,), ("low",)),), "1 limits and 1 words"),
        ((("motion", (), ("low",)),), "there must be a limit"),
        ((("motion", (0.3, 0.1), ("a", "b", "c")),), "do not ascend"),
        ((("motion", (0.1,), ("a", "a")),), "equal words"),
        ((("motion", (0.1,), ("a", "b; c")),), "without : and ;"),
        ((("motion", (0.1,), ("a", "")),), "without : and ;"),
        ((MOTION, MOTION), "two of one score"),
        ((("motion", (float("inf"),), ("a", "b")),), "must be a number in"),
        ((("motion", (0.1,)),), "must have 3 entries"),
    ],
)
def test_tags_that_make_no_sense_are_refused(tags, message):
    c = base.get_config()
    c.text.tags = tags
    with pytest.raises(ValueError, match=message) as refused:
        configs.build(recipe.Text, c.text, "text")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("text")


# -- from the shards to a batch -------------------------------------------------------


class Scored(clips.Clips):
    """Clips whose motion grows with their number; the first has no score."""

    def clips(self, *arguments):
        for number, clip in enumerate(super().clips(*arguments)):
            scores = {"motion": number / 10} if number else {}
            yield dataclasses.replace(clip, scores=scores)


class Heard:
    """Keeps the texts that it is asked for."""

    pad_id = 0

    def __init__(self):
        self.texts = []

    def encode(self, given, length):
        self.texts += given
        ids_bl = np.full((len(given), length), len(self.texts), np.int32)
        return ids_bl, ids_bl > 0


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    shards.write(folder / "shards", Scored(num=5, per_part=5))
    source = shards.open(folder / "shards")
    latent_cache.write(folder / "latents", source, encode, batch_size=2, **STATED)
    return latent_cache.open(folder / "latents")


def test_scores_go_with_latents_and_become_tags_of_examples(cached):
    assert [dict(record.scores) for record in cached] == [
        {}, {"motion": 0.1}, {"motion": 0.2}, {"motion": 0.3}, {"motion": 0.4}
    ]  # fmt: skip
    assert cached.manifest["scores"] == {"motion": 4}
    joined = latent_cache.Joined([cached, cached])
    assert joined.manifest["scores"] == {"motion": 8}
    c = base.get_config()
    c.text.tags, c.text.tag_keep, c.text.tiers.short = (MOTION,), 1.0, 1.0
    heard = Heard()
    tokenize = transforms.Tokenize(jobs._sampler(c, cached), heard, 4)
    for record in cached:
        transforms.LatentsAndText(tokenize)(record, np.random.default_rng(0))
    assert heard.texts == [
        "clip number 0",
        "clip number 1; motion: medium",
        "clip number 2; motion: medium",
        "clip number 3; motion: high",
        "clip number 4; motion: high",
    ]


def test_scores_that_no_clip_has_are_refused(cached):
    c = base.get_config()
    c.text.tags = (MOTION, SHARP)
    with pytest.raises(
        ValueError, match=r"scores \['text_area'\] .* are: motion \(4\)"
    ):
        jobs._sampler(c, cached)


def test_other_scores_are_other_data(cached, tmp_path):
    """A run that reads tags must not go on with other scores."""
    shards.write(tmp_path / "shards", clips.Clips(num=5, per_part=5))
    other = shards.open(tmp_path / "shards")
    latent_cache.write(tmp_path / "latents", other, encode, batch_size=2, **STATED)
    found = latent_cache.open(tmp_path / "latents")
    same = [records.captions_of(found.captions(k), ["short"]) for k in range(5)]
    assert same == [
        records.captions_of(cached.captions(k), ["short"]) for k in range(5)
    ]
    assert found.digests != cached.digests


def test_a_new_tokenizer_learns_the_words_of_tags(cached, tmp_path):
    c = base.get_config()
    c.text.tags, c.text.vocab_size = (("motion", (0.25,), ("quiet", "zippy")),), 320
    sampler = jobs._sampler(c, cached)
    tokens = jobs._tokenizer(
        c, tmp_path, cached, sampler.probabilities, sampler.variation
    )
    text = "clip number 1; motion: zippy"
    assert tokens.decode(tokens.ids(text)) == text


def test_captions_with_their_tags_are_counted(cached, capsys):
    c = base.get_config()
    c.text.tags = (MOTION,)

    class Words:
        def ids(self, text):
            return text.split()

    jobs._warn_of_cut(cached, jobs._sampler(c, cached), Words(), 3, "text.length")
    assert "80.0% of 5 have more than 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"tags": (MOTION,)}, {"shuffle": 0.5}])
def test_stored_states_do_not_go_with_varied_captions(cached, tmp_path, changes):
    c = base.get_config()
    c.text.frozen = True
    c.text.update(changes)
    place = encode_text.cache_folder(cached.folder)
    place.mkdir(exist_ok=True)
    start = initial.Initial(None, tmp_path)
    with pytest.raises(ValueError, match="text.tags and text.shuffle vary them"):
        encode_text.states_of_run(c, tmp_path, cached, start, ["short"])
    place.rmdir()
