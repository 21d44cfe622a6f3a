"""A whole config as frozen dataclasses, with the range of every number.

`configs.build(recipe.Recipe, c, "")` checks a config before anything is compiled.
configs/base.py and the dataclasses of other modules explain the fields.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

from sora_jax.core import config as configs
from sora_jax.data import captions, conditions, transforms
from sora_jax.diffusion import timesteps
from sora_jax.models import (
    captioner,
    discriminator,
    dit,
    lora,
    text_encoder,
    video_vae,
)
from sora_jax.training import loop, optim, reconstruction, state_loss

_Axis = Annotated[int, configs.Range("[1, 1e6]", -1, "all remaining devices")]
_Own = Annotated[int, configs.Range("[1, 1e6]", 0, "the clip's own")]
# What `transforms.stages` reads: the share of the steps, and kinds of windows.
_Kind = tuple[_Own, _Own, _Own, configs.Size]
_Stage = tuple[configs.Share, tuple[_Kind, ...]]
_Limit = Annotated[float, configs.Range("[-1e9, 1e9]")]  # of a score


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Number of devices on each axis; see core/mesh.py."""

    replica: _Axis
    fsdp: _Axis
    ring: _Axis
    ulysses: _Axis
    tensor: _Axis


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the data is, and how it is batched."""

    shards: str
    eval_shards: str
    eval_clips: configs.Size
    gap_clips: Annotated[int, configs.Range("[1, 1e6]", 0, "off")]
    sample_prompts: str
    latents: str
    batch_size: configs.Size
    num_workers: Annotated[int, configs.Range("[1, 1024]", 0, "threads")]
    max_corrupt_share: configs.Share
    crops: tuple[_Stage, ...]
    mirror: configs.Share
    shift: Annotated[int, configs.Range("[0, 1e4]")]
    noise: Annotated[float, configs.Range("[0, 255]")]

    def __post_init__(self):
        transforms.stages(self.crops, 1)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How clips of many sizes share rows; see data/packing.py."""

    shapes: Annotated[int, configs.Range("[1, 16]", 0, "clips of one size")]
    tokens: Annotated[int, configs.Range("[1, 1e8]", 0, "those of the longest clip")]
    unit: configs.Size
    clips: configs.Size
    window: configs.Size
    max_padding: configs.Share


@dataclasses.dataclass(frozen=True)
class Text:
    """Captions, their tokenizer, and the text encoder."""

    length: configs.Size
    vocab_size: configs.Size
    dropout: configs.Share
    tiers: Mapping[str, configs.Factor]
    tags: tuple[tuple[str, tuple[_Limit, ...], tuple[str, ...]], ...]
    tag_keep: configs.Share
    shuffle: configs.Share
    target: str
    target_length: configs.Size
    encoder: str
    frozen: bool
    clean: bool

    def __post_init__(self):
        captions.variation(self.tags, self.tag_keep, self.shuffle)


@dataclasses.dataclass(frozen=True)
class Model:
    """The networks."""

    dit: dit.Config
    text_encoder: text_encoder.Config
    vae: video_vae.Config
    discriminator: discriminator.Config
    captioner: captioner.Config


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All of configs/base.py; `sample` is read by `generation/runs.py: settings`."""

    objective: str
    init: str
    seed: configs.Seed
    mesh: Mesh
    data: Data
    packing: Packing
    text: Text
    model: Model
    noise: timesteps.Config
    known: conditions.Config
    state_loss: state_loss.Config
    reconstruction: reconstruction.Weights
    lora: lora.Config
    optim: optim.Config
    loop: loop.Config
    sample: Mapping[str, object]
