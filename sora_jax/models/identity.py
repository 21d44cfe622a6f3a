"""The fields of a config that define a network, without those that only affect compute.

Two configs with equal identity describe the same network: its parameters have the same
names, shapes and meaning, so weights of one work for the other.
"""

import dataclasses

from sora_jax.models import dit, text_encoder, video_vae

Config = dit.Config | text_encoder.Config | video_vae.Config
# Fields of any config that only affect compute; parameters are always float32.
_COMPUTE = ("dtype", "remat", "quantization")


def of(config: Config) -> Config:
    """Returns the config with default _COMPUTE fields, and optional ones filled in."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    changes = {name: fields[name] for name in _COMPUTE if name in fields}
    if isinstance(config, dit.Config):
        changes["num_kv_heads"] = config.kv_heads
        if config.time_scale is None:  # time is counted in latent frames
            changes["temporal_stride"] = fields["temporal_stride"]
    if isinstance(config, video_vae.Config):
        channels = config.latent_channels
        changes["decoder_base_dim"] = config.decoder_base_dim or config.base_dim
        changes["spatial_downsample"] = tuple(space for _, space in config.steps)
        changes["latent_mean"] = config.latent_mean or (0.0,) * channels
        changes["latent_std"] = config.latent_std or (1.0,) * channels
    return dataclasses.replace(config, **changes)
