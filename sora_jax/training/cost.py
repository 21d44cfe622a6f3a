"""Floating point operations by formula, and the measured peak of a machine."""

import time

import jax
import jax.numpy as jnp

from sora_jax.data import packing
from sora_jax.models import dit


def dit_forward_flops(config: dit.Config, tokens: int, text_tokens: int) -> int:
    """FLOPs of one denoiser forward pass for one row (a multiply-add is two).

    Per block 2 N (4 d^2 + 2 d k + 2 d f) for projections and MLP, 4 T d k for the text's
    keys and values, 4 N^2 d + 4 N T d for attention, which is not causal. k is d where
    keys and values have as many heads as queries. Embedders and the modulation of a
    row's few noise levels are left out.
    """
    d, f, n, t = config.dim, config.mlp_dim, tokens, text_tokens
    k = config.kv_heads * config.head_dim
    block = 2 * n * (4 * d * d + 2 * d * k + 2 * d * f) + 4 * t * d * k
    block += 4 * n * n * d + 4 * n * t * d
    ends = 2 * n * d * (config.token_dim * 2)
    return config.num_layers * block + ends


def dit_train_flops(
    config: dit.Config, tokens: int, text_tokens: int, *, adapted: bool = False
) -> int:
    """FLOPs of training the denoiser on one row.

    The gradient takes twice the forward pass: half of it is of activations, half of
    weights. With `adapted`, weights have none; LoRA's own products are left out.
    """
    forward = dit_forward_flops(config, tokens, text_tokens)
    if not adapted:
        return 3 * forward
    pairs = tokens * (tokens + text_tokens)
    attention = 4 * config.num_layers * pairs * config.dim
    return 2 * forward + attention


def packed_row_cost(config: dit.Config) -> packing.Cost:
    """The cost of a packed row: FLOPs of its tokens, and of all pairs of them.

    None of our attention implementations skips the pairs of different clips.
    """
    pair = 4 * config.num_layers * config.dim
    token = dit_forward_flops(config, 1, 0) - pair
    return packing.Cost(linear=token, quadratic=pair, skips=False)


def matmul_peak() -> float:
    """Measures FLOP/s of a dense float32 matmul (bfloat16 on accelerators), one device.

    It is the denominator of the utilisation that a run logs.
    """
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    size = 1536 if on_cpu else 8192
    with jax.default_device(device):
        a = jnp.ones((size, size), dtype)
        multiply = jax.jit(jnp.matmul)
        multiply(a, a).block_until_ready()
        best, spent = float("inf"), 0.0
        while spent < 0.5:
            start = time.perf_counter()
            multiply(a, a).block_until_ready()
            elapsed = time.perf_counter() - start
            best, spent = min(best, elapsed), spent + elapsed
    return 2 * size**3 / best
