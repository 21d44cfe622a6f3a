"""The video VAE's job: stages with several kinds of windows, checked before they run."""

import jax
import numpy as np
import pytest

from configs import toy, toy_vae
from sora_jax.core import mesh as meshes
from sora_jax.data import shards
from sora_jax.training import jobs, trained_vae
from tests.data import clips

CLIPS, IMAGES = (5, 8, 8, 1), (1, 0, 0, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae_job") / "shards"
    shards.write(path, clips.Clips(num=6))  # of 5 x 16 x 16
    return path


def make(folder, crops):
    c = toy.get_config()
    c.objective, c.data.shards, c.data.crops = "vae", str(folder), crops
    c.data.batch_size, c.loop.num_steps = 4, 4
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    return jobs.vae(c, folder.parent / "run", mesh)


def test_every_step_of_a_stage_has_every_kind(folder):
    job = make(folder, ((0.5, (CLIPS, IMAGES)), (0.5, ((0, 0, 0, 1),))))
    with job.batches(0) as rows:
        whole = list(rows)
    assert [[video.shape for video in step.values()] for step in whole] == [
        [(4, 5, 8, 8, 3), (8, 1, 16, 16, 3)]
    ] * 2 + [[(4, 5, 16, 16, 3)]] * 2
    with job.batches(1) as rows:
        for found, wanted in zip(rows, whole[1:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    "kinds, message",
    [
        ((CLIPS, (3, 8, 8, 1)), r"data.crops: num_frames is 3; .* 1 \+ 4n frames"),
        ((CLIPS, (5, 10, 8, 1)), "data.crops: height x width is 10 x 8; .* multiples"),
        ((CLIPS, (9, 8, 8, 1)), "data.crops: a window of 9 x 8 x 8 is larger"),
        ((), "has no windows"),
    ],
)
def test_impossible_crops_are_refused_before_the_first_step(folder, kinds, message):
    crops = ((0.9, (CLIPS,)), (0.1, kinds))
    with pytest.raises(ValueError, match=message) as refused:
        make(folder, crops)
    assert "\n" not in str(refused.value)


FIXED = "^vae.(encoder|quant_conv|linear)"


def test_a_fixed_encoder_keeps_the_scale_of_its_latents(folder, tmp_path, monkeypatch):
    """Also when the run goes on, and its start is no longer there."""
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    shipped = trained_vae.load(trained_vae.component("toy"))

    def scale_of(init, pattern=FIXED):
        c = toy.get_config()
        c.objective, c.data.shards, c.init = "vae", str(folder), init
        c.model.vae = toy_vae.get_config().model.vae
        c.data.batch_size, c.loop.num_steps = 4, 4
        c.optim.learning_rate_factors = ((pattern, 0.0),) if pattern else ()
        out = tmp_path / "run"
        with jax.set_mesh(mesh):
            job = jobs.vae(c, out, mesh)
            job.finish({"vae": shipped.params})
        found = trained_vae.load(out / "vae").config
        return found.latent_mean, found.latent_std

    own = shipped.config.latent_mean, shipped.config.latent_std
    assert scale_of("toy") == own
    assert scale_of("toy", "") != own  # measured on these clips
    for pattern in ("^vae.encoder", "^vae.encoder.conv_in"):
        with pytest.raises(ValueError, match="fix a part of what makes latents"):
            scale_of("toy", pattern)
    assert scale_of("toy") == own
    monkeypatch.setattr(jobs.checkpoint, "has_any", lambda folder: True)
    assert scale_of("") == own
    (tmp_path / "run" / "latent_scale.json").unlink()
    with pytest.raises(ValueError, match="name a video VAE with --init"):
        scale_of("")
