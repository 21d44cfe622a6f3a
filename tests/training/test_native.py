"""From a folder of videos of many shapes to packed rows of their latents."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data import latent_cache, packing, shards, video_clips
from sora_jax.data.shape_classes import Budget
from sora_jax.training import encode_latents, trained_vae
from tests.data.test_video_io import film, write
from tests.training import tiny_job


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Videos, their shards, a video VAE and the latents, with seven clips of five shapes."""
    base = tmp_path_factory.mktemp("native")
    (base / "in").mkdir()
    for name, num_frames, fps, height, width in (
        ("wide", 23, 10, 90, 160),
        ("high", 18, 12, 160, 90),
        ("square", 14, 24, 64, 64),
        ("small", 15, 25, 30, 42),
    ):
        frames = film(num_frames, fps, height=height, width=width)
        write(base / "in" / f"{name}.mp4", frames, fps)
        (base / "in" / f"{name}.txt").write_text(f"a film that is {name}")
    source = video_clips.FolderClips(
        base / "in", Budget(108, 8), (9, 5), None, max_fps=12
    )
    shards.write(base / "shards", source)
    tiny_job.write_vae(base / "vae")
    with pytest.MonkeyPatch.context() as patched:
        # Batches of two clips of the larger sizes, and of up to eight of the others.
        patched.setattr(trained_vae, "VOXELS_AT_ONCE", 2 * 9 * 32 * 56)
        encode_latents.encode(base / "shards", base / "vae", base / "latents")
    return base


def test_each_clip_has_the_latents_that_it_has_alone(base):
    clips = {clip.id: clip for clip in shards.open(base / "shards")}
    shapes = collections.Counter(
        (clip.num_frames, clip.height, clip.width, clip.fps) for clip in clips.values()
    )
    assert shapes == {
        (9, 32, 56, 10.0): 2, (5, 32, 56, 10.0): 1, (9, 56, 32, 12.0): 2,
        (5, 56, 56, 12.0): 1, (5, 24, 32, 12.5): 1,
    }  # fmt: skip
    latents = latent_cache.open(base / "latents")
    assert {latents[index].id for index in range(len(latents))} == {*clips}
    vae = trained_vae.load(base / "vae")
    encode = jax.jit(lambda video: vae.module().encode(video)[0])
    for index in (0, len(latents) - 1):
        record = latents[index]
        clip = clips[record.id]
        video = jnp.asarray(clip.frames()[None], jnp.float32) / 127.5 - 1
        np.testing.assert_allclose(record.latents, encode(video)[0], atol=1e-4)
        assert (record.fps, record.captions) == (clip.fps, clip.captions)


def test_packed_rows_hold_them_all(base, start):
    given = {
        "data__latents": base / "latents", "text__tiers__alt": 1.0,
        "packing__shapes": 2, "packing__unit": 8, "packing__clips": 6,
        "packing__window": 96, "packing__max_padding": 0.6, "data__batch_size": 8,
        "loop__num_steps": 8, "model__dit__patch": (1, 1, 1),
    }  # fmt: skip
    with pytest.raises(SystemExit, match="do not divide.*another --multiple_of"):
        start("other", **given | {"model__dit__patch": (1, 2, 2)})
    call = start("run", **given)
    with call.args[3](0) as batches:
        found = list(itertools.islice(batches, 8))
    latents = latent_cache.open(base / "latents")
    known = {}
    for index in range(len(latents)):
        tokens_mc, places_m3 = packing.patches(latents[index].latents, (1, 1, 1))
        known[tokens_mc.tobytes()] = latents[index], places_m3
    seen = collections.Counter()
    for batch in found:
        for row, segments in enumerate(batch["segments"]):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                record, places_m3 = known[batch["tokens"][row, here].tobytes()]
                np.testing.assert_array_equal(batch["places"][row, here], places_m3)
                assert batch["fps"][row, segment - 1] == np.float32(record.fps)
                seen[record.id] += 1
    assert {*seen} == {record.id for record, _ in known.values()}
    with pytest.raises(SystemExit, match="differ in shape.*need packing.shapes"):
        start("other", **given | {"packing__shapes": 0})


def test_a_video_vae_is_measured_on_clips_of_all_sizes(base, tmp_path):
    """Mean and deviation of its latents are those of the cache's, which has every clip."""
    vae = trained_vae.load(base / "vae")
    clips = shards.open(base / "shards")
    config = trained_vae.save(tmp_path / "vae", vae.params, vae.config, clips)
    mean, std = latent_cache.open(base / "latents").mean_std
    np.testing.assert_allclose(config.latent_mean, mean, atol=1e-4)
    np.testing.assert_allclose(config.latent_std, std, rtol=1e-3)
