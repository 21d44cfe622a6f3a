"""Copies of scenes are found, and nothing else is taken for one."""

import numpy as np
import PIL.Image
import pytest

from sora_jax.data import video_io
from sora_jax.data.curation import duplicates, fingerprint
from tests.data.curation.folders import FPS, shifted, toy


def resized(frames_thwc, height, width):
    return np.stack(
        [
            np.asarray(PIL.Image.fromarray(frame).resize((width, height)))
            for frame in frames_thwc
        ]
    )


def coded(frames_thwc, crf):
    return video_io.decode(video_io.encode_mp4(frames_thwc, FPS, crf=crf)).frames


COPIES = {
    "coded": lambda v: coded(v, 30),
    "smaller": lambda v: resized(v, 40, 40),
    "larger": lambda v: resized(v, 96, 96),
    "cropped": lambda v: resized(v[:, 2:62, 2:62], 64, 64),
    "brighter": lambda v: shifted(v, 25),
    "darker": lambda v: (0.8 * v).astype(np.uint8),
}


@pytest.fixture(scope="module")
def scenes():
    return [toy(index, "tw64", seed=21) for index in range(80)]


@pytest.fixture(scope="module")
def prints(scenes):
    return [fingerprint.of(frames_thwc) for frames_thwc in scenes]


def test_different_scenes_are_no_copies(prints):
    assert duplicates.find(prints) == [None] * len(prints)


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found(scenes, prints, kind):
    chosen = [*range(0, 80, 10)]
    copied = [fingerprint.of(COPIES[kind](scenes[index])) for index in chosen]
    found = duplicates.find([*prints, *copied])
    assert found[len(prints) :] == chosen
    assert duplicates.originals(copied, prints) == chosen
    bits = fingerprint.differing_bits(
        np.stack([one.signs for one in copied]), np.stack([one.signs for one in prints])
    )
    assert bits[range(8), chosen].max() <= duplicates.CANDIDATE_BITS


def test_bits_are_counted_as_strings_are():
    rng = np.random.default_rng(0)
    texts = [rng.bytes(32).hex() for _ in range(5)]
    signs = np.stack([fingerprint.signs(text) for text in texts])
    truth = [[(int(a, 16) ^ int(b, 16)).bit_count() for b in texts] for a in texts]
    np.testing.assert_array_equal(fingerprint.differing_bits(signs, signs), truth)


def test_a_fingerprint_survives_json(prints):
    again = fingerprint.Fingerprint.from_json(prints[3].to_json())
    assert again.hash == prints[3].hash and len(again.hash) == 64
    np.testing.assert_array_equal(again.thumbnail_khwc, prints[3].thumbnail_khwc)


def test_every_copy_is_of_a_clip_that_is_kept(prints):
    """A chain of small changes: its ends differ, and both stay."""
    one, other = (prints[k].thumbnail_khwc.astype(float) for k in (0, 1))
    chain = [
        fingerprint.Fingerprint(
            prints[0].hash, ((1 - share) * one + share * other).astype(np.uint8)
        )
        for share in np.linspace(0, 1, 9)
    ]
    found = duplicates.find(chain)
    kept = [index for index, original in enumerate(found) if original is None]
    assert kept[0] == 0 and 2 <= len(kept) < 9
    assert all(original in kept for original in found if original is not None)
    assert [*found] == duplicates.find(chain)


def test_blocks_do_not_change_what_is_found(scenes, prints, monkeypatch):
    copied = [fingerprint.of(shifted(scenes[index], 20)) for index in range(40)]
    mixed = [one for pair in zip(prints, copied, strict=False) for one in pair]
    whole = duplicates.find(mixed)
    assert sum(original is not None for original in whole) == 40
    monkeypatch.setattr(duplicates, "_ROWS", 7)
    monkeypatch.setattr(duplicates, "_COLUMNS", 5)
    assert duplicates.find(mixed) == whole
    assert duplicates.find([]) == []


def test_flat_clips_are_copies_only_in_one_colour():
    def flat(colour, seed):
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 2, (5, 64, 64, 3))
        return fingerprint.of((noise + np.array(colour)).astype(np.uint8))

    black, again = flat((0, 0, 0), 1), flat((0, 0, 0), 2)
    white, red, blue = flat((250,) * 3, 3), flat((200, 0, 0), 4), flat((0, 0, 200), 5)
    assert duplicates.find([black, again]) == [None, 0]
    assert duplicates.find([black, white, red, blue]) == [None] * 4


def test_a_strict_distance_keeps_more(scenes):
    cropped = resized(scenes[0][:, 2:62, 2:62], 64, 64)
    pair = [fingerprint.of(scenes[0]), fingerprint.of(cropped)]
    assert duplicates.find(pair) == [None, 0]
    assert duplicates.find(pair, distance=0.001) == [None, None]
