"""The loss gap: exact for a loss that is known, 0 where text is not read."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import toy
from sora_jax.core import mesh as meshes
from sora_jax.data import latent_cache, shards
from sora_jax.diffusion import timesteps
from sora_jax.evals.prompts import loss_gap
from sora_jax.toyworld import captions
from sora_jax.training import jobs
from tests.data import clips
from tests.training import tiny_job

TIERS = {"alt": 0.9, "short": 0.6, "medium": 0.4}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return latent_cache.open(
        tiny_job.write_toy_world(tmp_path_factory.mktemp("gap"), 60)
    )


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(devices=jax.devices()[:2])


def test_pairs_state_the_attribute_rightly_and_wrongly(latents):
    found = loss_gap.find_pairs(latents, TIERS, 3)
    assert found.keys() == set(captions.ATTRIBUTES)
    records = {r.captions["short"]: r for r in latents.read(range(len(latents)))}
    records |= {r.captions["medium"]: r for r in latents.read(range(len(latents)))}
    for name, pairs in found.items():
        assert len(pairs) == 3
        for pair in pairs:
            np.testing.assert_array_equal(
                records[pair.right].latents, pair.latents_thwc
            )
            assert pair.wrong != pair.right
            # Short captions come first, but do not state how fast something is.
            tier = "medium" if name == "speed" else "short"
            assert records[pair.right].captions[tier] == pair.right


class Words:
    """A tokenizer of whole texts: each has an id."""

    def __init__(self, pairs):
        texts = [t for some in pairs.values() for p in some for t in (p.right, p.wrong)]
        self.ids = {text: 1 + index for index, text in enumerate(dict.fromkeys(texts))}

    def encode(self, texts, length):
        ids = np.array([[self.ids[text]] + [0] * (length - 1) for text in texts])
        return ids.astype(np.int32), ids != 0


def test_captions_of_models_are_not_exchanged(latents):
    tiers = {"model_dense": 0.9, "alt": 0.05, "short": 0.05}
    found = loss_gap.find_pairs(latents, tiers, 3)
    shorts = {r.captions["short"] for r in latents.read(range(len(latents)))}
    assert {pair.right for pairs in found.values() for pair in pairs} <= shorts
    assert loss_gap.find_pairs(latents, {"model_short": 1.0}, 3) == {}


def test_the_gap_is_that_of_a_known_loss(latents, mesh):
    pairs = loss_gap.find_pairs(latents, TIERS, 3)
    words = Words(pairs)
    table = np.random.default_rng(0).normal(size=1 + len(words.ids)).astype(np.float32)
    noise = timesteps.Config(shift=3.0)
    levels = []

    def clip_losses(modules, batch):
        """tau times a number of the text, and a part that is in both losses."""
        both = jnp.sum(batch["noise"], (1, 2, 3, 4))
        both += jnp.sum(batch["latents"], (1, 2, 3, 4))
        of_text = jax.nn.one_hot(batch["text_ids"][:, 0], len(table)) @ table
        return (
            batch["tau"] * (of_text * modules["text_encoder"])[:, None] + both[:, None]
        )

    objective = types.SimpleNamespace(
        noise=noise,
        clip_losses=clip_losses,
        dit_config=types.SimpleNamespace(patch=(1, 1, 1)),
        networks=types.SimpleNamespace(
            bind=dict, abstract=lambda: {"text_encoder": None}
        ),
    )
    gap = loss_gap.LossGap(objective, words, 4, pairs, mesh=mesh, batch_size=4)
    values = dict(gap.run({"text_encoder": jnp.float32(2.0), "other": None}))
    edges = noise.band_edges
    for name, some in pairs.items():
        wrong, right = (
            np.mean([table[words.ids[getattr(pair, side)]] for pair in some])
            for side in ("wrong", "right")
        )
        mean = 0.0
        for low, high in itertools.pairwise(edges):
            share = timesteps.training_share((low, high), noise)
            band = f"{name}/{low:g}-{high:g}"
            assert (band in values) == (share >= 0.05)
            if band in values:
                levels.append(band)
                wanted = 2 * (low + high) / 2 * (wrong - right)
                assert values[band] == pytest.approx(wanted, abs=2e-4)
                mean += share * wanted
        assert values[name] == pytest.approx(mean, abs=2e-4)
    assert len(levels) > 3 * len(pairs)


def test_a_denoiser_that_ignores_text_has_no_gap(latents, mesh, tmp_path):
    c = toy.get_config()
    c.update_from_flattened_dict(tiny_job.TINY)
    c.data.latents, c.data.gap_clips = str(latents.folder), 2
    with jax.set_mesh(mesh):
        task = jobs.denoiser(c, tmp_path, mesh)
        gap = loss_gap.of_run(c, task.objective, task.latents, task.tokenizer, mesh)
        params = jax.jit(task.objective.networks.init)(jax.random.key(0))
        values = dict(gap.run(params))
        # The last layer is zero at first, so the text cannot reach the velocity.
        assert set(values.values()) == {0.0}
        kernel = params["dit"]["proj_out"]["kernel"]
        random = np.random.default_rng(0).normal(size=kernel.shape)
        params["dit"]["proj_out"]["kernel"] = jnp.float32(random)
        values = dict(gap.run(params))
    assert all(values.values())


def test_clips_of_another_world_are_not_measured(mesh, tmp_path):
    shards.write(tmp_path / "shards", clips.Clips(num=8, per_part=8))
    tiny_job.write_latents(tmp_path / "latents", tmp_path / "shards", (2, 2, 2))
    source = latent_cache.open(tmp_path / "latents")
    assert loss_gap.find_pairs(source, TIERS, 3) == {}
