import dataclasses
import inspect
import json

import numpy as np
import pytest

from sora_jax.data import texts
from sora_jax.generation import pipeline, request

SETTINGS = request.Settings(
    num_frames=9, height=32, width=32, fps=8.0, text_length=24, shift=5.0
)
STRIDES = request.Strides(time=4, patch_time=1, height=16, width=16)


def ask(strides=STRIDES, **changes):
    return request.check(SETTINGS, strides, **({"prompt": "a cat"} | changes))


def test_what_is_not_said_comes_from_the_settings():
    asked = ask()
    for field in dataclasses.fields(request.Request):
        if hasattr(SETTINGS, field.name):
            assert getattr(asked, field.name) == getattr(SETTINGS, field.name)
    assert ask(num_frames=13, guidance_scale=0.0).num_frames == 13
    assert ask(num_frames=13, guidance_scale=0.0).guidance_scale == 0.0


def test_the_pipeline_takes_the_arguments_of_a_request():
    """It alone lists them; flags, files and recipes follow `request.Arguments`."""
    of_call = inspect.signature(pipeline.Pipeline.__call__).parameters
    of_check = inspect.signature(request.check).parameters
    added = {"self", "callback_on_step_end", "progress"}
    wanted = {*of_check, *request.SHARED} - {"settings", "strides", "shared"}
    wanted -= {"is_given"}  # which a task says of itself
    assert of_call.keys() - added == wanted
    assert {name for name in request.SHARED if of_call[name].default is None} == {
        *request.SHARED
    }
    assert ask(guidance_scale=np.float32(2), num_frames=np.int64(5)).num_frames == 5


def test_prompts_are_normalised_as_captions_are():
    said = "a \U0001f468\u200d\U0001f469 \u00a0 in soft\u00adhyphen\n rain"
    asked = ask(prompt=said, negative_prompt=f" {said}")
    assert asked.prompts == asked.negative_prompts == (texts.normalise(said),)
    assert asked.prompts == ("a \U0001f468\u200d\U0001f469 in softhyphen rain",)


def test_clip_i_of_one_seed_has_seed_plus_i():
    assert ask(prompt=["a", "b", "c"], seed=7).seeds == (7, 8, 9)
    assert ask(prompt=["a", "b"], seed=[5, np.int64(5)]).seeds == (5, 5)
    asked = ask(prompt=["a", "b"], negative_prompt=["x", "y"], num_videos_per_prompt=2)
    assert asked.prompts == ("a", "a", "b", "b") and asked.seeds == (0, 1, 2, 3)
    assert asked.negative_prompts == ("x", "x", "y", "y")


def test_seed_minus_one_is_drawn_once_for_a_call_and_written_down():
    first, second = (ask(prompt=["a", "b"], seed=-1) for _ in range(2))
    assert first.seeds[1] == first.seeds[0] + 1 and first.seeds != second.seeds
    assert first.recipe(1)["seed"] == first.seeds[1] >= 0
    mixed = ask(prompt=["a", "b", "c"], seed=[-1, 2**63, -1]).seeds
    assert mixed[1] == 2**63 and mixed[0] != mixed[2] and min(mixed) >= 0


def test_a_recipe_is_json_and_tells_clips_apart():
    image = np.zeros((4, 4, 3), np.uint8)
    asked = ask(prompt=["a", "b"], image=[image, image + 1], seed=3)
    first, second = asked.recipe(0), asked.recipe(1)
    assert json.loads(json.dumps(first)) == first
    assert (first["prompt"], first["seed"]) == ("a", 3)
    assert first["image_sha256"] != second["image_sha256"]
    assert ask().recipe(0)["image_sha256"] is None


@pytest.mark.parametrize(
    "num_frames, nearest",
    [(10, "9 or 13"), (0, "1"), (2, "1 or 5"), (-7, "1"), (12, "9 or 13")],
)
def test_impossible_frame_counts_name_the_nearest(num_frames, nearest):
    with pytest.raises(ValueError, match=f"the nearest is {nearest}$"):
        ask(num_frames=num_frames)


def test_time_patches_restrict_frame_counts():
    strides = dataclasses.replace(STRIDES, patch_time=2)
    assert ask(strides, num_frames=5).num_frames == 5
    assert ask(strides, num_frames=13).num_frames == 13
    with pytest.raises(ValueError, match=r"makes 5 \+ 8 n.*nearest is 5 or 13$"):
        ask(strides, num_frames=9)
    with pytest.raises(ValueError, match="nearest is 5$"):
        ask(strides, num_frames=1)


