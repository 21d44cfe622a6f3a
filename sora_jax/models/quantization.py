"""Products of activations with weights in 8 bits, through the library qwix.

    y = s_x s_w (q_x q_w),  q = round(v / s),  s = max |v| / (largest number of the type)

with one s for each row of x and each column of W, found anew in each call (1 where it
would be below 1e-19, so that rows of nearly nothing become 0); q_x q_w is summed in
int32, of floats in float32. The gradient goes straight through rounding
(arXiv 1308.3432). That of x is such a product too. That of W is not: it sums over all
tokens of a batch, and stays in the type of x (SwitchBack, arXiv 2304.13013).

Letters: b batch, n tokens, i input width, o output width.
"""

import functools

import jax
import jax.numpy as jnp

from sora_jax.core import sharding

# What activations and weights become, and gradients, whose range is wider (arXiv
# 2209.05433). qwix stretches the range of integers by half a step, so that the largest
# number lies on a tie, which rounding errors break one way or the other; the factor
# undoes it, so that a program on many devices rounds as on one.
_TYPES = {
    "int8": (jnp.int8, jnp.int8, f"absmax,{127.5 / 127}"),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2, "absmax"),
}
KINDS = ("", *_TYPES)  # "": none


def check(kind: str) -> None:
    """Raises a ValueError where a kind is none of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"quantization is {kind!r}; it is one of {[*KINDS]}")


def _product(x, kernel, axis, kind, dtype, layout):
    """Sums x over its last axis with an axis of the kernel; the result is like x."""
    import qwix  # here, as no other run needs it

    def quantize(value, dtype, kept):
        # Scales have the type of what is quantized: float32, whatever x is.
        value = value.astype(jnp.float32)
        return qwix.quantize(
            value, dtype, channelwise_axes=kept, calibration_method=_TYPES[kind][2]
        )

    y = qwix.dot_general(
        quantize(x, dtype, range(x.ndim - 1)),
        quantize(kernel, _TYPES[kind][0], (1 - axis,)),
        (((x.ndim - 1,), (axis,)), ((), ())),
        out_sharding=layout,
    )
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel_io: jax.Array, kind: str, layout) -> jax.Array:
    """x W over the last axis in 8 bits.

    Args:
      x: [..., i]; kernel_io: the weights, whole or split as x is.
      kind: one of `KINDS`, not "".
      layout: of the result [..., o]; None where no mesh is set.

    Returns:
      x W in the type of x.
    """
    return _product(x, kernel_io, 0, kind, _TYPES[kind][0], layout)


def _forward(x, kernel_io, kind, layout):
    # Not `product`: a policy of `jax.checkpoint` does not look into a custom gradient.
    y = _product(x, kernel_io, 0, kind, _TYPES[kind][0], layout)
    return y, (x, kernel_io)


def _backward(kind, _, kept, g):
    x, kernel_io = kept
    of_x = _product(g, kernel_io, 1, kind, _TYPES[kind][1], sharding.spec_like(x))
    layout = sharding.spec_like(kernel_io)
    return of_x, jnp.einsum("...i,...o->io", x, g, out_sharding=layout)


product.defvjp(_forward, _backward)
