"""A folder in diffusers' layout, of a few thousand random weights."""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from sora_jax.data import shards, tokenizer
from sora_jax.models import dit, text_encoder, video_vae
from sora_jax.training import encode_latents, pretrained
from tests.data import clips

DIT = dit.Config(
    in_channels=4, out_channels=4, dim=32, num_layers=2, num_heads=2, mlp_dim=48,
    text_dim=16, freq_dim=16, mask_text=False, known_embedding=False, pooled_text=False,
)  # fmt: skip
TEXT = text_encoder.Config(
    vocab_size=320, dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32
)
VAE = dataclasses.replace(
    video_vae.WAN_2_1, base_dim=4, latent_channels=4, num_res_blocks=1,
    latent_mean=(0.1, 0.2, 0.3, 0.4), latent_std=(1.0, 2.0, 1.0, 0.5),
)  # fmt: skip
CONFIGS = {"transformer": DIT, "text_encoder": TEXT, "vae": VAE}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
    "use_flow_sigmas": True, "flow_shift": 5.0, "num_train_timesteps": 1000,
}  # fmt: skip
TEXTS = ["a red circle moves left", "a blue square", "clip number 1"]


def weights(name: str, seed: int = 0) -> dict:
    """Random parameters of a component, in our names."""
    rng = np.random.default_rng(seed)
    kind = name.removesuffix("_2")
    shapes = pretrained.KINDS[name].peer.shapes(CONFIGS[kind])
    return jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype("f4"), shapes
    )


def write(folder: pathlib.Path, experts: int = 1) -> pathlib.Path:
    """Writes the folder; with two experts it has the form of Wan 2.2 T2V A14B."""
    names = ["transformer", "text_encoder", "vae"] + ["transformer_2"] * (experts - 1)
    for seed, name in enumerate(names):
        config = CONFIGS[name.removesuffix("_2")]
        params = weights(name, seed)
        pretrained.write_component(folder / name, name, params, config)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    tokenizer.train(TEXTS, folder / "tokenizer" / "spiece.model", 320)
    index = {"_class_name": "WanPipeline"}
    index["boundary_ratio"] = 0.875 if experts == 2 else None
    index |= {n: ["library", "Class"] for n in (*names, "scheduler", "tokenizer")}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_with_latents(base: pathlib.Path) -> pathlib.Path:
    """Writes `folder`, `shards`, and `latents` that the folder's own VAE made of them."""
    write(base / "folder")
    shards.write(base / "shards", clips.Clips(num=16, per_part=8))
    encode_latents.encode(base / "shards", base / "folder", base / "latents")
    return base
