"""Wan 2.1 T2V 14B; see wan_1_3b.py.

    python -m sora_jax.train --config=configs/wan_14b.py --out=runs/tuned \
        --config.data.latents=latents --init Wan2.1-T2V-14B-Diffusers

Compiled by preflight for these slices, not run, with one clip a step, AdamW moments in
bfloat16, EMA and parameters in float32 (launch/forecasts.md has estimated times too):

    81 frames of 720 x 1280   v5p-8    ulysses=4          81 % of a device's memory
                              v6e-16   ring=2,ulysses=8   66 %
    two of them               tpu7x-8  fsdp=2,ulysses=4   47 %, of a core's; offload
    two of 81 of 480 x 832    v6e-16   fsdp=2,ulysses=8   62 %
    one of them               v6e-8    ulysses=8          96 %; offload
    961 of 480 x 832          v5p-128  ring=8,ulysses=8   14 %
    two of them               v6e-256  fsdp=2,ring=16,ulysses=8   21 %

where offload is --config.model.dit.remat=offload. It does not fit v5e-4 at any clip size:
its state alone needs 11 devices or more. The estimated MFU of the first row is 45.6 %.
"""

from configs import wan_1_3b


def get_config():
    """Returns the config."""
    c = wan_1_3b.get_config()
    dit = c.model.dit
    dit.dim, dit.num_layers, dit.num_heads, dit.mlp_dim = 5120, 40, 40, 13_824
    dit.remat, c.optim.moments = "attention", "bfloat16"
    c.noise.shift = 5.0
    c.sample.height, c.sample.width = 720, 1280
    return c
