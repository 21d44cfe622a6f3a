"""Attention behind one function.

Letters: b batch, n query tokens, m key tokens, h heads, e head size.
"""

import jax
import jax.numpy as jnp

from sora_jax.core import sharding


def attention(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    mask_bm: jax.Array | None = None,
    q_segments_bn: jax.Array | None = None,
    k_segments_bm: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(e)) v, softmax in float32 (arXiv 1706.03762).

    Args:
      q_bnhe, k_bmhe, v_bmhe: queries, keys and values, in the compute dtype.
      mask_bm: True where a key may be attended to.
      q_segments_bn, k_segments_bm: ids; a query sees only keys of its own segment.

    Returns:
      [b, n, h, e] in the dtype of q. A query that may see no key at all gets the mean
      of the values.

    Queries stay where they are; keys and values are gathered over the context axes.
    """
    k_bmhe = sharding.gather_axis(k_bmhe, 1, like=q_bnhe)
    v_bmhe = sharding.gather_axis(v_bmhe, 1, like=q_bnhe)
    scores_bhnm = jnp.einsum(
        "bnhe,bmhe->bhnm", q_bnhe, k_bmhe, preferred_element_type=jnp.float32
    )
    scores_bhnm = scores_bhnm * q_bnhe.shape[-1] ** -0.5
    # Finite, so that a row without any key stays free of NaN.
    low = jnp.finfo(jnp.float32).min
    if mask_bm is not None:
        scores_bhnm = jnp.where(mask_bm[:, None, None, :], scores_bhnm, low)
    if q_segments_bn is not None:
        same_bnm = q_segments_bn[:, :, None] == k_segments_bm[:, None, :]
        scores_bhnm = jnp.where(same_bnm[:, None], scores_bhnm, low)
    weights_bhnm = jax.nn.softmax(scores_bhnm, axis=-1).astype(v_bmhe.dtype)
    return jnp.einsum("bhnm,bmhe->bnhe", weights_bhnm, v_bmhe)
