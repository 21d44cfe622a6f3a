"""A run folder and shards as small as they can be, made without any training."""

import pathlib

import jax
import numpy as np
import optax
from absl import flags

from configs import toy
from sora_jax.core import config as configs
from sora_jax.core import paths
from sora_jax.data import shards, tokenizer, toy_clips
from sora_jax.generation import runs
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, trained_vae
from sora_jax.training import state as states
from tests import conftest

VAE = video_vae.Config(
    latent_channels=4, base_dim=4, num_res_blocks=1,
    latent_mean=(0.1, 0.0, -0.1, 0.2), latent_std=(0.5, 1.0, 2.0, 1.0),
)  # fmt: skip
FAMILIES = {"motion": 0.6, "relation": 0.2, "attribute": 0.2}


def make_shards(folder: pathlib.Path, num_clips: int = 40) -> None:
    """Writes toy-world shards of the families that the quickstart trains."""
    shards.write(folder, toy_clips.ToyClips("tw32", num_clips, families=FAMILIES))


def make_run(folder: pathlib.Path, shards_folder: pathlib.Path) -> None:
    """Writes the folder of a denoiser's run at step 0."""
    c = toy.get_config()
    for name in ("in_channels", "out_channels"):
        c.model.dit[name] = 4
    c.model.dit.dim, c.model.dit.num_layers, c.model.dit.num_heads = 32, 1, 2
    c.model.dit.mlp_dim, c.model.dit.text_dim, c.model.dit.freq_dim = 32, 16, 16
    c.model.text_encoder.update(
        {"num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
    )
    c.sample.num_inference_steps, c.sample.fps = 2, 8.0
    configs.write(folder, c)
    texts = shards.open(shards_folder).all_captions()
    tokenizer.train(texts, folder / "tokenizer.model", c.text.vocab_size)
    vae = filled(trained_vae.networks_of(VAE).abstract()["vae"])
    checkpoint.save_weights(folder / "vae", vae, VAE)
    words = tokenizer.Tokenizer(folder / "tokenizer.model")
    params = filled(runs.networks_of(c, words).abstract())
    zero = np.zeros((), np.int32)
    state = states.TrainState(
        params, params, optax.sgd(0.1).init(params), zero, zero, zero
    )
    saver = checkpoint.Checkpointer(folder / "checkpoints", keep=1)
    saver.save(0, state, {"seconds": {}})
    saver.close()
    rows = [
        f'{{"step": {s}, "loss": {2 / s}, "loss_band/0.85-0.93": {3 / s}}}\n'
        for s in range(1, 40)
    ]
    paths.write_atomically(folder / "metrics.jsonl", "".join(rows))


def add_checkpoint(folder: pathlib.Path, step: int, *, keep: int = 9) -> None:
    """Writes another checkpoint, of other weights, as training would."""
    params = checkpoint.load_run(folder).params
    other = jax.tree.map(lambda leaf: np.roll(leaf, step, axis=-1), params)
    zero = np.zeros((), np.int32)
    state = states.TrainState(other, other, (), zero, zero, zero)
    saver = checkpoint.Checkpointer(folder / "checkpoints", keep=keep)
    saver.save(step, state, {"seconds": {}})
    saver.close()


def evaluate(job, **given) -> None:
    """Runs the job `evaluate` in this process, so that what is compiled is shared."""
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["evaluate", *(f"--{name}={value}" for name, value in given.items())])
    try:
        conftest.run_job(job)
    finally:
        for name in job.FLAGS:
            if job.FLAGS[name].present:
                job.FLAGS[name].unparse()


def filled(abstract):
    """Random weights by NumPy: compiling an initializer would take longer."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 25
        return (rng.normal(size=leaf.shape) / fan_in**0.5).astype(leaf.dtype)

    return jax.tree.map(fill, abstract)
