"""Which keys a query may attend to, and the masking of the other scores.

Letters: b batch, n query tokens, m key tokens.
"""

import jax
import jax.numpy as jnp

# A mask of keys [b, m], segments of queries [b, n] and of keys [b, m], or None.
Masks = tuple[jax.Array | None, jax.Array | None, jax.Array | None]


def visible(
    mask_bm: jax.Array | None,
    q_segments_bn: jax.Array | None,
    k_segments_bm: jax.Array | None,
) -> jax.Array | None:
    """Whether a query may attend to a key: bool [b, n or 1, m]; None where all may."""
    visible = None if mask_bm is None else mask_bm[:, None]
    if q_segments_bn is not None:
        same_bnm = q_segments_bn[:, :, None] == k_segments_bm[:, None]
        visible = same_bnm if visible is None else same_bnm & visible
    return visible


def hide(scores: jax.Array, visible: jax.Array | None) -> jax.Array:
    """Sets the scores of keys that are not visible to the lowest float32."""
    # Finite, so that a row without any key has no NaN.
    low = jnp.finfo(jnp.float32).min
    return scores if visible is None else jnp.where(visible, scores, low)
