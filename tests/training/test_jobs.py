"""What a job says of its data before the first step."""

import jax
import pytest

from configs import toy
from sora_jax.core import mesh as meshes
from sora_jax.data import shards
from sora_jax.training import jobs
from tests import conftest
from tests.data import clips
from tests.training import tiny_job


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A latent cache of 24 clips with captions of some 10 tokens."""
    out = tmp_path_factory.mktemp("jobs")
    shards.write(out / "shards", clips.Clips(num=24, per_part=12))
    tiny_job.write_latents(out / "latents", out / "shards", (2, 2, 2))
    tiny_job.write_vae(out / "latents" / "vae")
    return out


@pytest.mark.parametrize("length", [4, 24])
@pytest.mark.parametrize("objective", ["text_encoder", "denoiser"])
def test_captions_that_are_cut_are_counted(made, tmp_path, capsys, objective, length):
    c = toy.get_config()
    c.model.dit.in_channels = c.model.dit.out_channels = 4
    c.text.vocab_size, c.optim.learning_rate_factors = 300, ()
    c.data.latents = str(made / "latents")
    c.text.length, c.text.target_length = length, length // 2
    c.text.target = "dense"
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        jobs.JOBS[objective](c, tmp_path / "run", mesh)
    said = capsys.readouterr().err
    fields = {"text_encoder": ["length", "target_length"], "denoiser": ["length"]}
    for field in fields[objective]:
        warned = f"are cut; --config.text.{field}=" in said
        assert warned == (length == 4), said


def test_a_run_is_measured_on_clips_of_the_whole_set(made, monkeypatch):
    c = toy.get_config()
    c.objective, c.data.eval_shards, c.data.eval_clips = "vae", str(made / "shards"), 4
    measured = lambda config, video, lpips: video[:, 0, 0, 0, 0].tolist()  # noqa: E731
    with conftest.lone_job("train") as train:
        monkeypatch.setattr(train.reconstruction, "Reconstruction", measured)
        evaluators = train.evaluators(c, made, jobs.Job(None, None), None, None)
    assert evaluators == {"reconstruction": [0, 7, 15, 23]}