@pytest.mark.parametrize(
    "size, message",
    [
        ({"height": 40}, "height is 40; .* multiples of 16: the nearest is 32 or 48$"),
        ({"width": 1}, "width is 1; .* nearest is 16$"),
        ({"width": 0}, "width is 0; .* nearest is 16$"),
        ({"height": -16}, "height is -16; .* nearest is 16$"),
        ({"height": 32.0}, "height is a whole number, not 32.0"),
    ],
)
def test_impossible_sizes_name_the_nearest(size, message):
    with pytest.raises(ValueError, match=message):
        ask(**size)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": ["a", " \n"]}, "prompt 1 is empty"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": ["a", 3]}, "prompt 1 is text, not int"),
        ({"prompt": "x" * 4001}, "4001 characters; at most 4000"),
        ({"negative_prompt": ["", "", ""]}, "3 negative prompts for 1 clips"),
        ({"seed": -2}, r"in \[0, 2\^64\), or -1 for a random one, not -2"),
        ({"seed": 2**64}, r"in \[0, 2\^64\)"),
        ({"prompt": ["a", "b"], "seed": 2**64 - 1}, r"in \[0, 2\^64\)"),
        ({"seed": [1, 2]}, "2 seeds for 1 clips"),
        ({"seed": "3"}, "whole number or one for each clip"),
        ({"seed": [1.5]}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"num_inference_steps": 0}, r"is 0; it must be a whole number in \[1, 1000\]"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"guidance_scale": -1.0}, r"scale is -1.0; it must be a number in \[0, 100\]"),
        (
            {"guidance_scale": float("nan")},
            "guidance_scale is nan; it must be a number",
        ),
        ({"guidance_rescale": 1.5}, r"guidance_rescale is 1.5; .* in \[0, 1\]"),
        (
            {"guidance_rescale": float("nan")},
            "guidance_rescale is nan; it must be a number",
        ),
        (
            {"guidance_scale": 1.0, "negative_prompt": "a dog"},
            "negative_prompt is given, but guidance_scale is 1, where it does nothing",
        ),
        (
            {"guidance_scale": 1.0, "guidance_rescale": 0.7},
            "guidance_rescale is given, but guidance_scale is 1, where it does nothing",
        ),
        ({"fps": 0.0}, r"fps is 0.0; it must be a number in \[0.01, 1000\]"),
        ({"fps": 1e-3}, "fps is 0.001; it must be a number in"),
        ({"fps": 1001.0}, "fps is 1001.0; it must be a number in"),
        ({"fps": float("nan")}, "fps is nan; it must be a number in"),
        ({"shift": 0.0}, r"shift is 0.0; it must be a number in \(0, 100\]"),
        ({"shift": 101.0}, "shift is 101.0; it must be a number in"),
        ({"step_cache": 101.0}, r"step_cache is 101.0; .* in \[0, 100\]"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number in"),
        ({"batch_size": 10**9}, "batch_size is 1000000000; it must be a whole"),
        ({"num_frames": 10**9 + 1}, "num_frames is at most 1000000, not 1000000001"),
        ({"height": 16 * 10**9}, "height is at most 1000000"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is at least 1"),
        ({"sampler": "huen"}, "'huen' is unknown.*did you mean 'heun'"),
        ({"output_type": "pil"}, "'pil' is unknown; there are .*latent"),
        ({"image": "a.png"}, "image is an array"),
        ({"image": [np.zeros((4, 4, 3))] * 2}, "2 images for 1 clips"),
        (
            {"image": np.zeros((4, 4, 3)), "num_frames": 1},
            "num_frames is 1: with an image given",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        ask(**changes)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_model_without_a_rate_is_told_one():
    settings = dataclasses.replace(SETTINGS, fps=None)
    with pytest.raises(ValueError, match="give fps: the model's config has no frame"):
        request.check(settings, STRIDES, prompt="a cat")
    assert request.check(settings, STRIDES, prompt="a cat", fps=8.0).fps == 8.0


def test_prompts_beyond_the_models_length_are_refused():
    request.check_lengths(ask(prompt=["abc", "ab"]), len, 3)
    with pytest.raises(ValueError, match="has 4 tokens; this model reads 3"):
        request.check_lengths(ask(prompt=["abc", "abcd"]), len, 3)
    with pytest.raises(ValueError, match="has 4 tokens; this model reads 3"):
        request.check_lengths(ask(prompt="abc", negative_prompt="abcd"), len, 3)
    longer = request.Upsampled("abcd", "ab", "rules:dense")
    with pytest.raises(ValueError, match="rules:dense rewrote 'ab' in 4 tokens; this"):
        request.check_lengths(ask(prompt=["abc", longer]), len, 3)
