"""Masks of what is kept of a video, of pixels and of latents."""

import numpy as np
import pytest
import scipy.ndimage

from sora_jax.data import regions


def test_drawn_regions_keep_some_and_leave_some_of_each_video():
    shares, moving = [], 0
    for seed in range(300):
        kept = regions.draw(np.random.default_rng(seed), (9, 32, 48))
        assert kept.shape == (9, 32, 48) and kept.dtype == bool
        shares.append(kept.mean())
        moving += bool((kept != kept[:1]).any())
    shares = np.array(shares)
    assert 0.2 < shares.min() and shares.max() < 1.0
    assert shares.std() > 0.1 and 0.2 < moving / 300 < 0.5


def test_a_region_is_a_function_of_the_clip():
    first = regions.of_clip("a", (5, 16, 16))
    np.testing.assert_array_equal(regions.of_clip("a", (5, 16, 16)), first)
    assert any((regions.of_clip(name, (5, 16, 16)) != first).any() for name in "bcd")


def test_what_is_not_kept_is_grey():
    frames = np.full((1, 2, 2, 3), 9, np.uint8)
    kept = np.array([[[True, False], [False, True]]])
    got = regions.blanked(frames, kept)
    assert got[0, 0, 0].tolist() == [9] * 3 and got[0, 0, 1].tolist() == [127] * 3


@pytest.mark.parametrize("stride", [2, 4])
def test_a_latent_is_known_if_all_of_its_pixels_are_kept(stride):
    kept = np.random.default_rng(0).random((9, 16, 24)) < 0.9
    kept[:, :8] = True
    found = regions.of_latents(kept, stride, 4)
    for number in range(3):
        frames = kept[:1] if not number else kept[4 * number - 3 : 4 * number + 1]
        # The minimum over the block whose last pixel is at the strided place.
        least = scipy.ndimage.minimum_filter(
            frames.all(0),
            stride,
            origin=(stride - 1) // 2 if stride % 2 else stride // 2 - 1,
        )
        np.testing.assert_array_equal(
            found[number], least[stride - 1 :: stride, stride - 1 :: stride]
        )
    assert found.any() and not found.all()
