"""cuDNN's attention for NVIDIA GPUs on one device.

Its kernels keep scores inside a multiprocessor (arXiv 2205.14135), as splash does on a
TPU core. They take half precision, and the mask as a bias [b, 1, n, m]; rows for which
that bias would be large are left to `attention.chunked`.

Letters: b batch, n query tokens, m key tokens, h heads, e head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.models import visibility

_DTYPES = (jnp.bfloat16, jnp.float16)
_HEAD_SIZE = 128  # at most; a multiple of 8
_CAPABILITY = 8, 0  # of the GPU, at least
_BIAS_BYTES = 2**28
_product = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def is_available() -> bool:
    """Returns whether JAX runs on NVIDIA GPUs that have these kernels.

    Tracing for cuDNN asks the GPU, so it fails where a program is compiled elsewhere.
    """
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return False
    return tuple(map(int, device.compute_capability.split("."))) >= _CAPABILITY


def supports(q_bnhe: jax.Array, hidden: int) -> bool:
    """Returns whether the kernels support these arguments.

    Args:
      q_bnhe: queries of all devices.
      hidden: pairs of a query and a key in the mask of a device; 0 without a mask and
        segments.
    """
    e = q_bnhe.shape[-1]
    if q_bnhe.dtype not in _DTYPES or e > _HEAD_SIZE or e % 8:
        return False
    return 2 * hidden <= _BIAS_BYTES


@functools.partial(jax.custom_vjp, nondiff_argnames=("name",))
def attend(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    masks: visibility.Masks,
    name: str,
) -> jax.Array:
    """Attention [b, n, h, e]; see `attention.attention`."""
    return _attend_forward(q_bnhe, k_bmhe, v_bmhe, masks, name)[0]


def _attend_forward(q_bnhe, k_bmhe, v_bmhe, masks, name):
    n = q_bnhe.shape[1]
    hidden = _hidden(q_bnhe, k_bmhe, masks)
    qkv, unpad = jax.vjp(lambda *x: tuple(map(_pad_even, x)), q_bnhe, k_bmhe, v_bmhe)
    y_bnhe, pull = jax.vjp(functools.partial(_product, **hidden), *qkv)
    # Remat policies save the result and the sums that the gradient takes from it, or
    # neither, by name. What follows from the arguments is recomputed.
    leaves, tree = jax.tree.flatten(pull)
    again = [x.shape for x in hidden.values()]
    kept = {id(x): x for x in (*qkv, *(x for x in leaves if x.shape in again))}
    for x in (y_bnhe, *leaves):
        kept.setdefault(id(x), checkpoint_name(x, name))
    y_bnhe, pull = kept[id(y_bnhe)], tree.unflatten(kept[id(x)] for x in leaves)
    y_bnhe, uncut = jax.vjp(lambda y_bnhe: y_bnhe[:, :n], y_bnhe)
    return y_bnhe, (uncut, pull, unpad)


def _attend_backward(name, pulls, dy_bnhe):
    del name
    uncut, pull, unpad = pulls
    return *unpad(pull(*uncut(dy_bnhe))), None


attend.defvjp(_attend_forward, _attend_backward)


def _hidden(q_bnhe, k_bmhe, masks: visibility.Masks) -> dict[str, jax.Array]:
    """The mask as keyword arguments of the kernel, for padded sizes.

    With a mask or segments it is [b, 1, n, m]; else the number of keys, [b], where one
    key is padding; else nothing.
    """
    (b, n), m = q_bnhe.shape[:2], k_bmhe.shape[1]
    visible = visibility.visible(*masks)
    if visible is None:
        lengths = {"key_value_seq_lengths": jnp.full(b, m, jnp.int32)}
        return lengths if m % 2 else {}
    visible = _pad_even(_pad_even(jnp.broadcast_to(visible, (b, n, m))), 2)
    return {"mask": visible[:, None]}


def _pad_even(x: jax.Array, axis: int = 1) -> jax.Array:
    """Pads an axis with zeros to an even size, which the gradient's kernel requires."""
    edges = [(0, 0)] * x.ndim
    edges[axis] = 0, x.shape[axis] % 2
    return jnp.pad(x, edges)
