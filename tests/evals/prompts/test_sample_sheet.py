"""Sample sheets: what a run draws is what its pipeline makes."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from configs import toy
from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.evals.prompts import sample_sheet
from sora_jax.generation import pipeline
from sora_jax.models import lora
from sora_jax.training import adapters, checkpoint, jobs, objectives, trackers
from tests.training import tiny_job

NONE = trackers.Trackers({})


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return tiny_job.write_toy_world(tmp_path_factory.mktemp("sheet"), 16)


def settings(latents, prompts):
    c = toy.get_config()
    c.update_from_flattened_dict(tiny_job.TINY)
    c.data.latents, c.data.sample_prompts = str(latents), str(prompts)
    c.sample.num_frames, c.sample.height, c.sample.width = 5, 16, 16
    return c


@pytest.mark.parametrize("rank", [0, 2])
def test_a_sheet_shows_what_the_weights_make(latents, rank, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    c, folder = settings(latents, prompts), tmp_path / "run"
    seen = mock.Mock()
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = jobs.denoiser(c, folder, mesh)
        configs.write(folder, c)
        made = sample_sheet.of_run(c, folder, trackers.Trackers({"seen": seen}))
        params = jax.jit(task.objective.networks.init)(jax.random.key(0))
        # The last layer is zero at first, and all would look the same.
        params["dit"]["proj_out"]["kernel"] += 0.1
        kept = {name: params[name] for name in ("dit", "text_encoder")}
        if rank:
            c.lora.rank = rank
            adapted = adapters.config_of(c)
            networks = objectives.denoiser_networks(
                task.objective.dit_config, None, adapted
            )
            own = networks.init(jax.random.key(1))[lora.PART]
            own = jax.tree.map(lambda leaf: leaf + 0.3, own)
            params[lora.PART] = own
            base = jax.tree.map(jnp.copy, kept["dit"])
            kept["dit"] = lora.merge(base, own["dit"], adapted.scale)
        assert [*made.run(params, 40)] == []
        c.lora.rank = 0
        run = checkpoint.LoadedRun(c, kept, 40, folder)
        clip = pipeline.Pipeline.from_run(run)("a blue square", seed=1).frames[0]
    sheet = np.asarray(PIL.Image.open(folder / "samples" / "00000040.png"))
    large = np.round(255 * np.clip(clip[0], 0, 1)).astype(np.uint8)
    large = large.repeat(6, 0).repeat(6, 1)
    (step, videos, fps), _ = seen.videos.call_args
    assert step == 40 and [*videos] == ["a red circle", "a blue square"] and fps == 8
    np.testing.assert_array_equal(
        videos["a blue square"][0].repeat(6, 0).repeat(6, 1), large
    )
    second = 38 + 96 + 16 + 22
    np.testing.assert_array_equal(sheet[second : second + 96, 16:112], large)


def test_what_cannot_be_drawn_is_refused_at_the_start(latents, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" * 33)
    with pytest.raises(ValueError, match="33 prompts; a sheet shows up to 32"):
        sample_sheet.of_run(settings(latents, prompts), tmp_path, NONE)
    with pytest.raises(FileNotFoundError):
        sample_sheet.of_run(settings(latents, tmp_path / "none.txt"), tmp_path, NONE)
    assert sample_sheet.of_run(settings(latents, ""), tmp_path, NONE) is None
