"""A denoiser of a few thousand parameters, and batches that are a function of the step."""

import contextlib
import functools

import jax
import numpy as np

from sora_jax.data import conditions
from sora_jax.diffusion import timesteps
from sora_jax.models import dit, lora, text_encoder
from sora_jax.training import loop, objectives, optim
from sora_jax.training import trackers as run_trackers

DIT = dit.Config(
    in_channels=4, out_channels=4, patch=(1, 1, 1), dim=32, num_layers=2, num_heads=2,
    mlp_dim=64, text_dim=16, freq_dim=16, additive_positions=True, time_scale=2.0,
)  # fmt: skip
TEXT = text_encoder.Config(
    vocab_size=40, dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32
)
OPTIM = optim.Config(
    learning_rate=3e-3, muon_learning_rate=1e-2, warmup_steps=2, ema_decay=0.9
)


def objective(
    config: dit.Config = DIT, lora_config: lora.Config = lora.Config()
) -> objectives.Denoiser:
    """A denoiser's objective that uses text dropout and known tokens; one per mesh."""
    return _objective(config, lora_config, jax.sharding.get_abstract_mesh())


@functools.cache
def _objective(config, lora_config, mesh) -> objectives.Denoiser:
    del mesh  # on which its arrays lie
    return objectives.Denoiser(
        config,
        TEXT,
        timesteps.Config(shift=3.0),
        conditions.Config({"none": 0.5, "first_frame": 0.5}),
        text_dropout=0.2,
        null_ids=[1] + [0] * 5,
        fps=8.0,
        lora_config=lora_config,
    )


def batch(step: int, rows: int = 8) -> dict[str, np.ndarray]:
    """The global batch of a step."""
    random = np.random.default_rng(step)
    ids = random.integers(3, 40, (rows, 6)).astype(np.int32)
    ids[:, 4:] = 0
    latents = random.normal(size=(rows, 2, 4, 4, 4)).astype(np.float32)
    is_image = random.random(rows) < 0.5
    slots = np.zeros((rows, 32), np.int8)
    slots[is_image, :16] = conditions.Slot.KNOWN
    return {
        "latents": latents,
        "text_ids": ids,
        "text_mask": ids != 0,
        "slots": slots,
        "pattern": is_image.astype(np.int32),
    }


def batches(start: int, change=None):
    """What `loop.train` takes; `change(step, batch)` may spoil a batch."""

    def rows():
        step = start
        while True:
            step += 1
            values = batch(step)
            yield change(step, values) if change else values

    return contextlib.nullcontext(rows())


def train(
    folder,
    mesh,
    num_steps=10,
    change=None,
    evaluators=None,
    config=DIT,
    trackers=run_trackers.Trackers({}),
    **fields,
):
    """Runs the loop on the tiny denoiser."""
    fields = {"log_every": 1, "checkpoint_every": 100, **fields}
    return loop.train(
        loop.Config(num_steps=num_steps, **fields),
        OPTIM,
        objective(config),
        lambda start: batches(start, change),
        seed=0,
        folder=folder,
        mesh=mesh,
        evaluators=evaluators,
        trackers=trackers,
    )
