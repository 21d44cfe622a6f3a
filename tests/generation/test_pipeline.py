import json

import jax
import numpy as np
import pytest

from sora_jax.core import mesh, rng
from sora_jax.data import video_io
from sora_jax.generation import compiled, pipeline, recipes
from sora_jax.generation import given as givens
from tests.generation import tiny


@pytest.fixture(scope="module")
def trio(pipe):
    """Three clips made together; the second is "a cat" with seed 3."""
    return pipe(["a dog", "a cat", "x"], seed=[0, 3, 5]).frames


def test_frames_have_the_shape_and_range_of_a_video(trio):
    assert trio.shape == (3, 9, 16, 16, 3) and trio.dtype == np.float32
    assert trio.min() >= 0 and trio.max() <= 1 and trio.std() > 0.01


def test_a_seed_gives_the_same_clip_alone_and_in_any_company(pipe, trio):
    alone = pipe("a cat", seed=3).frames
    np.testing.assert_array_equal(alone[0], trio[1])
    # five clips are two batches of four places
    five = pipe(["a", "b", "c", "d", "a cat"], seed=[9, 8, 7, 6, 3]).frames
    np.testing.assert_array_equal(five[4], trio[1])
    np.testing.assert_array_equal(pipe("a dog", seed=0).frames[0], trio[0])


def test_seed_prompt_guidance_and_negative_prompt_all_matter(pipe, trio):
    for changes in (
        {"seed": 4},
        {"seed": 2**32 + 3},
        {"prompt": "a dog"},
        {"guidance_scale": 3.0},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"negative_prompt": "x"},
        {"sampler": "heun"},
        {"num_inference_steps": 5},
        {"fps": 4.0},
    ):
        other = pipe(**({"prompt": "a cat", "seed": 3} | changes)).frames
        assert np.abs(other[0] - trio[1]).max() > 1e-4, changes


def test_noise_is_a_function_of_the_seed_alone(pipe):
    request = pipe.check_inputs(prompt=["a", "b"], seed=[5, 2**32 - 1])
    noise, given = pipe.prepare_latents(request, [0, 1])
    assert given == givens.Given()
    for row, seed in enumerate(request.seeds):
        key = rng.key(seed, "noise")
        np.testing.assert_array_equal(noise[row], jax.random.normal(key, (3, 2, 2, 4)))


def test_no_step_leaves_the_noise_and_many_steps_converge(pipe):
    def latents(steps, sampler):
        return pipe(
            "a cat", num_inference_steps=steps, sampler=sampler, output_type="latent"
        ).frames

    fine = latents(200, "heun")
    coarse, finer = latents(5, "euler"), latents(80, "euler")
    assert np.abs(finer - fine).max() < 0.3 * np.abs(coarse - fine).max()


def test_image_to_video_keeps_the_picture_as_its_first_latent(pipe):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    got = pipe(["a cat", "x"], image=picture, output_type="latent").frames
    vae = tiny.networks()["vae"]
    video = picture[None, None].astype(np.float32) / 127.5 - 1
    want = jax.jit(lambda video: vae.normalize(vae.encode(video)[0]))(video)
    np.testing.assert_allclose(got[:, :1], np.concatenate([want] * 2), atol=1e-5)
    free = pipe(["a cat", "x"], output_type="latent").frames
    assert np.abs(got[:, 1:] - free[:, 1:]).max() > 1e-3
    other = pipe("a cat", image=255 - picture, output_type="latent").frames
    assert np.abs(other[0, 1:] - got[0, 1:]).max() > 1e-3


def test_the_given_latent_is_held_slightly_noised_through_all_steps(pipe):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    seen = []
    final = pipe(
        "a cat",
        seed=3,
        image=picture,
        output_type="latent",
        callback_on_step_end=lambda p, i, tau, x: seen.append(x["latents"][:, 0]),
    ).frames
    noise = jax.random.normal(rng.key(3, "noise"), (3, 2, 2, 4))
    known_tau = tiny.SETTINGS.known_tau
    want = (1 - known_tau) * final[:, 0] + known_tau * np.asarray(noise)[None, 0]
    assert len(seen) == 4 and known_tau > 0
    for first_frame in seen:
        np.testing.assert_allclose(first_frame, want, atol=1e-6)


def test_one_image_for_each_clip(pipe):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    both = pipe(["a", "b"], image=pictures, output_type="latent").frames
    second = pipe("b", seed=1, image=pictures[1], output_type="latent").frames
    np.testing.assert_array_equal(both[1], second[0])


