"""An experiment: a video VAE of 8 x 32 x 32 with 128 channels.

It keeps a quarter of the numbers of 4 x 8 x 8 with 16 channels, in an eighth of the
tokens of 4 x 16 x 16. The architecture is that of vae_4x16x16.py with one more level. A
latent frame stands for eight video frames, so clips have 1 + 8n frames:

    python -m sora_jax.prepare --source folder:my_videos --size 256x256 \
        --num_frames 33 --fps 16 --out runs/shards
    python -m sora_jax.train --config=configs/vae_8x32x32.py --out=runs/vae_8x32x32 \
        --config.data.shards=runs/shards

Built and shape-checked by the tests; it has not been trained.
"""

from configs import vae_4x16x16


def get_config():
    """Returns the config."""
    c = vae_4x16x16.get_config()
    vae = c.model.vae
    vae.latent_channels, vae.linear_channels = 128, 96
    vae.channel_multipliers = (1, 2, 4, 4, 4)
    vae.temporal_downsample = (False, True, True, True)
    vae.spatial_downsample = (True, True, True, True)
    c.data.crops = (
        (0.4, ((9, 128, 128, 1), (1, 128, 128, 2))),
        (0.4, ((17, 128, 128, 1), (1, 256, 256, 1))),
        (0.2, ((0, 0, 0, 1),)),
    )
    c.model.dit.in_channels = c.model.dit.out_channels = 128
    c.model.dit.temporal_stride = 8
    return c
