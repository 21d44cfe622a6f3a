"""Which files of before are finished clips, and which are somebody's."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from sora_jax.data import gif, video_io
from sora_jax.generation import recipes

RECIPE = {"prompt": "a cat", "seed": 3, "fps": 8.0, "step": 7, "guidance_rescale": 0.0}
FRAMES = np.random.default_rng(0).uniform(size=(5, 16, 16, 3))


@pytest.fixture(params=["mp4", "webm", "gif"])
def file(tmp_path, request):
    path = tmp_path / f"clip.{request.param}"
    recipes.save(FRAMES, path, RECIPE)
    return path


def refusal(path, recipe=RECIPE):
    with pytest.raises(ValueError) as caught:
        recipes.is_finished(path, recipe)
    assert "choose another --out, remove it, or add --overwrite" in str(caught.value)
    assert not recipes.is_finished(path, recipe, overwrite=True)
    return str(caught.value)


def test_a_clip_of_the_same_recipe_is_finished(file, tmp_path):
    assert recipes.is_finished(file, RECIPE)
    assert recipes.is_finished(file, RECIPE | {"versions": "newer"}, overwrite=True)
    assert not recipes.is_finished(tmp_path / "other.mp4", RECIPE)
    for change in ({"seed": 4}, {"prompt": "a dog"}, {"step": 8}, {"shift": 2.0}):
        name, value = next(iter(change.items()))
        was = f"exists with another recipe ({name} was {RECIPE.get(name)!r} and is {value!r})"
        assert was in refusal(file, RECIPE | change)


def test_half_a_clip_is_made_again_and_a_changed_one_is_not(file):
    sidecar, video = recipes.sidecar_of(file), file.read_bytes()
    text = sidecar.read_text()
    sidecar.unlink()  # interrupted before it was written: the recipe is in the video
    assert not recipes.is_finished(file, RECIPE)
    assert "seed was 3 and is 4" in refusal(file, RECIPE | {"seed": 4})
    sidecar.write_text(text)
    file.unlink()
    assert not recipes.is_finished(file, RECIPE)
    file.write_bytes(video + b"\0")
    assert "was changed after it was made" in refusal(file)


def test_files_of_others_are_not_lost(file):
    sidecar = recipes.sidecar_of(file)
    sidecar.unlink()
    file.write_bytes(b"a film of somebody's")
    assert f"{file} exists and has no recipe" in refusal(file)
    file.unlink()
    for text in ('{"name": "a package"}', '{"prompt": "a"}', "[]", '"prompt"', "{", ""):
        sidecar.write_text(text)
        assert f"{sidecar} exists and has no recipe" in refusal(file)


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("seed", "x", "seed is a whole number, not 'x'"),
        ("fps", [8], "fps is a number, not .8."),
        ("prompt", 3, "prompt is text, not 3"),
    ],
)
def test_a_damaged_recipe_is_named(tmp_path, field, value, reason):
    path = tmp_path / "clip.mp4"
    comment = json.dumps(RECIPE | {field: value})
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    path.write_bytes(video_io.encode_mp4(frames, 8.0, metadata={"comment": comment}))
    with pytest.raises(ValueError, match=f"recipe of .*clip.mp4 is damaged: {reason}"):
        recipes.read(path)


def test_formats_do_not_share_a_recipes_file(tmp_path):
    for suffix in recipes.VIDEO_FORMATS:
        recipes.save(FRAMES, tmp_path / f"clip.{suffix}", RECIPE)
    assert all(
        recipes.is_finished(tmp_path / f"clip.{suffix}", RECIPE)
        for suffix in recipes.VIDEO_FORMATS
    )
    assert len([*tmp_path.glob("*.json")]) == len(recipes.VIDEO_FORMATS)


def test_a_webm_is_vp9_in_bt709_and_reads_back(tmp_path):
    path = tmp_path / "clip.webm"
    colours = np.zeros((5, 32, 48, 3))
    colours[:, :, :16, 0] = colours[:, :, 16:32, 1] = colours[:, :, 32:, 2] = 1
    recipes.save(colours, path, RECIPE)
    header = video_io.probe(path)
    assert (header.codec, header.width, header.height, header.fps) == ("vp9", 48, 32, 8)
    found = video_io.decode(path).frames[:, 4:28]
    for place, colour in enumerate(np.eye(3)):
        middle = found[:, :, 16 * place + 5 : 16 * place + 11]
        assert np.abs(middle - 255 * colour).max() < 12
    assert json.loads(video_io.read_comment(path)) == RECIPE


def test_a_gif_keeps_times_and_colours(tmp_path):
    """12 frames a second are no whole hundredths: each frame begins at the nearest."""
    assert gif.durations(12, 12) == [8, 9, 8] * 4
    assert sum(gif.durations(1200, 23.976)) == round(100 * 1200 / 23.976)
    path = tmp_path / "clip.gif"
    shades = np.linspace(0, 1, 5)[:, None, None, None] * np.ones((1, 16, 24, 3))
    recipes.save(shades, path, RECIPE | {"fps": 12.5})
    with PIL.Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (5, (24, 16), 0)
        for number in range(5):
            image.seek(number)
            assert image.info["duration"] == 80
            found = np.asarray(image.convert("RGB"))
            assert np.abs(found - 255 * shades[number]).max() <= 2
    with pytest.raises(ValueError, match="at most 50 frames a second, not 60"):
        gif.encode(np.zeros((2, 8, 8, 3), np.uint8), 60.0)
    assert "8 or 9 of them" in recipes.check_format(path, 9, 12.0)
    assert not any(recipes.check_format(path, 9, fps) for fps in (12.5, 50.0, 0.1))


def test_a_still_gif_is_as_long_as_a_gif_can_be(tmp_path):
    """Its equal frames become one, whose time is a number of 16 bits."""
    still = np.zeros((6, 8, 8, 3), np.uint8)
    with PIL.Image.open(io.BytesIO(gif.encode(still, 6 / gif.LONGEST))) as image:
        assert image.info["duration"] == 1000 * gif.LONGEST
    with pytest.raises(ValueError, match="at most 655 seconds long, not 656: write"):
        recipes.check_format(tmp_path / "clip.gif", 656, 1.0)


def test_a_clip_made_without_the_file_is_another(tmp_path):
    recipe = {"prompt": "a", "seed": 0, "fps": 8.0, "weights": "x", "lora": "y"}
    clip = tmp_path / "a.mp4"
    recipes.save(np.zeros((5, 16, 16, 3), np.float32), clip, recipe)
    assert recipes.is_finished(clip, recipe)
    del recipe["lora"]
    with pytest.raises(ValueError, match="lora was 'y' and is None"):
        recipes.is_finished(clip, recipe)
    with pytest.raises(ValueError, match="lora y"):
        recipes.check_weights(recipes.read(clip), recipe)


def test_an_image_is_a_png_of_exact_pixels_with_its_recipe(tmp_path):
    path, random = tmp_path / "one.png", np.random.default_rng(0)
    frame = random.integers(0, 256, (1, 16, 24, 3), np.uint8)
    recipes.save(frame / 255, path, RECIPE)
    np.testing.assert_array_equal(recipes.frames_of(path), frame)
    with PIL.Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(opened), frame[0])
        assert json.loads(opened.text["Comment"]) == RECIPE
    assert recipes.read(path) == RECIPE and recipes.is_finished(path, RECIPE)
    with pytest.raises(ValueError, match="a .png is one frame, and the video has 9"):
        recipes.check_format(path, 9, 8.0)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="contains no recipe"):
        recipes.read(tmp_path / "other.png")
    (tmp_path / "none.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a PNG"):
        recipes.read(tmp_path / "none.png")