def test_other_sizes_than_the_trained_one(pipe):
    for sizes, grid in (((5, 24, 8), (2, 3, 1)), ((1, 16, 16), (1, 2, 2))):
        frames, height, width = sizes
        latents = pipe(
            "a cat", num_frames=frames, height=height, width=width, batch_size=1,
            output_type="latent",
        ).frames  # fmt: skip
        assert latents.shape == (1, *grid, 4)


def test_callback_sees_every_step_and_may_change_the_latents(pipe):
    seen = []

    def watch(pipe, step, tau, tensors):
        seen.append((step, tau, tensors["latents"].shape))

    latents = pipe(
        "a cat", seed=3, callback_on_step_end=watch, output_type="latent"
    ).frames
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert seen[-1][1] == 0.0 and {shape for _, _, shape in seen} == {(1, 3, 2, 2, 4)}
    unwatched = pipe("a cat", seed=3, output_type="latent").frames
    np.testing.assert_allclose(latents, unwatched, atol=1e-5)

    def zero(pipe, step, tau, tensors):
        return {"latents": 0 * tensors["latents"]} if step == 3 else None

    zeroed = pipe("a", callback_on_step_end=zero, output_type="latent").frames
    np.testing.assert_array_equal(zeroed, np.zeros_like(zeroed))
    with pytest.raises(ValueError, match="returned latents of shape"):
        pipe("a", callback_on_step_end=lambda *_: {"latents": np.zeros(3)})


def test_changed_latents_are_honoured_whatever_the_solver_remembers(pipe):
    """The last step of each solver is the same, so from the same latents so is the end."""

    def change(pipe, step, tau, tensors):
        if step == 2:
            tensors["latents"][:] = 1.7

    def returned(pipe, step, tau, tensors):
        return {"latents": 0 * tensors["latents"] + 1.7} if step == 2 else tensors

    def ends(sampler, callback):
        return pipe(
            "a cat", seed=3, output_type="latent", sampler=sampler,
            callback_on_step_end=callback,
        ).frames  # fmt: skip

    want = ends("euler", change)
    for sampler in ("heun", "unipc"):
        np.testing.assert_allclose(ends(sampler, change), want, atol=1e-5)
    np.testing.assert_array_equal(ends("unipc", returned), ends("unipc", change))
    # One that hands back what it was shown changes nothing.
    looked = ends("unipc", lambda pipe, step, tau, tensors: tensors)
    np.testing.assert_array_equal(looked, ends("unipc", lambda *_: None))
    assert np.abs(looked - want).max() > 0.1


def test_progress_counts_clip_steps(pipe):
    done = []
    pipe(["a"] * 5, progress=done.append)
    assert done == [12, 4, 3, 1] and sum(done) == 5 * 4


def test_chunks_of_any_number_of_steps_are_compiled_once(pipe):
    pipe("a", num_inference_steps=4)
    before = compiled.denoise_chunk._cache_size()
    pipe(["a", "b"], num_inference_steps=7, guidance_scale=5.0, fps=6.0, seed=9)
    assert compiled.denoise_chunk._cache_size() == before


