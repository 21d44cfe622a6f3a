"""cuDNN's attention for NVIDIA GPUs on one device.

Its kernels hold no scores outside of a multiprocessor (arXiv 2205.14135), as splash does
on TPUs. They take half precision, and what is not seen as a bias [b, 1, n, m]; rows with
so many of both that it would be large are left to `attention.chunked`.

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


def there() -> bool:
    """Whether JAX runs on NVIDIA GPUs that have these kernels.

    What is compiled for others cannot be traced for cuDNN, which asks the GPU.
    """
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return False
    return tuple(map(int, device.compute_capability.split("."))) >= _CAPABILITY


def takes(q_bnhe: jax.Array, k_bmhe: jax.Array, hidden: bool, devices: int) -> bool:
    """Whether the kernels do, of arrays that lie on so many devices.

    Args:
      hidden: whether there are a mask or segments.
    """
    (b, n, _, e), m = q_bnhe.shape, k_bmhe.shape[1]
    if q_bnhe.dtype not in _DTYPES or e > _HEAD_SIZE or e % 8:
        return False
    return not hidden or 2 * b * n * m // devices <= _BIAS_BYTES


@functools.partial(jax.custom_vjp, nondiff_argnames=("name",))
def attend(
    q_bnhe: jax.Array,
    k_bmhe: jax.Array,
    v_bmhe: jax.Array,
    seen: visibility.Seen,
    name: str,
) -> jax.Array:
    """Attention [b, n, h, e]; see `attention.attention`."""
    return _attend(q_bnhe, k_bmhe, v_bmhe, seen)


def _attend_forward(q_bnhe, k_bmhe, v_bmhe, seen, name):
    qkv = q_bnhe, k_bmhe, v_bmhe
    y_bnhe, pull = jax.vjp(functools.partial(_attend, seen=seen), *qkv)
    # Remat policies keep the result and the sums that the gradient takes from it, or
    # neither, by name.
    leaves, tree = jax.tree.flatten(pull)
    kept = [x if any(x is y for y in qkv) else checkpoint_name(x, name) for x in leaves]
    return checkpoint_name(y_bnhe, name), jax.tree.unflatten(tree, kept)


def _attend_backward(name, pull, dy_bnhe):
    del name
    return *pull(dy_bnhe), None


attend.defvjp(_attend_forward, _attend_backward)


def _attend(q_bnhe, k_bmhe, v_bmhe, seen: visibility.Seen):
    if all(x is None for x in seen):
        return _product(q_bnhe, k_bmhe, v_bmhe)
    visible = visibility.visible(*seen)
    n, m = q_bnhe.shape[1], k_bmhe.shape[1]
    visible = jnp.broadcast_to(visible, (q_bnhe.shape[0], n, m))
    # The gradient takes a bias of even sizes.
    q_bnhe = _even(q_bnhe, 1)
    k_bmhe, v_bmhe = _even(k_bmhe, 1), _even(v_bmhe, 1)
    visible = _even(_even(visible, 1), 2)
    return _product(q_bnhe, k_bmhe, v_bmhe, mask=visible[:, None])[:, :n]


def _even(x: jax.Array, axis: int) -> jax.Array:
    """Fills an axis up with zeros to an even size."""
    edges = [(0, 0)] * x.ndim
    edges[axis] = 0, x.shape[axis] % 2
    return jnp.pad(x, edges)
