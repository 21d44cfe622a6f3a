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


def takes(q_bnhe: jax.Array, hidden: int) -> bool:
    """Whether the kernels do.

    Args:
      q_bnhe: queries of all devices.
      hidden: pairs of a query and a key of which a device must say whether they see
        each other; 0 without a mask and segments.
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
    seen: visibility.Seen,
    name: str,
) -> jax.Array:
    """Attention [b, n, h, e]; see `attention.attention`."""
    return _attend_forward(q_bnhe, k_bmhe, v_bmhe, seen, name)[0]


def _attend_forward(q_bnhe, k_bmhe, v_bmhe, seen, name):
    n = q_bnhe.shape[1]
    hidden = _hidden(q_bnhe, k_bmhe, seen)
    qkv, unfill = jax.vjp(lambda *x: tuple(map(_even, x)), q_bnhe, k_bmhe, v_bmhe)
    y_bnhe, pull = jax.vjp(functools.partial(_product, **hidden), *qkv)
    # Remat policies keep the result and the sums that the gradient takes from it, or
    # neither, by name. What is made of the arguments is made again.
    leaves, tree = jax.tree.flatten(pull)
    again = [x.shape for x in hidden.values()]
    kept = {id(x): x for x in (*qkv, *(x for x in leaves if x.shape in again))}
    for x in (y_bnhe, *leaves):
        kept.setdefault(id(x), checkpoint_name(x, name))
    y_bnhe, pull = kept[id(y_bnhe)], tree.unflatten(kept[id(x)] for x in leaves)
    y_bnhe, uncut = jax.vjp(lambda y_bnhe: y_bnhe[:, :n], y_bnhe)
    return y_bnhe, (uncut, pull, unfill)


def _attend_backward(name, pulls, dy_bnhe):
    del name
    uncut, pull, unfill = pulls
    return *unfill(pull(*uncut(dy_bnhe))), None


attend.defvjp(_attend_forward, _attend_backward)


def _hidden(q_bnhe, k_bmhe, seen: visibility.Seen) -> dict[str, jax.Array]:
    """What hides keys, as the kernel takes it, of sizes that are filled up.

    With a mask or segments [b, 1, n, m]; or the number of keys, [b], where there is one
    more; or nothing.
    """
    (b, n), m = q_bnhe.shape[:2], k_bmhe.shape[1]
    visible = visibility.visible(*seen)
    if visible is None:
        lengths = {"key_value_seq_lengths": jnp.full(b, m, jnp.int32)}
        return lengths if m % 2 else {}
    visible = _even(_even(jnp.broadcast_to(visible, (b, n, m))), 2)
    return {"mask": visible[:, None]}


def _even(x: jax.Array, axis: int = 1) -> jax.Array:
    """Fills an axis up with zeros to an even size, which the kernel for gradients asks."""
    edges = [(0, 0)] * x.ndim
    edges[axis] = 0, x.shape[axis] % 2
    return jnp.pad(x, edges)