def test_weights_that_give_no_numbers_are_reported(pipe):
    broken = tiny.networks()
    bias = broken["dit"].proj_out.bias
    bias[...] = bias[...] * np.nan
    spoiled = pipeline.Pipeline(
        **broken, tokenizer=tiny.Letters(), settings=tiny.SETTINGS
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        spoiled("a cat", output_type="latent")


def test_long_prompts_are_refused(pipe):
    with pytest.raises(ValueError, match="25 tokens; this model reads 24"):
        pipe("x" * 24)


@pytest.mark.parametrize(
    "shape", [{"replica": 2, "fsdp": 4}, {"replica": 2, "fsdp": 2, "tensor": 2}]
)
def test_eight_devices_make_the_same_clips(pipe, trio, shape):
    three = {"prompt": ["a dog", "a cat", "x"], "seed": [0, 3, 5]}
    picture = np.full((16, 16, 3), 0.25)
    one = pipe(**three, output_type="latent").frames
    one_given = pipe(**three, image=picture, output_type="latent").frames
    with jax.set_mesh(mesh.make_mesh(shape)):
        spread = pipeline.Pipeline(
            **tiny.networks(), tokenizer=tiny.Letters(), settings=tiny.SETTINGS
        )
        eight = spread(**three, output_type="latent").frames
        np.testing.assert_allclose(eight, one, atol=1e-4)
        if "tensor" not in shape:  # the video VAE has its own tests of meshes
            np.testing.assert_allclose(spread(**three).frames, trio, atol=1e-4)
            given = spread(**three, image=picture, output_type="latent").frames
            np.testing.assert_allclose(given, one_given, atol=1e-4)


def test_the_two_branches_of_one_clip_are_on_two_devices(pipe):
    """One clip at a time keeps two devices busy: the denoiser sees one row on each."""
    picture = np.full((16, 16, 3), 0.25)
    two = {"prompt": ["a dog", "a cat"], "seed": [0, 3], "output_type": "latent"}
    one, given = pipe(**two).frames, pipe(**two, image=picture).frames
    with jax.set_mesh(mesh.make_mesh({"replica": 2}, jax.devices()[:2])):
        spread = pipeline.Pipeline(
            **tiny.networks(), tokenizer=tiny.Letters(), settings=tiny.SETTINGS
        )
        request = spread.check_inputs(**two, batch_size=1)
        assert [*spread.batches(request)] == [[0, 0], [1, 1]]
        seen = []
        found = spread(
            **two, batch_size=1,
            callback_on_step_end=lambda p, i, tau, x: seen.append(x["latents"].shape),
        )  # fmt: skip
        np.testing.assert_allclose(found.frames, one, atol=1e-4)
        assert seen == [(1, 3, 2, 2, 4)] * 8
        with_picture = spread(**two, image=picture, batch_size=1).frames
        np.testing.assert_allclose(with_picture, given, atol=1e-4)
        # Without guidance a clip is one row: two are made at a time.
        alone = spread.check_inputs(**two, batch_size=1, guidance_scale=1.0)
        assert [*spread.batches(alone)] == [[0, 1]]
        text, null = spread.encode_prompt(request, [0, 0])
        noise, _ = spread.prepare_latents(request, [0, 0])
        rows = []
        video = compiled.dits.DiT.__call__

        def spying(self, given, *rest):
            x = given.tokens_bnc
            rows.append((x.shape[0], jax.typeof(x).sharding.spec[0]))
            return video(self, given, *rest)

        compiled.denoise_chunk.clear_cache()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled.dits.DiT, "__call__", spying)
            spread.denoise(request, [0, 0], text, null, noise)
        compiled.denoise_chunk.clear_cache()
    # Two rows, of one clip, split over the two devices.
    assert set(rows) == {(2, ("replica", "fsdp"))}


def test_decoding_undoes_what_encoding_normalises(pipe):
    assert tiny.VAE.latent_std != (1.0,) * 4
    latents = np.random.default_rng(0).normal(size=(4, 3, 2, 2, 4)).astype(np.float32)
    vae = tiny.networks()["vae"]
    std, mean = np.asarray(tiny.VAE.latent_std), np.asarray(tiny.VAE.latent_mean)
    video = jax.jit(vae.decode)((latents * std + mean).astype(np.float32))
    want = np.clip(np.asarray(video) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(pipe.decode_latents(latents), want, atol=1e-5)


def test_a_saved_clip_holds_its_recipe_inside_and_beside(tmp_path, pipe):
    output = pipe("a cat", seed=3, fps=6.0)
    path = tmp_path / "out" / "clip.mp4"
    output.export_to_video(path)
    video = video_io.decode(path)
    assert video.frames.shape == (9, 16, 16, 3) and video.fps == 6.0
    sidecar = json.loads(path.with_suffix(".json").read_text())
    recipe = {k: v for k, v in sidecar.items() if k != "video_sha256"}
    assert recipe == json.loads(json.dumps(output.recipes[0]))
    assert (recipe["prompt"], recipe["seed"], recipe["shift"]) == ("a cat", 3, 3.0)
    assert json.dumps(output.recipes[0], sort_keys=True).encode() in path.read_bytes()
    with pytest.raises(ValueError, match="ends in one of .mp4, .webm, .gif"):
        recipes.save(output.frames[0], tmp_path / "clip.avi", output.recipes[0])
    latents = pipe("a cat", num_inference_steps=1, output_type="latent")
    with pytest.raises(ValueError, match="are latents, not a video"):
        latents.export_to_video(path)


def test_a_large_video_is_decoded_in_chunks(pipe, monkeypatch):
    """In chunks as at once; and the frames come while later latents are still away."""
    latents = np.random.default_rng(0).normal(size=(2, 9, 2, 2, 4)).astype(np.float32)
    whole = np.asarray(pipe.decode_latents(latents))
    chunks = [*pipe.decode_stream(latents)]
    assert len(chunks) > 1
    np.testing.assert_allclose(np.concatenate(chunks, 1), whole, atol=1e-5)
    monkeypatch.setattr(pipeline.trained_vae, "VOXELS_AT_ONCE", 1)
    found = pipe.decode_latents(latents)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    taken = []

    def parts():
        for t in range(9):
            taken.append(t)
            yield latents[:, t : t + 1]

    next(pipe.decode_stream(parts()))
    assert len(taken) < 9
