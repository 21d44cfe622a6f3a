"""What defines a network, and what says only how it is computed.

Two configs whose identity is equal are of one network: its parameters have the same
names, shapes and meaning, so that weights of one serve the other.
"""

import dataclasses

from sora_jax.models import dit, text_encoder, video_vae

Config = dit.Config | text_encoder.Config | video_vae.Config
# Of any config: the type that is computed in, what the backward pass computes again,
# and products in 8 bits of parameters that are float32 all the same.
_HOW = ("dtype", "remat", "quantization")


def of(config: Config) -> Config:
    """The config with _HOW left at the defaults, and one spelling of each meaning."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    changes = {name: fields[name] for name in _HOW if name in fields}
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
