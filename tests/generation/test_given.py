import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.generation import given as givens


def test_image_to_video_gives_the_first_latent_frame_and_no_other():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 3, 4, 5)))
    given = givens.image_to_video(image, (4, 3, 4))
    assert given.known_bthw.shape == (2, 4, 3, 4)
    assert given.known_bthw[:, 0].all() and not given.known_bthw[:, 1:].any()
    np.testing.assert_array_equal(given.latents_bthwc[:, :1], image)
    assert given.latents_bthwc.shape == (2, 4, 3, 4, 5)


def test_image_of_another_size_or_with_nothing_left_is_refused():
    image = jnp.zeros((1, 1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"\(1, 3, 4\).*\(1, 3, 3\)"):
        givens.image_to_video(image, (4, 3, 3))
    with pytest.raises(ValueError, match="at least 2 latent frames"):
        givens.image_to_video(image, (1, 3, 4))


def test_a_picture_that_fits_is_only_rescaled_to_the_range():
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    fitted = givens.fit_image(picture, 4, 6)
    np.testing.assert_allclose(fitted, picture / 127.5 - 1, atol=1e-6)
    assert fitted.dtype == np.float32
    same = givens.fit_image(picture.astype(np.float64) / 255, 4, 6)
    np.testing.assert_allclose(same, fitted, atol=1e-6)


def test_a_picture_is_cropped_in_its_middle_and_never_stretched():
    # vertical stripes: left third red, middle green, right blue
    picture = np.zeros((20, 60, 3), np.uint8)
    for channel in range(3):
        picture[:, 20 * channel : 20 * channel + 20, channel] = 255
    middle = givens.fit_image(picture, 20, 20)
    np.testing.assert_allclose(middle, np.broadcast_to([-1.0, 1.0, -1.0], (20, 20, 3)))
    small = givens.fit_image(picture, 10, 30)
    red, blue = small[:, 3:7], small[:, 23:27]
    np.testing.assert_allclose(red, np.broadcast_to([1, -1, -1], red.shape), atol=1e-5)
    np.testing.assert_allclose(
        blue, np.broadcast_to([-1, -1, 1], blue.shape), atol=1e-5
    )


@pytest.mark.parametrize(
    "picture, message",
    [
        (np.zeros((4, 4), np.uint8), r"\[height, width, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"\[height, width, 3\]"),
        (np.zeros((4, 4, 3), np.int32), "uint8 or float"),
        (np.full((4, 4, 3), 255.0), r"in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"in \[0, 1\]"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        givens.fit_image(picture, 4, 4)
