"""Accuracy by noise band: of a model that knows, and of one that ignores the text."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import timesteps
from sora_jax.evals import bands, summary
from sora_jax.training import metrics

EDGES = (0.0, 0.5, 0.9, 1.0)


class Pixels:
    """A video VAE whose latents are the pixels."""

    def encode(self, video):
        return video, video

    def normalize(self, latents):
        return latents

    denormalize = decode = normalize


class Finisher:
    """Goes straight to `right` where the input is clear enough, else to `wrong`."""

    def __init__(self, params):
        self.params = params

    def apply_video(self, x, levels_bk, known, text, mask, fps):
        tau = levels_bk[0, 0]
        target = jnp.where(
            tau > self.params["lost"], self.params["wrong"], self.params["right"]
        )
        return (x - target) / tau


@pytest.fixture(scope="module")
def oracle():
    networks = types.SimpleNamespace(
        bind=lambda params: {
            "dit": Finisher(params),
            "text_encoder": lambda ids, mask: jnp.zeros((*ids.shape, 1)),
        }
    )
    words = types.SimpleNamespace(
        encode=lambda texts, length: (
            np.zeros((len(texts), length), np.int32),
            np.ones((len(texts), length), bool),
        )
    )
    return bands.BandOracle(
        networks,
        types.SimpleNamespace(module=Pixels),
        words,
        tier="tw32",
        text_length=4,
        fps=8.0,
        shift=5.0,
        edges=EDGES,
        sizes={"motion": 8, "relation": 6},
        num_steps=3,
    )


def test_a_model_that_knows_is_right_in_every_band(oracle):
    clips = oracle._x0
    found = dict(oracle.run({"right": clips, "wrong": clips, "lost": 1.0}))
    names = timesteps.band_names(EDGES)
    assert found.keys() >= {f"motion direction/{name}" for name in names}
    assert found.keys() >= {f"relation side/{name}" for name in names}
    assert set(found.values()) == {1.0}


def test_what_is_lost_shows_in_its_band(oracle):
    """The last step decides: it begins at .64 in the upper band, below .5 elsewhere."""
    clips = oracle._x0
    other = jnp.concatenate([jnp.roll(clips[:8], 1, 0), jnp.roll(clips[8:], 1, 0)])
    found = dict(oracle.run({"right": clips, "wrong": other, "lost": 0.5}))
    assert found["motion pass/0-0.5"] == found["motion pass/0.5-0.9"] == 1.0
    assert found["motion pass/0.9-1"] < 0.5
    assert found["relation side/0.9-1"] < 0.5


def test_a_model_that_ignores_the_text_is_wrong_everywhere(oracle):
    clips = oracle._x0
    other = jnp.concatenate([jnp.roll(clips[:8], 1, 0), jnp.roll(clips[8:], 1, 0)])
    always = dict(oracle.run({"right": other, "wrong": other, "lost": 1.0}))
    assert always["motion pass/0-0.5"] < 0.5
    assert always["relation side/0.9-1"] < 0.5


def test_logged_accuracies_are_drawn(oracle, tmp_path):
    log = metrics.MetricsFile(tmp_path / "metrics.jsonl", start_step=0, write=True)
    clips = oracle._x0
    for step in (1, 2):
        found = oracle.run({"right": clips, "wrong": clips, "lost": 1.0})
        log.write(step, {f"oracle/{name}": value for name, value in found})
    log.close()
    charts = summary.charts(tmp_path)
    assert ["oracle accuracy by noise level" in chart.title for chart in charts] == [
        True
    ]
    assert "motion direction" in charts[0].svg
