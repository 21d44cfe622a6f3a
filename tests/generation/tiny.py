"""Tiny networks of random weights: what the tests of this room generate with."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.generation import request
from sora_jax.models import dit, text_encoder, video_vae

DIT = dit.Config(
    in_channels=4, out_channels=4, patch=(1, 1, 1), dim=32, num_layers=2, num_heads=2,
    mlp_dim=64, text_dim=16, freq_dim=16, additive_positions=True, time_scale=2.0,
)  # fmt: skip
TEXT = text_encoder.Config(
    vocab_size=128, dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32
)
VAE = video_vae.Config(
    latent_channels=4, base_dim=4, num_res_blocks=1,
    latent_mean=(0.1, 0.0, -0.1, 0.2), latent_std=(0.5, 1.0, 2.0, 1.0),
)  # fmt: skip
SETTINGS = request.Settings(
    num_frames=9, height=16, width=16, fps=8.0, text_length=24, shift=3.0,
    num_inference_steps=4, guidance_scale=2.0, batch_size=4, chunk_steps=3,
)  # fmt: skip


class Letters:
    """A tokenizer of single letters; id 1 ends a text, 0 fills it up."""

    def ids(self, text: str) -> tuple[int, ...]:
        return (*(ord(letter) % 120 + 3 for letter in text), 1)

    def encode(self, texts, length):
        ids_bl = np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            ids = self.ids(text)
            ids_bl[row, : len(ids)] = ids
        return ids_bl, ids_bl != 0


def networks(text: text_encoder.Config = TEXT) -> dict[str, nnx.Module]:
    """Random weights everywhere: those that start at zero would hide mistakes."""
    rng = np.random.default_rng(0)

    def weights(leaf):
        fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 25
        return jnp.asarray(rng.normal(size=leaf.shape) / fan_in**0.5, leaf.dtype)

    made = {}
    for name, make in (
        ("dit", lambda: dit.DiT(DIT, rngs=nnx.Rngs(0))),
        ("text_encoder", lambda: text_encoder.TextEncoder(text, rngs=nnx.Rngs(0))),
        ("vae", lambda: video_vae.VideoVAE(VAE, rngs=nnx.Rngs(0))),
    ):
        graph, state = nnx.split(nnx.eval_shape(make), nnx.Param)
        made[name] = nnx.merge(graph, jax.tree.map(weights, state))
    return made
