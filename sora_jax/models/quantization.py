"""Matrix products of activations and weights in 8 bits, by the library qwix.

    y = s_x s_w (q_x q_w),  q = round(v / s),  s = max |v| / (largest number of the type)

with one s for each row of x and each column of W, computed in each call (1 where it would
be below 1e-19, so that tiny rows become 0). q_x q_w accumulates in int32, or in float32
for floats. The gradient is straight-through (arXiv 1308.3432). The gradient of x is such
a product too. That of W, a sum over all tokens of a batch, stays in the type of x
(SwitchBack, arXiv 2304.13013).

Letters: b batch, n tokens, i input width, o output width.
"""

import functools

import jax
import jax.numpy as jnp

from sora_jax.core import sharding

# The types of activations and weights, of gradients, whose range is wider (arXiv
# 2209.05433), and the calibration. qwix stretches the range of integers by half a step,
# which puts the largest number on a rounding tie, so that it could round differently on
# one device and on many; the factor undoes that.
_TYPES = {
    "int8": (jnp.int8, jnp.int8, f"absmax,{127.5 / 127}"),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2, "absmax"),
}
KINDS = ("", *_TYPES)  # "": not quantized


def check(kind: str) -> None:
    """Raises ValueError if a kind is not one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"quantization is {kind!r}; it must be one of {[*KINDS]}")


def _product(x, kernel, axis, kind, dtype, spec):
    """Contracts the last axis of x with an axis of the kernel; in the type of x."""
    import qwix  # only quantized runs need it

    def quantize(value, dtype, kept):
        # Scales take the type of the quantized array: float32, whatever x is.
        value = value.astype(jnp.float32)
        return qwix.quantize(
            value, dtype, channelwise_axes=kept, calibration_method=_TYPES[kind][2]
        )

    y = qwix.dot_general(
        quantize(x, dtype, range(x.ndim - 1)),
        quantize(kernel, _TYPES[kind][0], (1 - axis,)),
        (((x.ndim - 1,), (axis,)), ((), ())),
        out_sharding=spec,
    )
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel_io: jax.Array, kind: str, spec) -> jax.Array:
    """x W over the last axis in 8 bits.

    Args:
      x: [..., i]; kernel_io: the weights, of which i is sharded as that of x.
      kind: one of `KINDS`, not "".
      spec: sharding of the result [..., o]; None where no mesh is set.

    Returns:
      x W in the type of x.
    """
    return _product(x, kernel_io, 0, kind, _TYPES[kind][0], spec)


def _forward(x, kernel_io, kind, spec):
    # Not `product`: policies of `jax.checkpoint` do not see inside a custom gradient.
    y = _product(x, kernel_io, 0, kind, _TYPES[kind][0], spec)
    return y, (x, kernel_io)


def _backward(kind, _, saved, g):
    x, kernel_io = saved
    dx = _product(g, kernel_io, 1, kind, _TYPES[kind][1], sharding.spec_like(x))
    spec = sharding.spec_like(kernel_io)
    return dx, jnp.einsum("...i,...o->io", x, g, out_sharding=spec)


product.defvjp(_forward, _backward)
